"""Linear attention that fades at constant rates and knows positions by rotation: RetNet and TransNormer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from foveate.catalogue.registry import Reference, register
from foveate.layers.rotary import rotate
from foveate.mixers.base import divided, join_heads
from foveate.mixers.linear.linear import LightningAttention2
from foveate.mixers.recurrent import Inputs, Lengths, Projected, RecurrentMixer, RecurrentState
from foveate.precision import to_accum


class Placed(RecurrentMixer):
    """A recurrent mixer whose queries and keys carry their positions; its decoder counts tokens."""

    def placed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys (B, H or G, N, D) at ``positions`` (N,)."""
        raise NotImplementedError

    def project(self, x: Tensor, context: Tensor, tails: tuple[Tensor, ...], lengths: Lengths = None) -> Projected:
        *tails_of_convs, first = tails or (torch.zeros((), dtype=torch.long, device=x.device),)
        q, k, v, after = super().project(x, context, tuple(tails_of_convs), lengths)
        q, k = (self.placed(y, first + places(y.shape[2], lengths).to(x.device)) for y in (q, k))
        return Projected(q, k, v, (*after, first + x.shape[1]))

    def empty_state(self, batch: int, capacity: int | None) -> RecurrentState:
        recurrent, tails = super().empty_state(batch, capacity)
        return RecurrentState(recurrent, (*tails, torch.zeros((), dtype=torch.long, device=recurrent.device)))


def places(length: int, lengths: Lengths = None) -> Tensor:
    """Positions 0, 1, 2, ..., (N,), in each document of a pack anew.

    >>> places(5, [3, 0, 2])
    tensor([0, 1, 2, 0, 1])
    """
    return torch.cat([torch.arange(each) for each in ([length] if lengths is None else lengths)])


@register(
    "retention",
    papers=None,
    reference=Reference(
        "Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei",
        "Retentive Network: A Successor to Transformer for Large Language Models",
        "2307.08621",
    ),
    family="linear",
    formula="o_n = GN(Σ_{m≤n} γ_h^(n-m) (q_n e^{inθ}) (k_m e^{imθ})^† v_m) ⊙ silu(W_G x_n), γ_h = 1 - 2^(-5-h)",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes="The norm takes the place of the paper's three normalisations, which it undoes up to its epsilon.",
)
class Retention(Placed):
    """Linear attention with rotary positions in which head h forgets 2^(-5-h) of its state at each token.

    Values are twice as wide as keys, as in the paper; each head is normalised, then gated.

    >>> mixer = Retention(64, heads=4)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        rotary: float = 10_000.0,
        **options: Any,
    ) -> None:
        head_dim = head_dim or divided(dim, heads)
        super().__init__(dim, heads, head_dim=head_dim, value_dim=value_dim or 2 * head_dim, **options)
        self.rotary = rotary
        self.to_gate = nn.Linear(dim, heads * self.value_dim, bias=False)

    def placed(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, positions, self.rotary)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        forgotten = 2.0 ** -(5.0 + torch.arange(self.heads, dtype=torch.float64, device=x.device))
        return Inputs(q, k, v, decay=torch.log1p(-forgotten))

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        normed = layer_norm(heads, heads.shape[-1:])
        return self.to_out(join_heads(normed) * silu(self.to_gate(x)))

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.heads, self.head_dim, self.value_dim


@register(
    "lightning_attention",
    papers=("Lightning-Attention-TNL",),
    formula="S_t = λ_h S_{t-1} + k_t v_tᵀ, o_t = norm(q_tᵀ S_t) ⊙ u_t",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes="The block is TNL's. Its attention is that of Lightning Attention-2, and so is the code.",
)
class LightningAttention(LightningAttention2):
    """TNL's token mixer: linear attention with a constant decay per head and layer, RMS norm and a gate.

    >>> mixer = LightningAttention(64, heads=4, decay_scale=0.5)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """


@register(
    "transnormer_llm",
    papers=("TransNormerLLM",),
    formula="o_t = norm(Σ_{s≤t} λ_h^(t-s) Σ_c q_tc k_sc cos((t - s) θ_c) v_s) ⊙ u_t",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes=(
        "lrpe=False is what the paper has in all layers but the first, the decay alone (lightning_attention). The "
        "decoder keeps the faded state and never forms λ^-t. The model transnormer is built of it."
    ),
)
class TransNormerLLM(LightningAttention2, Placed):
    """Linear attention with a constant decay per head and LRPE, a rotation of each channel by a learned angle.

    >>> mixer = TransNormerLLM(64, heads=4)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(self, dim: int, heads: int = 8, *, lrpe: bool = True, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        channels = self.kv_heads * self.head_dim
        angles = 10_000.0 ** (-2 * torch.arange(channels) / channels)  # over all heads, as in the authors' code
        self.angles = nn.Parameter(angles.view(self.kv_heads, self.head_dim)) if lrpe else None

    def placed(self, x: Tensor, positions: Tensor) -> Tensor:
        x = silu(x)
        if self.angles is None:
            return x
        angles = self.angles.double().repeat_interleave(x.shape[1] // self.kv_heads, dim=0)  # (H or G, D)
        turned = positions[:, None] * angles.unsqueeze(1)  # exact at any position
        cos, sin = turned.cos().to(to_accum(x).dtype), turned.sin().to(to_accum(x).dtype)
        return torch.cat([x * cos, x * sin], dim=-1)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        return Inputs(q, k, v, decay=self.decay(x), scale=self.head_dim**-0.5)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.heads, self.head_dim * (1 if self.angles is None else 2), self.value_dim
