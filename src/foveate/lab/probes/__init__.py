"""Experiments on small runs: what a paper found, confirmed or refuted."""
