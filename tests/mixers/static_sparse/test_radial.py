"""Radial attention: its blocks out of a mask written out token by token, how many there are, and text beside them."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import faster_from, heads_of, joined, masked
from torch import Tensor

from foveate import Beside, Grid, attend_partial, block_mask, merge
from foveate.catalogue.registry import mixer
from foveate.patterns.rules.radial import radial, radial_blocks

DIM, HEADS = 12, 3


def seen(frames: int, s: int, i: int, j: int, block: int, decay: float, full_reach: int) -> Tensor:
    """Which tokens of frame i see which of frame j, before blocks are cut."""
    if j == 0:
        return torch.ones(s, s, dtype=torch.bool)
    d = abs(i - j)
    length = 2 ** len(f"{s:b}") / 2 ** (len(f"{d:b}") if d else 0)
    if length < block and d % math.floor(block / length) != 0:
        return torch.zeros(s, s, dtype=torch.bool)
    width = s if d <= full_reach else s // 2 if d == 1 else max(length * decay, block)
    place = torch.arange(s)
    return (place[:, None] - place).abs() <= width


def written_out(frames: int, s: int, block: int, decay: float, full_reach: int) -> Tensor:
    """Blocks in which over 0.6 of the columns that show anything do so to over a third of the rows, frame by frame."""
    length = frames * s
    count = math.ceil(length / block)
    rows = torch.tensor([min(block, length - r * block) for r in range(count)])
    table = torch.zeros(count, count, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            mask = torch.zeros(count * block, count * block)
            mask[i * s : (i + 1) * s, j * s : (j + 1) * s] = seen(frames, s, i, j, block, decay, full_reach)
            share = mask.view(count, block, count, block).sum(1) / rows.view(-1, 1, 1)
            table |= (share > 1 / 3).sum(2) > 0.6 * (share > 0).sum(2)
    return table


@pytest.mark.paper("Radial Attention", "definition")
@pytest.mark.paper("Radial Attention", "works_when")
@pytest.mark.parametrize(
    ("frames", "s", "block", "decay", "full_reach"),
    [
        (6, 12, 4, 1.0, 1),
        (7, 11, 4, 0.5, 0),
        (9, 13, 6, 2.0, 0),
        (5, 7, 7, 1.0, 2),
        (10, 9, 3, 0.25, 1),
        (1, 5, 3, 1.0, 1),
    ],
)
def test_blocks_are_those_of_the_mask_written_out(
    frames: int, s: int, block: int, decay: float, full_reach: int
) -> None:
    got = radial_blocks(frames, s, block, decay, full_reach)
    assert torch.equal(got, written_out(frames, s, block, decay, full_reach))
    assert got.any(1).all() and got[:, 0].all()


@pytest.mark.paper("Radial Attention", "definition")
@pytest.mark.paper("Radial Attention", "works_when")
@pytest.mark.parametrize(("dims", "text"), [((6, 3, 4), 0), ((9, 3, 3), 7), ((6, 5, 3), 1)])
def test_the_mixer_is_dense_attention_under_the_mask_and_text(dims: tuple[int, int, int], text: int) -> None:
    radially = mixer("radial_attention", DIM, heads=HEADS, block=5, full_reach=0).double()
    s, video = dims[1] * dims[2], dims[0] * dims[1] * dims[2]
    mask = torch.ones(video + text, video + text, dtype=torch.bool)
    table = written_out(dims[0], s, 5, 1.0, 0)
    mask[:video, :video] = table.repeat_interleave(5, 0).repeat_interleave(5, 1)[:video, :video]
    assert not mask.all()
    x = torch.randn(2, video + text, DIM, dtype=torch.float64, requires_grad=True)
    layout = Beside(Grid(*dims), after=text) if text else Grid(*dims)

    def dense() -> Tensor:
        layers = (radially.to_q, radially.to_k, radially.to_v)
        q, k, v = (heads_of(x, layer.weight, None, HEADS) for layer in layers)
        return joined(masked(q, k, v, mask)) @ radially.to_out.weight.T

    follows(radially, lambda: radially(x, layout=layout), dense, x)


@pytest.mark.paper("Radial Attention", "works_when")
def test_text_is_what_merging_its_part_gives() -> None:
    """As the authors run it: the video's blocks by themselves, text by itself, merged by their row sums."""
    frames, s, block, text = 6, 12, 4, 9
    q, k, v = torch.randn(3, 1, 2, frames * s + text, 8, dtype=torch.float64)
    video = [each[:, :, : frames * s] for each in (q, k, v)]
    parts = [attend_partial(*video, block_mask(radial_blocks(frames, s, block), block))]
    parts.append(attend_partial(video[0], k[:, :, frames * s :], v[:, :, frames * s :]))
    pattern = radial(frames, s, block=block, text=text)
    together = attend_partial(q, k, v, pattern).out
    torch.testing.assert_close(together[:, :, : frames * s], merge(parts).out, rtol=1e-10, atol=1e-10)
    dense = torch.softmax(q[:, :, frames * s :] @ k.mT / 8**0.5, -1) @ v
    torch.testing.assert_close(together[:, :, frames * s :], dense, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("Radial Attention", "works_when")
def test_blocks_grow_as_n_log_n() -> None:
    """From 8 frames to 128 the share of n log n stays; of n^2 it falls to a quarter."""
    counts = {frames: int(radial_blocks(frames, 256, 16, 1.0, 1).sum()) for frames in (8, 16, 32, 64, 128)}
    of_log = {frames: count / (frames * math.log2(frames)) for frames, count in counts.items()}
    of_square = {frames: count / frames**2 for frames, count in counts.items()}
    assert max(of_log.values()) < 2 * min(of_log.values())
    assert of_square[128] < of_square[8] / 4
    for frames, count in counts.items():  # the paper's bound: 4 s n (log2 n - log2 s) pairs, and the first frame
        pairs, n = count * 16**2, frames * 256
        assert pairs <= 4 * 256 * n * math.log2(frames) + 2 * n * 256


@pytest.mark.paper("Radial Attention", "works_when")
def test_it_was_measured_faster_than_dense_attention_at_video_length() -> None:
    faster_from("radial_attention", 16384, 1.3)
    faster_from("radial_attention", 32768, 1.7)


def test_what_cannot_be_is_refused() -> None:
    for sizes, words in (((0, 4, 2), "frames"), ((2, 4, 8), "block=8 is more")):
        with pytest.raises(ValueError, match=words):
            radial_blocks(*sizes)
    with pytest.raises(ValueError, match="decay > 0"):
        radial_blocks(2, 4, 2, 0.0)
    with pytest.raises(ValueError, match="lives on a video"):
        mixer("radial_attention", DIM, heads=HEADS)(torch.randn(1, 12, DIM), layout=Grid(3, 4))
    with pytest.raises(ValueError, match="lives on a video"):
        mixer("radial_attention", DIM, heads=HEADS)(torch.randn(1, 13, DIM), layout=Beside(Grid(3, 2, 2), before=1))
