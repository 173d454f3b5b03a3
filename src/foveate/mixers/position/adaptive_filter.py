"""AFA: keys carried through learned dynamics to the query's time, weighed by what uncertainty remains."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from foveate.attention import attend_partial, score_function
from foveate.cache import KVCache
from foveate.catalogue.registry import register
from foveate.mixers.base import Mixer, StepOutput, divided, join_heads, split_heads
from foveate.patterns import Layout, Pattern
from foveate.precision import accum_dtype, to_accum

LEAST = 1e-5  # of decay and of measurement noise


class Noise(NamedTuple):
    """Of each head (H,): decay μ < 0, variances of process, key and query, and how far residuals are let go."""

    decay: Tensor
    process: Tensor
    key: Tensor
    query: Tensor
    tolerance: Tensor
    temperature: Tensor


@register(
    "adaptive_filter_attention",
    papers=("AFA",),
    formula="o_i = Σ_j a_ij e^{λΔt} v_j, a_ij = softmax_j(-τ² log(V_ij + |q_i - e^{λΔt} k_j|² / ν d)), V: variance",
    supports={"causal", "noncausal", "padding", "packed", "decode"},
)
class AdaptiveFilterAttention(Mixer):
    """Attention as the estimate of a state that decays, turns and is noisy, of noisy observations: isotropic AFA.

    Queries, keys and values are complex. A key is carried to the query's time by e^{λ Δt}, λ = μ_h ± i ω; what is then
    known of it has variance V = σ² (1 - e^{2μΔt}) / (-2μ) + η² e^{2μΔt} + γ², of process, key and query. A pair counts
    by its precision 1 / V, less the farther the query is from the key carried, with heavy tails; weights are normalised
    and values are carried like keys. Without dynamics and process noise, for keys of one length and residuals that are
    small beside ν d V, that is dot-product attention.

    ``length`` is the trained length, by which decays and turns are bounded: μ between 0 and -5 / length, ω at most
    10 π / length times the frequencies of rotary positions, or learned numbers with ``learn_turns``. Time is quadratic;
    it runs on "reference", as scores are a function of dot products and distances.

    Racioppo, Attention as an Adaptive Filter, arXiv 2509.04154, after the authors' published code with its robust
    weights, precision bias and turned values, without its optional norms, residual and prediction of the next step.
    """

    def __init__(
        self, dim: int, heads: int = 8, *, length: int = 1024, learn_turns: bool = False, causal: bool = True
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, self.head_dim, self.length = heads, divided(dim, heads), length
        if self.head_dim % 2:
            raise ValueError(f"states turn in conjugate pairs: heads take even widths; got {self.head_dim}")
        if length < 1:
            raise ValueError(f"length is the number of tokens trained on, at least 1; got {length}")
        self.to_q, self.to_k, self.to_v = (complex_linear(dim, dim) for _ in range(3))
        self.to_out = nn.Linear(2 * dim, dim)
        with torch.no_grad():
            self.to_out.weight.copy_(complex_weights(dim, dim).mT)
            self.to_out.bias.zero_()
        self.decay, self.process, self.key_noise, self.query_noise = (
            nn.Parameter(torch.randn(heads)) for _ in range(4)
        )
        self.tolerance, self.temperature = (nn.Parameter(torch.ones(heads)) for _ in range(2))
        half = self.head_dim // 2
        rotary = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        self.turns = nn.Parameter(torch.randn(heads, half)) if learn_turns else None
        self.rotary: Tensor
        self.register_buffer("rotary", rotary.expand(heads, half).clone(), persistent=False)

    def noise(self) -> Noise:
        decay = (torch.sigmoid(to_accum(self.decay)) - 1) * 5 / self.length - LEAST
        process, key, query, tolerance = (
            softplus(to_accum(x)) for x in (self.process, self.key_noise, self.query_noise, self.tolerance)
        )
        return Noise(decay, process, key + LEAST, query + LEAST, tolerance + LEAST, to_accum(self.temperature).square())

    def turned(self, x: Tensor, at: Tensor, sign: int) -> Tensor:
        """Complex heads x (B, H, N, 2 D), real parts first, times e^{± i ω t}."""
        frequencies = self.rotary if self.turns is None else self.turns
        omega = to_accum(frequencies).repeat_interleave(2, dim=1) * (10 * math.pi / self.length)
        omega = omega * torch.tensor([1.0, -1.0], device=x.device, dtype=omega.dtype).repeat(self.head_dim // 2)
        dtype = accum_dtype(x)
        angles = sign * omega.to(dtype).unsqueeze(1) * at.to(dtype).view(1, -1, 1)  # (H, N, D)
        real, imaginary = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1).to(x.dtype)

    def project(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, N, 2 D), all turned back to time 0."""
        at = torch.arange(first, first + x.shape[1], device=x.device)
        made = []
        for layer in (self.to_q, self.to_k, self.to_v):
            real, imaginary = (split_heads(part, self.heads) for part in layer(x).chunk(2, dim=-1))
            made.append(self.turned(torch.cat([real, imaginary], -1), at, -1))
        return made[0], made[1], made[2]

    def estimate(self, q: Tensor, k: Tensor, v: Tensor, within: Pattern, layout: Layout | None, first: int) -> Tensor:
        """Σ_j a_ij e^{μ|Δt|} of values (B, H, M, 2 D), turned to the queries' times."""
        noise, offset = self.noise(), k.shape[2] - q.shape[2]
        lengths = [to_accum(x).square().sum(-1) for x in (q, k)]
        tensors = (*lengths, *noise)
        scores = score_function(scores_of(self.head_dim, offset), *tensors)
        faded = score_function(fading(offset), noise.decay)
        whole = attend_partial(q, k, v[..., :1].detach(), within, bias=scores, scale=1.0, layout=layout)
        part = attend_partial(q, k, v, within, bias=[scores, faded], scale=1.0, layout=layout)
        assert whole.lse is not None and part.lse is not None
        none = part.lse.isneginf()
        share = torch.exp(torch.where(none, 0, part.lse) - torch.where(none, 0, whole.lse)).to(v.dtype)
        at = torch.arange(first, first + q.shape[2], device=q.device)
        return self.turned(part.out * share.unsqueeze(-1), at, 1)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        q, k, v = self.project(x, 0)
        return self._out(self.estimate(q, k, v, self.within(padding), layout, 0))

    def _out(self, heads: Tensor) -> Tensor:
        real, imaginary = (join_heads(part) for part in heads.chunk(2, dim=-1))
        return self.to_out(torch.cat([real, imaginary], -1))

    # ---- decoding -------------------------------------------------------------------------------------------

    def empty_state(self, batch: int, capacity: int | None) -> KVCache:
        return KVCache(batch, capacity)

    def mix_after(self, x: Tensor, state: KVCache) -> StepOutput:
        q, k, v = self.project(x, state.seen)
        cache = state.append(k, v)
        return StepOutput(self._out(self.estimate(q, cache.k, cache.v, cache.within, None, state.seen)), cache)

    def state_bytes(self, n: int) -> int:
        return 4 * n * self.dim * self.weight.element_size()


def scores_of(width: int, offset: int):  # type: ignore[no-untyped-def]
    """Of dot products of queries and keys turned back to time 0: the log of each pair's robust precision, times τ²."""

    def scores(
        dot: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, q2: Tensor, k2: Tensor, *rest: Tensor
    ) -> Tensor:
        noise = Noise(*(x[h] for x in rest))
        apart = (q + offset - k).abs()
        fade = torch.exp(noise.decay * apart)
        residual = q2[b, h, q] + fade.square() * k2[b, h, k] - 2 * fade * dot
        process = torch.expm1(2 * noise.decay * apart) / (2 * noise.decay)
        variance = noise.process * process + noise.key * fade.square() + noise.query
        far = torch.log1p(residual.clamp_min(0) / (noise.tolerance * width * variance))
        return -noise.temperature * (variance.log() + far)

    return scores


def fading(offset: int):  # type: ignore[no-untyped-def]
    """Scores plus μ |Δt|."""

    def faded(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
        return score + decay[h] * (q + offset - k).abs()

    return faded


def complex_weights(inputs: int, outputs: int) -> Tensor:
    """Real and imaginary parts, one above the other (2 outputs, inputs): normal lengths, phases all alike."""
    length = math.sqrt(2 / (inputs + outputs)) * torch.randn(outputs, inputs)
    phase = 2 * math.pi * torch.rand(outputs, inputs)
    return torch.cat([length * phase.cos(), length * phase.sin()])


def complex_linear(inputs: int, outputs: int) -> nn.Linear:
    """Real inputs, complex outputs, real parts first."""
    layer = nn.Linear(inputs, 2 * outputs)
    with torch.no_grad():
        layer.weight.copy_(complex_weights(inputs, outputs))
        layer.bias.zero_()
    return layer
