"""What adapters of recurrent layers share: padding, packing, the convolution, and what a layer keeps between calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.precision import accum_dtype
from foveate.recurrence import causal_conv

Method = TypeVar("Method", bound=Callable[..., Any])

_SILU = ("silu", "swish")


def in_place_of(name: str) -> Callable[[Method], Method]:
    """Make a function the stand-in for a layer's own method, which still serves whatever is not on the CPU.

    The stand-in bears the method's name, so that a pickled or copied layer finds its way to one of the two.
    """

    def decorate(ours: Method) -> Method:
        @wraps(ours)
        def stand_in(layer: Any, *args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else next(iter(kwargs.values()))
            run = ours if first.device.type == "cpu" else getattr(type(layer), name)
            return run(layer, *args, **kwargs)

        stand_in.__name__ = name
        return stand_in  # type: ignore[return-value]

    return decorate


def without_padding(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states (B, N, C) with zeros where the mask (B, at least N) marks padding."""
    if mask is None:
        return hidden
    return (hidden * mask[:, -hidden.shape[1] :, None]).to(hidden.dtype)


def packed_lengths(kwargs: Mapping[str, Any], cache: Any) -> Sequence[int] | None:
    """Lengths of the sequences that a caller packed into one row, if any."""
    ends, index = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
    if cache is not None and (ends is not None or index is not None):
        raise ValueError("packed sequences leave no state to go on from: pass use_cache=False with them")
    if ends is not None:
        return ends.diff().tolist()
    if index is None:
        return None
    if index.shape[0] != 1:
        raise ValueError(f"packed sequences lie in one row, but seq_idx has {index.shape[0]}: flatten the batch")
    return index[0].unique_consecutive(return_counts=True)[1].tolist()


def convolve(layer: Any, x: Tensor, cache: Any, lengths: Sequence[int] | None = None) -> Tensor:
    """The layer's causal convolution over x (B, N, C), after the tokens that the cache holds; it then holds these."""
    conv, act = getattr(layer, "conv1d", None) or layer.conv, getattr(layer, "activation", None)
    weight, bias = conv.weight.squeeze(1), conv.bias
    width = weight.shape[1]
    state = None if cache is None else cache.get_conv_state(layer.layer_idx)
    if state is not None and x.shape[1] == 1 and not cache.is_recording_past(layer.layer_idx):
        return _activate(_convolve_one(x, state, weight, bias), act)
    fused: Literal["silu"] | None = "silu" if act in _SILU else None
    tail = None if state is None else _last(state, width - 1)
    out = causal_conv(x, weight, bias, tail=tail, activation=fused, lengths=lengths).out
    if cache is not None:
        cache.update_conv_state(x.transpose(1, 2), layer.layer_idx, conv_kernel_size=width)
    return out if fused else _activate(out, act)


def _convolve_one(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One token x (B, 1, C) and the state (B, C, width), which moves on: it is all that the token sees.

    A few small operations: reading and checking arguments for a kernel would take several times as long.
    """
    seen = torch.cat([state[..., 1:], x.transpose(1, 2)], dim=2)
    state.copy_(seen)
    out = (as_state(seen, x) * as_state(weight, x)).sum(2)
    return (out if bias is None else out + bias).to(x.dtype).unsqueeze(1)


def _activate(x: Tensor, name: str | None) -> Tensor:
    if name in _SILU:
        return F.silu(x)
    return x if name is None else _activation(name)(x)


def _last(state: Tensor, columns: int) -> Tensor:
    """The last columns of a state, which has one more, or any number while past states are being recorded."""
    spare = state.shape[-1] - columns
    return state[..., spare:] if spare >= 0 else F.pad(state, (-spare, 0))


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def last_state(layer: Any, cache: Any, hidden: Tensor) -> Tensor | None:
    """The state that the cache holds for a layer, as its model shapes it; None before the first token."""
    state = None if cache is None else cache.get_recurrent_state(layer.layer_idx)
    return None if state is None else as_state(state, hidden)


def as_state(state: Tensor, hidden: Tensor) -> Tensor:
    """In the dtype that a recurrence of these hidden states holds its state in."""
    return state.to(accum_dtype(hidden))


def keep_state(layer: Any, cache: Any, state: Tensor) -> None:
    """Let the cache hold a state, shaped as the layer's model has it.

    A later state takes the place of an earlier one without a copy: nothing on a CPU relies on its address.
    """
    if cache is None:
        return
    held = cache.layers[layer.layer_idx].recurrent_states
    if held.get(0) is None:
        cache.update_recurrent_state(state, layer.layer_idx)
    else:
        held[0] = state
