"""From a corpus of sentence pairs to batches."""
