"""Selective scans with a state for each channel, and the short convolution before them."""
