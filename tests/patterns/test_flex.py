"""Patterns as FlexAttention's block masks."""

from __future__ import annotations

import pytest
import torch
from tests.support.pattern_examples import CASES, Case
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from foveate.patterns import Grid, causal, full, neighborhood, per_head, random_blocks, sinks, window
from foveate.patterns.select.dense import dense_mask
from foveate.patterns.select.flex import to_block_mask


def block_mask_of(case: Case, block_size: int) -> BlockMask:
    return to_block_mask(case.pattern, case.num_queries, case.num_keys, layout=case.layout, block_size=block_size)


def listed(block_mask: BlockMask) -> tuple[Tensor, Tensor]:
    """The partial and the full blocks that a BlockMask lists."""
    assert block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None
    partial = marked(block_mask.kv_num_blocks, block_mask.kv_indices)
    return partial, marked(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)


def marked(counts: Tensor, indices: Tensor) -> Tensor:
    """Whether each block is listed, (batches, heads, query blocks, key blocks)."""
    first = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    return torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), first)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("block_size", [8, 128])
def test_blocks_are_empty_full_or_partial_as_the_mask_is(case: Case, block_size: int) -> None:
    block_mask, mask = block_mask_of(case, block_size), dense_mask(case.resolved, case.scene)
    partial, full_blocks = listed(block_mask)
    assert not (partial & full_blocks).any()
    whole, part = (_spread(blocks, mask, block_size) for blocks in (full_blocks, partial))
    axes = zip(mask.shape, ((-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,)), strict=True)
    seen = block_mask.mask_mod(*(torch.arange(size).view(shape) for size, shape in axes))
    assert torch.equal(whole | part & seen, mask)
    assert block_mask.seq_lengths == (case.num_queries, case.num_keys)


def _spread(blocks: Tensor, mask: Tensor, block_size: int) -> Tensor:
    pairs = blocks.repeat_interleave(block_size, 2).repeat_interleave(block_size, 3)
    return pairs[:, :, : mask.shape[2], : mask.shape[3]].expand_as(mask)


@pytest.mark.parametrize("case", CASES[::23], ids=repr)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_over_it_is_attention_over_the_mask(case: Case) -> None:
    resolved = case.resolved
    mask = dense_mask(resolved, case.scene)
    q = torch.randn(resolved.batches, resolved.heads, case.num_queries, 16, dtype=torch.float64)
    k, v = torch.randn(2, resolved.batches, resolved.heads, case.num_keys, 16, dtype=torch.float64)
    out = flex_attention(q, k, v, block_mask=block_mask_of(case, 128))
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    sees = mask.any(-1, keepdim=True)
    torch.testing.assert_close(torch.where(sees, out, 0), torch.where(sees, expected, 0))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_flex_attention_skips_blocks_rightly() -> None:
    grid = Grid(16, 24)
    for pattern, layout in (
        (window(50) & causal | sinks(4), None),
        (neighborhood(5), grid),
        (per_head([full, causal & random_blocks(16, 0.5)]), None),
    ):
        q, k, v = torch.randn(3, 1, 2, 384, 16)
        out = torch.compile(flex_attention)(q, k, v, block_mask=to_block_mask(pattern, 384, layout=layout))
        expected = scaled_dot_product_attention(q, k, v, attn_mask=pattern.mask(384, layout=layout))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_lists_no_more_blocks_than_needed() -> None:
    block_mask = to_block_mask(window(300) & causal | sinks(4), 1280)
    partial, whole = listed(block_mask)
    assert partial.sum(-1).tolist() == [[[1, 1, 2, 3, 4, 4, 4, 4, 4, 4]]]
    assert whole.sum(-1).tolist() == [[[0, 1, 1, 1, 1, 1, 1, 1, 1, 1]]]


def test_refuses_in_words() -> None:
    with pytest.raises(ValueError, match="needs layout=Grid"):
        to_block_mask(neighborhood(3), 64)
    with pytest.raises(ValueError, match="multiple of 8"):
        to_block_mask(causal, 64, block_size=100)
