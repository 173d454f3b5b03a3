"""The dtype that gates are made in."""

from torch import Tensor, float64


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that."""
    return x if x.dtype == float64 else x.float()
