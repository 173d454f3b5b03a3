"""attend: exact attention weights over the pairs that a pattern allows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foveate.attention.biases import BiasLike
from foveate.attention.call import Call, prepare
from foveate.attention.cost import attend_cost, empty_heads, empty_partial
from foveate.attention.impl import native, tiles
from foveate.attention.impl.flex import FLEX
from foveate.attention.impl.reference import REFERENCE
from foveate.attention.impl.sdpa import SDPA
from foveate.attention.impl.selected import selected
from foveate.attention.impl.short import attend_plain
from foveate.attention.partial import Partial, lse_dtype, with_sink
from foveate.attention.weights import Weights
from foveate.counting import counted
from foveate.dispatch import Facts, Operator
from foveate.layouts.kinds import Layout
from foveate.patterns.algebra import Pattern
from foveate.patterns.rules.sequence import full


@counted("attend", attend_cost, empty_heads)
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = full,
    *,
    bias: BiasLike = None,
    weights: Weights | str = "softmax",
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention, exact over the pairs that ``pattern`` allows.

    >>> import torch
    >>> from foveate import attend, causal, sinks, window
    >>> q, k, v = torch.randn(1, 8, 300, 64), torch.randn(1, 2, 300, 64), torch.randn(1, 2, 300, 64)
    >>> attend(q, k, v, window(128) & causal | sinks(4)).shape
    torch.Size([1, 8, 300, 64])

    Args:
        q, k, v: (B, H, N, D), (B, G, M, D), (B, Gv, M, Dv); float64, float32, bfloat16 or float16, any strides.
            G and Gv each divide H: query head h reads key head ``h // (H / G)``; nothing is repeated in memory.
            Query i sits at key position ``i + M - N``: the last query meets the last key.
        pattern: which pairs are visible; a row that sees no key gives zeros.
        bias: added to the logits: a tensor that broadcasts to (B, H, N, M), ``alibi(slopes)``,
            ``relative_table(table, dims)``, ``log_decay(log_gates)``, or a list of such, all added; differentiable.
            ``score_function(fn, *tensors)`` among them changes the sum: any function of it and of (b, h, q, k).
        weights: "softmax", "sigmoid", "relu", "sparsemax", "entmax15", or ``softmax(sink=...)``, ``sigmoid(bias=...)``,
            ``relu(bias=...)``, ``entmax(alpha)``, ``sinkhorn(iterations)``,
            ``qr_squared()``.
        scale: factor on q k^T, D ** -0.5 by default: a number, or a tensor () or (B or 1, H or 1, N or 1), a
            temperature of each query, which queries are multiplied by in at least float32; differentiable.
        softcap: c in ``c * tanh(logits / c)``, applied before the bias.
        layout: where tokens live; needed by grid and point patterns, and keeps ``Packed`` sequences apart.
        dropout: probability to drop each weight by, after the softmax; the others are divided by ``1 - dropout``
            (Srivastava et al., Dropout, JMLR 2014). Nothing is drawn where it is 0; the native kernels have none.
        seed: which weights are dropped is a function of it and of (batch entry, head, query, key) alone: equal seeds
            give equal results on every implementation. By default torch's generator draws one.
        impl: "auto", or the name of an implementation (``foveate.attention.ATTEND.names``), which then runs or says
            why it cannot.

    Returns:
        (B, H, N, Dv) in the dtype of q.

    Raises:
        ValueError, TypeError: inputs that do not belong together, in words.
        NotImplementedError: an implementation asked for by name that does not support the call.

    A NaN or infinite number spoils the rows that see its key, or whose query it is in, and no others.
    """
    plain = bias is softcap is layout is None and weights == "softmax" and not dropout
    if plain and not isinstance(scale, Tensor) and ATTEND.takes("native", impl):
        out = attend_plain(q, k, v, pattern, scale)
        if out is not None:
            return out
    call, sink = prepare(
        q, k, v, pattern, bias, weights, scale, softcap, layout, needs_lse=False, dropout=dropout, seed=seed
    )
    return _run(call, sink, impl).out


@counted("attend", attend_cost, empty_partial)
def attend_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = full,
    *,
    bias: BiasLike = None,
    weights: Weights | str = "softmax",
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    first: tuple[int, int] = (0, 0),
    impl: str = "auto",
) -> Partial:
    """Like :func:`attend`, with the log of each row's sum of weights, so that parts can be merged exactly.

    >>> import torch
    >>> from foveate import attend_partial
    >>> q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
    >>> attend_partial(q, k, v).lse.shape
    torch.Size([1, 2, 5])

    Returns ``Partial(out, lse)``: lse is float32 (float64 for float64 inputs), -inf for a row that sees no key,
    and None for sigmoid and ReLU weights. A sink counts in lse. Sparsemax, entmax and Sinkhorn weights, of which parts
    do not merge, raise ValueError. ``first`` are the numbers of the first query and key in a whole of which these are
    part: with the same seed the parts drop what the whole would drop.
    """
    call, sink = prepare(
        q, k, v, pattern, bias, weights, scale, softcap, layout, needs_lse=True, dropout=dropout, seed=seed, first=first
    )
    return _run(call, sink, impl)


def _run(call: Call, sink: Tensor | None, impl: str) -> Partial:
    if call.v.shape[3]:
        partial = ATTEND(call, impl)
    else:  # kernels have at least one channel to write
        out, lse = ATTEND(replace(call, v=torch.nn.functional.pad(call.v, (0, 1))), impl)
        partial = Partial(out[..., :0], lse)
    return partial if sink is None else with_sink(partial, sink)


def _no_pairs(call: Call) -> Partial | None:
    """What comes of no pairs at all: zeros, whose gradients are zeros."""
    if 0 not in (call.batch, call.heads, call.num_queries, call.num_keys):
        return None
    connected = sum(x.flatten()[:0].sum().to(call.q.dtype) for x in call.tensors if x.is_floating_point())
    shape = (call.batch, call.heads, call.num_queries)
    out = call.q.new_zeros(*shape, call.v.shape[3]) + connected
    if call.kind != "softmax":
        return Partial(out, None)
    return Partial(out, call.q.new_full(shape, float("-inf"), dtype=lse_dtype(call.q)) + connected)


def _described(call: Call) -> Facts:
    slow = call.pattern.slow_because
    return {"pattern": str(call.pattern)} | ({} if slow is None else {"slow": slow})


ATTEND: Operator[Call, Partial] = Operator(
    "attend",
    [selected("native", native), SDPA, FLEX, selected("tiles", tiles), REFERENCE],
    describe=_described,
    trivial=_no_pairs,
)
