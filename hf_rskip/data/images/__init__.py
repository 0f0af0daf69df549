"""From a dataset of images to batches."""
