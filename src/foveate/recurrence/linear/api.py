"""The recurrence operator: what it computes, and which implementation computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.counting import counted
from foveate.counts import whole_numbers
from foveate.dispatch import Facts, Operator
from foveate.precision import accum_dtype, no_autocast
from foveate.recurrence.cost import empty_recurrence, recur_cost
from foveate.recurrence.linear.checks import check_call, check_chunk, check_state
from foveate.recurrence.linear.impl.chunks import CHUNKS
from foveate.recurrence.linear.impl.native import NATIVE
from foveate.recurrence.linear.impl.reference import REFERENCE
from foveate.recurrence.linear.impl.short import recur_plain
from foveate.recurrence.linear.inputs import Call, LowRank, Tokens


class Recurrent(NamedTuple):
    """What `recur` and `step` return."""

    out: Tensor  # (B, H, N, Dv), in v's dtype
    state: Tensor  # (B, S, D, Dv), or (len(lengths), S, D, Dv) of packed sequences


@counted("recur", recur_cost, lambda *args, **options: Recurrent(*empty_recurrence(*args, **options)))
def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bonus: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    causal: bool = True,
    chunk: int = 64,
    impl: str = "auto",
) -> Recurrent:
    """Attend through a state that every token updates and every query reads, in time linear in N.

    Token t turns the state S (D x Dv, zero at first) and reads it:

        S_t = exp(decay_t) S_{t-1} + k_t v_t^T                            without beta
        S_t = S' + beta_t k_t (v_t - k_t^T S')^T, S' = exp(decay_t) S_{t-1}   with beta, the delta rule
        S_t = exp(decay_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T      with low_rank = (a, b), as in RWKV-7
        o_t = scale q_t^T S_t
        o_t = scale q_t^T (S_{t-1} + (bonus * k_t) v_t^T)                 with bonus, as in RWKV-6

    >>> import torch
    >>> q, k, v = (torch.randn(1, 4, 100, 16) for _ in range(3))
    >>> decay = torch.tensor([0.9, 0.99, 0.999, 1.0]).log()  # one per head, as in RetNet
    >>> out, state = recur(q, k, v, decay=decay)
    >>> out.shape, state.shape
    (torch.Size([1, 4, 100, 16]), torch.Size([1, 4, 16, 16]))

    The Linear Transformer divides by q_t^T z_t, z_t being the sum of the keys so far. A column of ones beside
    v makes z one more column of the state, and the divisor one more column of out:

    >>> q, k = q.exp(), k.exp()  # any positive feature map
    >>> out = recur(q, k, torch.nn.functional.pad(v, (0, 1), value=1.0)).out
    >>> out = out[..., :-1] / out[..., -1:]

    Shapes: q (B, H, N, D), k (B, G, N, D), v (B, Gv, N, Dv), out (B, H, N, Dv).
        decay   log-factors in [-inf, 0], -inf forgets all: (heads,) constant, (B, heads, N) per token,
                (B, heads, N, D) per token and channel. Broadcasting beyond that is yours to `expand`.
        beta    writing strengths in [0, 2], (B, heads, N). Keys should have unit length: with
                beta |k|^2 > 2 the rule itself diverges.
        low_rank   a and b, (B, heads, N, D) each; it takes the place of beta. The delta rule is
                a = exp(decay) k, b = -beta k.
        bonus   (H, D), or (B, H, N, D) per token: what a query reads of its own token in place of 1, the
                state being that before the token. Not beside beta.
        state   (B, S, D, Dv), what an earlier call returned. It is not written to.
        lengths of sequences packed one after another in N, with B = 1; they may be 0. Then there is
                one state each, (len(lengths), S, D, Dv), and nothing leaks between them.
    Every head count (G, Gv, decay's and beta's) divides H: query head h uses key head h // (H / G), and so
    forth. S is their least common multiple, so query heads that share all of them share a state.

    causal=False lets every query read the final state, S_N = sum_t k_t v_t^T; it takes neither decay nor
    beta, and k and v may then have another length than q.

    scale defaults to D ** -0.5.
    chunk, a power of two, is the number of tokens that "chunks" computes at once.
    impl is "reference" (the formula, token by token), "chunks" (parallel inside chunks), "native" (C++ kernels on
    CPU: token by token with the state in the first cache) or "auto", the fastest that can. One asked for by name
    runs, or raises NotImplementedError with the reason.

    dtypes: q, k, v, decay and beta of any floating dtype; arithmetic and state are float64 if one of q, k, v
    is and float32 otherwise, also under autocast; out has v's dtype. Differentiable in every tensor, state
    included.

    Raises ValueError or TypeError on ill-fitting input. The ranges of decay and beta are checked on the CPU
    only, and not while compiling: on a GPU looking at them would wait for the device.

    Papers: Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236. Yang et al., Gated Linear Attention
    Transformers with Hardware-Efficient Training, 2312.06635. Qin et al., Lightning Attention-2, 2401.04658.
    Yang et al., Parallelizing Linear Transformers with the Delta Rule over Sequence Length, 2406.06484; Gated
    Delta Networks, 2412.06464. Peng et al., Eagle and Finch, 2404.05892 (bonus); RWKV-7 "Goose", 2503.14456.
    """
    check_chunk(chunk)
    if lengths is bonus is None and causal and RECUR.takes("native", impl):
        plain = recur_plain(q, k, v, decay, beta, low_rank, scale, state)
        if plain is not None:
            return Recurrent(*plain)
    lengths = None if lengths is None else whole_numbers("lengths", lengths)
    check_call(q, k, v, decay=decay, beta=beta, low_rank=low_rank, bonus=bonus, lengths=lengths, causal=causal)
    tokens = _tokens(q, k, v, decay, beta, scale, low_rank, bonus)
    _, *shape = tokens.state_shape
    shape = [q.size(0) if lengths is None else len(lengths), *shape]
    if state is None:
        state = torch.zeros(shape, dtype=tokens.dtype, device=q.device)
    check_state(state, shape, tokens.dtype, q.device)
    with no_autocast(q.device.type):
        return Recurrent(*RECUR(Call(tokens, state, lengths, causal, chunk), impl))


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bonus: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    impl: str = "auto",
) -> Recurrent:
    """Advance the recurrence by one token: `recur` for N = 1, as a decoder calls it.

    >>> import torch
    >>> q, k, v = (torch.randn(1, 4, 1, 16) for _ in range(3))
    >>> out, state = step(q, k, v)
    >>> out, state = step(q, k, v, state=state)

    Shapes, dtypes, errors and papers are those of `recur`; q, k and v have length 1.
    """
    if q.dim() == 4 and q.size(2) != 1:
        raise ValueError(f"step takes one token, (B, H, 1, D), got q {tuple(q.shape)}; use recur for several")
    return recur(q, k, v, decay=decay, beta=beta, low_rank=low_rank, bonus=bonus, scale=scale, state=state, impl=impl)


def _tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    low_rank: tuple[Tensor, Tensor] | None,
    bonus: Tensor | None,
) -> Tokens:
    fades = decay is not None
    if decay is None:
        decay = torch.zeros(1, 1, 1, 1, dtype=accum_dtype(q, k, v), device=q.device)
    elif decay.dim() == 1:
        decay = decay[None, :, None, None]
    elif decay.dim() == 3:
        decay = decay.unsqueeze(-1)
    beta = None if beta is None else beta.unsqueeze(-1)
    if bonus is not None and bonus.dim() == 2:
        bonus = bonus[None, :, None, :]
    scale = q.size(-1) ** -0.5 if scale is None else scale
    return Tokens(q, k, v, decay, beta, scale, None if low_rank is None else LowRank(*low_rank), bonus, fades)


def _no_tokens(call: Call) -> tuple[Tensor, Tensor] | None:
    """What comes of no tokens at all: nothing, but part of the graph."""
    q, k, v = call.tokens.q, call.tokens.k, call.tokens.v
    return ((q[..., :1] * v[:, :1]).to(v.dtype), call.state) if q.size(2) == k.size(2) == 0 else None


def _described(call: Call) -> Facts:
    tokens = call.tokens
    update = "low rank" if tokens.low_rank else "additive" if tokens.beta is None else "delta rule"
    return {"update": update, "decay": _kind_of(tokens.decay) if tokens.fades else "none"}


def _kind_of(decay: Tensor) -> str:
    if decay.size(3) > 1:
        return "per channel"
    return "per token" if decay.size(0) > 1 or decay.size(2) > 1 else "per head"


RECUR: Operator[Call, tuple[Tensor, Tensor]] = Operator(
    "recur", [NATIVE, CHUNKS, REFERENCE], describe=_described, trivial=_no_tokens
)
