"""Which numbers of SpargeAttn each head bears, found on its own queries, keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.mixers.dynamic_sparse.sparge import Skipped, SpargeCore
from foveate.patterns import Pattern, causal

GRID = tuple(step / 8 for step in range(8))
LEAST = -50.0  # of lam: weights of e^-50 count in no dtype


class Tuned(NamedTuple):
    """A core with numbers for each head, its relative L1 error by head (H,), and what it skips."""

    core: SpargeCore
    errors: Tensor
    skipped: Skipped


@torch.no_grad()
def tune(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    error: float = 0.07,
    with_values: float = 0.08,
    thetas: Sequence[float] = GRID,
    steps: int = 10,
    within: Pattern = causal,
    scale: float | None = None,
    q_block: int = 128,
    k_block: int = 64,
    rows: int = 32,
    sink: bool = True,
) -> Tuned:
    """The numbers for each head that skip most while its output stays as near to attention's as asked.

    For every theta the least tau is sought, by halving, whose relative L1 error Σ|o - o'| / Σ|o| on this sample is at
    most ``error``; that of them is taken which skips most; then, by halving, the greatest lam whose error is at most
    ``with_values``. A head that no other numbers suit sees everything. The errors that come out are measured, never
    above what was asked. The authors' search takes 32 thetas from -1 on, of which those below 0 tell nothing apart,
    and the mean over neighbouring ones.

    >>> q, k, v = torch.randn(3, 1, 2, 300, 8).unbind(0)
    >>> found = tune(q, k, v, thetas=(0.0,), steps=4, q_block=32, k_block=16, rows=16)
    >>> bool((found.errors <= 0.08).all())
    True

    q (B, H, N, D), k and v (B, G, M, D). Raises ValueError unless 0 <= error <= with_values.
    """
    if not 0 <= error <= with_values:
        raise ValueError(f"errors asked for are at least 0, the second the greater; got {error} and {with_values}")
    exact, heads = attend(q, k, v, within, scale=scale), q.shape[1]

    def made(tau: Tensor, theta: Tensor, lam: Tensor | None = None) -> SpargeCore:
        lams = (-math.inf,) if lam is None else tuple(lam.tolist())
        return SpargeCore(tuple(tau.tolist()), tuple(theta.tolist()), lams, q_block, k_block, rows, sink)

    def errors(core: SpargeCore) -> Tensor:
        out = core(q, k, v, within=within, scale=scale)
        return (out - exact).abs().sum((0, 2, 3)) / exact.abs().sum((0, 2, 3)).clamp_min(1e-30)

    def skips(core: SpargeCore) -> Skipped:
        return core.skipped(q, k, within=within, scale=scale)

    ones = torch.ones(heads, dtype=torch.double, device=q.device)
    tau, theta, best = ones, ones, torch.zeros_like(ones)
    for number in thetas:
        own = ones * number
        least = halved(lambda x, own=own: errors(made(x, own)) <= error, ones, 0.0 * ones, steps)  # type: ignore[misc]
        saved = skips(made(least, own)).tiles
        better = saved > best
        tau, theta, best = (torch.where(better, a, b) for a, b in ((least, tau), (own, theta), (saved, best)))
    lam = halved(lambda x: errors(made(tau, theta, x)) <= with_values, LEAST * ones, 0.0 * ones, steps)
    lam = torch.where(errors(made(tau, theta, lam)) <= with_values, lam, -math.inf)
    core = made(tau, theta, lam)
    return Tuned(core, errors(core), skips(core))


def halved(suits: Callable[[Tensor], Tensor], safe: Tensor, beyond: Tensor, steps: int) -> Tensor:
    """For each entry the last number that suits on the way from ``safe`` towards ``beyond``."""
    for _ in range(steps):
        middle = (safe + beyond) / 2
        good = suits(middle)
        safe, beyond = torch.where(good, middle, safe), torch.where(good, beyond, middle)
    return safe
