"""Sparse attention chosen by looking at queries and keys."""
