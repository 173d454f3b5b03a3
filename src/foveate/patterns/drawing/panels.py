"""Panels of cells as text and as SVG."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

COLUMNS = 64  # of a terminal
HALF_BLOCKS = " ▄▀█"  # bit 0: lower cell, bit 1: upper cell
BRAILLE_BITS = torch.tensor([[1, 8], [2, 16], [4, 32], [64, 128]], dtype=torch.long, device="cpu")
SIDE, GAP, LINE_HEIGHT, CHARACTER, WIDEST = 320, 24, 20, 7, 1100  # of an SVG, in pixels
MARK = "#e8590c"  # orange is seen on light and dark


class Panel(NamedTuple):
    """Cells to fill (rows, columns), what they show, and a marked cell; a map shows tokens, not pairs."""

    cells: Tensor
    caption: str
    mark: tuple[int, int] | None = None
    is_map: bool = False


def as_text(title: str, panels: tuple[Panel, ...]) -> str:
    """Title, and each panel under its caption."""
    blocks = [title]
    for panel in panels:
        blocks.append(f"{panel.caption}\n{_map_text(panel) if panel.is_map else _cells_text(panel.cells)}")
    return "\n\n".join(blocks)


def _cells_text(cells: Tensor) -> str:
    """Two cells to a character; eight where they are too many; the union of several where even that is."""
    if cells.shape[1] <= COLUMNS:
        upper, lower = _padded(cells, 2, 1).unflatten(0, (-1, 2)).long().unbind(1)
        return _lines((2 * upper + lower).tolist(), HALF_BLOCKS)
    factor = -(-cells.shape[1] // (2 * COLUMNS))
    pooled = max_pool2d(cells[None].float(), factor, ceil_mode=True)[0].bool()
    dots = _padded(pooled, 4, 2).unflatten(1, (-1, 2)).unflatten(0, (-1, 4))  # (lines, 4, characters, 2)
    codes = (dots * BRAILLE_BITS[:, None, :]).sum((1, 3))
    return "\n".join("".join(chr(0x2800 + code) for code in line) for line in codes.tolist())


def _padded(cells: Tensor, rows: int, columns: int) -> Tensor:
    return pad(cells, (0, -cells.shape[1] % columns, 0, -cells.shape[0] % rows))


def _map_text(panel: Panel) -> str:
    shown = panel.cells.long()
    if panel.mark is not None:
        shown[panel.mark] = 2
    between = " " if 2 * shown.shape[1] <= COLUMNS else ""
    return _lines(shown.tolist(), "·█◉", between)


def _lines(cells: list[list[int]], characters: str, between: str = "") -> str:
    return "\n".join(between.join(characters[cell] for cell in row).rstrip() for row in cells)


def as_svg(title: str, panels: tuple[Panel, ...]) -> str:
    """Panels beside one another, in rows, in the current text colour."""
    drawn, widest = [], CHARACTER * len(title)
    left, top, bottom = 0, LINE_HEIGHT + GAP // 2, 0
    for panel in panels:
        scale = _scale(panel, len(panels))
        width = max(round(panel.cells.shape[1] * scale), CHARACTER * len(panel.caption))
        if left + width > WIDEST and left:
            left, top = 0, bottom + GAP
        drawn.append(_panel_svg(panel, left, top, scale))
        widest, bottom = max(widest, left + width), max(bottom, top + _height(panel, scale))
        left += width + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {widest} {bottom}" width="{widest}"'
        f' height="{bottom}" role="img" font-family="sans-serif" font-size="12" fill="currentColor">'
        f"<title>{escape(title)}</title>"
        f'<text y="{LINE_HEIGHT - 4}" font-weight="bold">{escape(title)}</text>{"".join(drawn)}</svg>'
    )


def _scale(panel: Panel, num_panels: int) -> float:
    """Pixels to a cell; the planes of a solid grid are drawn at half size."""
    side = SIDE / 2 if panel.is_map and num_panels > 2 else SIDE
    return side / max(panel.cells.shape)


def _height(panel: Panel, scale: float) -> int:
    return LINE_HEIGHT + round(panel.cells.shape[0] * scale)


def _panel_svg(panel: Panel, left: int, top: int, scale: float) -> str:
    rows, columns = panel.cells.shape
    mark = ""
    if panel.mark is not None:
        row, column = panel.mark
        mark = f'<rect x="{column}" y="{row}" width="1" height="1" fill="{MARK}"/>'
    path = "".join(f"M{x} {y}h{w}v{h}h-{w}z" for x, y, w, h in rectangles(panel.cells))
    place = f"translate({left} {top + LINE_HEIGHT}) scale({scale:.4g})"
    return (
        f'<text x="{left}" y="{top + LINE_HEIGHT - 6}">{escape(panel.caption)}</text>'
        f'<g transform="{place}" shape-rendering="crispEdges">'
        f'<rect width="{columns}" height="{rows}" fill-opacity=".08"/><path d="{path}"/>{mark}</g>'
    )


def rectangles(cells: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Filled cells as disjoint rectangles (x, y, width, height): runs of a row, joined to equal runs below."""
    open_runs: dict[tuple[int, int], int] = {}  # (start, end) of a run: its first row
    last = cells.shape[0]
    for y in range(last + 1):
        runs = dict.fromkeys(_runs(cells[y]) if y < last else [])
        for start, end in [run for run in open_runs if run not in runs]:
            top = open_runs.pop((start, end))
            yield start, top, end - start, y - top
        for run in runs:
            open_runs.setdefault(run, y)


def _runs(row: Tensor) -> list[tuple[int, int]]:
    edges = torch.nonzero(pad(row.int(), (1, 1)).diff()).flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
