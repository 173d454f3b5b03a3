"""Exact attention, computed with less memory traffic."""
