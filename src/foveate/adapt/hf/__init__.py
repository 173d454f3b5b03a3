"""transformers models with our mechanisms inside."""
