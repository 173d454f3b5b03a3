"""YOSO: attention weights are coin tosses, 1 where query and key fall into the same bucket of a hash."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from foveate.autodiff import once
from foveate.catalogue.registry import register
from foveate.layers.masked_ops import hide
from foveate.mixers.base import Mixer, divided, join_heads, split_heads
from foveate.patterns import Layout
from foveate.precision import to_accum

TWICE = "YOSO's gradient is an estimate, which has no derivative: it cannot be differentiated twice"
CHANNELS = 16  # values whose products with keys are gathered at once in backward: bounds its memory


def buckets(x: Tensor, planes: Tensor) -> Tensor:
    """Bucket of each of x (B, H, N, D) under m hashes by τ planes each, ``planes`` (m, τ, D): (m, B, H, N).

    >>> buckets(torch.tensor([[[[1.0, -1.0]]]]), torch.eye(2).unsqueeze(0)).item()  # in front of the first plane
    1
    """
    ahead = torch.einsum("bhnd,mtd->mbhnt", x, planes) > 0
    return (ahead * 2 ** torch.arange(planes.shape[1], device=x.device)).sum(-1)


def collide(reader: Tensor, writer: Tensor, values: Tensor, capacity: int) -> Tensor:
    """Σ_j [reader_i = writer_j] values_j: buckets (B, H, N) and (B, H, M), values (B, H, M, D)."""
    table = values.new_zeros(*values.shape[:2], capacity, values.shape[3])
    table = table.scatter_add(2, writer.unsqueeze(-1).expand_as(values), values)
    return table.gather(2, reader.unsqueeze(-1).expand(*reader.shape, values.shape[3]))


def expected_weights(q: Tensor, k: Tensor, bits: int) -> Tensor:
    """(1 - arccos(q_i·k_j) / π)^τ, the chance that unit vectors share a bucket: (B, H, N, M)."""
    return (1 - (q @ k.transpose(2, 3)).clamp(-1, 1).acos() / math.pi) ** bits


class Sampled(torch.autograd.Function):
    """Mean over m hashes of Σ_j [h(q_i) = h(k_j)] v_j, with the published estimate of its gradient.

    Its expectation's derivative by q_i·k_j, τ/π (1 - arccos/π)^(τ-1) / √(1 - (q_i·k_j)²), grows without bound near 1;
    the authors put its lower bound τ/2 (1 - arccos/π)^τ in its place, which the same hashes sample. An estimate is no
    derivative: it is not differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, planes: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, planes)
        out = v.new_zeros(*q.shape[:3], v.shape[3])
        for mine, theirs in zip(buckets(q, planes), buckets(k, planes), strict=True):
            out += collide(mine, theirs, v, 2 ** planes.shape[1])
        return out / len(planes)

    @staticmethod
    @once(TWICE)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, planes = ctx.saved_tensors
        (grad,) = grads
        capacity, steepness = 2 ** planes.shape[1], planes.shape[1] / 2
        to_q, to_k, to_v = (torch.zeros_like(x) for x in (q, k, v))
        for mine, theirs in zip(buckets(q, planes), buckets(k, planes), strict=True):
            to_v += collide(theirs, mine, grad, capacity)
            for some, grad_some, v_some in slices(grad, v):
                to_q += steepness * gathered(collide(mine, theirs, outer(v_some, k), capacity), grad_some, some)
                to_k += steepness * gathered(collide(theirs, mine, outer(grad_some, q), capacity), v_some, some)
        return to_q / len(planes), to_k / len(planes), to_v / len(planes), None


def slices(*xs: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A few channels of each at a time, and how many."""
    for first, second in zip(*(x.split(CHANNELS, dim=-1) for x in xs), strict=True):
        yield first.shape[-1], first, second


def outer(x: Tensor, y: Tensor) -> Tensor:
    """x (B, H, N, E) times y (B, H, N, D), each with each: (B, H, N, E * D)."""
    return (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(3)


def gathered(products: Tensor, weights: Tensor, channels: int) -> Tensor:
    """Products (B, H, N, E * D) summed over E with these weights (B, H, N, E)."""
    return (products.unflatten(3, (channels, -1)) * weights.unsqueeze(-1)).sum(3)


class Expected(torch.autograd.Function):
    """What :class:`Sampled` tends to with more hashes, forward and backward, in time quadratic in the tokens."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bits: int) -> Tensor:
        weights = expected_weights(q, k, bits)
        ctx.save_for_backward(q, k, v, weights)
        ctx.bits = bits
        return weights @ v

    @staticmethod
    @once(TWICE)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        (grad,) = grads
        slopes = ctx.bits / 2 * (grad @ v.transpose(2, 3)) * weights
        return slopes @ k, slopes.transpose(2, 3) @ q, weights.transpose(2, 3) @ grad, None


def yoso(q: Tensor, k: Tensor, v: Tensor, planes: Tensor) -> Tensor:
    """Σ_j B_ij v_j, B_ij the share of m random hashes that put q_i and k_j into the same bucket.

    q (B, H, N, D) and k (B, H, M, D) of unit length, v (B, H, M, Dv), ``planes`` (m, τ, D) normal random numbers.
    Time and memory are linear in the tokens: O((N + M) m Dv), in backward D times that.

    >>> q, k = (normalize(torch.randn(1, 2, 9, 4), dim=-1) for _ in range(2))
    >>> yoso(q, k, torch.randn(1, 2, 9, 6), torch.randn(32, 8, 4)).shape
    torch.Size([1, 2, 9, 6])

    Zeng, Xiong, Ravi, Acharya, Fung, Singh, You Only Sample (Almost) Once, arXiv 2111.09714.
    """
    return Sampled.apply(q, k, v, planes)


def yoso_expectation(q: Tensor, k: Tensor, v: Tensor, bits: int) -> Tensor:
    """Σ_j (1 - arccos(q_i·k_j) / π)^τ v_j: :func:`yoso` with infinitely many hashes, in quadratic time.

    >>> q = k = normalize(torch.randn(1, 2, 9, 4), dim=-1)
    >>> yoso_expectation(q, k, torch.randn(1, 2, 9, 6), bits=8).shape
    torch.Size([1, 2, 9, 6])
    """
    return Expected.apply(q, k, v, bits)


@register(
    "yoso",
    papers=("YOSO",),
    formula="o_i = ℓ₂(Σ_j B_ij v_j), B_ij = mean over hashes of [h(q_i) = h(k_j)], E B_ij = (1 - arccos(q_i·k_j)/π)^τ",
    supports={"noncausal", "cross", "padding"},
)
class YOSO(Mixer):
    """Attention weights sampled for all pairs at once by hashing: queries read the buckets that keys wrote to.

    ``hashes`` is m, ``bits`` τ; ``form="expectation"`` weighs by the chance of a collision instead. While training,
    hashes are drawn afresh in every call; in evaluation those drawn at first are kept. Gradients are the published
    estimates: the weights are steps, with no gradient of their own.
    """

    exempt: ClassVar[dict[str, str]] = {
        "differences": "sampled weights are steps; their gradient is the authors' estimate of the expectation's"
    }
    planes: Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        hashes: int = 32,
        bits: int = 8,
        form: Literal["sample", "expectation"] = "sample",
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        if hashes < 1 or not 1 <= bits <= 20:
            raise ValueError(f"yoso takes at least 1 hash of 1 to 20 bits; got hashes={hashes}, bits={bits}")
        if form not in ("sample", "expectation"):
            raise ValueError(f'form is "sample" or "expectation"; got {form!r}')
        self.heads, self.head_dim, self.form = heads, divided(dim, heads), form
        self.hashes, self.bits = hashes, bits
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.register_buffer("planes", torch.randn(hashes, bits, self.head_dim))

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        source = x if context is None else context
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(x), self.to_k(source), self.to_v(source)))
        q, k = normalize(to_accum(q), dim=-1), normalize(to_accum(k), dim=-1)
        v = hide(to_accum(v), padding)
        out = yoso_expectation(q, k, v, self.bits) if self.form == "expectation" else yoso(q, k, v, self.drawn(q))
        return self.to_out(join_heads(normalize(out, dim=-1)).to(x.dtype))

    def drawn(self, like: Tensor) -> Tensor:
        return (torch.randn_like(self.planes) if self.training else self.planes).to(like.dtype)
