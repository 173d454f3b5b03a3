"""What a PyTorch user would otherwise call on a CPU: SDPA in each of its spellings, FlexAttention, eager attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.attend_cpu_problem import Attention, Problem
from benchmarks.rivals import Rival, Unfit, needs
from foveate.patterns import causal, full, to_block_mask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def dense_mask(problem: Problem) -> Tensor | None:
    """Booleans (1, 1, N, M), or (B, 1, N, M) where batch entries differ; None if all is visible."""
    if problem.pattern == full:
        return None
    lengths = problem.q.shape[2], problem.k.shape[2]
    needs(2 * lengths[0] * lengths[1] * problem.pattern.batches)
    return problem.pattern.mask(*lengths, layout=problem.layout)


# ---- scaled_dot_product_attention ------------------------------------------------------------------------------


def _plain(problem: Problem) -> Attention:
    return partial(sdpa, is_causal=problem.pattern == causal)


def _masked(problem: Problem) -> Attention:
    return partial(sdpa, attn_mask=dense_mask(problem))


def _grouped(problem: Problem) -> Attention:
    return partial(sdpa, enable_gqa=True)


def packed(problem: Problem, attention: Attention) -> Attention:
    """Query heads of a group as further queries of its key head: keys are then read once."""
    batch, groups = problem.k.shape[:2]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.reshape(batch, groups, -1, q.shape[3]), k, v).reshape(q.shape)

    return run


SDPA = Rival("SDPA", _plain)
SDPA_MASK = Rival("SDPA, dense mask", _masked)
SDPA_GQA = Rival("SDPA, enable_gqa", _grouped)
SDPA_PACKED = Rival("SDPA, packed", lambda problem: packed(problem, sdpa))


# ---- matmul, softmax, matmul -----------------------------------------------------------------------------------


def _eager(problem: Problem) -> Attention:
    batch, heads, num_queries, _ = problem.q.shape
    needs(2 * batch * heads * num_queries * problem.k.shape[2] * problem.q.element_size())
    mask = dense_mask(problem)
    hidden = None if mask is None else torch.zeros(mask.shape, dtype=problem.q.dtype).masked_fill(~mask, float("-inf"))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q * problem.scale @ k.transpose(2, 3)
        return torch.softmax(logits if hidden is None else logits + hidden, -1) @ v

    return run


EAGER = Rival("eager", _eager)
EAGER_PACKED = Rival("eager, packed", lambda problem: packed(problem, _eager(problem)))


# ---- compiled FlexAttention ------------------------------------------------------------------------------------


def flex(mask_mod: MaskMod | None = None, block: int = 128) -> Rival:
    """FlexAttention compiled for the very shapes; ``mask_mod`` says by arithmetic what the pattern says."""
    return Rival("flex", lambda problem: _flex(problem, mask_mod, block))


def _flex(problem: Problem, mask_mod: MaskMod | None, block: int) -> Attention:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if problem.cotangent is not None:
        raise Unfit("FlexAttention has no backward on CPU")
    torch.compiler.reset()  # or it stops compiling after a few shapes
    mask = None
    if problem.pattern != full:
        mask = to_block_mask(problem.pattern, problem.q.shape[2], layout=problem.layout, block_size=block)
    if mask is not None and mask_mod is not None:
        full_blocks = mask.full_kv_num_blocks, mask.full_kv_indices
        mask = BlockMask.from_kv_blocks(
            mask.kv_num_blocks, mask.kv_indices, *full_blocks, block, mask_mod, mask.seq_lengths
        )
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


def causal_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def window_mod(width: int) -> MaskMod:
    """The last ``width`` keys up to the query."""
    return lambda batch, head, q, k: (q >= k) & (q - k < width)
