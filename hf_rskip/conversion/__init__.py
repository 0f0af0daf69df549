"""Converts trained models: from other libraries, to more recursions, and for other engines."""
