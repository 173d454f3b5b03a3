"""Whole mixers of images and videos that choose what to attend to, beside dense attention of the same width.

    python -m benchmarks.chosen_cpu                       every mechanism: twenty minutes
    python -m benchmarks.chosen_cpu --row vsa nabla       only these; the record keeps the others' figures

Times are CPU seconds of one thread, of the two by turns, on random tokens: projections, the choice, gathering and
attention are all in them. Random tokens are the worst case of choices query by query.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.contest import RESULTS, write_json
from foveate import Grid
from foveate.catalogue.registry import mixer as made
from foveate.counting import count_operations
from foveate.kernels.cpu.loader import status
from foveate.lab.measure import machine
from foveate.mixers.base import Mixer
from foveate.testing.closeness import reference_only

OUT = RESULTS / "chosen_cpu.json"
DIM, HEADS = 128, 2
TOLERANCE = 1e-3
IMAGES = (Grid(28, 28), Grid(56, 56), Grid(112, 112))
VIDEOS = (Grid(4, 16, 16), Grid(8, 32, 32), Grid(16, 32, 32))


@dataclass(frozen=True)
class Subject:
    """A mechanism's options and the grids it is timed on; a small grid on which it is first checked."""

    options: dict[str, Any] = field(default_factory=dict)
    grids: tuple[Grid, ...] = VIDEOS
    checked: Grid = Grid(3, 13, 11)  # noqa: RUF009


SUBJECTS = {
    "bi_level_routing": Subject({}, IMAGES, Grid(30, 23)),
    "vsa": Subject({"k": 16}),
    "vmoba": Subject({"layer": 2, "cube": (4, 8, 8)}, (Grid(2, 8, 8), *VIDEOS)),
    "nabla": Subject({"mass": 0.3, "near": (3, 3, 3)}),
    "psa": Subject({}),
    "sparsifiner": Subject({"tokens": 196, "class_token": False}, (Grid(14, 14),), Grid(14, 14)),
    "select_and_pack": Subject({"keep": 0.25}, (Grid(14, 14), Grid(56, 56)), Grid(14, 14)),
    "select_and_pack, half": Subject({"keep": 0.5}, (Grid(14, 14), Grid(56, 56)), Grid(14, 14)),
    "radial_attention": Subject({}, (Grid(8, 32, 32), Grid(16, 32, 32), Grid(32, 32, 32)), Grid(9, 13, 11)),
}


@dataclass(frozen=True)
class Line:
    """One mechanism on one grid: the least CPU seconds of it and of dense attention, and its share of the pairs."""

    row: str
    options: dict[str, Any]
    grid: str
    tokens: int
    task: str
    share_of_pairs: float
    seconds: dict[str, float]
    load: float  # of the machine, the average over the last minute

    @property
    def ratio(self) -> float:
        """How many times longer dense attention takes."""
        return self.seconds["dense"] / self.seconds["sparse"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--row", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for row in options.row:
        torch.manual_seed(0)
        check(row)
        lines = [line for grid in SUBJECTS[row].grids for line in measure(row, grid, options.repeats)]
        save(row, lines)
        show(row, lines)


def check(row: str) -> None:
    """No figure of a mixer that computes something else than its definition."""
    subject = SUBJECTS[row]
    mixer = made(row.partition(",")[0], DIM, heads=HEADS, **subject.options).eval()
    x = torch.randn(1, subject.checked.length, DIM)
    with torch.no_grad():
        got = mixer(x, layout=layout_of(mixer, subject.checked))
        with reference_only():
            error = float((got - mixer(x, layout=layout_of(mixer, subject.checked))).abs().max())
    if not error <= TOLERANCE:
        raise SystemExit(f"{row}: off by {error:.1e}; nothing timed")


def measure(row: str, grid: Grid, repeats: int) -> list[Line]:
    subject = SUBJECTS[row]
    mixers = {
        "sparse": made(row.partition(",")[0], DIM, heads=HEADS, **subject.options).eval(),
        "dense": made("flash_attention", DIM, heads=HEADS, causal=False).eval(),
    }
    x = torch.randn(1, grid.length, DIM)
    with torch.no_grad(), count_operations() as counted:
        mixers["sparse"](x, layout=layout_of(mixers["sparse"], grid))
    share = counted.pairs / (HEADS * grid.length**2)
    lines = []
    for task, way in {"forward": forward, "forward + backward": trained}.items():
        seconds = take_turns({name: way(mixer, x, grid) for name, mixer in mixers.items()}, repeats)
        about = (row, subject.options, str(grid), grid.length, task, share)
        lines.append(Line(*about, seconds, os.getloadavg()[0]))
    return lines


def layout_of(mixer: Mixer, grid: Grid) -> Grid | None:
    return grid if "grid" in mixer.row.supports else None


def forward(mixer: Mixer, x: torch.Tensor, grid: Grid) -> Callable[[], object]:
    layout = layout_of(mixer, grid)

    def run() -> object:
        with torch.no_grad():
            return mixer(x, layout=layout)

    return run


def trained(mixer: Mixer, x: torch.Tensor, grid: Grid) -> Callable[[], object]:
    layout = layout_of(mixer, grid)
    parameters = list(mixer.parameters())
    return lambda: torch.autograd.grad(mixer(x, layout=layout).sum(), parameters, allow_unused=True)


def take_turns(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    least = dict.fromkeys(contenders, float("inf"))
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    return least


def save(row: str, lines: list[Line]) -> None:
    """Bring the record up to date in one mechanism."""
    kept = json.loads(OUT.read_text(encoding="utf-8"))["rows"] if OUT.exists() else {}
    kept[row] = [asdict(line) | {"ratio": line.ratio} for line in lines]
    record = {
        "title": f"mixers of width {DIM}, {HEADS} heads, float32, on random tokens: CPU seconds of one thread",
        "machine": machine.describe(),
        "isa": status().isa,
        "rows": {name: kept[name] for name in SUBJECTS if name in kept},
    }
    write_json(OUT, record)


def show(row: str, lines: list[Line]) -> None:
    table = Table("grid", "tokens", "pass", "pairs", "sparse", "dense", "dense / sparse", title=row)
    for line in lines:
        seconds = (f"{1e3 * line.seconds[name]:,.1f} ms" for name in ("sparse", "dense"))
        ratio = f"{line.ratio:.2f}x"
        table.add_row(line.grid, f"{line.tokens:,}", line.task, f"{line.share_of_pairs:.1%}", *seconds, ratio)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
