"""Attention through fewer tokens."""
