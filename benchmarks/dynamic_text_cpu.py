"""Mechanisms that choose by content beside dense attention, on random inputs: choices, gates and attention together.

    python -m benchmarks.dynamic_text_cpu                          all of them: a quarter of an hour
    python -m benchmarks.dynamic_text_cpu --only dma --lengths 8192

Times are CPU seconds of one thread, the least of some repeats, of contenders by turns. Dense attention is ``attend``
over the same heads. A run of some mechanisms keeps the figures of the others in the file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.contest import RESULTS, write_json
from foveate import attend, causal
from foveate.kernels.cpu.loader import status
from foveate.lab.measure import machine
from foveate.mixers.dynamic_sparse.dma import attend_kept

FILE = RESULTS / "dynamic_text_cpu.json"
Run = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """What to time, and the dense call beside it, with the tensors that have gradients; and how far off it is."""

    sparse: Run
    dense: Run
    leaves: tuple[Tensor, ...] = ()
    error: Callable[[], float] | None = None


@dataclass(frozen=True)
class Line:
    mechanism: str
    tokens: int
    task: str
    settings: dict[str, Any]
    seconds: dict[str, float]
    error: float | None = None  # relative, of outputs, against dense attention
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", self.seconds["dense"] / self.seconds["sparse"])


def dma(length: int) -> tuple[dict[str, Any], Problem]:
    q, k, v = tensors(length, heads=2, dim=64)
    gate, keep = torch.rand(1, 2, length).requires_grad_(), 1024
    bias = gate.detach().unsqueeze(2)
    return {"keep": keep, "heads": 2, "dim": 64}, Problem(
        lambda: attend_kept(q, k, v, gate, keep), lambda: attend(q, k, v, causal, bias=bias), (q, k, v, gate)
    )


MECHANISMS: dict[str, tuple[Callable[[int], tuple[dict[str, Any], Problem]], tuple[int, ...]]] = {
    "dma": (dma, (4096, 16384, 32768)),
}
TRAINED = 16384  # tokens of which a backward pass is timed, too


def tensors(length: int, *, heads: int, dim: int) -> list[Tensor]:
    return [torch.randn(1, heads, length, dim).requires_grad_() for _ in range(3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(MECHANISMS), default=list(MECHANISMS))
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [line for name in options.only for line in measure(name, options.lengths, options.repeats)]
    show(lines)
    others = json.loads(FILE.read_text(encoding="utf-8"))["cases"] if FILE.exists() else []
    record = {
        "title": "mechanisms that choose by content, on random inputs, CPU seconds of one thread",
        "machine": machine.describe(),
        "isa": status().isa,
        "cases": [case for case in others if case["mechanism"] not in options.only] + [asdict(line) for line in lines],
    }
    print("written to", write_json(FILE, record))


def measure(name: str, lengths: list[int] | None, repeats: int) -> Iterator[Line]:
    make, usual = MECHANISMS[name]
    for length in lengths or usual:
        settings, problem = make(length)
        with torch.no_grad():
            seconds = take_turns({"sparse": problem.sparse, "dense": problem.dense}, repeats if length < 2**16 else 1)
            error = None if problem.error is None else problem.error()
        yield Line(name, length, "forward", settings, seconds, error)
        if problem.leaves and length <= TRAINED:
            contenders = {"sparse": trained(problem.sparse, problem), "dense": trained(problem.dense, problem)}
            yield Line(name, length, "forward + backward", settings, take_turns(contenders, repeats))


def trained(run: Run, problem: Problem) -> Run:
    def both() -> None:
        out = run()
        torch.autograd.grad(out, problem.leaves, torch.ones_like(out), allow_unused=True)

    return both


def take_turns(contenders: dict[str, Run], repeats: int) -> dict[str, float]:
    least = dict.fromkeys(contenders, float("inf"))
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    return least


def show(lines: list[Line]) -> None:
    table = Table("mechanism", "tokens", "pass", "sparse", "dense", "ratio", "error", title="CPU seconds of one thread")
    for line in lines:
        times = (f"{line.seconds[name]:.3f}" for name in ("sparse", "dense"))
        error = "" if line.error is None else f"{line.error:.3g}"
        table.add_row(line.mechanism, f"{line.tokens}", line.task, *times, f"{line.ratio:.1f}x", error)
    Console(width=120).print(table, f"{machine.in_words()}; native kernels: {status().isa}")


if __name__ == "__main__":
    main()
