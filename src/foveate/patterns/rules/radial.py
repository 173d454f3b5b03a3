"""Radial attention's blocks: a video's tokens see less and less of frames that are further away."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.patterns.algebra import Pattern
from foveate.patterns.rules.listed import global_tokens
from foveate.patterns.rules.masks import block_mask
from foveate.patterns.rules.sequence import positive
from foveate.plain import remembered

DENSE_COLUMN, DENSE_BLOCK = 1 / 3, 0.6  # of the rows of a block, and of its columns that show anything


def radial(
    frames: int, tokens: int, *, block: int = 128, decay: float = 1.0, full_reach: int = 1, text: int = 0
) -> Pattern:
    """Blocks of a band that halves with the distance between frames of a video, O(n log n) of them.

    ``frames`` of ``tokens`` tokens lie one after the other, then ``text`` tokens, which see all and are seen by all.
    See :func:`radial_blocks` for the others.

    >>> radial(2, 3, block=1, full_reach=0, text=1).mask(7)[0, 0].int()
    tensor([[1, 1, 1, 1, 1, 0, 1],
            [1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 0, 1, 1, 1],
            [1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1, 1]], dtype=torch.int32)

    Li et al., Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation,
    arXiv 2506.19852.
    """
    found = radial_blocks(frames, tokens, block, decay, full_reach)
    if not text:
        return block_mask(found, block)
    video = frames * tokens
    every = -(-(video + positive("radial", "text", text)) // block)
    table = torch.ones(every, every, dtype=torch.bool, device=found.device)
    table[: len(found), : len(found)] = found
    return block_mask(table, block) | global_tokens(range(video, video + text))


def radial_blocks(frames: int, tokens: int, block: int = 128, decay: float = 1.0, full_reach: int = 1) -> Tensor:
    """Which blocks of tokens see which, (n, n) of n = ceil(frames * tokens / block), as the authors' code has it.

    A token sees the same place ± w tokens in a frame at distance d. Up to ``full_reach`` (1 as for HunyuanVideo, 0 as
    for Wan) w is a whole frame; at distance 1 beyond that, half of one. Further away w is ``decay`` times the power of
    two above ``tokens``, halved for each binary digit of d, and a block at least. Where, without decay, it would be
    less than a block, only every so-manieth frame is seen that makes up for it. All see the first frame.

    Of each pair of frames, the blocks are kept in which more than 0.6 of the columns that show anything are seen by
    more than a third of the rows. (Rows beyond the end of the video do not count, as in the authors' padding.)

    Raises ValueError unless sizes are at least 1, a frame holds a block and ``decay`` is positive.
    """
    for name, size in (("frames", frames), ("tokens", tokens), ("block", block)):
        positive("radial_blocks", name, size)
    if not decay > 0 or full_reach < 0:
        raise ValueError(f"radial_blocks takes decay > 0 and full_reach >= 0; got {decay} and {full_reach}")
    if tokens < block:
        raise ValueError(f"blocks are of one frame or two: block={block} is more than the {tokens} tokens of a frame")
    return _blocks(frames, tokens, block, float(decay), full_reach)


@remembered(16)
def _blocks(frames: int, tokens: int, block: int, decay: float, full_reach: int) -> Tensor:
    count = -(-frames * tokens // block)
    found = torch.zeros(count, count, dtype=torch.bool, device="cpu")
    known: dict[tuple[int, ...], Tensor] = {}
    for i in range(frames):
        for j in range(frames):
            width = tokens if j == 0 else width_of(abs(i - j), tokens, block, decay, full_reach)
            if width is None:
                continue
            rows, columns = i * tokens // block, j * tokens // block
            left = min((frames - i) * tokens, tokens + block)
            key = (i * tokens % block, j * tokens % block, width, left)
            if key not in known:
                known[key] = _pair(*key, tokens, block)
            part = known[key]
            found[rows : rows + part.shape[0], columns : columns + part.shape[1]] |= part
    return found


def width_of(distance: int, tokens: int, block: int, decay: float, full_reach: int) -> int | None:
    """How far along a frame at this distance a token sees on either side; None for a frame that it does not see.

    >>> [width_of(d, 256, 128, 1.0, 0) for d in (0, 1, 2, 3, 4, 8, 15, 16)]
    [256, 128, 128, 128, 128, 128, None, 128]
    """
    length = 2 ** (tokens.bit_length() - distance.bit_length())
    if length < block and distance % int(block / length):
        return None
    if distance <= full_reach:
        return tokens
    if distance == 1:
        return tokens // 2
    return int(max(length * decay, block))


def _pair(row_shift: int, column_shift: int, width: int, left: int, tokens: int, block: int) -> Tensor:
    """The dense blocks of a band between two frames that begin so far into blocks, ``left`` rows before the end."""
    num_rows, num_columns = (-(-(shift + tokens) // block) for shift in (row_shift, column_shift))
    begin = torch.arange(num_rows, device="cpu").unsqueeze(1) * block - row_shift  # of each block of rows, in its frame
    column = torch.arange(num_columns * block, device="cpu") - column_shift
    low = torch.maximum((column - width).clamp_min(0), begin)
    high = torch.minimum((column + width).clamp_max(tokens - 1), begin + block - 1)
    seen = (high - low + 1).clamp_min(0).masked_fill((column < 0) | (column >= tokens), 0)  # rows of each column
    by_block = seen.unflatten(1, (num_columns, block))
    dense = (by_block > DENSE_COLUMN * (left - begin).clamp_max(block).unsqueeze(2).double()).sum(2)
    return dense > DENSE_BLOCK * (by_block > 0).sum(2).double()
