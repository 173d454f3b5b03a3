"""The short way for plain calls: no gradient, bias or layout, a band as pattern, straight to a native kernel.

A decoding step of a small head computes for a microsecond; checking and describing a general call takes thirty.
Whatever is not plain, or not right, gets None and goes the long way, which says what is wrong.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from foveate.attention.impl.plan import WIDEST
from foveate.kernels.cpu import call as c
from foveate.kernels.cpu.loader import num_threads
from foveate.kernels.cpu.short import addresses, entry, head_of
from foveate.layouts.kinds import Sequence
from foveate.patterns.algebra import Pattern
from foveate.patterns.band import Band, band_of

HEAD, REST = head_of(c.AttendArgument, before="selection.batches")  # no lists, no biases, no gradients


def attend_plain(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float | None) -> Tensor | None:
    """Heads out (B, H, N, Dv) of a plain call; None if it is none."""
    kernel, band = entry("foveate_attend_forward"), _band(pattern) if _may_be_band(pattern) else None
    call = None if kernel is None or band is None else described(q, k, v, 0, scale, band)
    if kernel is None or call is None:
        return None
    argument, out = call
    status = kernel(argument)
    if status:
        c.check(status)
    return out


def described(
    q: Tensor, k: Tensor, v: Tensor, kind: int, scale: float | None, band: Band
) -> tuple[bytes, Tensor] | None:
    """A plain call as kernels take it, and the tensor that they write to; None if it is none."""
    at = addresses(q, k, v)
    if at is None or not (q.dtype is k.dtype is v.dtype and q.dim() == k.dim() == v.dim() == 4):
        return None
    batch, heads, num_queries, dim = q.shape
    k_batch, k_heads, num_keys, k_dim = k.shape
    v_batch, v_heads, v_keys, value_dim = v.shape
    fits = batch == k_batch == v_batch and dim == k_dim and num_keys == v_keys and 0 < dim <= WIDEST
    if not (fits and k_heads and v_heads and value_dim <= WIDEST) or heads % k_heads or heads % v_heads:
        return None
    out = q.new_empty((batch, heads, num_queries, value_dim))  # sooner made than by torch.empty
    head = HEAD.pack(
        at[0], heads, *q.stride(),
        at[1], k_heads, *k.stride(),
        at[2], v_heads, *v.stride(),
        out.data_ptr(), heads, *out.stride(),
        0, c.DTYPES[q.dtype], kind, num_threads(), batch, num_queries, num_keys, dim, value_dim,
        dim**-0.5 if scale is None else scale, 0.0,
        *band,
    )  # fmt: skip
    return head + REST, out


def _may_be_band(pattern: object) -> bool:
    return isinstance(pattern, Pattern) and not pattern.tensors  # nor may one that holds tensors be kept


@lru_cache(maxsize=256)
def _band(pattern: Pattern) -> Band | None:
    return band_of(pattern, Sequence())
