"""Locality-sensitive hashing: queries see the keys that random rotations put in their own bucket."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.patterns.algebra import Pattern, Scene
from foveate.patterns.rules.buckets import EqualLabels
from foveate.patterns.rules.sequence import Window, positive
from foveate.patterns.rules.sequence import causal as not_after
from foveate.precision import to_accum


@dataclass(frozen=True, eq=False, repr=False)
class Hashed(Pattern):
    num_buckets: int
    rounds: int
    seed: int
    causal: bool

    is_dynamic = True

    @property
    def text(self) -> str:  # type: ignore[override]
        settings = [str(self.num_buckets)]
        for name, default in (("rounds", 1), ("seed", 0), ("causal", True)):
            if getattr(self, name) != default:
                settings.append(f"{name}={getattr(self, name)}")
        return f"lsh({', '.join(settings)})"

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return not self.causal

    @torch.no_grad()
    def resolve(self, scene: Scene) -> Pattern:
        q, k = scene.q, scene.k
        if q is None or k is None:
            raise ValueError(f"{self} hashes q and k: use pattern.select(q, k), or resolve(Scene(n, m, q=q, k=k))")
        seen: Pattern = Window(0, 0)
        draw = torch.Generator("cpu").manual_seed(self.seed)
        for _ in range(self.rounds):
            planes = torch.randn(
                q.shape[3], self.num_buckets // 2, generator=draw, dtype=torch.float32, device="cpu"
            ).to(q.device)
            of_queries, of_keys = (_rotated(x, planes) for x in (q, k))
            of_keys = of_keys.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            seen = seen | EqualLabels(of_queries, of_keys, scene.offset)
        return seen & not_after if self.causal else seen


def _rotated(x: Tensor, planes: Tensor) -> Tensor:
    """The bucket of each token (B, H, N): the axis, of either sign, that its rotation points along most."""
    turned = to_accum(x) @ planes.to(to_accum(x).dtype)
    return torch.cat([turned, -turned], -1).argmax(-1)


def lsh(num_buckets: int, *, rounds: int = 1, seed: int = 0, causal: bool = True) -> Pattern:
    """Keys that random rotations hash into the query's bucket in one of ``rounds`` rounds, and its own key.

    Vectors that point the same way share a bucket; each of the ``num_buckets`` is a direction, of either sign,
    of a random projection. Reformer hashes queries as keys: pass ``k = q``. With ``causal`` no key after the query
    is seen. The same ``seed`` draws the same rotations for every head and call.

    Kitaev, Kaiser, Levskaya, Reformer: The Efficient Transformer, arXiv 2001.04451.

    >>> q = torch.eye(3).repeat(1, 1, 2, 1)  # tokens 3, 4, 5 are as 0, 1, 2
    >>> seen = lsh(8, rounds=2).select(q, q).to_dense()[0, 0]
    >>> bool(seen[3, 0] & seen[4, 1] & seen[5, 2] & ~seen[0, 3])
    True

    Raises ValueError unless ``num_buckets`` is even, and it and ``rounds`` are at least 1.
    """
    if positive("lsh", "num_buckets", num_buckets) % 2:
        raise ValueError(f"lsh takes an even num_buckets, as each direction counts with both signs; got {num_buckets}")
    return Hashed(num_buckets, positive("lsh", "rounds", rounds), int(seed), bool(causal))
