"""Agent attention: a few averaged queries gather from all keys, and all queries read from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.attention import attend
from foveate.attention.biases import as_tuple
from foveate.attention.weights import as_weights
from foveate.catalogue.registry import register
from foveate.mixers.base import Mixer, divided, join_heads, split_heads
from foveate.mixers.core import CoreOptions
from foveate.patterns import Grid, Layout, Pattern, full

AGENTS = 49  # 7 x 7, the authors' number for classifiers
AGENTS_OF_GENERATORS = 256  # their code for Stable Diffusion takes a fifth of the tokens; a fixed number stays linear

POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def agents_of(q: Tensor, layout: Layout | None, count: int) -> Tensor:
    """Means of ``count`` stretches of the queries (B, H, N, D), or of about as many boxes of a grid.

    >>> agents_of(torch.arange(6.0).view(1, 1, 6, 1), None, 2).flatten()
    tensor([1., 4.])
    """
    dims = layout.dims if isinstance(layout, Grid) else (q.shape[2],)
    side = max(round(count ** (1 / len(dims))), 1)
    image = q.transpose(2, 3).flatten(0, 1).unflatten(2, dims)  # (B * H, D, *dims)
    means = POOLS[len(dims)](image, (side,) * len(dims)).flatten(2).transpose(1, 2)
    return means.unflatten(0, q.shape[:2])


@dataclass(frozen=True)
class AgentCore:
    """Agent attention inside a pretrained model, as the authors apply it to Stable Diffusion.

    The second softmax is flatter, its scale being ``scale ** flatness``, and ``shortcut`` times each token's
    own value is added. Queries and keys must be the same tokens, all visible: agents mix every key. Agents are means
    of boxes of the image, and as many in every image; the authors' code merges like tokens, and keeps a fifth.

    >>> q = k = v = torch.randn(1, 2, 9, 4)
    >>> AgentCore(agents=4)(q, k, v).shape
    torch.Size([1, 2, 9, 4])
    """

    agents: int = AGENTS_OF_GENERATORS
    flatness: float = 0.3
    shortcut: float = 0.075

    def __post_init__(self) -> None:
        if self.agents < 1:
            raise ValueError(f"agent attention takes at least 1 agent; got {self.agents}")

    @property
    def pattern(self) -> Pattern:
        return full

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[CoreOptions]
    ) -> Tensor:
        weights = as_weights(options.get("weights", "softmax"))
        if within != full or q.shape[2] != k.shape[2]:
            raise ValueError(f"agents mix all keys for all queries, so they cannot keep to {within}")
        if (
            as_tuple(options.get("bias"))
            or options.get("softcap") is not None
            or weights.kind != "softmax"
            or weights.sink is not None
        ):
            raise ValueError("agent attention is two plain softmaxes: it takes no bias, sink or soft-cap")
        scale = options.get("scale") or q.shape[-1] ** -0.5
        agents = agents_of(q, options.get("layout"), self.agents)
        gathered = attend(agents, k, v, scale=scale)
        out = attend(q, agents, gathered, scale=scale**self.flatness)
        own = v.unsqueeze(2).expand(-1, -1, q.shape[1] // v.shape[1], -1, -1).flatten(1, 2)
        return out + self.shortcut * own


@register(
    "agent_attention",
    papers=("Agent Attention",),
    formula="O = softmax(Q Aᵀ / √d + B₂) softmax(A Kᵀ / √d + B₁) V + DWConv(V), A = pool(Q)",
    supports={"noncausal", "grid"},
    core=AgentCore,
)
class AgentAttention(Mixer):
    """A few agents, averages of the queries, attend to all keys, and the queries attend to the agents.

    Works on images and on sequences (an image of one row). Both attentions have learned biases, kept as an image
    of ``bias_side`` squared per agent and head and resized to the input; a depthwise convolution of the values
    brings back local detail.
    """

    tiny: ClassVar[dict[str, Any]] = {"agents": 9}
    grids: ClassVar[tuple[Layout, ...]] = (Grid(5, 7), Grid(6, 6))

    def __init__(
        self, dim: int, heads: int = 8, *, agents: int = AGENTS, bias_side: int = 7, causal: bool = False
    ) -> None:
        super().__init__(dim, causal=causal)
        if agents < 1 or math.isqrt(agents) ** 2 != agents:
            raise ValueError(f"agents are a square number, to tile an image; got {agents}")
        self.heads, self.head_dim, self.agents = heads, divided(dim, heads), agents
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.gather_bias = nn.Parameter(torch.randn(heads, agents, bias_side, bias_side) * 0.02)
        self.spread_bias = nn.Parameter(torch.randn(heads, agents, bias_side, bias_side) * 0.02)
        self.detail = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def check(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> None:
        super().check(x, context, layout, padding)
        if isinstance(layout, Grid) and len(layout.dims) == 3:
            raise ValueError(f"agent_attention takes images and sequences; got {layout}")

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        dims = (1, x.shape[1])
        if isinstance(layout, Grid) and len(layout.dims) == 2:
            dims = (layout.dims[0], layout.dims[1])
        q = split_heads(self.to_q(x), self.heads)
        k, v = split_heads(self.to_kv(x), 2 * self.heads).chunk(2, 1)
        agents = agents_of(q, layout, self.agents)
        gathered = attend(agents, k, v, bias=resized(self.gather_bias, dims))
        out = attend(q, agents, gathered, bias=resized(self.spread_bias, dims).transpose(2, 3))
        return self.to_out(join_heads(out) + self.details(join_heads(v), dims))

    def details(self, v: Tensor, dims: tuple[int, int]) -> Tensor:
        """Depthwise convolution of the values (B, N, C) as an image."""
        return self.detail(v.transpose(1, 2).unflatten(2, dims)).flatten(2).transpose(1, 2)


def resized(bias: Tensor, dims: tuple[int, int]) -> Tensor:
    """A bias image per head and agent (H, A, s, s), as (1, H, A, N) for an image of these sizes."""
    return F.interpolate(bias, dims, mode="bilinear").flatten(2).unsqueeze(0)
