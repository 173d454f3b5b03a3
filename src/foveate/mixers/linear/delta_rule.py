"""The delta rule: a token overwrites what its key recalls of the state, instead of adding to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad, softplus

from foveate.catalogue.registry import Reference, register
from foveate.layers.short_conv import ShortConv
from foveate.mixers.base import join_heads, split_heads
from foveate.mixers.linear.gated import fresh_rates, small_steps
from foveate.mixers.recurrent import Inputs, Lengths, RecurrentMixer
from foveate.precision import to_accum
from foveate.recurrence import Recurrent


@register(
    "deltanet",
    papers=("DeltaNet",),
    formula="S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, |k_t| = 1",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes=(
        "negative=True lets beta reach 2 and eigenvalues -1 (Grazzi et al., 2411.12537). Padding lies at the ends of "
        "a sequence: inside it, the short convolutions would read it as zeros."
    ),
)
class DeltaNet(RecurrentMixer):
    """A state in which each token overwrites what its key recalls, by as much as its writing strength says.

    Queries, keys and values pass a short convolution and SiLU; queries and keys have unit length.

    >>> mixer = DeltaNet(64, heads=4, negative=True)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(self, dim: int, heads: int = 8, *, negative: bool = False, conv: int = 4, **options: Any) -> None:
        super().__init__(dim, heads, conv=conv, **options)
        self.strongest = 2.0 if negative else 1.0
        self.to_strength = nn.Linear(dim, self.kv_heads, bias=False)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5)

    def strength(self, x: Tensor) -> Tensor:
        """beta, (B, N, G)."""
        return self.strongest * torch.sigmoid(to_accum(self.to_strength(x)))

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        return Inputs(unit(q), unit(k), v, beta=self.strength(x).transpose(1, 2))

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.to_out(join_heads(self.norm(heads)))


def unit(x: Tensor) -> Tensor:
    """x (..., D) at length 1, in float32 at least."""
    return normalize(to_accum(x), dim=-1, eps=1e-6)


@register(
    "efla",
    papers=("EFLA",),
    formula="S_t = (I - a_t k_t k_tᵀ) S_{t-1} + a_t k_t v_tᵀ, a_t = (1 - exp(-β_t λ_t)) / λ_t, λ_t = |k_t|^2",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes="Keys keep their length, which decides how far the state moves; unit queries and the rest are DeltaNet's.",
)
class EFLA(DeltaNet):
    """The delta rule followed for a time beta instead of one step: dS/dt = -k k^T S + k v^T, solved exactly.

    >>> mixer = EFLA(64, heads=4)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        return Inputs(unit(q), k, v, beta=exact_strength(self.strength(x).transpose(1, 2), to_accum(k)))


def exact_strength(beta: Tensor, k: Tensor) -> Tensor:
    """(1 - exp(-beta |k|^2)) / |k|^2, (B, G, N): the delta rule's strength that is exact for any k (B, G, N, D).

    It tends to beta as k tends to 0, without a loss of digits in it or its gradient.

    >>> exact_strength(torch.tensor(0.5), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([0.5000, 0.0400])
    """
    time = beta * k.square().sum(-1)
    near = time < 1e-2
    far = torch.where(near, 1, time)
    series = 1 - time / 2 * (1 - time / 3 * (1 - time / 4 * (1 - time / 5 * (1 - time / 6))))
    return beta * torch.where(near, series, -torch.expm1(-far) / far)


@register(
    "kda",
    papers=None,
    reference=Reference("Kimi Team", "Kimi Linear: An Expressive, Efficient Attention Architecture", "2510.26692"),
    family="linear",
    formula="S_t = (I - β_t k_t k_tᵀ) Diag(α_t) S_{t-1} + β_t k_t v_tᵀ",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes="Kimi Delta Attention, the linear layers of Kimi Linear; its other layers are full attention (MLA).",
)
class KDA(DeltaNet):
    """The delta rule on a state of which every key channel fades by a gate of its own.

    Decays and the output's sigmoid gate come out of ``rank`` channels (by default as many as a head has).

    >>> mixer = KDA(64, heads=4)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(self, dim: int, heads: int = 8, *, rank: int | None = None, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        rank, channels = rank or self.value_dim, self.kv_heads * self.head_dim
        to_decay = nn.Linear(rank, channels)
        with torch.no_grad():
            to_decay.bias.copy_(small_steps(channels))
        self.to_decay = nn.Sequential(nn.Linear(dim, rank, bias=False), to_decay)
        self.A_log = nn.Parameter(fresh_rates(self.kv_heads).log())
        self.to_gate = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, heads * self.value_dim))

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        dt = split_heads(softplus(to_accum(self.to_decay(x))), self.kv_heads)  # (B, G, N, D)
        decay = -dt * to_accum(self.A_log).exp()[:, None, None]
        return Inputs(unit(q), unit(k), v, decay=decay, beta=self.strength(x).transpose(1, 2))

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.to_out(join_heads(self.norm(heads)) * torch.sigmoid(self.to_gate(x)))


class Steps(Inputs):
    """Inputs with several keys and values to a token, one after another; queries read after the last."""

    def mask_padding(self, key_mask: Tensor) -> Inputs:
        return super().mask_padding(key_mask.repeat_interleave(self.k.shape[2] // max(key_mask.shape[1], 1), dim=1))


@register(
    "delta_product",
    papers=None,
    reference=Reference(
        "Siems, Carstensen, Zela, Hutter, Pontil, Grazzi",
        "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products",
        "2502.10297",
    ),
    family="linear",
    formula="S_t = A_n … A_1 α_t S_{t-1} + …, A_j = I - β_j k_j k_jᵀ: n delta steps a token",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes="gated=True is Gated DeltaProduct: the state fades once a token, before its first step.",
)
class DeltaProduct(DeltaNet):
    """The delta rule taken ``steps`` times a token, with keys, values and strengths of their own.

    A product of two such steps can rotate the state, which one step, a reflection at most, cannot.

    >>> mixer = DeltaProduct(64, heads=4, steps=3)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        steps: int = 2,
        gated: bool = False,
        negative: bool = True,
        conv: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, negative=negative, conv=conv, **options)
        if steps < 1:
            raise ValueError(f"steps is how often a token writes, at least once; got {steps}")
        self.steps = steps
        keys, values = (steps * self.kv_heads * width for width in (self.head_dim, self.value_dim))
        self.to_k, self.to_v = nn.Linear(dim, keys, bias=False), nn.Linear(dim, values, bias=False)
        self.to_strength = nn.Linear(dim, steps * self.kv_heads, bias=False)
        self.convs = nn.ModuleList(ShortConv(w, conv) for w in (self.to_q.out_features, keys, values) if conv)
        self.to_decay = nn.Linear(dim, self.kv_heads) if gated else None
        if self.to_decay is not None:
            self.A_log = nn.Parameter(fresh_rates(self.kv_heads).log())
            with torch.no_grad():
                self.to_decay.bias.copy_(small_steps(self.kv_heads))

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        k, v = (y.unflatten(-1, (self.steps, -1)).flatten(2, 3) for y in (k, v))  # (B, G, N * steps, D)
        strength = split_heads(self.strength(x), self.kv_heads).flatten(2)
        q = pad(q.unsqueeze(3), (0, 0, self.steps - 1, 0)).flatten(2, 3)  # zeros read nothing
        return Steps(unit(q), unit(k), v, decay=self.decay(x), beta=strength)

    def decay(self, x: Tensor) -> Tensor | None:
        """The fading before a token's first step, and none before the others, (B, G, N * steps)."""
        if self.to_decay is None:
            return None
        dt = softplus(to_accum(self.to_decay(x))) * to_accum(self.A_log).exp()
        return pad(-dt.transpose(1, 2).unsqueeze(-1), (0, self.steps - 1)).flatten(2)

    def run(self, inputs: Inputs, *, lengths: Lengths = None, state: Tensor | None = None) -> Recurrent:
        longer = None if lengths is None else [length * self.steps for length in lengths]
        out, state = super().run(inputs, lengths=longer, state=state)
        return Recurrent(out[:, :, self.steps - 1 :: self.steps], state)
