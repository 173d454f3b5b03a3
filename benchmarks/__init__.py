"""Measurements behind every figure in this repository. Run one as `python -m benchmarks.<name>`."""
