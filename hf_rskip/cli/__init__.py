"""The command line, `hf-rskip`. Each command imports what it needs when it runs."""

from .main import main

__all__ = ["main"]
