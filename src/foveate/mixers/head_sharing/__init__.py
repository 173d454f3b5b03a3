"""Heads that share: keys, work, or one another's weights."""
