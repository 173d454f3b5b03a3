"""Training of small language models."""
