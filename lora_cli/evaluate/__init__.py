"""What a model says: generate, chat and verify."""
