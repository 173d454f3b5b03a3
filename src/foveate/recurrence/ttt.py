"""Test-time training: a state that is a small network, taught by every token and read by running it."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, pad

from foveate.options import FORCED

EPS = 1e-6


class Learner(NamedTuple):
    """The inner network between two tokens: its weights (B, H, fan-in + 1, fan-out), a layer each, the last row of
    each being its bias; what the unfinished mini-batch would subtract; and how many tokens that has seen."""

    weights: tuple[Tensor, ...]
    pending: tuple[Tensor, ...]
    seen: int


class Taught(NamedTuple):
    """Outputs (B, H, N, D) in v's dtype, and the inner network after the last token."""

    out: Tensor
    state: Learner


class Norm(NamedTuple):
    """Weight and bias (H, D) of the layer norm inside the inner network."""

    weight: Tensor
    bias: Tensor


class Lesson(NamedTuple):
    """What teaches: q, k, v (B, H, N, D), learning rates (B, H, N, 1), the norm (H, 1, D) and the pace (batch,)."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    norm: Norm
    pace: Tensor

    def part(self, first: int, end: int) -> Lesson:
        q, k, v, eta = (x[:, :, first:end] for x in self[:4])
        return Lesson(q, k, v, eta, self.norm, self.pace)


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    weight: Tensor,
    norm: tuple[Tensor, Tensor],
    *,
    pace: Tensor | None = None,
    batch: int = 16,
    state: Learner | None = None,
    impl: str = "auto",
) -> Taught:
    """Teach a linear map to turn k into v while reading, and let it answer q: TTT-Linear.

    The state is the map f(x) = x + LN(x W + b). Token t takes the gradient of |f(k_t) - v_t|^2 / 2 at the weights
    W_0 that entered its mini-batch, and is answered by the weights with all gradients G of the mini-batch so far:

        W_t = W_0 - pace_t sum_{s <= t} eta_s G_s,    o_t = f(q_t; W_t)

    Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", arXiv 2407.04620.

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
    return _ttt(q, k, v, eta, (weight,), norm, pace, batch, state, impl)


def ttt_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    weights: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
    *,
    pace: Tensor | None = None,
    batch: int = 16,
    state: Learner | None = None,
    impl: str = "auto",
) -> Taught:
    """`ttt_linear` with a network of two layers in place of the linear map: TTT-MLP.

    f(x) = x + LN(gelu(x W_1 + b_1) W_2 + b_2), with GELU in its tanh form. ``weights`` are (H, D + 1, F) and
    (H, F + 1, D), F being 4 D in the paper. All else is as in `ttt_linear`.

    >>> q, k, v = torch.randn(3, 2, 4, 50, 8).unbind(0)
    >>> weights, norm = (torch.randn(4, 9, 32), torch.randn(4, 33, 8)), (torch.ones(4, 8), torch.zeros(4, 8))
    >>> ttt_mlp(q, k, v, torch.full((2, 4, 50), 0.1), weights, norm).out.shape
    torch.Size([2, 4, 50, 8])
    """
    return _ttt(q, k, v, eta, weights, norm, pace, batch, state, impl)


def _ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    weights: tuple[Tensor, ...],
    norm: tuple[Tensor, Tensor],
    pace: Tensor | None,
    batch: int,
    state: Learner | None,
    impl: str,
) -> Taught:
    _check(q, k, v, eta, weights, norm, pace, batch, state)
    teach = _implementation(impl)
    dtype = reduce(torch.promote_types, [x.dtype for x in (q, k, v, eta, *weights)], torch.float32)
    pace = q.new_ones(batch, dtype=dtype) if pace is None else pace
    heads = Norm(*(x.to(dtype).unsqueeze(1) for x in norm))
    lesson = Lesson(q.to(dtype), k.to(dtype), v.to(dtype), eta.to(dtype).unsqueeze(-1), heads, pace.to(dtype))
    learner = state or beginner(tuple(x.to(dtype) for x in weights), q.shape[0])
    outs = [q.new_empty(*q.shape[:2], 0, q.shape[3], dtype=dtype)]
    for first, end in _mini_batches(q.shape[2], batch, learner.seen):
        out, learner = teach(lesson.part(first, end), learner)
        outs.append(out)
    return Taught(torch.cat(outs, 2).to(v.dtype), learner)


def beginner(weights: tuple[Tensor, ...], batch: int) -> Learner:
    """The inner networks of a batch, (H, fan-in + 1, fan-out) each, before the first token."""
    mine = tuple(weight.expand(batch, *weight.shape) for weight in weights)
    return Learner(mine, tuple(map(torch.zeros_like, mine)), 0)


def _mini_batches(length: int, batch: int, seen: int) -> list[tuple[int, int]]:
    """Ranges of tokens that end where a mini-batch does, after one that has seen so many."""
    ends = [*range(batch - seen, length, batch), length] if length else []
    return list(pairwise([0, *ends]))


def _implementation(name: str) -> Callable[[Lesson, Learner], tuple[Tensor, Learner]]:
    known = {"reference": _by_token, "dual": _by_batch}
    name = FORCED.get() or "dual" if name == "auto" else name
    if name not in known:
        raise ValueError(f'impl is "auto", "reference" or "dual"; got {name!r}')
    return known[name]


# ---- the definition ----------------------------------------------------------------------------------------


def _network(x: Tensor, weights: tuple[Tensor, ...], norm: Norm) -> Tensor:
    """f(x) for tokens x (B, H, n, D)."""
    z = x
    for layer, weight in enumerate(weights):
        z = _with_one(gelu(z, approximate="tanh") if layer else z) @ weight
    centred = z - z.mean(-1, keepdim=True)  # written out: gradients of gradients of torch's are wrong in torch.func
    unit = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return x + unit * norm.weight + norm.bias


def _loss(weights: tuple[Tensor, ...], k: Tensor, v: Tensor, norm: Norm) -> Tensor:
    return (_network(k, weights, norm) - v).square().sum() / 2


def _by_token(lesson: Lesson, learner: Learner) -> tuple[Tensor, Learner]:
    """One token after the other, each learning by automatic differentiation at the mini-batch's first weights."""
    outs = []
    for t in range(lesson.q.shape[2]):
        q, k, v, eta, norm, pace = lesson.part(t, t + 1)
        gradients = torch.func.grad(_loss)(learner.weights, k, v, norm)
        pending = tuple(old + eta * new for old, new in zip(learner.pending, gradients, strict=True))
        outs.append(_network(q, _moved(learner.weights, pending, pace[learner.seen]), norm))
        learner = _one_further(Learner(learner.weights, pending, learner.seen + 1), pace)
    return torch.cat(outs, 2), learner


# ---- the same by matrix products ---------------------------------------------------------------------------


def _by_batch(lesson: Lesson, learner: Learner) -> tuple[Tensor, Learner]:
    """Tokens of one mini-batch at once: what their gradients do to a query is attention with weights q k^T."""
    inputs, slopes = _backward(lesson, learner.weights)
    places = slice(learner.seen, learner.seen + lesson.q.shape[2])
    pace = lesson.pace[places, None]  # (n, 1)
    x, z, pending = lesson.q, lesson.q, []
    layers = zip(inputs, slopes, learner.weights, learner.pending, strict=True)
    for layer, (seen, slope, weight, before) in enumerate(layers):
        x = _with_one(gelu(z, approximate="tanh") if layer else z)  # (B, H, n, fan-in + 1)
        taught = lesson.eta * slope
        z = x @ weight - pace * (x @ before + (x @ seen.mT).tril() @ taught)
        pending.append(before + seen.mT @ taught)
    out = lesson.q + _normed(z) * lesson.norm.weight + lesson.norm.bias
    return out, _one_further(Learner(learner.weights, tuple(pending), places.stop), lesson.pace)


def _backward(lesson: Lesson, weights: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Each layer's inputs (B, H, n, fan-in + 1), and the loss's gradients by its outputs (B, H, n, fan-out)."""
    inputs, outputs, z = [], [], lesson.k
    for layer, weight in enumerate(weights):
        inputs.append(_with_one(gelu(z, approximate="tanh") if layer else z))
        z = inputs[-1] @ weight
        outputs.append(z)
    slopes = [_slope_of_norm(z, lesson)]
    for weight, z in zip(reversed(weights[1:]), reversed(outputs[:-1]), strict=True):
        slopes.append(slopes[-1] @ weight[..., :-1, :].mT * _slope_of_gelu(z))
    return inputs, slopes[::-1]


def _slope_of_norm(z: Tensor, lesson: Lesson) -> Tensor:
    """The gradient of |k + LN(z) - v|^2 / 2 by z."""
    centred = z - z.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    unit = centred / spread
    error = (lesson.k + unit * lesson.norm.weight + lesson.norm.bias - lesson.v) * lesson.norm.weight
    along = (error * unit).mean(-1, keepdim=True)
    return (error - error.mean(-1, keepdim=True) - unit * along) / spread


def _slope_of_gelu(z: Tensor) -> Tensor:
    """The derivative of GELU's tanh form."""
    root, cubic = (2 / torch.pi) ** 0.5, 0.044715
    tanh = (root * (z + cubic * z**3)).tanh()
    return (1 + tanh) / 2 + z * (1 - tanh.square()) * root * (1 + 3 * cubic * z.square()) / 2


# ---- what both share ---------------------------------------------------------------------------------------


def _with_one(x: Tensor) -> Tensor:
    """A one beside each row, for the bias."""
    return pad(x, (0, 1), value=1.0)


def _normed(z: Tensor) -> Tensor:
    return layer_norm(z, z.shape[-1:], eps=EPS)


def _moved(weights: tuple[Tensor, ...], pending: tuple[Tensor, ...], pace: Tensor) -> tuple[Tensor, ...]:
    return tuple(weight - pace * step for weight, step in zip(weights, pending, strict=True))


def _one_further(learner: Learner, pace: Tensor) -> Learner:
    """The learner; at the end of a mini-batch with its gradients taken over into the weights."""
    if learner.seen < len(pace):
        return learner
    weights = _moved(learner.weights, learner.pending, pace[-1])
    return Learner(weights, tuple(map(torch.zeros_like, weights)), 0)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    weights: tuple[Tensor, ...],
    norm: tuple[Tensor, Tensor],
    pace: Tensor | None,
    batch: int,
    state: Learner | None,
) -> None:
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v are (batch, heads, length, dim), all of one shape; got {shapes}")
    heads, dim = q.shape[1], q.shape[3]
    if eta.shape != q.shape[:3]:
        raise ValueError(f"eta is (batch, heads, length), {tuple(q.shape[:3])}; got {tuple(eta.shape)}")
    if batch < 1 or (pace is not None and pace.shape != (batch,)):
        raise ValueError(f"batch is 1 or more and pace one factor for each place in it; got {batch} and {pace}")
    widths = [dim, *(weight.shape[-1] for weight in weights[:-1]), dim]
    wanted = [(heads, fan_in + 1, fan_out) for fan_in, fan_out in pairwise(widths)]
    if [tuple(weight.shape) for weight in weights] != wanted:
        raise ValueError(f"weights are {wanted}, the last row a bias; got {[tuple(w.shape) for w in weights]}")
    if any(x.shape != (heads, dim) for x in norm):
        raise ValueError(f"norm is a weight and a bias, {(heads, dim)} each; got {[tuple(x.shape) for x in norm]}")
    if state is not None:
        _check_state(state, [(q.shape[0], *shape) for shape in wanted], batch)


def _check_state(state: Learner, wanted: list[tuple[int, ...]], batch: int) -> None:
    for tensors in state[:2]:
        if [tuple(x.shape) for x in tensors] != wanted:
            raise ValueError(f"the state holds weights {wanted}; got {[tuple(x.shape) for x in tensors]}")
    if not 0 <= state.seen < batch:
        raise ValueError(f"the state's mini-batch has seen 0 to {batch - 1} tokens; got {state.seen}")
