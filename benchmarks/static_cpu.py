"""What static patterns cost beside what they see: windows beside dense calls, neighborhoods dilated and with biases.

    python -m benchmarks.static_cpu                 two minutes
    python -m benchmarks.static_cpu --repeats 3     less

A window is held against the time of causal attention times its share of the pairs, a dilated neighborhood against the
undilated one, one with a table of relative positions against one without. Times are the least CPU seconds of one
thread, of contenders by turns.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from benchmarks.choice_cpu import take_turns
from benchmarks.contest import RESULTS, write_json
from foveate import Grid, Pattern, attend, causal, neighborhood, relative_table, window
from foveate.attention import Bias
from foveate.kernels.cpu.loader import status
from foveate.lab.measure import machine

TOKENS = 6000
WINDOWS = (window(63) & causal, window(250) & causal, window(1000) & causal, window(125))
GRIDS = ((28, 7, (1, 2, 4)), (28, 3, (1, 4, 8)), (56, 7, (1, 2, 4, 8)))  # side, keys along it, dilations
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # greatest error


@dataclass(frozen=True)
class Line:
    """One pattern and pass: its time, and that of what it is held against, times the share of the work."""

    name: str
    against: str
    dtype: str
    task: str
    seconds: float
    expected: float
    load: float  # of the machine, the average over the last minute

    @property
    def ratio(self) -> float:
        return self.seconds / self.expected


@dataclass(frozen=True)
class Problem:
    """One call, and the name that others hold themselves against."""

    name: str
    pattern: Pattern
    tensors: list[Tensor]
    layout: Grid | None = None
    bias: Bias | None = None

    def run(self, tensors: list[Tensor]) -> Tensor:
        how = {} if self.layout is None else {"layout": self.layout}
        return attend(*tensors, self.pattern, bias=self.bias, impl="native", **how)  # type: ignore[arg-type]

    def visible(self) -> Tensor:
        return self.pattern.mask(self.tensors[0].shape[2], layout=self.layout)[0, 0]

    def check(self) -> None:
        """No figure of a call that computes something else."""
        exact = [x[:1, :1].double() for x in self.tensors]
        logits = exact[0] @ exact[1].mT * exact[0].shape[3] ** -0.5
        if self.bias is not None:
            places = torch.arange(logits.shape[-1])
            logits = logits + self.bias.values(0, 0, places[:, None], places).double()
        truth = logits.masked_fill(~self.visible(), float("-inf")).softmax(-1) @ exact[2]
        error = float((self.run(self.tensors)[:1, :1] - truth).abs().max())
        allowed = ALLOWED[self.tensors[0].dtype]
        if not error <= allowed:
            raise SystemExit(f"{self.name}: off by {error:.2e}, more than {allowed:.0e}; nothing timed")

    def tasks(self) -> Iterator[tuple[str, Callable[[], object]]]:
        yield "forward", lambda: self.run(self.tensors)
        wanted = [x.clone().requires_grad_() for x in self.tensors]
        out = self.run(wanted)
        seed = torch.randn_like(out)
        yield "backward", lambda: torch.autograd.grad(out, wanted, seed, retain_graph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("heads", 4), ("dim", 64), ("repeats", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines: list[Line] = []
    for dtype in ALLOWED:
        tensors = [torch.randn(1, options.heads, TOKENS, options.dim, dtype=dtype) for _ in range(3)]
        lines += over_tokens(tensors, options.repeats)
    for side, size, dilations in GRIDS:
        tensors = [torch.randn(2, options.heads, side**2, 32) for _ in range(3)]
        lines += on_grid(Grid(side, side), size, dilations, tensors, options.repeats)
    show(lines)
    record = {
        "title": "static patterns beside what they see, CPU seconds of one thread",
        "machine": machine.describe(),
        "isa": status().isa,
        "settings": vars(options),
        "cases": [asdict(line) | {"ratio": line.ratio} for line in lines],
    }
    print("written to", write_json(RESULTS / "static_cpu.json", record))


def over_tokens(tensors: list[Tensor], repeats: int) -> list[Line]:
    dense = Problem("causal", causal, tensors)
    problems = [Problem(str(pattern), pattern, tensors) for pattern in WINDOWS]
    pairs = {problem.name: int(problem.visible().sum()) for problem in (dense, *problems)}
    shares = {problem.name: ("causal", pairs[problem.name] / pairs["causal"]) for problem in problems}
    return measure([dense, *problems], shares, repeats)


def on_grid(layout: Grid, size: int, dilations: tuple[int, ...], tensors: list[Tensor], repeats: int) -> list[Line]:
    table = torch.randn(tensors[0].shape[1], *(2 * side - 1 for side in layout.dims))
    problems, shares = [], {}
    for dilation in dilations:
        pattern, name = neighborhood(size, dilation=dilation), f"{size} x {size} keys, dilation {dilation}, {layout}"
        problems.append(Problem(name, pattern, tensors, layout))
        biased = Problem(f"{name}, table", pattern, tensors, layout, relative_table(table, layout.dims))
        problems.append(biased)
        shares[biased.name] = (name, 1.0)
        if dilation > 1:
            shares[name] = (problems[0].name, 1.0)
    return measure(problems, shares, repeats)


def measure(problems: list[Problem], shares: dict[str, tuple[str, float]], repeats: int) -> list[Line]:
    runs: dict[str, Callable[[], object]] = {}
    for problem in problems:
        problem.check()
        runs |= {f"{problem.name}: {task}": run for task, run in problem.tasks()}
    seconds = take_turns(runs, repeats)
    dtype, load = str(problems[0].tensors[0].dtype).removeprefix("torch."), os.getloadavg()[0]
    return [
        Line(name, against, dtype, task, seconds[f"{name}: {task}"], share * seconds[f"{against}: {task}"], load)
        for name, (against, share) in shares.items()
        for task in ("forward", "backward")
    ]


def show(lines: list[Line]) -> None:
    table = Table("pattern", "against", "dtype", "pass", "takes", "share of that", "ratio", title="static patterns")
    for line in lines:
        times = f"{1e3 * line.seconds:.2f} ms", f"{1e3 * line.expected:.2f} ms", f"{line.ratio:.2f}x"
        table.add_row(escape(line.name), escape(line.against), line.dtype, line.task, *times)
    Console(width=160).print(table, f"{machine.in_words()}; native kernels: {status().isa}")


if __name__ == "__main__":
    main()
