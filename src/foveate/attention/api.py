"""attend: exact attention weights over the pairs that a pattern allows."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor
from torch.compiler import is_compiling

from foveate.attention.biases import BiasLike
from foveate.attention.call import Call, prepare
from foveate.attention.impl import flex, native, reference, sdpa, tiles
from foveate.attention.impl.quick import attend_plain
from foveate.attention.partial import Partial, with_sink
from foveate.attention.weights import Weights
from foveate.layouts.kinds import Layout
from foveate.options import FORCED
from foveate.patterns.algebra import Pattern
from foveate.patterns.rules.sequence import full

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "native": native,
    "sdpa": sdpa,
    "flex": flex,
    "tiles": tiles,
    "reference": reference,
}  # in the order of preference


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
            ``relu(bias=...)``, ``entmax(alpha)``, ``sinkhorn(iterations)``.
        scale: factor on q k^T, D ** -0.5 by default: a number, or a tensor () or (B or 1, H or 1, N or 1), a
            temperature of each query, which queries are multiplied by in at least float32; differentiable.
        softcap: c in ``c * tanh(logits / c)``, applied before the bias.
        layout: where tokens live; needed by grid and point patterns, and keeps ``Packed`` sequences apart.
        dropout: probability to drop each weight by, after the softmax; the others are divided by ``1 - dropout``
            (Srivastava et al., Dropout, JMLR 2014). Nothing is drawn where it is 0; the native kernels have none.
        seed: which weights are dropped is a function of it and of (batch entry, head, query, key) alone: equal seeds
            give equal results on every implementation. By default torch's generator draws one.
        impl: "auto", or one of ``foveate.attention.IMPLEMENTATIONS``, which then runs or says why it cannot.

    Returns:
        (B, H, N, Dv) in the dtype of q.

    Raises:
        ValueError, TypeError: inputs that do not belong together, in words.
        NotImplementedError: an implementation asked for by name that does not support the call.

    A NaN or infinite number spoils the rows that see its key, or whose query it is in, and no others.
    """
    plain = bias is softcap is layout is None and weights == "softmax" and not dropout
    if plain and not isinstance(scale, Tensor) and _takes_native(impl):
        out = attend_plain(q, k, v, pattern, scale)
        if out is not None:
            return out
    call, sink = prepare(
        q, k, v, pattern, bias, weights, scale, softcap, layout, needs_lse=False, dropout=dropout, seed=seed
    )
    return _run(call, sink, impl).out


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
    do not merge, raise ValueError.
    """
    call, sink = prepare(q, k, v, pattern, bias, weights, scale, softcap, layout, needs_lse=True)
    return _run(call, sink, impl)


def _run(call: Call, sink: Tensor | None, impl: str) -> Partial:
    module = choose(call, impl)
    if 0 in (call.batch, call.heads, call.num_queries, call.num_keys):
        partial = _nothing(call)
    elif call.v.shape[3] == 0:  # kernels have at least one channel to write
        out, lse = module.run(replace(call, v=torch.nn.functional.pad(call.v, (0, 1))))
        partial = Partial(out[..., :0], lse)
    else:
        partial = module.run(call)
    return partial if sink is None else with_sink(partial, sink)


def _nothing(call: Call) -> Partial:
    """What comes of no pairs at all: zeros, whose gradients are zeros."""
    connected = sum(x.flatten()[:0].sum().to(call.q.dtype) for x in call.tensors if x.is_floating_point())
    shape = (call.batch, call.heads, call.num_queries)
    out = call.q.new_zeros(*shape, call.v.shape[3]) + connected
    if call.kind != "softmax":
        return Partial(out, None)
    precise = torch.promote_types(call.q.dtype, torch.float32)
    return Partial(out, call.q.new_full(shape, float("-inf"), dtype=precise) + connected)


def _takes_native(impl: str) -> bool:
    return impl in ("auto", "native") and FORCED.get() in (None, "native") and not is_compiling()


def choose(call: Call, impl: str = "auto") -> ModuleType:
    """The implementation that runs a call: the one asked for, or the first that supports it."""
    impl = (FORCED.get() or impl) if impl == "auto" else impl
    if impl == "auto":
        return next(module for module in IMPLEMENTATIONS.values() if module.refuse(call) is None)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is 'auto' or one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    reason = IMPLEMENTATIONS[impl].refuse(call)
    if reason is not None:
        raise NotImplementedError(f"impl={impl!r} cannot run this call: {reason}")
    return IMPLEMENTATIONS[impl]
