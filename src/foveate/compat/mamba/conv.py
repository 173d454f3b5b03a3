"""causal_conv1d's two functions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveate.compat.mamba.packing import check, refuse, run_lengths
from foveate.recurrence.selective.api import causal_conv

ACTIVATIONS: dict[str | None, Literal["silu"] | None] = {None: None, "silu": "silu", "swish": "silu"}


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel of x (batch, channels, tokens) with its own weight (channels, width), looking back only.

    >>> x, weight = torch.randn(2, 6, 10), torch.randn(6, 4)
    >>> out, tail = causal_conv1d_fn(x, weight, activation="silu", return_final_states=True)
    >>> out.shape, tail.shape
    (torch.Size([2, 6, 10]), torch.Size([2, 6, 3]))

    States are the last width - 1 inputs, (batch, channels, width - 1). seq_idx (batch, tokens) begins a new sequence
    wherever its number changes. activation is None, "silu" or "swish".
    Raises ValueError where shapes do not fit, NotImplementedError for final_states_out, and for states beside seq_idx
    (as theirs does).
    """
    refuse(final_states_out=(final_states_out, "copy the returned final states"))
    channels, width = _check(x, weight, bias, activation)
    check("initial_states", initial_states, (x.shape[0], channels, width - 1))
    if seq_idx is None:
        out, tail = causal_conv(
            x.transpose(1, 2), weight, bias, tail=initial_states, activation=ACTIVATIONS[activation]
        )
        return (out.transpose(1, 2), tail) if return_final_states else out.transpose(1, 2)
    refuse(
        initial_states=(initial_states, "leave it out beside seq_idx"),
        return_final_states=(return_final_states, "leave it out beside seq_idx"),
    )
    lengths = run_lengths(seq_idx, x.shape[0], x.shape[2])
    packed = x.transpose(1, 2).reshape(1, -1, channels)
    out = causal_conv(
        packed, weight, bias, activation=ACTIVATIONS[activation], lengths=[n for row in lengths for n in row]
    ).out
    return out.reshape(x.shape[0], x.shape[2], channels).transpose(1, 2)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next tokens of `causal_conv1d_fn`; ``conv_state`` is overwritten, and nothing is differentiated.

    >>> x, conv_state, weight = torch.randn(2, 6), torch.zeros(2, 6, 4), torch.randn(6, 4)
    >>> causal_conv1d_update(x, conv_state, weight).shape, torch.equal(conv_state[..., -1], x)
    (torch.Size([2, 6]), True)

    x is (batch, channels) or (batch, channels, tokens), conv_state (batch, channels, at least width - 1).
    Raises NotImplementedError for cache_seqlens and conv_state_indices.
    """
    refuse(
        cache_seqlens=(cache_seqlens, "conv_state is shifted, not a ring"),
        conv_state_indices=(conv_state_indices, "pass the rows of conv_state that are meant"),
    )
    tokens = x.unsqueeze(2) if x.dim() == 2 else x
    channels, width = _check(tokens, weight, bias, activation)
    kept = conv_state.shape[-1]
    if tuple(conv_state.shape[:2]) != (x.shape[0], channels) or kept < width - 1:
        raise ValueError(
            f"conv_state must be (batch, channels, at least width - 1) = {(x.shape[0], channels, width - 1)}, "
            f"got {tuple(conv_state.shape)}"
        )
    out = causal_conv(
        tokens.transpose(1, 2),
        weight,
        bias,
        tail=conv_state[..., kept - (width - 1) :].to(x.dtype),
        activation=ACTIVATIONS[activation],
    ).out
    joined = torch.cat((conv_state, tokens.to(conv_state.dtype)), -1)
    conv_state.copy_(joined[..., joined.shape[-1] - kept :])
    return out.transpose(1, 2).reshape(x.shape)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> tuple[int, int]:
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"x must be (batch, channels, tokens) and weight (channels, width), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    check("bias", bias, (weight.shape[0],))
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f'activation must be None, "silu" or "swish", got {activation!r}')
    return weight.shape[0], weight.shape[1]
