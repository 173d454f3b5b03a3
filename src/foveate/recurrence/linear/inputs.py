"""The inputs of a recurrence as its implementations see them: cut along time, grouped by state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.precision import accum_dtype

Lengths = Sequence[int] | None


class LowRank(NamedTuple):
    """What a token's b (a^T S) is made of, beside the fading of S."""

    a: Tensor  # (B, any divisor of H, M, D), or one per state
    b: Tensor


class Grouped(NamedTuple):
    """All inputs in the arithmetic's dtype, heads gathered by the state they share.

    R query heads read each of the S states. The decay broadcasts along every axis where it has size 1.
    """

    q: Tensor  # (B, S, R, N, D), scaled
    k: Tensor  # (B, S, M, D)
    v: Tensor  # (B, S, M, Dv)
    decay: Tensor  # (B or 1, S or 1, M or 1, D or 1)
    beta: Tensor | None  # (B, S, M, 1)
    low_rank: LowRank | None  # (B, S, M, D) each
    bonus: Tensor | None  # (B or 1, S, R, M or 1, D)


@dataclass(frozen=True)
class Tokens:
    """A stretch of tokens, as the caller laid it out. Views only: nothing is copied before `grouped`."""

    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, G, M, D)
    v: Tensor  # (B, Gv, M, Dv)
    decay: Tensor  # (B or 1, any divisor of H, M or 1, D or 1)
    beta: Tensor | None  # (B, any divisor of H, M, 1)
    scale: float
    low_rank: LowRank | None = None
    bonus: Tensor | None = None  # (B or 1, H, M or 1, D): queries read the state before the token, and this of it
    fades: bool = True  # whether decay is more than zeros

    @property
    def dtype(self) -> torch.dtype:
        """What the arithmetic and the state are held in."""
        return accum_dtype(self.q, self.k, self.v)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        per_state = (self.k, self.v, self.decay, self.beta, *(self.low_rank or ()))
        heads = [x.size(1) for x in per_state if x is not None]
        return self.q.size(0), reduce(_lcm, heads), self.q.size(3), self.v.size(3)

    def split(self, lengths: Sequence[int]) -> list[Tokens]:
        """Consecutive stretches. Uses torch.split, whose backward is one cat, where slices would each pad."""
        low_rank = self.low_rank or (None, None)
        columns = (self.q, self.k, self.v, self.decay, self.beta, *low_rank, self.bonus)
        pieces = zip(*(_split(x, lengths) for x in columns), strict=True)
        return [
            Tokens(q, k, v, decay, beta, self.scale, None if a is None else LowRank(a, b), bonus, self.fades)
            for q, k, v, decay, beta, a, b, bonus in pieces
        ]

    def grouped(self) -> Grouped:
        k, v = self.per_state(self.k), self.per_state(self.v)
        decay = self.decay.to(self.dtype) if self.decay.size(1) == 1 else self.per_state(self.decay)
        beta = None if self.beta is None else self.per_state(self.beta)
        low_rank = None if self.low_rank is None else LowRank(*map(self.per_state, self.low_rank))
        return Grouped(self.queries(), k, v, decay, beta, low_rank, self._bonus())

    def _bonus(self) -> Tensor | None:
        return None if self.bonus is None else self.bonus.to(self.dtype).unflatten(1, (self.state_shape[1], -1))

    def queries(self) -> Tensor:
        return self.q.to(self.dtype).unflatten(1, (self.state_shape[1], -1)) * self.scale

    def per_state(self, x: Tensor) -> Tensor:
        """Give each state its head of x; a copy only where several states, but not all, share one."""
        num_states = self.state_shape[1]
        x = x.to(self.dtype)
        if x.size(1) == 1:
            return x.expand(-1, num_states, -1, -1)
        share = num_states // x.size(1)
        return x.unsqueeze(2).expand(-1, -1, share, -1, -1).flatten(1, 2)


class Call(NamedTuple):
    """A call of recur, checked and completed; an empty state is made of zeros before."""

    tokens: Tokens
    state: Tensor  # (B, S, D, Dv), or (len(lengths), S, D, Dv)
    lengths: Lengths
    causal: bool
    chunk: int


def state_facts(call: Call) -> dict[str, Any]:
    """What `explain` says of any call's state."""
    return {
        "states": call.state.shape[0] * call.state.shape[1],
        "state_bytes": call.state.numel() * call.state.element_size(),
    }


Form = Callable[[Tokens, Tensor], tuple[Tensor, Tensor]]


def one_by_one(run: Form, tokens: Tokens, state: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    """Run a form that knows nothing of packed sequences on each of them."""
    if lengths is None:
        return run(tokens, state)
    pairs = zip(tokens.split(lengths), state.split(1), strict=True)
    outs, states = zip(*(_or_nothing(run, piece, before) for piece, before in pairs), strict=True)
    return join(outs, 2), join(states, 0)


def _or_nothing(run: Form, tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    if tokens.q.size(2) == 0:
        return tokens.v.new_zeros(*tokens.q.shape[:3], tokens.v.size(3)), state
    return run(tokens, state)


def _lcm(a: int, b: int) -> int:
    """math.lcm, which torch.compile cannot trace over symbols."""
    product = a * b
    while b:
        a, b = b, a % b
    return product // a


def join(pieces: Sequence[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)


def _split(x: Tensor | None, lengths: Sequence[int]) -> list:
    if x is None or (x.size(2) == 1 and sum(lengths) != 1):  # absent, or constant in time
        return [x] * len(lengths)
    return list(x.split(list(lengths), dim=2))
