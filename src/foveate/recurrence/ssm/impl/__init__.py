"""The implementations of evolve and evolve_shared."""
