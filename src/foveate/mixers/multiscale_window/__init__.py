"""Windows of several sizes."""
