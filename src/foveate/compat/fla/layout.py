"""A call in flash-linear-attention's layout as a call of `recur`, and its results back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from foveate.counts import whole_numbers
from foveate.precision import accum_dtype
from foveate.recurrence import recur

LAYOUT = "tensors are [B, T, H, D]: batch, tokens, heads, dim"

Result = tuple[Tensor, Tensor | None]


class Decay(NamedTuple):
    """Log-factors of the state at most 0, under the caller's name for them; None fades nothing."""

    name: str
    log: Tensor | None
    per: Literal["head", "token", "channel"]  # (HV,), (B, T, HV), (B, T, HV, K)


@dataclass(frozen=True)
class Sequences:
    """How tokens are cut into sequences, the state that each begins with, and whether its last one is wanted."""

    initial_state: Tensor | None = None  # (N, H, K, V), or (N, H, V, K) with the values first
    output_final_state: bool = False
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    reverse: bool = False
    state_v_first: bool = False

    def lengths(self, batch: int, num_tokens: int) -> list[int] | None:
        """Tokens of each sequence in the order of the computation; None if every batch entry is one sequence."""
        if self.cu_seqlens is None:
            if self.cu_seqlens_cpu is not None:
                raise ValueError("cu_seqlens_cpu is a copy of cu_seqlens for the host; pass cu_seqlens as well")
            return None
        if batch != 1:
            raise ValueError(f"with cu_seqlens all sequences lie one after another in a batch of 1, got {batch}")
        lengths = lengths_of(self.cu_seqlens if self.cu_seqlens_cpu is None else self.cu_seqlens_cpu, num_tokens)
        return lengths[::-1] if self.reverse else lengths

    def turned(self, state: Tensor, packed: bool) -> Tensor:
        """A state from their order of axes and sequences to recur's, or back."""
        state = state.mT if self.state_v_first else state
        return state.flip(0) if self.reverse and packed else state

    def first(self, wanted: tuple[int, ...], dtype: torch.dtype, packed: bool) -> Tensor | None:
        """The initial state as recur takes it, wanted (N, H, K, V)."""
        if self.initial_state is None:
            return None
        shown = (*wanted[:2], wanted[3], wanted[2]) if self.state_v_first else wanted
        if tuple(self.initial_state.shape) != shown:
            order = "[N, H, V, K]" if self.state_v_first else "[N, H, K, V]"
            raise ValueError(f"initial_state must be {order} = {shown}, got {tuple(self.initial_state.shape)}")
        return self.turned(self.initial_state, packed).to(dtype)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    *,
    scale: float | None,
    decay: Decay | None = None,
    beta: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bonus: Tensor | None = None,
) -> Result:
    """Recur over q, k [B, T, H, K], v [B, T, HV, V], beta [B, T, HV], low_rank [B, T, HV, K], bonus [HV, K]."""
    log = None if decay is None else decay.log
    a, b = (None, None) if low_rank is None else low_rank
    check_layout(q, k, v, decay, beta=beta, a=a, b=b, u=bonus)
    batch, num_tokens, heads, dim_v = v.shape
    lengths = sequences.lengths(batch, num_tokens)
    packed = lengths is not None
    wanted = (batch if lengths is None else len(lengths), heads, q.shape[3], dim_v)

    def facing(x: Tensor) -> Tensor:
        return (x.flip(1) if sequences.reverse else x).transpose(1, 2)

    out, state = recur(
        facing(shared(q, heads)),
        facing(k),
        facing(v),
        decay=log if log is None or log.dim() == 1 else facing(log),
        beta=None if beta is None else facing(beta),
        low_rank=None if a is None or b is None else (facing(a), facing(b)),
        bonus=bonus,
        scale=scale,
        state=sequences.first(wanted, accum_dtype(q, k, v), packed),
        lengths=lengths,
    )
    out = out.transpose(1, 2)
    out = out.flip(1) if sequences.reverse else out
    return out, sequences.turned(state, packed) if sequences.output_final_state else None


def check_layout(q: Tensor, k: Tensor, v: Tensor, decay: Decay | None, **others: Tensor | None) -> None:
    """Refuse what does not fit together, in their letters."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or q.shape[:2] != v.shape[:2]:
        raise ValueError(f"q and k must be [B, T, H, K], v [B, T, HV, V], got {shapes}; {LAYOUT}")
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape [B, T, H, K], got {shapes}; {LAYOUT}")
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"the heads of v must be a multiple of those of q and k, got {shapes}; {LAYOUT}")
    batch, num_tokens, heads = v.shape[:3]
    per = {"head": (heads,), "token": (batch, num_tokens, heads), "channel": (batch, num_tokens, heads, q.shape[3])}
    fits = {"beta": per["token"], "u": (heads, q.shape[3])} | ({} if decay is None else {decay.name: per[decay.per]})
    named = others if decay is None else {decay.name: decay.log, **others}
    for name, x in named.items():
        wanted = fits.get(name, per["channel"])
        if x is not None and tuple(x.shape) != wanted:
            raise ValueError(f"{name} must be {wanted} beside {shapes}, got {tuple(x.shape)}; {LAYOUT}")


def shared(x: Tensor, heads: int) -> Tensor:
    """Each head of x (B, T, H, K) for as many of ``heads`` as share it."""
    share = heads // x.shape[2]
    return x if share == 1 else x.unsqueeze(3).expand(-1, -1, -1, share, -1).flatten(2, 3)


def lengths_of(cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    """Differences of the offsets [0, ..., num_tokens].

    >>> lengths_of(torch.tensor([0, 3, 3, 7]), 7)
    [3, 0, 4]
    """
    offsets = whole_numbers("cu_seqlens", cu_seqlens)
    lengths = [end - start for start, end in pairwise(offsets)]
    if not lengths or offsets[0] != 0 or offsets[-1] != num_tokens or min(lengths) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to the {num_tokens} tokens there are, got {list(offsets)}")
    return lengths


def refuse(**options: object) -> None:
    """Refuse each option that was given, by name: ``refuse(gv=None)`` passes."""
    if options.get("head_first") is False:
        warnings.warn(f"head_first is deprecated: {LAYOUT}; leave it out", DeprecationWarning, stacklevel=3)
    for name, value in options.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} is not supported by foveate.compat.fla: {WHY[name]}")


WHY = {
    "gv": "recur fades the rows of its states, not their columns; leave gv out",
    "head_first": f"it has been removed there too; {LAYOUT}, so pass x.transpose(1, 2)",
    "output_attentions": "no weights between pairs of tokens are formed; leave it False",
    "cp_context": "sequences are not split over devices; leave it None",
    "return_intermediate_states": "only the last state is kept; cut the sequence and pass initial_state on",
    "use_graph": "it is about capturing CUDA graphs of their kernels; leave it False",
}


def v_first(state_v_first: bool, transpose_state_layout: bool | None) -> bool:
    """``state_v_first`` by either of its names."""
    if transpose_state_layout is None:
        return state_v_first
    if state_v_first:
        raise ValueError("transpose_state_layout is the old name of state_v_first; pass only one of them")
    warnings.warn("transpose_state_layout is deprecated: it is now state_v_first", DeprecationWarning, stacklevel=3)
    return transpose_state_layout
