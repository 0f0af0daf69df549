"""Parallel corpora: loading them, training a tokenizer on them, turning them into token ids."""
