"""Foveate: attention that spends its effort where it matters."""
