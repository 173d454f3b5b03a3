"""Layers that mixers share."""
