"""Selections built, and blocks chosen, by the native kernels (csrc/select.cpp, choose.cpp, pool.cpp)."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from foveate.kernels.cpu import loader
from foveate.kernels.cpu.call import DTYPES, TensorArgument, misaligned, pointer, strided, tensor
from foveate.patterns.algebra import Pattern, Scene
from foveate.patterns.select.program import Program
from foveate.patterns.select.selection import TILE, Selection
from foveate.plain import is_plain

ALONE = 2**17  # pairs of tiles that one thread is quicker with than several
FEW_WEIGHTS = 2**15  # likewise scores


def select(pattern: Pattern, scene: Scene, device: torch.device | str, *, keys_of_visit: int = 0) -> Selection | None:
    """The selection of a resolved pattern in the natural order; None where the kernels cannot build it.

    With ``keys_of_visit`` it lists runs where queries choose keys that few of their neighbours do: where to gather
    them, which takes each as long as so many keys, costs less than to show most of a tile's queries nothing.

    >>> from foveate import causal
    >>> from foveate.patterns.algebra import Scene
    >>> selection = select(causal, Scene(640, 640), "cpu")
    >>> selection is None or selection.num_tiles == 55
    True
    """
    library = _library() if torch.device(device).type == "cpu" and is_plain() else None
    if 0 in (pattern.batches, pattern.heads):
        return None
    program = None if library is None else Program.of(pattern)
    if library is None or program is None:
        return None
    sizes = (pattern.batches, pattern.heads, scene.num_queries, scene.num_keys)
    undecided = c_int64()
    numbers = (c_int64 * 5)(*sizes, keys_of_visit)
    code = (c_int64 * len(program.code))(*program.code)
    handle = library.foveate_select_open(code, numbers, _threads(*sizes), byref(undecided))
    if not handle:
        raise MemoryError(f"no memory for the selection of {pattern}")
    try:
        return _written(library, handle, sizes, undecided.value)
    finally:
        library.foveate_select_close(handle)


def pool(x: Tensor, block: int, lead: int) -> Tensor | None:
    """See :func:`foveate.patterns.rules.choose.pool`; None where the kernels cannot, or there is nothing to do."""
    library = _library()
    if library is None or not is_plain(x) or x.dtype not in DTYPES or misaligned(x) or x.numel() == 0:
        return None
    batch, heads, tokens, dim = x.shape
    blocks = -(-(lead + tokens) // block)
    out = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device="cpu")
    numbers = (DTYPES[x.dtype], batch, tokens, dim, block, lead, blocks)
    threads = 1 if x.numel() < FEW_WEIGHTS else loader.num_threads()
    described, address = tensor(x, x.dtype, *x.shape), pointer(out, torch.float32, *out.shape)
    if library.foveate_pool(byref(described), (c_int64 * 7)(*numbers), address, threads):
        raise MemoryError("no memory to pool tokens in")
    return out


def choose_rows(
    weights: Tensor, budget: int, by_share: bool, out: Tensor, rows_per_word: int, own: Tensor | None
) -> bool:
    """See :func:`foveate.patterns.rules.choose.choose_rows`; False where the kernels cannot do it."""
    library = _library()
    if library is None or not is_plain(weights, out, own) or weights.dtype != torch.float32:
        return False
    weights = weights.contiguous()
    batches, heads, num_rows, num_columns = weights.shape
    if out.numel() == 0:
        return True
    assert out.stride() == (heads * out.stride(1), out.stride(1), out.shape[3], 1)
    sizes = (batches * heads, num_rows, num_columns, rows_per_word, out.shape[3], out.stride(1), budget, by_share)
    threads = 1 if weights.numel() < FEW_WEIGHTS else loader.num_threads()
    addresses = (
        pointer(weights, torch.float32, *weights.shape),
        pointer(own, torch.int64, num_rows),
        strided(out, (torch.int64,), (batches, heads, *out.shape[2:])),
    )
    if library.foveate_choose(*addresses, (c_int64 * 8)(*sizes), threads):
        raise MemoryError("no memory to choose blocks in")
    return True


def _written(library: ctypes.CDLL, handle: int, sizes: tuple[int, int, int, int], undecided: int) -> Selection:
    masks = torch.empty(undecided, TILE, TILE // 8, dtype=torch.uint8, device="cpu")
    totals = (c_int64 * 4)()
    if library.foveate_select_evaluate(handle, pointer(masks, torch.uint8, *masks.shape), totals):
        raise MemoryError("no memory for the masks of a selection")
    num_masks, num_tiles, num_columns, num_runs = totals
    batches, heads, num_queries, num_keys = sizes
    rows = batches * heads * -(-num_queries // TILE)
    starts = torch.empty(3, rows + 1, dtype=torch.int64, device="cpu")
    tiles = torch.empty(2, num_tiles, dtype=torch.int32, device="cpu")
    columns = torch.empty(num_columns, dtype=torch.int32, device="cpu")
    runs = torch.empty(num_runs, 2, dtype=torch.int32, device="cpu")
    column_masks, run_masks = (torch.empty(n, TILE // 8, dtype=torch.uint8, device="cpu") for n in totals[2:])
    lists = (*starts, *tiles, columns, runs, column_masks, run_masks)
    addresses = [pointer(each, each.dtype, *each.shape) for each in lists]
    library.foveate_select_write(handle, (c_void_p * len(lists))(*addresses))
    masks = masks[:num_masks] if 8 * num_masks > undecided else masks[:num_masks].clone()
    by_row = (starts[0], *tiles, masks, starts[1], columns, column_masks)
    gathered = {"run_starts": starts[2], "runs": runs, "run_masks": run_masks} if num_runs else {}
    return Selection(num_queries, num_keys, TILE, batches, heads, *by_row, **gathered)


def _threads(batches: int, heads: int, num_queries: int, num_keys: int) -> int:
    pairs = batches * heads * -(-num_queries // TILE) * -(-num_keys // TILE)
    return 1 if pairs < ALONE else loader.num_threads()


def _library() -> ctypes.CDLL | None:
    library = loader.library()
    return None if library is None else _declared(library)


@cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    numbers = POINTER(c_int64)
    library.foveate_select_open.argtypes = (numbers, numbers, c_int64, numbers)
    library.foveate_select_open.restype = c_void_p
    library.foveate_select_evaluate.argtypes = (c_void_p, c_void_p, numbers)
    library.foveate_select_evaluate.restype = c_int64
    library.foveate_select_write.argtypes = (c_void_p, POINTER(c_void_p))
    library.foveate_select_write.restype = None
    library.foveate_select_close.argtypes = (c_void_p,)
    library.foveate_select_close.restype = None
    library.foveate_choose.argtypes = (c_void_p, c_void_p, c_void_p, numbers, c_int64)
    library.foveate_choose.restype = c_int64
    library.foveate_pool.argtypes = (POINTER(TensorArgument), numbers, c_void_p, c_int64)
    library.foveate_pool.restype = c_int64
    return library
