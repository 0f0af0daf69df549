"""What a recipe may say: its keys, their values and how they are read."""
