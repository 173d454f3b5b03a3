"""Pictures of patterns show the mask, the whole mask, and nothing but the mask."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.patterns import (
    Grid,
    Pattern,
    causal,
    key_padding,
    neighborhood,
    per_head,
    sinks,
    strips,
    topk_blocks,
    window,
)
from foveate.patterns.drawing.panels import MARK, rectangles

MIXED = (window(5) | sinks(2)) & causal | ~window(30)


def cells_of_svg(svg: str) -> list[Tensor]:
    """The cells that each panel fills, read back from its path."""
    panels = []
    for group in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"):
        frame, path, *_ = group
        cells = torch.zeros(int(frame.attrib["height"]), int(frame.attrib["width"]), dtype=torch.long)
        for run in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-(\d+)z", path.attrib["d"]):
            x, y, width, height, back = map(int, run)
            assert width == back
            cells[y : y + height, x : x + width] += 1
        panels.append(cells)
    return panels


def cells_of_text(block: str, width: int) -> Tensor:
    """Cells from half-block characters."""
    lines = [line.ljust(width) for line in block.split("\n")]
    return torch.tensor([[c in half for c in line] for line in lines for half in ("▀█", "▄█")])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**31))
def test_rectangles_cover_the_cells_once(rows: int, columns: int, density: float, seed: int) -> None:
    cells = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    covered = torch.zeros(rows, columns, dtype=torch.long)
    for x, y, width, height in rectangles(cells):
        covered[y : y + height, x : x + width] += 1
    assert torch.equal(covered, cells.long())


@pytest.mark.parametrize(("n", "m"), [(41, 41), (7, 40), (40, 7), (1, 1), (130, 150)])
@pytest.mark.parametrize("pattern", [MIXED, causal, window(3) & ~causal], ids=str)
def test_svg_fills_the_mask(pattern: Pattern, n: int, m: int) -> None:
    (cells,) = cells_of_svg(pattern.draw(n, m).svg)
    assert torch.equal(cells, pattern.mask(n, m)[0, 0].long())


@pytest.mark.parametrize(("n", "m"), [(41, 41), (7, 40), (40, 7), (64, 64)])
def test_text_fills_the_mask(n: int, m: int) -> None:
    title, caption_and_cells = str(MIXED.draw(n, m)).split("\n\n", 1)
    assert title == str(MIXED)
    cells = cells_of_text(caption_and_cells.split("\n", 1)[1], m)
    assert torch.equal(cells[:n], MIXED.mask(n, m)[0, 0])
    assert not cells[n:].any()


def test_wide_text_is_braille_of_at_most_64_columns() -> None:
    for size in (65, 128, 500):
        lines = window(40).draw(size).text.splitlines()[3:]
        assert max(map(len, lines)) <= 64
        assert all(0x2800 <= ord(c) < 0x2900 for line in lines for c in line)
    dots = [ord(c) - 0x2800 for line in causal.draw(128).text.splitlines()[3:] for c in line]
    assert sum(bin(code).count("1") for code in dots) == 128 * 129 // 2
    assert causal.draw(500).text.splitlines()[3][0] == chr(0x2800 + 0b11110111), "the union of 4 x 4 cells"


def test_a_grid_shows_what_the_middle_query_sees() -> None:
    drawing = neighborhood((3, 5)).draw(layout=Grid(7, 9))
    matrix, seen = cells_of_svg(drawing.svg)
    expected = neighborhood((3, 5)).mask(63, layout=Grid(7, 9))[0, 0]
    assert torch.equal(matrix, expected.long())
    assert torch.equal(seen, expected[3 * 9 + 4].view(7, 9).long())
    assert "what (3, 4) sees" in drawing.text and drawing.text.count("◉") == 1
    assert drawing.svg.count(MARK) == 1


def test_a_solid_grid_shows_its_planes_and_a_line_one() -> None:
    solid = neighborhood((2, 3, 3)).draw(layout=Grid(4, 5, 6))
    assert len(cells_of_svg(solid.svg)) == 1 + 4 and solid.svg.count(MARK) == 1
    seen = neighborhood((2, 3, 3)).mask(120, layout=Grid(4, 5, 6))[0, 0][2 * 30 + 2 * 6 + 3].view(4, 5, 6)
    assert torch.equal(torch.stack(cells_of_svg(solid.svg)[1:]), seen.long())
    assert cells_of_svg(neighborhood(3).draw(layout=Grid(9)).svg)[1].shape == (1, 9)


def test_the_last_queries_of_a_grid() -> None:
    matrix, seen = cells_of_svg(neighborhood(3).draw(5, layout=Grid(5, 5)).svg)
    assert matrix.shape == (5, 25)
    assert torch.equal(seen.flatten(), matrix[0])


def test_heads_are_drawn_one_at_a_time() -> None:
    pattern = per_head([strips(2), strips(2, axis=1)])
    drawings = [pattern.draw(layout=Grid(6, 6), head=head) for head in (0, 1)]
    for head, drawing in enumerate(drawings):
        mask = pattern.mask(36, layout=Grid(6, 6))[0, head]
        assert torch.equal(cells_of_svg(drawing.svg)[0], mask.long())
        assert f"head {head}" in drawing.title


def test_svg_is_compact_escaped_and_takes_the_colour_of_the_page() -> None:
    svg = (window(9) & causal).draw(512)._repr_svg_()
    assert "window(9) &amp; causal" in svg and "currentColor" in svg
    assert len(window(9).draw(512).svg) < 40_000 < 512 * 512


def test_saves_by_ending_and_leaves_nothing_else(tmp_path: Path) -> None:
    drawing = MIXED.draw(20, path=tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == drawing.svg
    drawing.save(str(tmp_path / "b.png"))
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    neighborhood(3).draw(layout=Grid(8, 4, 5), path=tmp_path / "c.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.png", "c.png"]
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        drawing.save(tmp_path / "c.pdf")
    with pytest.raises(FileNotFoundError):
        drawing.save(tmp_path / "nowhere" / "d.svg")


def test_says_what_is_missing_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"foveate\[report\]"):
        causal.draw(8).png(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: causal.draw(0), "from 1 to 2048"),
        (lambda: causal.draw(3000), "from 1 to 2048"),
        (lambda: causal.draw(8, head=1), "heads 0 to 0"),
        (lambda: per_head([causal, window(2)]).draw(8, head=-1), "heads 0 to 1"),
        (lambda: neighborhood(3).draw(8), "needs layout=Grid"),
        (lambda: key_padding(torch.ones(1, 5, dtype=torch.bool)).draw(8), "marks 5 keys"),
        (lambda: topk_blocks(4, k=2).draw(8), "chooses from q and k"),
    ],
)
def test_refuses_in_words(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_notebook_shows_a_picture_where_there_is_one() -> None:
    assert MIXED._repr_svg_() == MIXED.draw().svg
    assert topk_blocks(8, k=2)._repr_svg_() is None, "it depends on q and k"
    assert neighborhood((3, 3))._repr_svg_() is None, "it needs a grid"


class Unfinished(Pattern):
    """A class of a user's own that does not yet say what is visible."""

    text = "unfinished()"


def test_a_notebook_shows_the_words_of_a_pattern_that_cannot_be_drawn() -> None:
    assert Unfinished()._repr_svg_() is None
