"""Viper-F1: a scan of text whose dynamics are modulated by the parts of an image each token matches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from foveate.catalogue.registry import register
from foveate.mixers.attention import JUMPS
from foveate.mixers.base import Mixer
from foveate.mixers.recurrent_ssm.mamba import NO_STEP, SelectiveScan, SSMParams
from foveate.patterns import Layout
from foveate.precision import to_accum


class FiLM(nn.Module):
    """Feature-wise linear modulation: (1 + γ) x + β with γ and β from a condition; at first it does nothing.

    >>> x, condition = torch.randn(2, 5, 8), torch.randn(2, 5, 3)
    >>> torch.equal(FiLM(3, 8)(x, condition), x)
    True
    """

    def __init__(self, condition: int, channels: int) -> None:
        super().__init__()
        self.to_both = nn.Linear(condition, 2 * channels)
        nn.init.zeros_(self.to_both.weight)
        nn.init.zeros_(self.to_both.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.to_both(condition).chunk(2, dim=-1)
        return x * (1 + scale) + shift


@register(
    "viper_f1",
    papers=("Viper-F1",),
    formula="v_t = Σ_top-k softmax(cos(x_t, g) / τ) g, (Δ, B, C)_t = FiLM(W u_t; v_t), out = FiLM(W scan(u); v)",
    supports={"noncausal", "cross", "padding"},
    notes=(
        "The liquid dynamics are those of the selective scan, whose transition exp(Δ_t A) depends on the token; "
        "FiLM acts on what enters, on Δ, B and C, and on what leaves. Without a context, tokens match each other."
    ),
)
class ViperScan(Mixer):
    """A selective scan of x whose step sizes, inputs and outputs are modulated by the patches each token matches.

    ``context`` holds the patches; each token matches the ``top`` most similar ones, by the cosine in ``match``
    channels. Costs grow with N, and with N times M only in that similarity.

    >>> mixer = ViperScan(64)
    >>> text, patches = torch.randn(2, 12, 64), torch.randn(2, 196, 64)
    >>> mixer(text, context=patches).shape
    torch.Size([2, 12, 64])
    """

    exempt: ClassVar[dict[str, str]] = JUMPS

    tiny: ClassVar[dict[str, Any]] = {"top": 5, "match": 12}

    def __init__(
        self,
        dim: int,
        *,
        top: int = 16,
        match: int = 64,
        temperature: float = 0.1,
        expand: int = 1,
        state: int = 16,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        if top < 1 or match < 1 or not temperature > 0:
            raise ValueError(f"top, match and temperature are positive; got {top}, {match} and {temperature}")
        self.top, self.temperature = top, temperature
        inner = expand * dim
        self.to_query, self.to_key = nn.Linear(dim, match, bias=False), nn.Linear(dim, match, bias=False)
        self.to_value = nn.Linear(dim, match, bias=False)
        self.to_in, self.to_out = nn.Linear(dim, 2 * inner, bias=False), nn.Linear(inner, dim, bias=False)
        self.ssm = SelectiveScan(inner, state)
        self.enter, self.leave = FiLM(match, inner), FiLM(match, dim)
        self.dynamics = FiLM(match, inner + 2 * state)  # of Δ, B and C

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        key_mask = padding if context is None else None
        if key_mask is not None:
            x = x.masked_fill(~key_mask.unsqueeze(-1), 0)
        matched = self.matched(x, x if context is None else context, padding)
        u, gate = self.to_in(x).chunk(2, dim=-1)
        u = silu(self.enter(u, matched))
        chosen = self.modulated(self.ssm.chosen(u), matched, key_mask)
        return self.leave(self.to_out(self.ssm.scan(u, chosen, gate=gate).out), matched)

    def matched(self, x: Tensor, patches: Tensor, key_mask: Tensor | None) -> Tensor:
        """What each token sees of the patches it matches best, (B, N, match); zeros where there are none."""
        if patches.shape[1] == 0:
            return x.new_zeros(*x.shape[:2], self.to_value.out_features)
        if key_mask is not None:
            patches = patches.masked_fill(~key_mask.unsqueeze(-1), 0)
        query, key = (normalize(to_accum(y), dim=-1) for y in (self.to_query(x), self.to_key(patches)))
        likeness = query @ key.mT / self.temperature  # (B, N, M), the token-grid correlation
        if key_mask is not None:
            likeness = likeness.masked_fill(~key_mask.unsqueeze(1), -torch.inf)
        best, index = likeness.topk(min(self.top, likeness.shape[-1]), dim=-1)
        none = best.isneginf().all(-1, keepdim=True)
        weights = best.masked_fill(none, 0).softmax(-1).masked_fill(none, 0).to(x.dtype)
        batch = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        seen = self.to_value(patches)[batch, index]  # (B, N, top, match)
        return (weights.unsqueeze(2) @ seen).squeeze(2)

    def modulated(self, chosen: SSMParams, matched: Tensor, key_mask: Tensor | None) -> SSMParams:
        """What the tokens choose of the scan, modulated by what they match."""
        widths = [each.shape[-1] for each in chosen]
        step, b, c = self.dynamics(torch.cat(chosen, dim=-1), matched).split(widths, dim=-1)
        return SSMParams(step if key_mask is None else step.masked_fill(~key_mask.unsqueeze(-1), NO_STEP), b, c)
