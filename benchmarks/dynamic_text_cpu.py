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
from foveate import attend, block_mask, causal
from foveate.kernels.cpu.loader import status
from foveate.lab.measure import machine
from foveate.mixers.dynamic_sparse.dma import attend_kept
from foveate.mixers.dynamic_sparse.hyper import HyperCore
from foveate.mixers.dynamic_sparse.mosa import MoSA
from foveate.mixers.dynamic_sparse.routing import RoutingAttention
from foveate.mixers.dynamic_sparse.seer import SeerAttention

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


def hyper_attention(length: int) -> tuple[dict[str, Any], Problem]:
    """Tokens of 512 topics, each with keys, queries and values of its own, and noise."""
    topic = torch.randint(512, (length,))
    q, k, v = (3 * torch.randn(512, 64)[topic] / 2**0.5 for _ in range(3))
    k = q + 0.5 * torch.randn_like(q)
    q, v = q + 0.5 * torch.randn_like(q), v + 0.5 * torch.randn_like(q)
    q, k, v = (x[None, None] for x in (q, k, v))
    core = HyperCore()

    def error() -> float:
        exact = attend(q, k, v, causal)
        return float((core(q, k, v, within=causal) - exact).norm() / exact.norm())

    settings = {"block": core.block, "samples": core.samples, "exact_below": core.exact_below, "heads": 1, "dim": 64}
    return settings, Problem(lambda: core(q, k, v, within=causal), lambda: attend(q, k, v, causal), error=error)


def routing(length: int) -> tuple[dict[str, Any], Problem]:
    """The routed heads alone, with as many clusters as the root of the length."""
    made = RoutingAttention(128, 2, clusters=round(length**0.5), local_heads=0).eval()
    q, k, v = tensors(length, heads=2, dim=64)
    return {"clusters": made.clusters, "heads": 2, "dim": 64}, Problem(
        lambda: made.route(q, None, v), lambda: attend(q, k, v, causal), (q, v)
    )


def mosa(length: int) -> tuple[dict[str, Any], Problem]:
    """Heads that choose, and as many dense ones with as wide projections."""
    made, dense = (MoSA(128, 2, sparsity=16, dense_heads=count) for count in (0, 2))
    x = torch.randn(1, length, 128).requires_grad_()
    return {"sparsity": 16, "heads": 2, "head_dim": 64, "dim": 128}, Problem(
        lambda: made.sparse(x), lambda: dense.dense(x), (x,)
    )


def seer(length: int) -> tuple[dict[str, Any], Problem]:
    """An eighth of the blocks, a random gate, which costs what a learned one does."""
    made = SeerAttention(128, 2, k=length // 64 // 8)
    q, k, v = tensors(length, heads=2, dim=64)

    def sparse() -> Tensor:
        table = made.chosen(q, k)
        return attend(*made.turned(q, k), v, block_mask(table, made.block) & causal)

    return {"block": made.block, "k": made.k, "heads": 2, "dim": 64}, Problem(
        sparse, lambda: attend(*made.turned(q, k), v, causal), (q, k, v)
    )


MECHANISMS: dict[str, tuple[Callable[[int], tuple[dict[str, Any], Problem]], tuple[int, ...]]] = {
    "dma": (dma, (4096, 16384, 32768)),
    "routing": (routing, (4096, 16384, 65536)),
    "mosa": (mosa, (4096, 16384)),
    "seer_attention": (seer, (4096, 16384, 32768)),
    "hyper_attention": (hyper_attention, tuple(2**power for power in range(12, 18))),
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
            seconds = take_turns({"sparse": problem.sparse, "dense": problem.dense}, repeats, once=length >= 2**16)
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


def take_turns(contenders: dict[str, Run], repeats: int, *, once: bool = False) -> dict[str, float]:
    """The least times of each; of dense attention but one where it takes minutes, ``once``."""
    least = dict.fromkeys(contenders, float("inf"))
    for turn in range(repeats):
        for name, run in contenders.items():
            if name == "dense" and once and turn:
                continue
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
