"""Mechanisms whose idea is what a decoder keeps of its keys and values."""
