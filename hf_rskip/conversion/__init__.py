"""From and to other formats."""
