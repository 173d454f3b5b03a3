"""From a pattern to a selection, coarse to fine, without ever touching all pairs.

Tokens are grouped into tiles, tiles into groups of 8, those into groups of 8, ... Interval reasoning settles
whole pairs of groups as empty or full; only pairs of groups it cannot settle are split. What is still
unsettled at the level of tiles gets a bit mask, and each distinct mask is evaluated once.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.layouts.kinds import Layout, Points, Sequence, pad_slots
from foveate.patterns.algebra import Boxes, Interval, Pattern, Scene, mix_hash, resolve
from foveate.patterns.compound import And, Not, Or, settled_signature
from foveate.patterns.select import native
from foveate.patterns.select.cache import SELECTIONS
from foveate.patterns.select.selection import FULL, TILE, Selection, pack_bits, unpack_bits

FAN = 8  # tiles in a group, groups in the next
SPARSE = 4  # a partial tile that uses fewer than 1/SPARSE of its keys becomes single columns
BATCH = 4096  # masks evaluated at a time: 16 MB of booleans at 64 x 64


class Pyramid(NamedTuple):
    """Lowest and highest position, and coordinate along each axis, of the groups of one level."""

    position: tuple[Tensor, Tensor]
    axes: tuple[tuple[Tensor, Tensor], ...]

    @property
    def size(self) -> int:
        return self.position[0].numel()


class Pairs(NamedTuple):
    """Candidate pairs of groups, all (T,)."""

    batch: Tensor
    head: Tensor
    q: Tensor
    k: Tensor

    def where(self, keep: Tensor) -> Pairs:
        return Pairs(*(part[keep] for part in self))


def select(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    layout: Layout | None = None,
    *,
    tile: int = 64,
    scale: float | None = None,
    keys_of_visit: int = 0,
) -> Selection:
    """The selection of a pattern for these queries and keys; a static pattern's is cached.

    With ``keys_of_visit`` it may list runs, which only native kernels attend over: those take a query as long as so
    many keys to be gathered with others and put back.
    """
    layout = layout or Sequence()
    if 0 in (*q.shape[:3], *k.shape[:3], pattern.batches, pattern.heads):  # nothing to choose from, or for
        return _nothing(q, k, tile)
    if pattern.is_dynamic or isinstance(layout, Points):
        scene = Scene(q.shape[2], k.shape[2], layout, q.detach(), k.detach(), scale)
        with torch.no_grad():
            return build(resolve(pattern, scene), scene, tile=tile, device=q.device, keys_of_visit=keys_of_visit)
    scene = Scene(q.shape[2], k.shape[2], layout)

    def make() -> Selection:
        return build(resolve(pattern, scene), scene, tile=tile, device=q.device, keys_of_visit=keys_of_visit)

    if pattern.may_change:
        return make()
    sizes = q.shape[2], k.shape[2], tile
    return SELECTIONS.get(pattern, layout, *sizes, str(q.device), make, keys_of_visit=keys_of_visit)


def _nothing(q: Tensor, k: Tensor, tile: int) -> Selection:
    """The selection of no pairs."""
    batches, rows = min(q.shape[0], 1), -(-q.shape[2] // tile)
    starts = torch.zeros(batches * rows + 1, dtype=torch.int64, device=q.device)
    ids = torch.zeros(0, dtype=torch.int32, device=q.device)
    masks, bits = (torch.zeros(0, *shape, tile // 8, dtype=torch.uint8, device=q.device) for shape in ((tile,), ()))
    return Selection(q.shape[2], k.shape[2], tile, batches, 1, starts, ids, ids, masks, starts, ids, bits)


def build(
    resolved: Pattern,
    scene: Scene,
    *,
    tile: int = 64,
    device: torch.device | str = "cpu",
    reorder: bool = True,
    keys_of_visit: int = 0,
) -> Selection:
    """Build the selection of a resolved pattern; without ``reorder`` in the natural order of tokens."""
    if tile % 8 or tile < 8:
        raise ValueError(f"a tile is a multiple of 8 tokens; got {tile}")
    patches = tile & (tile - 1) == 0  # boxes of grid tokens have sides of powers of two
    reorder = reorder and resolved.needs_axes and scene.offset == 0 and patches
    if tile == TILE and not reorder:
        selection = native.select(resolved, scene, device, keys_of_visit=keys_of_visit)
        if selection is not None:
            return selection
    slots = scene.layout.slots(tile, device) if reorder else None
    q_slots = _natural_slots(scene.num_queries, tile, device) if slots is None else slots
    k_slots = _natural_slots(scene.num_keys, tile, device) if slots is None else slots
    q_levels = _pyramid(q_slots, scene.offset, scene.layout, tile)
    k_levels = _pyramid(k_slots, 0, scene.layout, tile)
    full, partial = _descend(resolved, q_levels, k_levels)
    alike = slots is None or scene.layout.tiles_alike
    masks = _Masks(resolved, q_slots.view(-1, tile), k_slots.view(-1, tile), scene.offset, alike=alike)
    tiles, mask_ids, table, columns, column_masks = masks.evaluate(full, partial, q_levels[0], k_levels[0])
    num_q_tiles = q_slots.numel() // tile
    rows = (tiles.batch * resolved.heads + tiles.head) * num_q_tiles + tiles.q
    column_rows = (columns.batch * resolved.heads + columns.head) * num_q_tiles + columns.q
    num_rows = resolved.batches * resolved.heads * num_q_tiles
    num_k_tiles = k_slots.numel() // tile
    order = torch.argsort((2 * rows + (mask_ids == FULL)) * num_k_tiles + tiles.k)  # masked tiles first
    column_order = torch.argsort(column_rows * k_slots.numel() + columns.k)
    return Selection(
        num_queries=scene.num_queries,
        num_keys=scene.num_keys,
        tile=tile,
        batches=resolved.batches,
        heads=resolved.heads,
        tile_starts=_starts(rows, num_rows),
        tile_ids=tiles.k[order].int(),
        mask_ids=mask_ids[order].int(),
        masks=table,
        column_starts=_starts(column_rows, num_rows),
        column_ids=columns.k[column_order].int(),
        column_masks=column_masks[column_order],
        q_slots=slots,
        k_slots=slots,
    )


def _natural_slots(length: int, tile: int, device: torch.device | str) -> Tensor:
    return pad_slots(torch.arange(length, device=device), tile)


def _starts(rows: Tensor, num_rows: int) -> Tensor:
    counts = torch.bincount(rows, minlength=num_rows)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _pyramid(slots: Tensor, offset: int, layout: Layout, tile: int) -> list[Pyramid]:
    """Levels from tiles (first) to at most FAN groups (last)."""
    exists, position = slots >= 0, slots + offset
    coordinates = layout.coordinates(position.clamp_min(0))
    ranges = [_ranges(values, exists, tile) for values in (position, *coordinates)]
    levels = [Pyramid(ranges[0], tuple(ranges[1:]))]
    while levels[-1].size > FAN:
        coarser = [_coarser(low, high) for low, high in (levels[-1].position, *levels[-1].axes)]
        levels.append(Pyramid(coarser[0], tuple(coarser[1:])))
    return levels


def _ranges(values: Tensor, exists: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    greatest = torch.finfo(values.dtype).max if values.is_floating_point() else torch.iinfo(torch.int32).max
    low = torch.where(exists, values, greatest).view(-1, tile).amin(1)
    high = torch.where(exists, values, -greatest).view(-1, tile).amax(1)
    return low, high


def _coarser(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    missing = -low.numel() % FAN
    greatest = torch.finfo(low.dtype).max if low.is_floating_point() else torch.iinfo(torch.int32).max
    low = torch.nn.functional.pad(low, (0, missing), value=greatest).view(-1, FAN).amin(1)
    return low, torch.nn.functional.pad(high, (0, missing), value=-greatest).view(-1, FAN).amax(1)


def _boxes(pairs: Pairs, q: Pyramid, k: Pyramid) -> Boxes:
    def interval(q_range: tuple[Tensor, Tensor], k_range: tuple[Tensor, Tensor]) -> Interval:
        return Interval(q_range[0][pairs.q], q_range[1][pairs.q], k_range[0][pairs.k], k_range[1][pairs.k])

    axes = tuple(interval(q_axis, k_axis) for q_axis, k_axis in zip(q.axes, k.axes, strict=True))
    return Boxes(pairs.batch, pairs.head, interval(q.position, k.position), axes)


def _descend(pattern: Pattern, q_levels: list[Pyramid], k_levels: list[Pyramid]) -> tuple[Pairs, Pairs]:
    """Pairs of tiles that are surely full, and those that interval reasoning cannot settle."""
    depth = min(len(q_levels), len(k_levels))
    q_levels, k_levels = q_levels[:depth], k_levels[:depth]
    device = q_levels[0].position[0].device
    counts = (pattern.batches, pattern.heads, q_levels[-1].size, k_levels[-1].size)
    open_pairs = Pairs(*torch.cartesian_prod(*(torch.arange(n, device=device) for n in counts)).view(-1, 4).unbind(1))
    full: list[Pairs] = []
    for level in reversed(range(depth)):
        some, every = pattern.bounds(_boxes(open_pairs, q_levels[level], k_levels[level]))
        full.append(_split(open_pairs.where(every & some), q_levels, k_levels, level, 0))
        open_pairs = open_pairs.where(some & ~every)
        open_pairs = _split(open_pairs, q_levels, k_levels, level, max(level - 1, 0))
    return Pairs(*(torch.cat(parts) for parts in zip(*full, strict=True))), open_pairs


def _split(pairs: Pairs, q_levels: list[Pyramid], k_levels: list[Pyramid], level: int, target: int) -> Pairs:
    """Each pair of groups as all the pairs of its members at a finer level."""
    for finer in reversed(range(target, level)):
        fan = torch.arange(FAN, device=pairs.q.device)
        q = (pairs.q[:, None, None] * FAN + fan[:, None]).expand(-1, FAN, FAN).reshape(-1)
        k = (pairs.k[:, None, None] * FAN + fan).expand(-1, FAN, FAN).reshape(-1)
        batch, head = (part.repeat_interleave(FAN * FAN) for part in (pairs.batch, pairs.head))
        exists = (q < q_levels[finer].size) & (k < k_levels[finer].size)
        pairs = Pairs(batch, head, q, k).where(exists)
    return pairs


class _Masks:
    """Evaluates the masks of tiles, each distinct one once, and sorts sparse ones out into columns."""

    def __init__(self, pattern: Pattern, q_slots: Tensor, k_slots: Tensor, offset: int, *, alike: bool) -> None:
        self.pattern, self.q_slots, self.k_slots = pattern, q_slots, k_slots
        self.offset, self.alike = offset, alike
        self.tile = q_slots.shape[1]
        self.q_shapes, self.k_shapes = _shapes(q_slots), _shapes(k_slots)

    def evaluate(
        self, full: Pairs, partial: Pairs, q_level: Pyramid, k_level: Pyramid
    ) -> tuple[Pairs, Tensor, Tensor, Pairs, Tensor]:
        """Tiles, their mask numbers, the table of packed masks, columns, and their packed masks."""
        key_hole = (self.k_slots < 0).any(1)[full.k]  # a full tile with an empty key slot needs a mask
        partial = Pairs(*(torch.cat(pair) for pair in zip(partial, full.where(key_hole), strict=True)))
        full = full.where(~key_hole)
        first, number = self._distinct(self.pattern, partial, q_level, k_level)
        distinct = partial.where(first)
        masks = self._packed(self.pattern, distinct, q_level, k_level)  # (U, tile, tile / 8)
        used = self._used_keys(masks)
        kind = self._classify(distinct, masks, used)  # 0 empty, 1 full, 2 masked, 3 columns
        kind_of = kind[number]
        columns, column_masks = self._columns(partial.where(kind_of == 3), masks, used, number[kind_of == 3])
        table, renumber = self._compact(masks, kind == 2)
        kept = [full, partial.where(kind_of == 1), partial.where(kind_of == 2)]
        tiles = Pairs(*(torch.cat(parts) for parts in zip(*kept, strict=True)))
        ids = torch.full_like(tiles.q, FULL)
        ids[ids.numel() - kept[2].q.numel() :] = renumber[number[kind_of == 2]]
        return tiles, ids, table, columns, column_masks

    def _distinct(self, pattern: Pattern, pairs: Pairs, q_level: Pyramid, k_level: Pyramid) -> tuple[Tensor, Tensor]:
        """Index of a representative for each distinct mask, and each pair's number among them."""
        if pairs.q.numel() == 0 or not self.alike:
            every = torch.arange(pairs.q.numel(), device=pairs.q.device)
            return every, every
        signature = settled_signature(pattern, _boxes(pairs, q_level, k_level))
        shapes = self.q_shapes[pairs.q], self.k_shapes[pairs.k]
        _, number = torch.unique(mix_hash(signature, *shapes), return_inverse=True)
        first = torch.full((int(number.max()) + 1,), pairs.q.numel(), dtype=torch.long, device=number.device)
        order = torch.arange(number.numel(), device=number.device)
        return first.scatter_reduce(0, number, order, "amin"), number

    def _packed(self, pattern: Pattern, pairs: Pairs, q_level: Pyramid, k_level: Pyramid) -> Tensor:
        """Packed masks of tiles: of a compound joined from those of its parts, each of which has few."""
        if not isinstance(pattern, (And, Or, Not)):
            chunks = zip(*(p.split(BATCH) for p in pairs), strict=True)
            packed = [self._evaluate(pattern, Pairs(*chunk)) for chunk in chunks]
            empty = torch.empty(0, self.tile, self.tile // 8, dtype=torch.uint8, device=pairs.q.device)
            return torch.cat([empty, *packed])
        masks = []
        for part in pattern.parts:
            first, number = self._distinct(part, pairs, q_level, k_level)
            masks.append(self._packed(part, pairs.where(first), q_level, k_level)[number])
        if isinstance(pattern, Not):
            return ~masks[0] & self._existing(pairs)
        return reduce(torch.bitwise_and if isinstance(pattern, And) else torch.bitwise_or, masks)

    def _evaluate(self, pattern: Pattern, pairs: Pairs) -> Tensor:
        q, k = self.q_slots[pairs.q].unsqueeze(2), self.k_slots[pairs.k].unsqueeze(1)
        batch, head = pairs.batch.view(-1, 1, 1), pairs.head.view(-1, 1, 1)
        seen = pattern.visible(batch, head, q.clamp_min(0) + self.offset, k.clamp_min(0))
        if seen.stride(-1) == 0:  # the same for all keys of the tile
            packed = (seen[..., :1].to(torch.uint8) * 255).expand(-1, -1, self.tile // 8)
        else:
            packed = pack_bits(seen)
        return packed & self._existing(pairs)

    def _existing(self, pairs: Pairs) -> Tensor:
        """Packed pairs of which neither the query slot nor the key slot is empty."""
        q, k = self.q_slots[pairs.q] >= 0, self.k_slots[pairs.k] >= 0
        return (q.to(torch.uint8) * 255).unsqueeze(2) & pack_bits(k).unsqueeze(1)

    def _used_keys(self, masks: Tensor) -> Tensor:
        """Packed (U, tile / 8): keys that some query of the tile sees."""
        used = masks
        while used.shape[1] > 1:
            half = used.shape[1] // 2
            rest = used[:, 2 * half :]
            used = torch.cat([used[:, :half] | used[:, half : 2 * half], rest], dim=1)
        return used[:, 0]

    def _classify(self, pairs: Pairs, masks: Tensor, used: Tensor) -> Tensor:
        count = _popcount(used)
        kind = torch.full_like(count, 2)
        kind[count * SPARSE <= self.tile] = 3
        is_full = (masks == self._existing(pairs)).flatten(1).all(1) & (count == self.tile)
        kind[is_full] = 1
        kind[count == 0] = 0
        return kind

    def _columns(self, pairs: Pairs, masks: Tensor, used: Tensor, number: Tensor) -> tuple[Pairs, Tensor]:
        """Single key columns (key slot in place of key tile) of sparse tiles, with a bit per query."""
        sparse, local = torch.unique(number, return_inverse=True)
        by_key = unpack_bits(masks[sparse]).transpose(1, 2)  # (U, key, query)
        entry, key = torch.nonzero(unpack_bits(used[sparse])[local], as_tuple=True)
        batch, head, q, k = (part[entry] for part in pairs)
        packed = pack_bits(by_key)[local[entry], key]
        return Pairs(batch, head, q, k * self.tile + key), packed

    def _compact(self, masks: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """The kept masks without repeats, and each mask's number among them."""
        table, inverse = _unique_rows(masks[keep].flatten(1))
        renumber = torch.full((keep.numel(),), FULL, dtype=torch.long, device=keep.device)
        renumber[keep] = inverse
        return table.view(-1, self.tile, self.tile // 8), renumber


def _unique_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows and each row's number; by 64-bit hash first, checked to be exact."""
    if rows.shape[0] == 0:
        return rows, torch.empty(0, dtype=torch.long, device=rows.device)
    words = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8)).contiguous().view(torch.int64)
    _, number = torch.unique(mix_hash(*words.unbind(1)), return_inverse=True)
    first = torch.full((int(number.max()) + 1,), rows.shape[0], dtype=torch.long, device=rows.device)
    first = first.scatter_reduce(0, number, torch.arange(rows.shape[0], device=rows.device), "amin")
    table = rows[first]
    if not torch.equal(table[number], rows):  # a hash collision: sort whole rows instead
        return torch.unique(rows, dim=0, return_inverse=True)
    return table, number


def _shapes(slots: Tensor) -> Tensor:
    """A number per tile for how far its tokens lie from its first one, and which of its slots are empty."""
    first = torch.where(slots < 0, slots.max() if slots.numel() else 0, slots).amin(1, keepdim=True)
    return mix_hash(*torch.where(slots < 0, -1, slots - first).unbind(1))


def _popcount(packed: Tensor) -> Tensor:
    return unpack_bits(packed).sum(1)
