"""attend_stored: attention of a few queries to what a decoder keeps, in whatever form it keeps it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.attention.call import FLOATS
from foveate.attention.partial import Partial, lse_dtype
from foveate.attention.stored.call import StoredCall
from foveate.attention.stored.definition import attend_dequantised
from foveate.attention.stored.native import NATIVE
from foveate.attention.stored.segment import Segment
from foveate.counting import Cost, counted
from foveate.dispatch import Facts, Implementation, Operator, as_it_is, nothing


def stored_cost(q: Tensor, stored: Sequence[Segment], **_: Any) -> Cost:
    """Operations of attend_stored: a product of D and one of Dv channels for each query and kept token."""
    cost = Cost(0)
    for one in stored:
        tokens = one.batch * one.heads * one.slots if one.lengths is None else int(one.counts.sum())
        pairs = tokens * q.shape[1] // max(one.heads, 1) * q.shape[2]
        flops = 2 * (one.k.shape[3] + one.v.shape[3]) * pairs
        room = max(math.prod(one.k.shape[:3]), 1)  # tokens of one head, as many as all pages hold
        read = tokens * (one.k.nbytes + one.v.nbytes) // room
        cost = Cost(cost.flops + flops, cost.pairs + pairs, cost.computed + pairs, cost.read + read)
    return cost


def empty_stored(q: Tensor, stored: Sequence[Segment], **_: Any) -> Partial:
    """What attend_stored returns, without its numbers."""
    shape = q.shape[:3]
    return Partial(q.new_empty(*shape, stored[0].v.shape[3]), q.new_empty(shape, dtype=lse_dtype(q)))


@counted("attend", stored_cost, empty_stored)
def attend_stored(
    q: Tensor,
    stored: Sequence[Segment],
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> Partial:
    """Attention of the last N tokens' queries to all tokens stored, read as they are stored, in parts that merge.

    The segments follow one another: int4 of a long past, its latest tokens as floats, pages of any of these, as many
    tokens as each head has. On a CPU the native kernel reads packed codes where they lie and applies scales to
    queries and to sums; elsewhere they are made floats first.

    >>> import torch
    >>> from foveate import Segment, attend_stored, quantise
    >>> k, v = torch.randn(1, 2, 500, 64), torch.randn(1, 2, 500, 64)
    >>> old = Segment(quantise(k[:, :, :400], "int4", by="channel", group=100), quantise(v[:, :, :400], "int4"))
    >>> new = Segment(k[:, :, 400:], v[:, :, 400:])
    >>> attend_stored(torch.randn(1, 8, 1, 64), [old, new]).out.shape
    torch.Size([1, 8, 1, 64])

    Args:
        q: (B, H, N, D), float64, float32, bfloat16 or float16.
        stored: segments of keys (D channels) and values (Dv) with B entries and G heads each, G dividing H.
        causal: whether query i sees all tokens but the last N - 1 - i of its head; else it sees all.
        scale: factor on q k^T, D ** -0.5 by default.
        softcap: c in ``c * tanh(logits / c)``, applied before the segments' biases.
        impl: "auto", "native" or "reference".

    Returns:
        ``Partial(out, lse)``: out (B, H, N, Dv) in the dtype of q, zeros where a query sees nothing, and lse
        (B, H, N) float32 (float64 for float64 queries), -inf there.

    Raises:
        ValueError, TypeError: tensors that do not belong together, page numbers that there are not.
        NotImplementedError: an implementation asked for by name that cannot run the call.
    """
    call = _checked(q, list(stored), causal, scale, softcap)
    return STORED(call, impl)


def _checked(q: Tensor, stored: list[Segment], causal: bool, scale: float | None, softcap: float | None) -> StoredCall:
    if q.dim() != 4 or q.dtype not in FLOATS:
        raise TypeError(f"q is (batch, heads, queries, channels) of floats; got {q.dtype} {tuple(q.shape)}")
    if not stored:
        raise ValueError("attend_stored takes at least one Segment; got none")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be a positive number; got {softcap}")
    batch, heads, queries, dim = q.shape
    key_heads, value_dim = stored[0].heads, stored[0].v.shape[3]
    for one in stored:
        have = (one.batch, one.heads, one.k.shape[3], one.v.shape[3])
        if have != (batch, key_heads, dim, value_dim) or not key_heads or heads % key_heads:
            raise ValueError(
                f"q {tuple(q.shape)} meets segments of {batch} entries, key heads that divide {heads}, {dim} channels"
                f" of keys and {value_dim} of values; got {have[0]}, {have[1]}, {have[2]} and {have[3]}"
            )
        if any(x.device != q.device for x in one.tensors):
            raise ValueError(f"all tensors of a segment must be on {q.device}, as q is")
        if one.bias is not None:
            _check_bias(one.bias, (batch, heads, queries, one.slots))
    return StoredCall(q, stored, causal, q.shape[3] ** -0.5 if scale is None else float(scale), softcap)


def _check_bias(bias: Tensor, want: tuple[int, ...]) -> None:
    fits = bias.dim() == 4 and all(x in (1, n) for x, n in zip(bias.shape, want, strict=True))
    if not fits or bias.shape[3] != want[3]:
        raise ValueError(f"a segment's bias is (B or 1, H or 1, N or 1, slots) = {want}; got {tuple(bias.shape)}")


def _nothing(call: StoredCall) -> Partial | None:
    """What comes of no queries or no slots."""
    some = any(one.slots for one in call.stored)
    if call.q.numel() and some:
        return None
    out = torch.zeros_like(empty_stored(call.q, call.stored).out)
    return Partial(out, out.new_full(out.shape[:3], float("-inf"), dtype=lse_dtype(out)))


def _described(call: StoredCall) -> Facts:
    return {"segments": len(call.stored)}


REFERENCE = Implementation("reference", nothing, as_it_is, attend_dequantised)
STORED: Operator[StoredCall, Partial] = Operator(
    "attend_stored", [NATIVE, REFERENCE], describe=_described, trivial=_nothing
)
