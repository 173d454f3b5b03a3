"""JRT-RNN: linear attention that reads a prefix as a whole."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from foveate.catalogue.registry import register
from foveate.mixers.base import StepOutput, split_heads
from foveate.mixers.linear.based_linear import BasedLinear
from foveate.mixers.recurrent import Lengths, RecurOptions, RecurrentState
from foveate.precision import to_accum
from foveate.recurrence import recur


class Unread(NamedTuple):
    """The state of a text whose prefix is still to come."""

    recurrent: Tensor
    tails: tuple[Tensor, ...]


@register(
    "jrt_rnn",
    papers=("JRT-RNN",),
    formula="o_i = φ(q_i)ᵀ (S_i + P) / φ(q_i)ᵀ (z_i + p), P = Σ_{j≤M} φ(k'_j) v'_jᵀ, p = Σ_{j≤M} φ(k'_j)",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes="S_i and z_i are Based's causal sums. The paper also repeats the context in the prompt: that needs no mixer.",
)
class JRT(BasedLinear):
    """Linear attention that knows its prefix as a whole, by a second set of keys and values, and the rest causally.

    The first ``prefix`` real tokens of a sequence are known to all its queries. To decode, hand the whole prompt to
    ``prefill``, or to ``read_prompt``, which takes prefixes of any length, then go on with ``decode``:

    >>> mixer = JRT(64, heads=4, prefix=30)
    >>> mixer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    >>> out, state = mixer.read_prompt(torch.randn(2, 12, 64))
    >>> out, state = mixer.decode(torch.randn(2, 1, 64), state)
    """

    tiny: ClassVar[dict[str, Any]] = {"prefix": 9}
    exempt: ClassVar[dict[str, str]] = {
        "causality": "queries inside the prefix see all of it",
        "causal gradients": "queries inside the prefix see all of it",
        "decode": "the prefix is read at once",
        "prefill": "a prompt shorter than the prefix is a shorter prefix",
        "prefill in chunks": "the prefix is read at once",
    }

    def __init__(self, dim: int, heads: int = 8, *, prefix: int = 1024, **options: Unpack[RecurOptions]) -> None:
        super().__init__(dim, heads, **options)
        if prefix < 0:
            raise ValueError(f"prefix is a number of tokens, 0 or more; got {prefix}")
        self.prefix = prefix
        self.to_prefix_k = nn.Linear(dim, self.to_k.out_features, bias=False)
        self.to_prefix_v = nn.Linear(dim, self.to_v.out_features, bias=False)

    def empty_state(self, batch: int, capacity: int | None) -> Unread:  # type: ignore[override]
        return Unread(*super().empty_state(batch, capacity))

    def mix_after(self, x: Tensor, state: RecurrentState | Unread) -> StepOutput:
        return self.read_prompt(x, self.prefix) if isinstance(state, Unread) else super().mix_after(x, state)

    def read_prompt(self, x: Tensor, prefix: int | Tensor | None = None, padding: Tensor | None = None) -> StepOutput:
        """Mix sequences x (B, N, C) of which the first ``prefix`` real tokens are known at once, with the state after.

        ``prefix`` is a number, or one for each sequence (B,); None is all tokens. ``padding`` (B, N) is True at real
        tokens.
        """
        self.check(x, None, None, padding)
        key_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if padding is None else padding
        x = x.masked_fill(~key_mask.unsqueeze(-1), 0)
        if prefix is None:
            known = key_mask
        else:
            reach = prefix.unsqueeze(-1) if isinstance(prefix, Tensor) else prefix
            known = key_mask & (key_mask.cumsum(1) <= reach)
        state = RecurrentState(self.prefix_state(x, known), ())
        out, state = super().flow(x, x, state, None, padding)
        return StepOutput(out * key_mask.unsqueeze(-1), state)

    def prefix_state(self, x: Tensor, known: Tensor) -> Tensor:
        """The sums P and p over the tokens ``known`` (B, N), (B, G, F, Dv + 1)."""
        k, v = (split_heads(layer(x), self.kv_heads) for layer in (self.to_prefix_k, self.to_prefix_v))
        k = self.feature_map(k).masked_fill(~known[:, None, :, None], 0)
        return recur(k[:, :, :0], k, pad(to_accum(v), (0, 1), value=1.0), causal=False).state

    def flow(
        self, x: Tensor, context: Tensor, state: Any = None, lengths: Lengths = None, padding: Tensor | None = None
    ) -> StepOutput:
        if state is not None:
            return super().flow(x, context, state, lengths, padding)
        if lengths is None:
            return self.read_prompt(x, self.prefix, padding)
        pieces = x.split(list(lengths), dim=1)
        key_mask = [None] * len(pieces) if padding is None else padding.split(list(lengths), dim=1)
        documents = [self.read_prompt(piece, self.prefix, each) for piece, each in zip(pieces, key_mask, strict=True)]
        return StepOutput(torch.cat([out for out, _ in documents], dim=1), documents[-1].state)
