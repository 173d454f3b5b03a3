"""What patterns that choose by queries and keys have in common, and those that choose for a prompt as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.patterns.algebra import Pattern, Scene
from foveate.patterns.part import Part
from foveate.patterns.rules.sequence import causal
from foveate.precision import to_accum


class PromptChoice(Pattern):
    """Base of causal patterns that choose for many queries at a time: for a block of them, a head, or the whole prompt.

    No query sees a key after itself, but what an earlier one sees may depend on what later ones look for.
    """

    is_dynamic = True
    sees_future = False
    chooses_ahead = True
    sees_all = False  # whether the budget is so large that nothing has to be chosen

    @torch.no_grad()
    def resolve(self, scene: Scene) -> Pattern:
        q, k, scale = looked_at(self, scene)
        if self.sees_all or not q.shape[2]:
            return causal
        return self.chosen(q, to_accum(k) * scale, scene) & causal

    def chosen(self, q: Tensor, keys: Tensor, scene: Scene) -> Pattern:
        """What queries (B, H, N, D) choose of keys (B, G, M, D), in accumulation precision and scaled already."""
        raise NotImplementedError


def counted_from(first: int, pattern: Pattern) -> Pattern:
    """A pattern asked with positions that itself counts from ``first``."""
    return Part(pattern, str(pattern), -first, 1, -first, 0) if first else pattern


def looked_at(pattern: Pattern, scene: Scene) -> tuple[Tensor, Tensor, float]:
    """The queries, the keys and the scale a pattern chooses by."""
    q, k = scene.q, scene.k
    if q is None or k is None:
        raise ValueError(f"{pattern} chooses from q and k: use pattern.select(q, k), or resolve(Scene(n, m, q=q, k=k))")
    fit = q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fit or q.shape[1] % k.shape[1]:
        shapes = f"got {tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"{pattern} takes q (B, H, N, D) and k (B, G, M, D), G dividing H; {shapes}")
    return q, k, q.shape[3] ** -0.5 if scene.scale is None else scene.scale
