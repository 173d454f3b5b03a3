"""Decoding with mechanisms and methods, each at several budgets: time and bytes a token, and quality."""
