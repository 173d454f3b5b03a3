"""What stand-ins share: heads, masks, and the way into the attention function."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapt.hf.pattern_mask import PatternMask
from foveate.patterns import full, key_padding


def attended(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    weights: Any = False,
) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, N, C), and the weights if they are asked for, of heads (B, H, N, D)."""
    from foveate.adapt.hf.attention_function import attention_function

    out, formed = attention_function(
        module, q, k, v, mask, dropout, scale, causal, position_bias=bias, output_attentions=bool(weights)
    )
    return out.flatten(2), formed


def heads(x: Tensor, dim: int) -> Tensor:
    """(B, N, C) as (B, C / dim, N, dim)."""
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def of_its_file(module: nn.Module, name: str) -> Any:
    """A function from the file of transformers that a module's class lives in."""
    return getattr(sys.modules[type(module).__module__], name)


def of_tokens(mask: Tensor | PatternMask | None) -> Any:
    """An encoder's (B, 1, N or 1, N) mask of booleans as a pattern, where it says which tokens are padding."""
    if not isinstance(mask, Tensor):
        return mask
    visible = mask.bool()
    keys = visible.any(-2, keepdim=True)  # (B, 1, 1, M)
    queries = visible.any(-1, keepdim=True)
    if visible.shape[1] != 1 or not torch.equal(visible, (keys & queries).expand_as(visible)):
        return visible
    num_keys = visible.shape[3]
    pattern = full if bool(keys.all()) else key_padding(keys[:, 0, 0])
    return PatternMask(pattern, num_keys, (visible.shape[0], 1, num_keys, num_keys), visible.device)
