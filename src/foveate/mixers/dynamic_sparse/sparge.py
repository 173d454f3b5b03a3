"""SpargeAttn: blocks judged by their means are skipped, then tiles whose weights the online softmax finds too small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.attention import attend
from foveate.attention.biases import as_tuple
from foveate.mixers.core import CoreOptions, joined, one_by_one
from foveate.patterns import Pattern, Scene, full
from foveate.patterns.algebra import resolve
from foveate.patterns.rules.choose import NEVER, score
from foveate.patterns.rules.similar import ByHead, similar_blocks
from foveate.patterns.select.dense import rows_of_mask
from foveate.precision import to_accum


class Skipped(NamedTuple):
    """Shares by head (H,) of slices of tiles: what the first stage skips, and what of the rest the second does."""

    tiles: Tensor
    values: Tensor


class Strip(NamedTuple):
    """One block of queries against the keys that its heads see at all."""

    rows: slice
    into: int  # rows of the first slice that come before these queries
    keys: Tensor  # (J * k_block,) slots, the last repeated
    logits: Tensor  # (B, H, n, J * k_block), NEVER where hidden
    kept: Tensor  # (B, H, slices, J): slices of rows whose values the second stage adds
    tiles: Tensor  # (B, H, slices, J): those the first stage left, of some visible pair
    dense: Tensor  # (B, H): how many tiles plain attention has here


@dataclass(frozen=True)
class SpargeCore:
    """Attention over `similar_blocks`; of its tiles, values are added where weights come near the greatest so far.

    Tiles are ``q_block`` queries by ``k_block`` keys, in the order of keys. Of a tile each slice of ``rows`` queries is
    looked at alone: if the greatest of (its row's best score in this tile - the best so far, this tile included) is
    below ``lam``, its values are not added; row sums have its weights all the same. ``lam=-inf`` skips none, and runs
    on the kernels of `attend`; a finite one is computed in torch, block of queries by block of queries. ``tau``,
    ``theta`` and ``lam`` are numbers or one number a head.

    >>> q, k, v = torch.randn(3, 1, 2, 300, 8).unbind(0)
    >>> core = SpargeCore(tau=0.7, theta=0.0, lam=-3.0)
    >>> core(q, k, v).shape, core.skipped(q, k).tiles.shape
    (torch.Size([1, 2, 300, 8]), torch.Size([2]))
    """

    tau: ByHead = 0.98
    theta: ByHead = 0.6
    lam: ByHead = -math.inf
    q_block: int = 128
    k_block: int = 64
    rows: int = 32
    sink: bool = True
    exempt: ClassVar[dict[str, str]] = {"decoding": "a block of queries chooses together, a query alone for itself"}

    def __post_init__(self) -> None:
        if self.rows < 1 or self.q_block % self.rows:
            raise ValueError(f"rows divide a block of queries; got {self.rows} and {self.q_block}")
        if any(math.isnan(one) or one > 0 for one in self._lams):
            raise ValueError(f"lam is how far below the greatest score a tile counts, at most 0; got {self.lam!r}")
        assert self.pattern  # refuses what is wrong with the other numbers

    @property
    def _lams(self) -> tuple[float, ...]:
        return (self.lam,) if isinstance(self.lam, int | float) else tuple(self.lam)

    @property
    def pattern(self) -> Pattern:
        """What the first stage sees where nothing hides later keys."""
        q_block, k_block = self.q_block, self.k_block
        return similar_blocks(self.tau, self.theta, q_block=q_block, k_block=k_block, sink=self.sink, causal=False)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[CoreOptions]
    ) -> Tensor:
        if all(one == -math.inf for one in self._lams):
            return attend(q, k, v, joined(self.pattern, within), **options)
        if as_tuple(options.get("bias")) or options.get("weights", "softmax") != "softmax" or options.get("softcap"):
            raise ValueError("a finite lam is for plain softmax: without bias, soft cap or other weights; or lam=-inf")
        how: dict[str, Any] = {"scale": options.get("scale")}
        apart = one_by_one(self, q, k, v, within=within, layout=options.get("layout"), **how)
        if apart is not None:
            return apart
        values = to_accum(v).repeat_interleave(q.shape[1] // v.shape[1], 1)
        strips = self.strips(q, k, joined(self.pattern, within), within, how["scale"])
        out = [weighted(strip, values, self.rows, self.k_block) for strip in strips]
        return torch.cat(out, 2).to(q.dtype) if out else q.new_zeros(*q.shape[:3], v.shape[3])

    @torch.no_grad()
    def skipped(self, q: Tensor, k: Tensor, *, within: Pattern = full, scale: float | None = None) -> Skipped:
        """What either stage skips of attention within a pattern that hides no document from another."""
        tiles = values = dense = torch.zeros(q.shape[1], dtype=torch.double, device=q.device)
        for strip in self.strips(q, k, joined(self.pattern, within), within, scale):
            tiles = tiles + strip.tiles.sum((0, 2, 3))
            values = values + (strip.tiles & strip.kept).sum((0, 2, 3))
            dense = dense + strip.dense.sum(0)
        return Skipped(1 - tiles / dense.clamp_min(1), 1 - values / tiles.clamp_min(1))

    def strips(self, q: Tensor, k: Tensor, pattern: Pattern, within: Pattern, scale: float | None) -> Iterator[Strip]:
        """Blocks of queries in turn, each with the blocks of keys that some head of it sees."""
        scene = Scene(q.shape[2], k.shape[2], q=q.detach(), k=k.detach(), scale=scale)
        chosen, allowed = resolve(pattern, scene), resolve(within, scene)
        keys = to_accum(k) * (q.shape[3] ** -0.5 if scale is None else scale)
        if len(self._lams) not in (1, q.shape[1]):
            raise ValueError(f"lam is one number, or one a head; got {len(self._lams)} for {q.shape[1]} heads")
        lam = torch.tensor(self._lams, dtype=keys.dtype, device=q.device).view(1, -1, 1, 1)
        first = -(scene.offset % self.q_block)
        for start in range(first, q.shape[2], self.q_block):
            rows = slice(max(start, 0), min(start + self.q_block, q.shape[2]))
            numbers = torch.arange(rows.start, rows.stop, device=q.device)
            seen, plain = (
                rows_of_mask(one, scene, numbers, q.shape[1]).expand(len(q), -1, -1, -1) for one in (chosen, allowed)
            )
            yield self._strip(q, keys, rows, seen, plain, max(-start, 0), lam)

    def _strip(
        self, q: Tensor, keys: Tensor, rows: slice, seen: Tensor, plain: Tensor, into: int, lam: Tensor
    ) -> Strip:
        block, last = self.k_block, keys.shape[2] - 1
        tiles = of_tiles(seen, self.rows, block, into)
        number = tiles.any(2).any(1).any(0).nonzero()  # tiles that any head needs: other products are never formed
        slots = number * block + torch.arange(block, device=q.device)
        inside, slots = (slots <= last).flatten(), slots.clamp(max=last).flatten()
        logits = score(to_accum(q[:, :, rows]), keys[:, :, slots])
        logits = logits.masked_fill(~(seen[..., slots] & inside), NEVER)
        with torch.no_grad():
            best = logits.unflatten(3, (-1, block)).amax(-1)  # (B, H, n, J)
            below = (best - best.cummax(3).values).nan_to_num(nan=NEVER)
            kept = ~(of_slices(below, self.rows, into) < lam)
        dense = of_tiles(plain, self.rows, block, into).sum((2, 3))
        return Strip(rows, into % self.rows, slots, logits, kept, tiles[..., number.squeeze(1)], dense)


def of_slices(below: Tensor, rows: int, into: int) -> Tensor:
    """The greatest of each slice of rows (B, H, slices, J), the first of which lacks ``into`` rows."""
    return (
        pad(below, (0, 0, into % rows, (-into - below.shape[2]) % rows), value=NEVER).unflatten(2, (-1, rows)).amax(3)
    )


def of_tiles(seen: Tensor, rows: int, block: int, into: int) -> Tensor:
    """Whether a slice of rows sees any of a block of keys, (B, H, slices, J)."""
    around = (0, -seen.shape[3] % block, into % rows, (-into - seen.shape[2]) % rows)
    return pad(seen, around).unflatten(3, (-1, block)).any(4).unflatten(2, (-1, rows)).any(3)


def weighted(strip: Strip, values: Tensor, rows: int, block: int) -> Tensor:
    """Outputs (B, H, n, Dv) of a block of queries: sums over the tiles kept, divided by the sums of all weights."""
    logits = strip.logits
    best = logits.detach().amax(-1, keepdim=True)
    weights = torch.exp(logits - best.clamp_min(torch.finfo(best.dtype).min))
    kept = strip.kept.repeat_interleave(rows, 2)[:, :, strip.into :][:, :, : logits.shape[2]]
    total = weights.sum(-1, keepdim=True)
    kept = kept.repeat_interleave(block, 3)
    return (weights * kept) @ values[:, :, strip.keys] / total.clamp_min(torch.finfo(total.dtype).tiny)
