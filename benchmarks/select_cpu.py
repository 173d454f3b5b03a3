"""What a selection costs beside the attention that it drives: the choice (scores, the best of them), and the building.

python -m benchmarks.select_cpu [--length 16384] [--heads 8] [--dim 64] [--repeats 9] [--threads 2] [--case topk]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.contest import RESULTS, Times, take_turns, write_json
from foveate import (
    Pattern,
    blocks,
    causal,
    dilated,
    mass_blocks,
    per_head,
    random_blocks,
    sinks,
    topk_blocks,
    vertical_slash,
    window,
)
from foveate.attention.impl import native
from foveate.attention.impl.plan import Plan
from foveate.kernels.cpu.loader import status
from foveate.lab.measure import machine
from foveate.patterns.algebra import Scene, resolve
from foveate.patterns.select.build import build
from foveate.patterns.select.dense import dense_mask

GOAL = 0.1  # of the attention's time
CHECKED = 1000  # tokens at which every selection is first held against its dense mask
STEPS = 200  # of decoding, another length each

STATIC = (
    window(256) & causal,
    (window(256) | sinks(4)) & causal,
    dilated(64, 4) & causal,
    blocks(256) & causal,
    (random_blocks(64, 0.1) | window(64)) & causal,
    per_head([window(64 * width) for width in range(1, 9)]) & causal,
)
BY_BLOCKS = (
    topk_blocks(64, k=8, per="block"),
    topk_blocks(64, k=64, per="block"),
    topk_blocks(128, k=8, per="block"),
    topk_blocks(64, k=8),
    topk_blocks(64, k=64),
    topk_blocks(64, k=16, shared=True),
    topk_blocks(64, k=8, per="block") | window(256) & causal,
)
BEYOND = (mass_blocks(64, 0.9, per="block"), mass_blocks(64, 0.5), vertical_slash(256, 256))  # no goal was set


@dataclass(frozen=True)
class Share:
    """One pattern: times of its parts, what it lists, and the parts' share of the attention."""

    pattern: str
    times: dict[str, Times]
    tiles: int
    distinct_masks: int
    columns: int
    computed: float  # pairs in tiles, columns and runs over all pairs
    goal: float | None

    @property
    def share(self) -> float:
        before = sum(self.times[part].minimum for part in ("choose", "build"))
        return before / self.times["attend"].minimum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("length", 16384), ("heads", 8), ("dim", 64), ("repeats", 9), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--case", default="", help="only patterns with this in their text")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    patterns = [p for p in STATIC + BY_BLOCKS + BEYOND if options.case in str(p)]
    with Progress(transient=True) as progress:
        shares = [measure(pattern, options) for pattern in progress.track(patterns)]
    decoding = {str(pattern): decode(pattern) for pattern in (window(4096) & causal | sinks(4),)}
    show(shares, decoding)
    if not options.case:
        print("written to", save(shares, decoding, vars(options)))


def measure(pattern: Pattern, options: argparse.Namespace) -> Share:
    check(pattern, options.heads)
    q, k, v = (torch.randn(1, options.heads, options.length, options.dim) for _ in range(3))
    scene = Scene(options.length, options.length, q=q, k=k)
    resolved = resolve(pattern, scene)
    visit = native.KEYS_OF_VISIT[q.dtype]
    selection = build(resolved, scene, keys_of_visit=visit)
    spec = Plan(selection, (), "softmax", options.dim**-0.5, None)
    runs: dict[str, Any] = {
        "choose": lambda: resolve(pattern, scene),
        "build": lambda: build(resolved, scene, keys_of_visit=visit),
        "attend": lambda: native.forward(spec, q, k, v),
    }
    times = take_turns(runs, dict.fromkeys(runs, options.repeats))
    sizes = (selection.num_tiles, len(selection.masks), selection.num_columns, selection.computed)
    return Share(str(pattern), times, *sizes, None if pattern in BEYOND else GOAL)


def check(pattern: Pattern, heads: int) -> None:
    """No figure of a selection that is not its pattern's mask."""
    q, k = (torch.randn(1, heads, CHECKED, 16) for _ in range(2))
    scene = Scene(CHECKED, CHECKED, q=q, k=k)
    resolved = resolve(pattern, scene)
    if not torch.equal(build(resolved, scene).to_dense(), dense_mask(resolved, scene)):
        raise SystemExit(f"{pattern}: its selection is not its mask; nothing timed")


def decode(pattern: Pattern, longest: int = 2**17) -> Times:
    """Selecting for one query, after one more key each time."""
    q, keys = torch.zeros(1, 1, 1, 1), torch.zeros(1).expand(1, 1, longest, 1)
    steps = iter(range(longest - STEPS, longest))

    def next_step() -> tuple[Tensor, ...]:
        return (pattern.select(q, keys[:, :, : next(steps)]).tile_ids,)

    return take_turns({"": next_step}, {"": STEPS})[""]


def show(shares: list[Share], decoding: dict[str, Times]) -> None:
    table = Table("pattern", "choose", "build", "attend", "share", "computed", "masks", title="selections")
    for each in shares:
        parts = (f"{1e3 * each.times[part].minimum:.1f} ms" for part in ("choose", "build", "attend"))
        verdict = "" if each.goal is None else " ok" if each.share <= each.goal else " more than a tenth"
        table.add_row(
            escape(each.pattern), *parts, f"{each.share:.1%}{verdict}", f"{each.computed:.1%}", f"{each.distinct_masks}"
        )
    console = Console(width=150)
    console.print(table, f"{machine.in_words()}; {torch.get_num_threads()} threads; native kernels: {status().isa}")
    for name, times in decoding.items():
        console.print(f"decoding, {escape(name)}: {1e6 * times.median:.0f} microseconds a step")


def save(shares: list[Share], decoding: dict[str, Times], settings: dict[str, Any]) -> str:
    record = {
        "title": "selections beside the attention they drive",
        "machine": machine.describe(),
        "isa": status().isa,
        "settings": settings,
        "cases": [asdict(each) | {"share": each.share} for each in shares],
        "decoding": {name: asdict(times) for name, times in decoding.items()},
    }
    return str(write_json(RESULTS / "select_cpu.json", record))


if __name__ == "__main__":
    main()
