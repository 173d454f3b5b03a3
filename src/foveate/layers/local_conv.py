"""Depthwise convolution of tokens that lie on a grid: the local detail that global mixers lack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.patterns import Grid, Layout

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LocalConv(nn.Module):
    """Each channel convolved with the ``kernel`` nearest tokens along each of ``axes`` axes; zeros lie outside.

    A grid of fewer axes, and a sequence, are grids of ``axes`` axes the first of which are 1 long.

    >>> LocalConv(6, kernel=3)(torch.randn(2, 35, 6), Grid(5, 7)).shape
    torch.Size([2, 35, 6])
    """

    def __init__(self, channels: int, kernel: int = 3, *, axes: int = 2, bias: bool = True) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"a convolution centred on its token has an odd kernel; got {kernel}")
        if axes not in CONVOLUTIONS:
            raise ValueError(f"tokens lie on 1, 2 or 3 axes; got axes={axes}")
        self.kernel, self.axes = kernel, axes
        bound = kernel ** (-axes / 2)
        self.weight = nn.Parameter(torch.empty(channels, 1, *(kernel,) * axes).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Convolve x (B, N, C), whose tokens lie on ``layout``."""
        dims = dims_of(layout, x.shape[1], self.axes)
        if not x.numel():
            return x
        image = x.transpose(1, 2).unflatten(2, dims)  # (B, C, *dims)
        convolve = CONVOLUTIONS[self.axes]
        out = convolve(image, self.weight, self.bias, padding=self.kernel // 2, groups=x.shape[2])
        return out.flatten(2).transpose(1, 2)


def dims_of(layout: Layout | None, num_tokens: int, axes: int) -> tuple[int, ...]:
    """Sizes of a grid of ``axes`` axes; a sequence, and a grid of fewer axes, are 1 long along the first ones.

    >>> dims_of(Grid(5, 7), 35, 3)
    (1, 5, 7)
    """
    dims = layout.dims if isinstance(layout, Grid) else (num_tokens,)
    if len(dims) > axes:
        raise ValueError(
            f"{layout} has {len(dims)} axes, but the convolution was built for {axes}: pass axes={len(dims)}"
        )
    return (1,) * (axes - len(dims)) + dims
