"""The implementations of the scans and of the short convolution."""
