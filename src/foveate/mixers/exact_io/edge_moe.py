"""Edge-MoE's attention: one pass over the keys with a running greatest logit, in floating or in fixed point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from foveate.attention.biases import as_tuple
from foveate.catalogue.registry import register
from foveate.mixers.attention import EVERYTHING, AttentionMixer, RotaryOptions
from foveate.mixers.core import CoreOptions
from foveate.mixers.exact_io.chunked import cuts
from foveate.patterns import Pattern, Scene, Sequence, full
from foveate.patterns.part import Parts
from foveate.patterns.rules.choose import NEVER, score
from foveate.precision import to_accum


@dataclass(frozen=True)
class SinglePassCore:
    """Softmax attention whose logits are read once, ``block`` keys at a time, in O(n block) memory.

    A row keeps its greatest logit b so far, the sum s of e^(logit - b), and the sum of values so weighted; where a
    block brings a greater logit, both sums are multiplied by e^(old b - new b). In floating point that is softmax but
    for rounding. With ``fraction_bits`` f logits, exponentials, sums and 1 / s are rounded to multiples of u = 2^-f, as
    on the authors' hardware, whose numbers have 22 such bits: outputs are then within 3 (M + 1) u max |v| of exact ones
    for M keys. Gradients pass through roundings as if there were none.

    >>> q = k = v = torch.randn(1, 2, 9, 4)
    >>> SinglePassCore(block=4)(q, k, v).shape
    torch.Size([1, 2, 9, 4])
    """

    block: int = 64
    fraction_bits: int | None = None
    pattern: Pattern = full

    def __post_init__(self) -> None:
        if self.block < 1 or (self.fraction_bits is not None and not 1 <= self.fraction_bits <= 40):
            raise ValueError(
                f"a block is at least a key, fraction_bits from 1 to 40; got {self.block} and {self.fraction_bits}"
            )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[CoreOptions]
    ) -> Tensor:
        if as_tuple(options.get("bias")) or options.get("weights", "softmax") != "softmax" or options.get("softcap"):
            raise ValueError("a single pass is for plain softmax: without bias, soft cap or other weights")
        scale, layout = options.get("scale"), options.get("layout") or Sequence()
        queries = to_accum(q) * (q.shape[3] ** -0.5 if scale is None else scale)
        parts = Parts.of(within, Scene(q.shape[2], k.shape[2], layout, q.detach(), k.detach(), scale))
        best = queries.new_full((*q.shape[:3], 1), NEVER)
        total, out = torch.zeros_like(best), queries.new_zeros(*q.shape[:3], v.shape[3])
        for keys in cuts(k.shape[2], self.block):
            seen = parts.part(slice(None), keys).mask(q.shape[2], keys.stop - keys.start).to(q.device)
            logits = self.rounded(score(queries, to_accum(k[:, :, keys]))).masked_fill(~seen, NEVER)
            greater = torch.maximum(best, logits.detach().amax(-1, keepdim=True)) if logits.shape[3] else best
            base = greater.clamp_min(torch.finfo(greater.dtype).min)  # of a row that has seen nothing, any number
            weights, shrunk = self.rounded((logits - base).exp()), self.rounded((best - base).exp())
            total = self.rounded(total * shrunk) + weights.sum(-1, keepdim=True)
            out = out * shrunk + score_values(weights, to_accum(v[:, :, keys]))
            best = greater
        return (out * self.rounded(total.clamp_min(torch.finfo(total.dtype).tiny).reciprocal())).to(q.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """To the nearest number that there is in fixed point."""
        if self.fraction_bits is None:
            return x
        step = 2.0**-self.fraction_bits
        return x + ((x / step).round() * step - x).detach().nan_to_num(nan=0.0)


def score_values(weights: Tensor, values: Tensor) -> Tensor:
    """Weights (B, H, N, M) times the values (B, G, M, D) of their group."""
    return score(weights, values.mT)


@register(
    "edge_moe",
    papers=("Edge-MoE",),
    formula="s ← s e^{b - b'} + Σ_j e^{l_j - b'}, b' = max(b, l_j), block by block; o = Σ_j e^{l_j - b} v_j / s",
    supports=EVERYTHING - {"grid"},
    core=SinglePassCore,
    notes="The paper's batching of tokens by expert is foveate.layers.experts.SortedExperts.",
)
class EdgeMoE(AttentionMixer):
    """Softmax attention in a single pass over the keys, exact or with the rounding errors of fixed point.

    Options are those of `SinglePassCore`. The authors' hardware keeps the logits of some queries and forms weights in a
    second step, where sums of values run along here; it takes keys one by one.
    """

    tiny: ClassVar[dict[str, Any]] = {"block": 7}
    full_budget: ClassVar[dict[str, Any] | None] = {}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        block: int = 64,
        fraction_bits: int | None = None,
        **options: Unpack[RotaryOptions],
    ) -> None:
        super().__init__(dim, heads, core=SinglePassCore(block, fraction_bits), **options)
