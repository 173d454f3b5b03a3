"""Test-time training: a state that is a small network, trained on every token and read by running it."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from foveate.dispatch import Facts, Operator
from foveate.precision import accum_dtype
from foveate.recurrence.ttt.impl.dual import DUAL
from foveate.recurrence.ttt.impl.reference import REFERENCE
from foveate.recurrence.ttt.inputs import Call, InnerModel, Norm, TTTInputs, init_inner_state


class TTTOutput(NamedTuple):
    """Outputs (B, H, N, D) in v's dtype, and the inner network after the last token."""

    out: Tensor
    state: InnerModel


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    weight: Tensor,
    norm: tuple[Tensor, Tensor],
    *,
    step_scale: Tensor | None = None,
    batch: int = 16,
    state: InnerModel | None = None,
    impl: str = "auto",
) -> TTTOutput:
    """Teach a linear map to turn k into v while reading, and let it answer q: TTT-Linear.

    The state is the map f(x) = x + LN(x W + b). Token t takes the gradient of |f(k_t) - v_t|^2 / 2 at the weights
    W_0 that entered its mini-batch, and is answered by the weights with all gradients G of the mini-batch so far:

        W_t = W_0 - pace_t sum_{s <= t} eta_s G_s,    o_t = f(q_t; W_t)

    Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", arXiv 2407.04620.

    >>> import torch
    >>> q, k, v = torch.randn(3, 2, 4, 50, 8).unbind(0)
    >>> weight, norm = torch.zeros(4, 9, 8), (torch.ones(4, 8), torch.zeros(4, 8))
    >>> out, state = ttt_linear(q, k, v, torch.full((2, 4, 50), 0.1), weight, norm)
    >>> out.shape, state.weights[0].shape, state.seen
    (torch.Size([2, 4, 50, 8]), torch.Size([2, 4, 9, 8]), 2)

    Args:
        q, k, v: (B, H, N, D).
        eta: learning rates (B, H, N).
        weight: where the map begins, (H, D + 1, D), the last row being the bias.
        norm: weight and bias of LN, (H, D) each.
        pace: factors on the sum by the place in the mini-batch, (batch,); 1 everywhere by default.
        batch: tokens in a mini-batch, 16 in the paper.
        state: what an earlier call returned, to go on from there; its mini-batch is finished first.
        impl: "reference" (token by token, by automatic differentiation of the loss), "dual" (a mini-batch at a time,
            by matrix products) or "auto", the latter.

    Floating dtypes in any mixture: arithmetic and state are float64 if one of them is and float32 otherwise.
    Differentiable in every tensor, through the learning too.

    Raises ValueError where shapes do not fit together.
    """
    return _ttt(q, k, v, eta, (weight,), norm, step_scale, batch, state, impl)


def ttt_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    weights: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
    *,
    step_scale: Tensor | None = None,
    batch: int = 16,
    state: InnerModel | None = None,
    impl: str = "auto",
) -> TTTOutput:
    """`ttt_linear` with a network of two layers in place of the linear map: TTT-MLP.

    f(x) = x + LN(gelu(x W_1 + b_1) W_2 + b_2), with GELU in its tanh form. ``weights`` are (H, D + 1, F) and
    (H, F + 1, D), F being 4 D in the paper. All else is as in `ttt_linear`.

    >>> import torch
    >>> q, k, v = torch.randn(3, 2, 4, 50, 8).unbind(0)
    >>> weights, norm = (torch.randn(4, 9, 32), torch.randn(4, 33, 8)), (torch.ones(4, 8), torch.zeros(4, 8))
    >>> ttt_mlp(q, k, v, torch.full((2, 4, 50), 0.1), weights, norm).out.shape
    torch.Size([2, 4, 50, 8])
    """
    return _ttt(q, k, v, eta, weights, norm, step_scale, batch, state, impl)


def _ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    weights: tuple[Tensor, ...],
    norm: tuple[Tensor, Tensor],
    step_scale: Tensor | None,
    batch: int,
    state: InnerModel | None,
    impl: str,
) -> TTTOutput:
    _check(q, k, v, eta, weights, norm, step_scale, batch, state)
    dtype = accum_dtype(q, k, v, eta, *weights)
    step_scale = q.new_ones(batch, dtype=dtype) if step_scale is None else step_scale
    heads = Norm(*(x.to(dtype).unsqueeze(1) for x in norm))
    inputs = TTTInputs(q.to(dtype), k.to(dtype), v.to(dtype), eta.to(dtype).unsqueeze(-1), heads, step_scale.to(dtype))
    out, inner = TTT(Call(inputs, state or init_inner_state(tuple(x.to(dtype) for x in weights), q.shape[0])), impl)
    return TTTOutput(out.to(v.dtype), inner)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    weights: tuple[Tensor, ...],
    norm: tuple[Tensor, Tensor],
    step_scale: Tensor | None,
    batch: int,
    state: InnerModel | None,
) -> None:
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v are (batch, heads, length, dim), all of one shape; got {shapes}")
    heads, dim = q.shape[1], q.shape[3]
    if eta.shape != q.shape[:3]:
        raise ValueError(f"eta is (batch, heads, length), {tuple(q.shape[:3])}; got {tuple(eta.shape)}")
    if batch < 1 or (step_scale is not None and step_scale.shape != (batch,)):
        raise ValueError(f"batch is 1 or more and pace one factor for each place in it; got {batch} and {step_scale}")
    widths = [dim, *(weight.shape[-1] for weight in weights[:-1]), dim]
    wanted = [(heads, fan_in + 1, fan_out) for fan_in, fan_out in pairwise(widths)]
    if [tuple(weight.shape) for weight in weights] != wanted:
        raise ValueError(f"weights are {wanted}, the last row a bias; got {[tuple(w.shape) for w in weights]}")
    if any(x.shape != (heads, dim) for x in norm):
        raise ValueError(f"norm is a weight and a bias, {(heads, dim)} each; got {[tuple(x.shape) for x in norm]}")
    if state is not None:
        _check_state(state, [(q.shape[0], *shape) for shape in wanted], batch)


def _check_state(state: InnerModel, wanted: list[tuple[int, ...]], batch: int) -> None:
    for tensors in state[:2]:
        if [tuple(x.shape) for x in tensors] != wanted:
            raise ValueError(f"the state holds weights {wanted}; got {[tuple(x.shape) for x in tensors]}")
    if not 0 <= state.seen < batch:
        raise ValueError(f"the state's mini-batch has seen 0 to {batch - 1} tokens; got {state.seen}")


def _described(call: Call) -> Facts:
    return {"layers": len(call.inner.weights)}


TTT: Operator[Call, tuple[Tensor, InnerModel]] = Operator("ttt", [DUAL, REFERENCE], describe=_described)
