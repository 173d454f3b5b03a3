"""Attention over blocks that each query chose, on random inputs: gathered, by tiles of the union, and dense.

    python -m benchmarks.choice_cpu                      up to 128k tokens: ten minutes
    python -m benchmarks.choice_cpu --lengths 8192       a few seconds

Times are CPU seconds of one thread, which other programs on the machine disturb least, of contenders by turns. Those of
the choices are whole calls: scores, the best of them, building, attention.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from unittest import mock

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from benchmarks.contest import RESULTS, write_json
from foveate import Pattern, attend, causal, topk_blocks
from foveate.attention.impl import native
from foveate.kernels.cpu.loader import status
from foveate.lab.measure import machine
from foveate.patterns.algebra import LINE, Scene, resolve

PATTERN = topk_blocks(512, 3)
DTYPES = (torch.float32, torch.bfloat16)
CHECKED = 3000  # tokens at which a pattern is first held against the definition
LONGEST_TRAINED = 2**15  # tokens of which a backward pass is timed, too
LONGEST_REPEATED = 2**15


@dataclass(frozen=True)
class Line:
    """One length, dtype and pass: the least CPU seconds of each contender."""

    tokens: int
    dtype: str
    task: str
    share_of_pairs: float  # of the causal ones
    seconds: dict[str, float]
    load: float  # of the machine, the average over the last minute

    @property
    def ratios(self) -> dict[str, float]:
        """How many times longer than the gathered call each takes."""
        return {name: seconds / self.seconds["gathered"] for name, seconds in self.seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**13, 2**15, 2**17])
    for name, default in (("heads", 2), ("dim", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = []
    for dtype in DTYPES:
        check(PATTERN, dtype)
        for length in options.lengths:
            tensors = [torch.randn(1, options.heads, length, options.dim, dtype=dtype) for _ in range(3)]
            lines += measure(PATTERN, tensors, 1 if length > LONGEST_REPEATED else options.repeats)
    show(PATTERN, lines)
    record = {
        "title": f"attention over {PATTERN} on random inputs, CPU seconds of one thread",
        "machine": machine.describe(),
        "isa": status().isa,
        "settings": vars(options),
        "cases": [asdict(line) | {"ratios": line.ratios} for line in lines],
    }
    print("written to", write_json(RESULTS / "choice_cpu.json", record))


@contextmanager
def by_tiles() -> Iterator[None]:
    """No queries are gathered."""
    with mock.patch.dict(native.KEYS_OF_VISIT, dict.fromkeys(native.KEYS_OF_VISIT, 0)):
        yield


def measure(pattern: Pattern, tensors: list[Tensor], repeats: int) -> list[Line]:
    q, k, v = tensors
    length = q.shape[2]

    def forward(over: Pattern) -> Callable[[], object]:
        return lambda: attend(q, k, v, over, impl="native")

    def trained(over: Pattern) -> Callable[[], object]:
        wanted = [x.detach().requires_grad_() for x in tensors]
        return lambda: torch.autograd.grad(attend(*wanted, over, impl="native"), wanted, torch.ones_like(q))

    tasks = {"forward": forward} | ({"forward + backward": trained} if length <= LONGEST_TRAINED else {})
    share = share_of_pairs(pattern, q, k)
    lines = []
    for task, run in tasks.items():
        contenders = {"gathered": run(pattern), "tiles of the union": tiled(run(pattern)), "dense": run(causal)}
        contenders["choosing"] = lambda: resolve(pattern, Scene(length, length, q=q, k=k))
        seconds = take_turns(contenders, repeats)
        lines.append(Line(length, str(q.dtype).removeprefix("torch."), task, share, seconds, os.getloadavg()[0]))
    return lines


def tiled(run: Callable[[], object]) -> Callable[[], object]:
    def without() -> object:
        with by_tiles():
            return run()

    return without


def take_turns(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    least = dict.fromkeys(contenders, float("inf"))
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    return least


def share_of_pairs(pattern: Pattern, q: Tensor, k: Tensor) -> float:
    """Visible pairs over those that causal attention forms."""
    selection = native.select(q, k, pattern, LINE, q.shape[3] ** -0.5, plain=True)
    length = q.shape[2]
    return selection.density * length**2 / (length * (length + 1) / 2)  # type: ignore[union-attr]


def check(pattern: Pattern, dtype: torch.dtype) -> None:
    """No figure of a call that computes something else."""
    q, k, v = (torch.randn(1, 2, CHECKED, 64, dtype=dtype) for _ in range(3))
    mask = pattern.select(q, k).to_dense()
    logits = (q.double() @ k.double().mT * 64**-0.5).masked_fill(~mask, float("-inf"))
    error = float((attend(q, k, v, pattern, impl="native") - torch.softmax(logits, -1) @ v.double()).abs().max())
    allowed = 1e-5 if dtype == torch.float32 else 3e-2
    if not error <= allowed:
        raise SystemExit(f"{pattern} in {dtype}: off by {error:.2e}, more than {allowed:.0e}; nothing timed")


def show(pattern: Pattern, lines: list[Line]) -> None:
    title = f"{escape(str(pattern))}: CPU seconds of one thread"
    table = Table("tokens", "dtype", "pass", "pairs", "gathered", "choosing", "by tiles", "dense", "load", title=title)
    for line in lines:
        times, ratios = line.seconds, line.ratios
        beside = (f"{times[name]:.3f} s, {ratios[name]:.1f}x" for name in ("tiles of the union", "dense"))
        own = (f"{times[name]:.3f} s" for name in ("gathered", "choosing"))
        table.add_row(
            f"{line.tokens}", line.dtype, line.task, f"{line.share_of_pairs:.1%}", *own, *beside, f"{line.load:.1f}"
        )
    Console(width=140).print(table, f"{machine.in_words()}; native kernels: {status().isa}")


if __name__ == "__main__":
    main()
