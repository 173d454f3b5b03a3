"""The catalogue: the papers, the mechanisms that keep them, and the tests that show it. It imports no mechanism."""
