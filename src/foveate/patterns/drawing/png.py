"""Panels as PNG."""

from __future__ import annotations

from pathlib import Path

from foveate.patterns.drawing.panels import MARK, Panel

INK = "#1c3d5a"
PAPER = "#eef1f4"


def write_png(title: str, panels: tuple[Panel, ...], path: Path) -> None:
    """Draw panels beside one another, at most six in a row, and save them."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        raise ImportError("PNG pictures need matplotlib: pip install 'foveate[report]'") from None
    columns = min(len(panels), 6)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(4.2 * columns, 0.085 * len(title)), 4.4 * rows), layout="constrained", dpi=120)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, ax in zip(panels, axes, strict=False):
        ax.imshow(panel.cells.numpy(), cmap=ListedColormap([PAPER, INK]), vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(panel.caption, fontsize=9)
        ax.tick_params(labelsize=7)
        if not panel.is_map:
            ax.set(xlabel="key", ylabel="query")
        if panel.mark is not None:
            row, column = panel.mark
            ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=MARK))
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.savefig(path, format="png")
