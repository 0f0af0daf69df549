"""What a finished model takes along to the Hub."""
