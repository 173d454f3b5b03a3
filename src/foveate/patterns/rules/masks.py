"""Static patterns given as tensors: boolean masks, tables of blocks, lists of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.patterns.algebra import Pattern, Scene
from foveate.patterns.rules.decided import block_table, pack_rows
from foveate.patterns.rules.sequence import positive

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False, repr=False)
class Table(Pattern):
    """Base: a tensor that says which blocks of queries see which blocks of keys, per batch entry and head.

    Rows count queries as they come, not positions: row 0 holds the first query of the call.
    """

    table: Tensor  # (B, H, rows, ...), or without the first dims
    k_block: int = 1
    q_block: int = 1
    depends_on = "slot"

    @property
    def placed(self) -> Tensor:
        """The table (B, H, rows, ...)."""
        return self.table[(None,) * (4 - self.table.dim())]

    @property
    def batches(self) -> int:  # type: ignore[override]
        return self.placed.shape[0]

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.placed.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def chosen(self, num_blocks: int) -> Tensor:
        """Whether each row sees each block of keys, (B, H, rows, num_blocks)."""
        return self.placed

    def resolve(self, scene: Scene) -> Pattern:
        rows, blocks = -(-scene.num_queries // self.q_block), -(-scene.num_keys // self.k_block)
        self.check(scene, rows, blocks)
        words = pack_rows(self.chosen(blocks), self.q_block)
        return block_table(words, rows, q_block=self.q_block, k_block=self.k_block, q_start=scene.offset)

    def check(self, scene: Scene, rows: int, blocks: int) -> None:
        """Refuse numbers of queries and keys that the table is not made for."""
        if self.placed.shape[2:] != (rows, blocks):
            raise ValueError(
                f"{self} holds {tuple(self.placed.shape[2:])} entries, but {scene.num_queries} queries and"
                f" {scene.num_keys} keys need {(rows, blocks)}"
            )


class BooleanMask(Table):
    text = "boolean_mask(...)"


def boolean_mask(mask: Tensor) -> Pattern:
    """Any mask, written out: ``mask`` (N, M), (H, N, M) or (B, H, N, M), boolean, True where visible.

    B and H may be 1. It costs N M bits of memory; a pattern of positions costs none.

    >>> from foveate import causal
    >>> upper = torch.ones(3, 3, dtype=torch.bool).triu()
    >>> (boolean_mask(upper) | causal).mask(3).all()
    tensor(True)

    Raises ValueError for any other tensor, and at the call where N or M differ from its queries and keys.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not 2 <= mask.dim() <= 4:
        raise ValueError(f"boolean_mask takes a boolean (N, M), (H, N, M) or (B, H, N, M) tensor; got {_kind(mask)}")
    return BooleanMask(mask)


@dataclass(frozen=True, eq=False, repr=False)
class BlockMaskTable(Table):
    @property
    def text(self) -> str:  # type: ignore[override]
        return f"block_mask(...{_blocks_text(self)})"


def block_mask(table: Tensor | BlockMask, block: int | None = None, *, q_block: int | None = None) -> Pattern:
    """Whole blocks of keys for whole blocks of queries, or torch's ``BlockMask`` as a pattern.

    ``table`` is boolean, (Nq, Nk), (H, Nq, Nk) or (B, H, Nq, Nk): whether the r-th ``q_block`` (default:
    ``block``) queries see the c-th ``block`` keys. The last blocks may be short. A ``BlockMask`` brings its
    block sizes along; blocks that are not full ask its ``mask_mod`` (see :func:`mask_mod`).

    >>> block_mask(torch.eye(2, dtype=torch.bool), 2).mask(3)[0, 0].int()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)

    Raises ValueError for any other tensor, and at the call where the numbers of blocks do not fit.
    """
    if not isinstance(table, Tensor) and hasattr(table, "kv_num_blocks"):
        if block is not None or q_block is not None:
            raise ValueError(f"a BlockMask brings its block sizes along; got block={block}, q_block={q_block}")
        return _of_flex(table)
    if not isinstance(table, Tensor) or table.dtype != torch.bool or not 2 <= table.dim() <= 4:
        raise ValueError(
            f"block_mask takes a boolean (Nq, Nk), (H, Nq, Nk) or (B, H, Nq, Nk) table; got {_kind(table)}"
        )
    if block is None:
        raise ValueError("block_mask(table, block) needs the number of tokens in a block")
    return BlockMaskTable(table, *_sizes("block_mask", block, q_block))


def _of_flex(mask: BlockMask) -> Pattern:
    from foveate.patterns.rules.functions import mask_mod

    q_block, k_block = mask.BLOCK_SIZE
    offset = mask.seq_lengths[1] - mask.seq_lengths[0]
    partial = BlockMaskTable(_listed(mask.kv_num_blocks, mask.kv_indices), k_block, q_block)

    def by_position(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask.mask_mod(batch, head, q - offset, k)  # flex counts queries from 0

    by_position.lengths = mask.seq_lengths  # type: ignore[attr-defined]
    seen = partial & mask_mod(by_position, batches=partial.batches, heads=partial.heads)
    if mask.full_kv_num_blocks is None or mask.full_kv_indices is None:
        return seen
    return seen | BlockMaskTable(_listed(mask.full_kv_num_blocks, mask.full_kv_indices), k_block, q_block)


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Which blocks are among the first ``counts`` of each row's indices."""
    first = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    return torch.zeros(indices.shape, dtype=torch.bool, device=indices.device).scatter(-1, indices.long(), first)


@dataclass(frozen=True, eq=False, repr=False)
class ListedBlocks(Table):
    @property
    def text(self) -> str:  # type: ignore[override]
        return f"listed_blocks(...{_blocks_text(self)})"

    def chosen(self, num_blocks: int) -> Tensor:
        listed = self.placed.long()
        listed = torch.where(listed < 0, num_blocks, listed)  # one more column for none
        marks = torch.zeros(*listed.shape[:3], num_blocks + 1, dtype=torch.bool, device=listed.device)
        return marks.scatter(-1, listed, True)[..., :-1]

    def check(self, scene: Scene, rows: int, blocks: int) -> None:
        if self.placed.shape[2] != rows:
            raise ValueError(
                f"{self} lists blocks for {self.placed.shape[2]} blocks of {self.q_block} queries, but"
                f" {scene.num_queries} queries are {rows}"
            )
        if self.table.numel() and int(self.table.max()) >= blocks:
            raise ValueError(
                f"{self} lists block {int(self.table.max())}, but {scene.num_keys} keys are {blocks} blocks, from 0 on"
            )


def listed_blocks(indices: Tensor, block: int, *, q_block: int | None = None) -> Pattern:
    """The blocks of ``block`` keys that are listed for each block of ``q_block`` (default: ``block``) queries.

    ``indices`` (B, H, rows, k) are whole numbers from 0 on, negative for none, in any order, repeated or not; B
    and H may be 1, or left out. Big Bird's random blocks, NSA's and DSA's (``q_block=1``) choices come so.

    Zaheer et al., Big Bird: Transformers for Longer Sequences, arXiv 2007.14062; Yuan et al., Native Sparse
    Attention, arXiv 2502.11089.

    >>> listed_blocks(torch.tensor([[0, -1], [1, 0], [0, 0]]), 2).mask(5)[0, 0].int()
    tensor([[1, 1, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 0, 0, 0]], dtype=torch.int32)

    Raises ValueError for any other tensor, and at the call for a block that is not there.
    """
    whole = isinstance(indices, Tensor) and not indices.is_floating_point() and not indices.is_complex()
    if not whole or indices.dtype == torch.bool or not 2 <= indices.dim() <= 4:
        raise ValueError(
            f"listed_blocks takes whole numbers (rows, k), (H, rows, k) or (B, H, rows, k); got {_kind(indices)}"
        )
    return ListedBlocks(indices, *_sizes("listed_blocks", block, q_block))


def _sizes(pattern: str, block: int, q_block: int | None) -> tuple[int, int]:
    block = positive(pattern, "block", block)
    return block, block if q_block is None else positive(pattern, "q_block", q_block)


def _blocks_text(table: Table) -> str:
    return f", {table.k_block}{'' if table.q_block == table.k_block else f', q_block={table.q_block}'}"


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
