"""Model cards, and pushing models to the Hub."""
