"""Where a mechanism looks inside a model, while the model attends exactly."""

from __future__ import annotations

import statistics
from typing import Unpack

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.lab.compare.results import Looked
from foveate.lab.measure.pairs import Picture
from foveate.mixers.core import CoreOptions, joined
from foveate.patterns import Pattern, Scene, Sequence, full, resolve
from foveate.patterns.select.build import build

LOGITS = 2**24  # logits formed at once for a sample of queries: 64 MB
MOST_QUERIES = 512


class Looks:
    """A core that attends exactly and notes what of that attention falls on the pattern in question."""

    pattern = full

    def __init__(self, asked: Pattern, *, seed: int = 0) -> None:
        self.asked, self.seed = asked, seed
        self.mass: list[float] = []
        self.visible: list[float] = []
        self.computed: list[float] = []
        self.picture = Picture()

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[CoreOptions]
    ) -> Tensor:
        q_here, k_here = q.detach().cpu(), k.detach().cpu()  # pictures and counts are made on the CPU
        layout, scale, bias = options.get("layout") or Sequence(), options.get("scale"), options.get("bias")
        scene = Scene(q.shape[2], k.shape[2], layout, q_here, k_here, scale)
        asked, allowed = resolve(joined(self.asked, within), scene), resolve(within, scene)
        self._count(asked, allowed, scene)
        rows = sample_queries(q, k, self.seed)
        assert bias is None or isinstance(bias, Tensor)
        bias_here = None if bias is None else bias.detach().cpu().float()
        shown, softcap = visible_rows(allowed, scene, rows), options.get("softcap")
        chances = exact_weights(q_here, k_here, rows, shown, bias_here, scale, softcap)
        self.mass.append(float((chances * visible_rows(asked, scene, rows)).sum(-1).mean()))
        return attend(q, k, v, within, **options)

    def _count(self, asked: Pattern, allowed: Pattern, scene: Scene) -> None:
        """Pairs at the tile of kernels, and at the tile of the picture."""
        ours, all_ = build(asked, scene), build(allowed, scene)
        self.visible.append(ours.density / all_.density)
        self.computed.append(ours.computed / all_.computed)
        tile = Picture.tile(scene.num_queries)
        self.picture.add(build(asked, scene, tile=tile), build(allowed, scene, tile=tile))

    def result(self) -> Looked:
        """Averages over layers; ValueError where the model never attended."""
        if not self.mass:
            raise ValueError("this model's attention does not go through transformers' attention functions")
        mass, visible, computed = map(statistics.fmean, (self.mass, self.visible, self.computed))
        return Looked(mass, visible, computed, self.picture.draw())


def sample_queries(q: Tensor, k: Tensor, seed: int) -> Tensor:
    """Which queries to look at, ascending: all of a short text, as many as fit in memory of a long one."""
    room = LOGITS // (q.shape[0] * q.shape[1] * k.shape[2])
    count = min(q.shape[2], MOST_QUERIES, max(16, room))
    return torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(seed))[:count].sort().values


def visible_rows(resolved: Pattern, scene: Scene, rows: Tensor) -> Tensor:
    """Boolean (batches, heads, R, M) rows of a resolved pattern's mask."""
    q, k = rows.view(1, 1, -1, 1) + scene.offset, torch.arange(scene.num_keys).view(1, 1, 1, -1)
    batch, head = torch.arange(resolved.batches).view(-1, 1, 1, 1), torch.arange(resolved.heads).view(1, -1, 1, 1)
    shape = (resolved.batches, resolved.heads, len(rows), scene.num_keys)
    return resolved.visible(batch, head, q, k).expand(shape)


def exact_weights(
    q: Tensor, k: Tensor, rows: Tensor, visible: Tensor, bias: Tensor | None, scale: float | None, softcap: float | None
) -> Tensor:
    """Softmax weights (B, H, R, M) of some queries, without a sink's share."""
    B, H, N, D = q.shape
    logits = q[:, :, rows].float() @ k.repeat_interleave(H // k.shape[1], 1).float().transpose(-2, -1)
    logits *= D**-0.5 if scale is None else scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits += bias.expand(B, H, N, k.shape[2])[:, :, rows]
    return logits.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)
