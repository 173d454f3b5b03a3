"""Linear attention with a local branch, and the check of a whole tree of drafted continuations at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from foveate.catalogue.registry import register
from foveate.layers.short_conv import ShortConv
from foveate.mixers.base import StepOutput, join_heads, split_heads
from foveate.mixers.linear.linear_transformer import LinearOptions, LinearTransformer, averaged
from foveate.mixers.recurrent import Lengths, RecurrentState


@register(
    "linearized_llm",
    papers=("Linearized-LLM",),
    formula="o_i = φ(q_i)ᵀ Σ_{j≤i} φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_{j≤i} φ(k_j) + Σ_{r<w} c_r ⊙ v_{i-r}",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    notes=(
        "feature_map chooses among linear attentions, of which the paper studies seven. Padding lies at the ends of a "
        "sequence: inside it, the convolution would read it as zeros."
    ),
)
class LinearizedLLM(LinearTransformer):
    """Causal linear attention plus a masked depthwise convolution of the values, fit for speculative decoding.

    ``verify`` reads several drafted continuations in one pass, each token after its own branch of the tree:

    >>> mixer = LinearizedLLM(64, heads=4, width=3)
    >>> prompt, drafts = torch.randn(2, 50, 64), torch.randn(2, 5, 64)
    >>> _, state = mixer.prefill(prompt, mixer.init_state(2))
    >>> out = mixer.verify(drafts, [-1, 0, 1, 0, -1], state)  # 0-1-2 and 0-3 and 4 continue the prompt
    >>> _, state = mixer.prefill(drafts[:, [0, 3]], state)  # accept 0-3
    """

    def __init__(self, dim: int, heads: int = 8, *, width: int = 9, **options: Unpack[LinearOptions]) -> None:
        super().__init__(dim, heads, **options)
        self.local = ShortConv(self.kv_heads * self.value_dim, width)

    def flow(
        self, x: Tensor, context: Tensor, state: Any = None, lengths: Lengths = None, padding: Tensor | None = None
    ) -> StepOutput:
        q, k, v, _ = self.project(x, context, (), lengths)
        near, tail = self.local(join_heads(v), None if state is None else state.tails[0], lengths)
        inputs = self.inputs(x, q, k, v)
        if padding is not None:
            inputs = inputs.mask_padding(padding)
        heads, recurrent = self.run(inputs, lengths=lengths, state=None if state is None else state.recurrent)
        return StepOutput(self.joined(heads, near), RecurrentState(recurrent, (tail,)))

    def joined(self, heads: Tensor, near: Tensor) -> Tensor:
        """Tokens from the outputs of the recurrence (B, H, N, Dv + 1) and the convolved values (B, N, G * Dv)."""
        near = split_heads(near, self.kv_heads).repeat_interleave(self.heads // self.kv_heads, dim=1)
        return self.to_out(join_heads(averaged(heads).to(near.dtype) + near))

    def verify(self, x: Tensor, parents: Sequence[int], state: RecurrentState) -> Tensor:
        """Outputs (B, T, C) of drafted tokens x (B, T, C), as if each were decoded after its ancestors alone.

        ``parents`` names each token's predecessor among the drafts, which comes before it, or is -1 for those that
        continue what ``state`` has seen. The state is left alone: ``prefill`` it with the branch that is accepted.
        """
        if len(parents) != x.shape[1]:
            raise ValueError(f"each drafted token has one parent; got {x.shape[1]} tokens and {len(parents)} parents")
        above = ancestry(parents).to(x.device)
        q, k, v, _ = self.project(x, x, ())
        inputs, share = self.inputs(x, q, k, v), self.heads // self.kv_heads
        k, values, sums = (y.repeat_interleave(share, dim=1) for y in (inputs.k, inputs.v, state.recurrent))
        q = inputs.q.to(sums.dtype)
        drafted = (q @ k.to(sums.dtype).mT).masked_fill(~above, 0) @ values
        return self.joined(drafted + q @ sums, self.local_of(join_heads(v), parents, state.tails[0]))

    def local_of(self, values: Tensor, parents: Sequence[int], tail: Tensor) -> Tensor:
        """The convolution along each branch of values (B, T, G * Dv), the tail (B, G * Dv, width - 1) before it."""
        reach = self.local.width
        paths = branches(parents, reach).to(values.device) + reach - 1  # (T, width)
        line = torch.cat([tail.mT.to(values.dtype), values], dim=1)
        taps = self.local.weight.squeeze(1).flip(1)  # (channels, width), from the token itself backwards
        return torch.einsum("btwc,cw->btc", line[:, paths], taps)


def ancestry(parents: Sequence[int]) -> Tensor:
    """Which tokens lie on the way from the root to each token, itself included: boolean (T, T), the tree mask.

    >>> ancestry([-1, 0, 0]).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 0, 1]], dtype=torch.int32)

    Raises ValueError where a parent does not come before its child.
    """
    above = torch.eye(len(parents), dtype=torch.bool)
    for token, parent in enumerate(parents):
        if not -1 <= parent < token:
            raise ValueError(f"the parent of token {token} is an earlier one or -1; got {parent}")
        if parent >= 0:
            above[token] |= above[parent]
    return above


def branches(parents: Sequence[int], length: int) -> Tensor:
    """Each token and its ancestors, nearest first, (T, length); -1, -2, ... are the tokens before the tree.

    >>> branches([-1, 0, 0], 3)
    tensor([[ 0, -1, -2],
            [ 1,  0, -1],
            [ 2,  0, -1]])
    """
    paths: list[list[int]] = []
    for token, parent in enumerate(parents):
        before = paths[parent] if parent >= 0 else list(range(-1, -length - 1, -1))
        paths.append([token, *before][:length])
    return torch.tensor(paths, dtype=torch.long).view(len(parents), length)
