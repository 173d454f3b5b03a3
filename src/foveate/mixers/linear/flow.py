"""Flow-Attention: queries and keys as sinks and sources of a network that conserves what flows through it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.catalogue.registry import register
from foveate.layers.masked_ops import TINY, count, hide
from foveate.mixers.base import StepOutput
from foveate.mixers.recurrent import Lengths, RecurrentMixer
from foveate.precision import to_accum
from foveate.recurrence import recur


class Flows(NamedTuple):
    """Decoding state: sums over the tokens so far, (B, H, D, ...) in float32 at least."""

    seen: Tensor  # of 1
    keys: Tensor  # of k
    queries: Tensor  # of q
    keys_out: Tensor  # of k / O
    queries_in: Tensor  # of q / I
    competition: Tensor  # of exp of the conserved outgoing flow
    values: Tensor  # of k v^T, v weighted by its share of the competition


class Flowing(NamedTuple):
    out: Tensor
    flows: Flows | None


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    real_queries: Tensor | None = None,
    real_keys: Tensor | None = None,
    lengths: Lengths = None,
    flows: Flows | None = None,
) -> Flowing:
    """Linear attention in which sources compete for what sinks take in, and sinks are given what sources let out.

    With φ = sigmoid, the flows I_i = φ(q_i)·Σφ(k) and O_j = φ(k_j)·Σφ(q), and both again while the other side's
    are held at 1, Î_i = φ(q_i)·Σφ(k)/O and Ô_j = φ(k_j)·Σφ(q)/I, it is

        o_i = sigmoid(Î_i N/M) Σ_j φ(q_i)·φ(k_j)/I_i · M softmax_j(min(Ô_j, 1)) v_j

    causal=True lets all sums run over the tokens so far, in which I and O count per token seen.

    >>> q, k, v = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 13, 4), torch.randn(1, 2, 13, 6)
    >>> flow_attention(q, k, v).out.shape
    torch.Size([1, 2, 9, 6])

    Shapes: q (B, H, N, D), k (B, H, M, D), v (B, H, M, Dv); ``real_queries`` (B, N) and ``real_keys`` (B, M) are False
    at padding; ``lengths`` of packed sequences as in ``recur``; ``flows`` what an earlier causal call returned, as
    this one does. Arithmetic is float32 at least, out has v's dtype. Ô is limited to 1 as in the authors' code.

    Wu, Wu, Xu, Wang, Long, Flowformer: Linearizing Transformers with Conservation Flows, arXiv 2202.06258.
    """
    states: list[Tensor] = []

    def total(reader: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        before = None if flows is None else flows[len(states)]
        summed = recur(reader, keys, values, scale=1.0, state=before, lengths=lengths, causal=causal)
        states.append(summed.state)
        return summed.out

    q, k = hide(to_accum(q).sigmoid(), real_queries), hide(to_accum(k).sigmoid(), real_keys)
    of_q, of_k = torch.ones_like(q[..., :1]), torch.ones_like(k[..., :1])
    sinks: Tensor | int = count(real_queries, q.shape[2])
    sources: Tensor | int = count(real_keys, k.shape[2])
    shown = hide(of_k, real_keys)
    if causal or lengths is not None:  # then queries and keys are the same tokens
        sinks = sources = total(of_k, shown, of_k).clamp_min(1)
    flow_in = total(q, k, of_k).clamp_min(TINY)
    flow_out = total(k, q, of_q).clamp_min(TINY)
    conserved_in = total(q, k, sinks / flow_out) / sources
    conserved_out = total(k, q, sources / flow_in) / sources
    strength = conserved_out.clamp(max=1).exp()
    share = strength * sources / total(of_k, shown, strength).clamp_min(TINY)
    out = total(q, k, to_accum(v) * share) / flow_in * conserved_in.sigmoid()
    return Flowing(out.to(v.dtype), Flows(*states) if causal else None)


@register(
    "flow_attention",
    papers=("Flowformer / Flow-Attention",),
    formula="o_i = σ(Î_i N/M) Σ_j φ(q_i)·φ(k_j)/I_i · M softmax_j(Ô_j) v_j; Î, Ô: flows while the other side's are 1",
    supports={"causal", "noncausal", "cross", "padding", "packed", "decode"},
    notes="Ô is limited to 1 before the softmax, as in the authors' code.",
)
class FlowAttention(RecurrentMixer):
    """Linear attention by conservation of flow: keys compete for queries, queries are allocated what they receive.

    >>> mixer = FlowAttention(64, heads=4, causal=False)
    >>> mixer(torch.randn(2, 9, 64), context=torch.randn(2, 50, 64)).shape
    torch.Size([2, 9, 64])
    """

    def __init__(self, dim: int, heads: int = 8, *, head_dim: int | None = None, causal: bool = True) -> None:
        super().__init__(dim, heads, head_dim=head_dim, causal=causal)

    def flow(
        self, x: Tensor, context: Tensor, state: Any = None, lengths: Lengths = None, padding: Tensor | None = None
    ) -> StepOutput:
        q, k, v, _ = self.project(x, context, (), lengths)
        own = padding if context is x else None
        out, flows = flow_attention(
            q, k, v, causal=self.causal, real_queries=own, real_keys=padding, lengths=lengths, flows=state
        )
        return StepOutput(self.read_out(x, out), flows)
