"""Routing attention: queries and keys meet in clusters that an online k-means keeps."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from foveate.attention import attend
from foveate.catalogue.registry import register
from foveate.layers.taking import take
from foveate.mixers.attention import JUMPS, recent
from foveate.mixers.base import Mixer, divided, join_heads, split_heads
from foveate.patterns import Layout, Pattern, causal, full, window
from foveate.precision import to_accum

AHEAD = "which tokens a cluster takes depends on later ones: the leak that the paper leaves open"


@register(
    "routing_transformer",
    papers=("Routing-Transformer",),
    formula="o_i = mean over clusters c ∋ i of Σ_{j ∈ c} softmax_j(q_i·k_j / √d) v_j, c: the n/C tokens nearest to μ_c",
    supports={"causal", "noncausal", "padding", "packed"},
    notes="For whole sequences: " + AHEAD + ".",
)
class RoutingAttention(Mixer):
    """Attention inside of ``clusters`` of equal size, chosen by centroids; half of the heads see a window. O(n² / C).

    Queries and keys are normalised (a layer norm without parameters), and each centroid takes the ⌈n / C⌉ of them that
    it has the greatest products with; with C = √n that is O(n^1.5). Causal attention shares queries and keys, and
    positions mask it; yet which tokens a cluster takes is decided by all of the sequence, later tokens included: it
    does not decode. A token in no cluster gets zeros from that head, one in several the mean. While training, each
    centroid moves by 1 - ``decay`` to the tokens it is nearest to of all; in evaluation it stays.

    The paper's update adds up these tokens; here they are averaged, as in the codes that follow it. Its relative
    positions in the local heads are left out: ``window`` is all they know of them.
    """

    one_by_one: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"clusters": 4, "window": 5}
    exempt: ClassVar[dict[str, str]] = {"causality": AHEAD, **JUMPS}
    centroids: Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        clusters: int = 16,
        window: int = 256,
        local_heads: int | None = None,
        decay: float = 0.999,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, self.local = heads, heads // 2 if local_heads is None else local_heads
        if clusters < 1 or not 0 <= self.local < heads or not 0 <= decay <= 1:
            raise ValueError(
                f"at least 1 cluster, fewer local heads than the {heads} heads, a decay from 0 to 1;"
                f" got {clusters}, {self.local} and {decay}"
            )
        self.clusters, self.decay = clusters, decay
        self.near = near(window, causal)
        self.head_dim = divided(dim, heads)
        of_keys = self.local if causal else heads  # routed heads that are causal share keys and queries
        self.to_q, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.to_k = nn.Linear(dim, of_keys * self.head_dim, bias=False) if of_keys else None
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.register_buffer("centroids", torch.randn(heads - self.local, clusters, self.head_dim))

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        q, v = split_heads(self.to_q(x), self.heads), split_heads(self.to_v(x), self.heads)
        k = None if self.to_k is None else split_heads(self.to_k(x), self.num_key_heads)
        outs = []
        if self.local:
            assert k is not None
            outs.append(attend(q[:, : self.local], k[:, : self.local], v[:, : self.local], self.near))
        routed_k = None if self.causal or k is None else k[:, self.local :]
        outs.append(self.route(q[:, self.local :], routed_k, v[:, self.local :]))
        return self.to_out(join_heads(torch.cat(outs, 1)))

    @property
    def num_key_heads(self) -> int:
        return self.local if self.causal else self.heads

    def route(self, q: Tensor, k: Tensor | None, v: Tensor) -> Tensor:
        """Heads out of heads in (B, H, N, D); keys are the queries where they are None."""
        if not q.shape[0] * q.shape[2]:
            return v
        q = layer_norm(q, q.shape[3:])
        k = q if k is None else layer_norm(k, k.shape[3:])
        with torch.no_grad():
            near_q = self.nearness(q)
            near_k = near_q if k is q else self.nearness(k)
            of_queries = members(near_q)
            of_keys = of_queries if k is q else members(near_k)
        out = in_clusters(q, k, v, of_queries, of_keys, causal if self.causal else full)
        if self.training:
            self.follow(((q, near_q), (k, near_k)))
        return out

    def nearness(self, x: Tensor) -> Tensor:
        """Products of centroids and tokens (B, H, N, D): (B, H, C, N)."""
        return to_accum(self.centroids) @ to_accum(x).transpose(2, 3)

    @torch.no_grad()
    def follow(self, tokens: tuple[tuple[Tensor, Tensor], ...]) -> None:
        """Move centroids towards the mean of the queries, and of the keys, that are nearer to them than to others."""
        moved = torch.zeros_like(to_accum(self.centroids))
        for x, nearness in tokens:
            own = torch.nn.functional.one_hot(nearness.argmax(2), self.clusters).to(moved)  # (B, H, N, C)
            total, count = (own.mT @ to_accum(x)).sum(0), own.sum((0, 2)).unsqueeze(2)
            moved += torch.where(count > 0, total / count.clamp_min(1), to_accum(self.centroids)) / len(tokens)
        self.centroids.copy_(self.decay * to_accum(self.centroids) + (1 - self.decay) * moved)


def near(size: int, is_causal: bool) -> Pattern:
    """The window of the local heads."""
    if size < 1:
        raise ValueError(f"a window holds at least the query's own key; got {size}")
    return recent(size) if is_causal else window(size - 1)


def members(nearness: Tensor) -> Tensor:
    """The N / C tokens, rounded up, that each centroid takes, in their order: (B, H, C, n) of (B, H, C, N)."""
    clusters, length = nearness.shape[2:]
    return nearness.topk(-(-length // clusters), dim=3).indices.sort().values


def in_clusters(q: Tensor, k: Tensor, v: Tensor, of_queries: Tensor, of_keys: Tensor, within: Pattern) -> Tensor:
    """Attention of the queries (B, H, N, D) of each cluster (B, H, C, n) to its keys; the mean over a token's clusters.

    ``within`` holds among places in the cluster: causal where these are the same ordered tokens.
    """
    shape = of_queries.shape
    qs, ks, vs = (
        take(x, index.flatten(2)).unflatten(2, (shape[2], -1)).flatten(1, 2)  # (B, H * C, n, D)
        for x, index in ((q, of_queries), (k, of_keys), (v, of_keys))
    )
    found = attend(qs, ks, vs, within).unflatten(1, shape[1:3]).flatten(2, 3)
    token = of_queries.flatten(2)
    count = token.new_zeros(*shape[:2], q.shape[2]).scatter_add(2, token, torch.ones_like(token))
    total = found.new_zeros(*shape[:2], q.shape[2], v.shape[3])
    total = total.scatter_add(2, token.unsqueeze(3).expand_as(found), found)
    return total / count.clamp_min(1).unsqueeze(3).to(total)
