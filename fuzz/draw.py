"""Everything random about a case: sizes, dtypes, contents of tensors and how they lie in memory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

LENGTHS = (0, 1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 66, 79, 100, 127, 128, 129, 130, 193)
SHORT = tuple(n for n in LENGTHS if n <= 33)
DIMS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 80)
LARGE_DIMS = (96, 127, 128, 129, 192, 255, 256, 257)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONTENTS = ("normal",) * 12 + ("large", "constant", "zeros", "tiny", "sparse")
PLACES = ("plain",) * 6 + ("transposed", "sliced", "strided", "misaligned", "permuted", "negative", "reversed rows")


class Draw:
    """Random choices of one case, all from its seed."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))

    # ---- numbers -----------------------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def one(self, choices: Sequence[T]) -> T:
        return self.random.choice(choices)

    def whole(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return self.random.randint(low, high)

    def length(self, most: int = 200) -> int:
        while True:
            n = self.one(SHORT if self.chance(0.6) else LENGTHS)
            if n <= most and (n or self.chance(0.3)):
                return n

    def dim(self, most: int = 257) -> int:
        dim = self.one(LARGE_DIMS) if self.chance(0.04) else self.one(DIMS)
        return min(dim, most)

    def batch(self) -> int:
        return self.one((0, 1, 1, 1, 1, 2, 2, 2, 3)) if self.chance(0.9) else self.one((0, 4, 5))

    def divisor(self, number: int) -> int:
        return self.one([d for d in range(1, number + 1) if number % d == 0])

    def split(self, total: int, most: int = 6) -> list[int]:
        """Lengths that add up, zeros among them."""
        cuts = sorted(self.whole(0, total) for _ in range(self.whole(0, most - 1)))
        return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]

    # ---- tensors -----------------------------------------------------------------------------------------

    def normal(self, *shape: int) -> Tensor:
        """In float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def wholes(self, low: int, high: int, *shape: int) -> Tensor:
        """From low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator, device="cpu")

    def bits(self, share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float32, device="cpu") < share

    def tensor(self, *shape: int, dtype: torch.dtype, contents: str = "normal") -> Tensor:
        """Numbers that ``dtype`` can hold."""
        x = self.normal(*shape)
        if contents == "large":
            x = x * 30  # as q and as k, and 64 channels: logits around 1e4
        elif contents == "constant":
            x = torch.full_like(x, self.random.gauss(0, 1))
        elif contents == "zeros":
            x = torch.zeros_like(x)
        elif contents == "tiny":
            x = x * (1e-6 if dtype == torch.float16 else 1e-39)  # denormal
        elif contents == "sparse":
            x = x * self.bits(0.2, *shape)
        return x.to(dtype)

    def contents(self) -> str:
        return self.one(CONTENTS)

    def placed(self, x: Tensor) -> Tensor:
        """The same numbers, anywhere in memory; what lies between them is NaN."""
        kind = self.one(PLACES)
        return x if kind == "plain" else lay(self, x, kind)


def lay(draw: Draw, x: Tensor, kind: str) -> Tensor:
    """A view equal to x."""
    dims = x.dim()
    if kind == "negative":
        return negative(x)
    if kind == "misaligned":
        offset = draw.whole(1, 7)
        store = filled(x, (x.numel() + offset + 3,))
        return store[offset : offset + x.numel()].view(x.shape).copy_(x)
    if kind in ("transposed", "permuted") and dims > 1:
        order = (
            [0, 2, 1, *range(3, dims)] if kind == "transposed" and dims > 2 else draw.random.sample(range(dims), dims)
        )
        store = filled(x, [x.shape[axis] for axis in order])
        return store.permute([order.index(axis) for axis in range(dims)]).copy_(x)
    axis = draw.whole(0, dims - 1)
    if kind == "strided":
        step = draw.whole(2, 3)
        store = filled(x, [n * step if a == axis else n for a, n in enumerate(x.shape)])
        return store[(slice(None),) * axis + (slice(None, None, step),)].copy_(x)
    before, after = draw.whole(0, 3), draw.whole(0, 3)
    store = filled(x, [n + before + after if a == axis else n for a, n in enumerate(x.shape)])
    return store.narrow(axis, before, x.shape[axis]).copy_(x)


def filled(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory around a view, which nothing may read: NaN, True or a great number."""
    if x.is_floating_point():
        return torch.full(tuple(shape), float("nan"), dtype=x.dtype, device=x.device)
    return torch.full(tuple(shape), True if x.dtype == torch.bool else 10**9, dtype=x.dtype, device=x.device)


def negative(x: Tensor) -> Tensor:
    """A view that holds -x with the negative bit set, where torch has complex numbers of this width."""
    if x.dtype not in (torch.float32, torch.float64):
        return x
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def repeated(draw: Draw, x: Tensor) -> Tensor:
    """Entry 0 of the batch or of the heads everywhere, of stride 0."""
    axis = draw.whole(0, 1)
    return x.narrow(axis, 0, 1).expand(x.shape) if x.shape[axis] else x


def shape_of(value: Any) -> str:
    """A value in words, for reports."""
    if isinstance(value, Tensor):
        flags = " negative" if value.is_neg() else ""
        strides = "" if value.is_contiguous() else f" strides {tuple(value.stride())}"
        offset = f" offset {value.storage_offset()}" if value.storage_offset() else ""
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}{strides}{offset}{flags}"
    if isinstance(value, (tuple, list)) and any(isinstance(each, Tensor) for each in value):
        return f"({', '.join(map(shape_of, value))})"
    return str(value)
