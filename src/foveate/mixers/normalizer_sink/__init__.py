"""Attention with sinks or with other normalisers."""
