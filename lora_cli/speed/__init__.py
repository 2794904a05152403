"""What makes a training step fast, each piece held against the stock way."""
