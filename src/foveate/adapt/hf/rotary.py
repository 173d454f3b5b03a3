"""A model's own rotary embedding, to turn keys and queries that it has turned already."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.precision import to_accum

_CHANGING = ("dynamic", "longrope")  # frequencies of these depend on the length of the text


Spread = Callable[[Tensor], Tensor]
SPREADS: tuple[Spread, ...] = (lambda x: x, lambda x: torch.cat((x, x), -1), lambda x: x.repeat_interleave(2, -1))
"""How models lay out the angles (..., R) of pairs over channels: one a pair, by halves, or pair by pair."""


class Rotary:
    """x (B, G, M, D), turned further by numbers of positions (B or 1, M), as a layer of the model turns it.

    Angles are computed in float64 from the model's frequencies; which channels make a pair is left to its own function.
    How it lays angles out, and how many channels it turns, is tried once for each number of channels.
    """

    def __init__(self, module: nn.Module, attribute: str, layer_type: str | None, apply: Callable[..., Any]) -> None:
        self.module, self.attribute, self.layer_type, self.apply = module, attribute, layer_type, apply
        self._spread: Spread | None = None
        self._widths: dict[int, int] = {}

    def __call__(self, x: Tensor, by: Tensor) -> Tensor:
        frequencies = getattr(self.module, self.attribute).double()
        if self._spread is None:
            self._spread = self._find_spread(frequencies)
        angles = self._spread(by.double().unsqueeze(-1) * frequencies)  # (B, M, R)
        wide = to_accum(x)
        cos, sin = angles.cos().to(wide.dtype), angles.sin().to(wide.dtype)
        width = self._widths.get(x.shape[-1])
        if width is None:
            width = self._widths[x.shape[-1]] = self._find_width(wide, cos, sin)
        turned = self.apply(wide[..., :width], wide[..., :width], cos, sin)[0].to(x.dtype)
        return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)

    def _find_spread(self, frequencies: Tensor) -> Spread:
        """How the model lays out angles of all channels."""
        one = torch.ones(1, 1, dtype=torch.long, device=frequencies.device)
        told = {} if self.layer_type is None else {"layer_type": self.layer_type}
        cos, sin = (part.double() for part in self.module(frequencies.float(), one, **told))
        like = torch.atan2(sin, cos)[0, 0]
        for spread in SPREADS:
            if spread(frequencies).shape == like.shape and torch.allclose(spread(frequencies), like, atol=1e-4):
                return spread
        raise NotImplementedError(
            f"the angles of {type(self.module).__name__} are laid out in a way unknown to Foveate"
        )

    def _find_width(self, x: Tensor, cos: Tensor, sin: Tensor) -> int:
        """Of the channels that are turned: all, or the first of them."""
        try:
            probe = x[:1, :1, :1]
            whole = self.apply(probe, probe, cos[:1, :1], sin[:1, :1])[0]
            return x.shape[-1] if whole.shape == probe.shape else cos.shape[-1]
        except RuntimeError:  # channels do not fit the angles
            return cos.shape[-1]


def rotary_of(model: nn.Module, layer: nn.Module, config: Any) -> Rotary | None:
    """The rotary embedding of an attention layer; None where it has none that Foveate knows.

    Raises NotImplementedError for one whose frequencies change with the length of the text.
    """
    apply = getattr(sys.modules[type(layer).__module__], "apply_rotary_pos_emb", None)
    if apply is None or not callable(apply):
        return None
    kinds = getattr(config, "layer_types", None)
    number = getattr(layer, "layer_idx", None)
    kind = kinds[number] if kinds and isinstance(number, int) and number < len(kinds) else None
    for module in model.modules():
        for attribute in (f"{kind}_inv_freq", "inv_freq"):
            if isinstance(getattr(module, attribute, None), Tensor):
                _check_fixed(config, kind)
                told = kind if "layer_type" in inspect.signature(module.forward).parameters else None
                return Rotary(module, attribute, told, apply)
    return None


def _check_fixed(config: Any, kind: str | None) -> None:
    told = getattr(config, "rope_parameters", None) or {}
    told = told.get(kind, told) if isinstance(told, dict) else {}
    if told.get("rope_type") in _CHANGING:
        raise NotImplementedError(
            f"rotary frequencies of type {told['rope_type']!r} change with the length of the text, so keys cannot be "
            "turned to other places: pass in_cache=False"
        )
