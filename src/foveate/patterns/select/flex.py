"""Patterns for torch's FlexAttention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from foveate.layouts.kinds import Layout
from foveate.patterns.algebra import LINE, Pattern, Scene, resolve
from foveate.patterns.select.build import build
from foveate.patterns.select.selection import FULL, Selection, unpack_bits

WHOLE = 1  # mask number of a block whose every pair is visible


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
        raise ValueError(f"{pattern} chooses from q and k: pass pattern.resolve(Scene(..., q=q, k=k)) instead")
    scene = Scene(num_queries, num_queries if num_keys is None else num_keys, layout or LINE)
    selection = build(resolve(pattern, scene), scene, tile=block_size, device=device, reorder=False)
    numbers, table = _numbered_masks(selection)
    return BlockMask.from_kv_blocks(
        *_ordered(numbers > WHOLE),
        *_ordered(numbers == WHOLE),
        BLOCK_SIZE=block_size,
        mask_mod=_mask_mod(numbers, table),
        seq_lengths=(scene.num_queries, scene.num_keys),
    )


def _mask_mod(numbers: Tensor, table: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Looks bits up, so that one compiled kernel serves every pattern and every pattern compiles."""
    num_batches, num_heads = numbers.shape[:2]
    size = table.shape[1]

    def mask_mod(batch: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        row = batch * (num_batches > 1), head * (num_heads > 1), q_index // size
        byte = table[numbers[(*row, k_index // size)], q_index % size, k_index % size // 8]
        return (byte >> k_index % 8) & 1 == 1

    return mask_mod


def _numbered_masks(selection: Selection) -> tuple[Tensor, Tensor]:
    """Mask number of each block, (batches, heads, query blocks, key blocks), and the packed masks.

    Number 0 is an empty block and 1 a full one; the masks of tiles follow, then those that columns add up to.
    """
    rows, tile = selection.num_rows, selection.tile
    numbers = torch.zeros(rows, selection.num_k_tiles, dtype=torch.int32, device=selection.tile_ids.device)
    uniform = selection.masks.new_tensor([0, 255])[:, None, None].expand(2, tile, tile // 8)
    offset = torch.where(selection.mask_ids == FULL, WHOLE - FULL, WHOLE + 1)
    numbers[selection.tile_rows, selection.tile_ids.long()] = (selection.mask_ids + offset).int()
    blocks, masks = _masks_of_columns(selection)
    first = WHOLE + 1 + len(selection.masks)
    numbers.view(-1)[blocks] = torch.arange(first, first + len(blocks), device=blocks.device).int()
    by_head = (selection.batches, selection.heads, selection.num_q_tiles, selection.num_k_tiles)
    return numbers.view(by_head), torch.cat([uniform, selection.masks, masks])


def _masks_of_columns(selection: Selection) -> tuple[Tensor, Tensor]:
    """Blocks that hold single columns (row times key blocks plus key block), and their packed masks."""
    tile, key = selection.tile, selection.column_ids.long()
    blocks, number = torch.unique_consecutive(
        selection.column_rows * selection.num_k_tiles + key // tile, return_inverse=True
    )
    bits = unpack_bits(selection.column_masks) << (key % 8).byte().unsqueeze(1)  # (C, query)
    by_byte = bits.new_zeros(len(blocks) * (tile // 8), tile)
    by_byte.index_add_(0, number * (tile // 8) + key % tile // 8, bits)
    return blocks, by_byte.unflatten(0, (-1, tile // 8)).transpose(1, 2)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of marked blocks in each row, and the blocks of the row, marked ones first."""
    order = torch.argsort(blocks.byte(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int().contiguous()
