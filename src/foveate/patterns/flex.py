"""Patterns for torch's FlexAttention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from foveate.patterns.algebra import LINE, Pattern, Scene, resolve
from foveate.patterns.build import build
from foveate.patterns.layouts import Layout
from foveate.patterns.selection import FULL, Selection


def to_block_mask(
    pattern: Pattern,
    num_queries: int,
    num_keys: int | None = None,
    *,
    layout: Layout | None = None,
    device: torch.device | str = "cpu",
    block_size: int = 128,
) -> BlockMask:
    """The pattern as a ``BlockMask``, from interval reasoning instead of evaluating every pair.

    >>> from foveate import causal, window
    >>> mask = to_block_mask(window(100) & causal, 1024)
    >>> mask.shape, mask.kv_num_blocks[0, 0].tolist(), mask.full_kv_num_blocks[0, 0].tolist()
    ((1, 1, 1024, 1024), [1, 2, 2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0])

    It holds for any batch, and for any number of heads unless the pattern tells heads or entries apart. As in
    :func:`foveate.attend`, the last query meets the last key.

    Raises ValueError for a pattern that chooses from q and k, unless it is resolved on a ``Scene`` with them.
    """
    if pattern.is_dynamic:
        raise ValueError(
            f"{pattern} chooses from q and k: pass pattern.resolve(Scene(..., q=q, k=k)) instead"
        )
    scene = Scene(num_queries, num_queries if num_keys is None else num_keys, layout or LINE)
    resolved = resolve(pattern, scene)
    selection = build(resolved, scene, tile=block_size, device=device, reorder=False)
    full, partial = _blocks(selection)
    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=block_size,
        mask_mod=_mask_mod(resolved, scene.offset),
        seq_lengths=(scene.num_queries, scene.num_keys),
    )


def _mask_mod(resolved: Pattern, offset: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def mask_mod(batch: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return resolved.visible(batch, head, q_index + offset, k_index)

    return mask_mod


def _blocks(selection: Selection) -> tuple[Tensor, Tensor]:
    """Which blocks are full, and which are partial, (batches, heads, query blocks, key blocks)."""
    shape = (selection.num_rows, selection.num_k_tiles)
    full, partial = torch.zeros(2, *shape, dtype=torch.bool, device=selection.tile_ids.device)
    rows, keys, is_full = selection.tile_rows, selection.tile_ids.long(), selection.mask_ids == FULL
    full[rows[is_full], keys[is_full]] = True
    partial[rows[~is_full], keys[~is_full]] = True
    partial[selection.column_rows, selection.column_ids.long() // selection.tile] = True
    by_head = (selection.batches, selection.heads, selection.num_q_tiles, selection.num_k_tiles)
    return full.view(by_head), (partial & ~full).view(by_head)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of marked blocks in each row, and the blocks of the row, marked ones first."""
    order = torch.argsort(blocks.byte(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int().contiguous()
