"""Synthetic tasks that tell token mixers apart."""
