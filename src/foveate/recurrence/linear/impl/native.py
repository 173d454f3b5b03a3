"""recur by native CPU kernels, token by token with the state in the first cache: forward, backward, one step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate import autodiff
from foveate.dispatch import Facts, Implementation
from foveate.kernels.cpu.call import DTYPES, misaligned
from foveate.kernels.cpu.loader import library, num_threads, status
from foveate.plain import traced, transformed
from foveate.recurrence.linear.checks import check_ranges_of
from foveate.recurrence.linear.chunked.form import recur_by_chunk
from foveate.recurrence.linear.impl import abi as native_call
from foveate.recurrence.linear.impl.abi import Inputs, OutOfRange
from foveate.recurrence.linear.inputs import Call, Lengths, LowRank, Tokens, one_by_one, state_facts

WIDEST = 512  # key channels of a head
CHUNK = 64  # tokens that the definition computes at once


def refuse(call: Call) -> str | None:
    """Why this implementation cannot run the call; None if it can."""
    tokens = call.tokens
    if tokens.q.device.type != "cpu":
        return f"it runs on CPU, not on {tokens.q.device.type}"
    for name, x in (("q", tokens.q), ("k", tokens.k), ("v", tokens.v)):
        if x.dtype not in DTYPES:
            return f"it has float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
        if misaligned(x):
            return f"{name} is not aligned in memory to its numbers of {x.element_size()} bytes"
    if tokens.q.size(3) > WIDEST:
        return f"it takes up to {WIDEST} channels a key, not {tokens.q.size(3)}"
    if not call.causal:
        return "it has the causal form only; one product sums over all tokens"
    if transformed():
        return "transforms of torch.func and derivatives in forward mode are those of the other forms"
    return _absence()


@torch.compiler.assume_constant_result  # torch.compile need not look into how libraries are loaded
def _absence() -> str | None:
    return status().reason if library() is None else None


class Planned(NamedTuple):
    """What the kernels are given."""

    call: Call
    tensors: tuple[Tensor | None, ...]  # q, k, v, decay, beta, a, b and the state
    settings: tuple[Lengths, float, bool]  # of _Recurrence
    differentiable: bool


def plan(call: Call) -> Planned:
    """Gates in a dtype that kernels read, and whether states are kept for a backward pass."""
    tokens = call.tokens
    a, b = tokens.low_rank or (None, None)
    decay = tokens.decay if tokens.fades else None
    gates = (x if x is None or x.dtype in DTYPES else x.float() for x in (decay, tokens.beta, a, b))
    lengths = None if call.lengths is None else list(call.lengths)
    tensors = (tokens.q, tokens.k, tokens.v, *gates, call.state)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return Planned(call, tensors, (lengths, tokens.scale, tokens.bonus is not None), differentiable)


def run(planned: Planned) -> tuple[Tensor, Tensor]:
    """Return out (B, H, N, Dv) and the state (B, S, D, Dv) after the last token."""
    (tokens, *_), tensors, settings, differentiable = planned
    try:
        if traced(*tensors):
            out, state, _ = torch.ops.foveate.recur_forward(*tensors, *settings, differentiable)
        elif differentiable:
            out, state = autodiff.run(_Recurrence(*settings), *tensors)
        else:
            out, state, _ = _forward(*tensors, *settings, False)
    except OutOfRange:
        check_ranges_of(tokens)  # says which, and what it spans
        raise
    return (out if tokens.bonus is None else out + own_part(tokens)), state


def _facts(planned: Planned) -> Facts:
    call = planned.call
    kept = native_call.num_checkpoints(call.tokens.q, call.lengths) if planned.differentiable else 0
    return {"tokens": call.tokens.q.size(2), "kept_states": kept, "threads": num_threads(), **state_facts(call)}


def own_part(tokens: Tokens) -> Tensor:
    """What the bonus lets each query read of its own token, (B, H, N, Dv)."""
    heads = tokens.q.size(1)
    k, v = (x.to(tokens.dtype).repeat_interleave(heads // x.size(1), 1) for x in (tokens.k, tokens.v))
    assert tokens.bonus is not None
    weight = (tokens.q.to(tokens.dtype) * tokens.bonus * k).sum(-1, keepdim=True)
    return (tokens.scale * weight * v).to(tokens.v.dtype)


class _Recurrence(NamedTuple):
    """A call as autograd takes it; its inputs are q, k, v, decay, beta, a, b and the state."""

    lengths: Sequence[int] | None
    scale: float
    reads_before: bool

    def forward(self, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        out, state, checkpoints = _forward(*inputs, *self, True)
        return (out, state), (checkpoints,)

    def backward(self, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...], *inputs: Any) -> list[Tensor | None]:
        return _given(inputs, _backward(*grads, *inputs, *saved, *self))

    def definition(self, *inputs: Any) -> tuple[Tensor, ...]:
        """What the kernels compute, by chunks: in torch's own operators."""
        q, k, v, decay, beta, a, b, state = inputs
        bonus = q.new_zeros(1, q.shape[1], 1, q.shape[3]) if self.reads_before else None
        low_rank = None if a is None or b is None else LowRank(a, b)
        fading = state.new_zeros(1, 1, 1, 1) if decay is None else decay
        tokens = Tokens(q, k, v, fading, beta, self.scale, low_rank, bonus)
        return one_by_one(partial(recur_by_chunk, causal=True, chunk=CHUNK), tokens, state, self.lengths)


def _given(inputs: Sequence[Tensor | None], grads: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if x is None else grad for x, grad in zip(inputs, grads, strict=True)]


def _fit(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient per state as one of x, whose heads, tokens or entries of the batch several states may share."""
    if grad.shape[1] != x.shape[1]:
        grad = grad.unflatten(1, (x.shape[1], -1)).sum(2)
    return grad.sum_to_size(x.shape).to(x.dtype)


# ---- operators of torch's dispatcher, so that torch.compile takes them whole ---------------------------------------

_HEADS = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? a, Tensor? b, Tensor state"
_SETTINGS = "int[]? lengths, float scale, bool reads_before"
_OPERATORS = torch.library.Library("foveate", "FRAGMENT")
_OPERATORS.define(f"recur_forward({_HEADS}, {_SETTINGS}, bool keeps) -> (Tensor, Tensor, Tensor)")
_OPERATORS.define(
    f"recur_backward(Tensor grad_out, Tensor grad_state, {_HEADS}, Tensor checkpoints, {_SETTINGS}) -> "
    f"({', '.join(['Tensor'] * 8)})"
)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *heads, state, lengths, scale, reads_before, keeps = arguments
    return native_call.forward(Inputs(*heads), state, lengths, scale, reads_before, keeps)


def _backward(grad_out: Tensor, grad_state: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, decay, beta, a, b and the state; empty ones for what is not given."""
    *heads, state, checkpoints, lengths, scale, reads_before = arguments
    inputs = Inputs(*heads)
    found = native_call.backward(grad_out, grad_state, inputs, state, checkpoints, lengths, scale, reads_before)
    return tuple(grad if x is None else _fit(grad, x) for x, grad in zip((*inputs, state), found, strict=True))


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, _, v, *_, state, lengths, _, _, keeps = arguments
    count = native_call.num_checkpoints(q, lengths) if keeps else 0
    return v.new_empty(*q.shape[:3], v.shape[3]), state.new_empty(state.shape), state.new_empty(count, *state.shape[1:])


def _fake_backward(grad_out: Tensor, grad_state: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *heads, state, _, _, _, _ = arguments
    return tuple(state.new_empty(0) if x is None else x.new_empty(x.shape) for x in (*heads, state))


_OPERATORS.impl("recur_forward", _forward, "CPU")
_OPERATORS.impl("recur_backward", _backward, "CPU")
torch.library.register_fake("foveate::recur_forward", _fake_forward, lib=_OPERATORS)
torch.library.register_fake("foveate::recur_backward", _fake_backward, lib=_OPERATORS)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, lengths, scale, reads_before, _ = inputs
    ctx.settings = lengths, scale, reads_before
    ctx.save_for_backward(*tensors, output[2])


def _backward_of_forward(ctx: Any, grad_out: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    found = torch.ops.foveate.recur_backward(grad_out, grad_state, *tensors, checkpoints, *ctx.settings)
    return *_given(tensors, found), None, None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, lengths, scale, reads_before = inputs
    ctx.settings = lengths, scale, reads_before
    ctx.save_for_backward(*tensors)


def _second_backward(ctx: Any, *wanted: Tensor) -> tuple[Any, ...]:
    grad_out, grad_state, *inputs = ctx.saved_tensors
    of_grads, of_inputs = autodiff.second_gradients(
        _Recurrence(*ctx.settings).definition,
        inputs,
        [grad_out, grad_state],
        _given(inputs, wanted),
        create_graph=torch.is_grad_enabled(),
    )
    return *of_grads, *of_inputs, None, None, None, None


torch.library.register_autograd("foveate::recur_forward", _backward_of_forward, setup_context=_setup, lib=_OPERATORS)
torch.library.register_autograd(
    "foveate::recur_backward", _second_backward, setup_context=_setup_backward, lib=_OPERATORS
)

NATIVE = Implementation("native", refuse, plan, run, facts=_facts)
