"""Where tokens are, inside attention."""
