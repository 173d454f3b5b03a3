"""Sparse attention at fixed places."""
