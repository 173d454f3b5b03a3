"""The implementations of attend."""
