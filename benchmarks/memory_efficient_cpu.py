"""Attention without quadratic memory: peak memory and time against attend's, forward and forward with backward.

python -m benchmarks.memory_efficient_cpu [--length 4096 ...] [--heads 1] [--dim 64] [--repeats 3] [--threads 1]

Memory is what the process holds at its peak beyond what it held before (VmHWM of /proc, reset before each run); time is
the processor's, the least of runs by turns, which other work on the machine adds least to.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import RESULTS, write_json
from foveate import attend, causal
from foveate.kernels.cpu.loader import status
from foveate.lab.measure import machine
from foveate.mixers.exact_io.chunked import ChunkedCore

LENGTHS = (4096, 8192, 16384)


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ChunkedCore()(q, k, v, within=causal)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, causal)


def forward(way: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return way(*inputs)


def trained(way: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(way(*inputs).square().sum(), inputs)


def held(field: str) -> int:
    """Bytes that this process holds (VmRSS), or has held at most since the last reset (VmHWM)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])


def peak(run: Callable[[], Any]) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs left free would else be used unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    run()
    return held("VmHWM") - before


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, action="append")
    for name, default in (("heads", 1), ("dim", 64), ("repeats", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory_efficient_cpu.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cases = []
    for task, run in (("forward", forward), ("forward + backward", trained)):
        for length in options.length or LENGTHS:
            shape = (1, options.heads, length, options.dim)
            inputs = tuple(torch.randn(shape, requires_grad=True) for _ in range(3))
            runs = {name: partial(run, way, inputs) for name, way in (("chunked", chunked), ("attend", exact))}
            error = max(float((a - b).abs().max()) for a, b in zip(*(run() for run in runs.values()), strict=True))
            seconds = dict.fromkeys(runs, float("inf"))
            for _ in range(options.repeats):
                for name, each in runs.items():
                    start = time.process_time()
                    each()
                    seconds[name] = min(seconds[name], time.process_time() - start)
            memory = {name: peak(each) for name, each in runs.items()}
            cases.append({"task": task, "tokens": length, "seconds": seconds, "bytes": memory, "error": error})
            ratio = seconds["chunked"] / seconds["attend"]
            print(f"{task}, {length:,} tokens: {ratio:.2f}x attend's time, {memory['chunked'] / 2**20:.1f} MiB")
    about = {"machine": machine.describe(), "isa": status().isa, "load": os.getloadavg()[0]}
    about["settings"] = {name: getattr(options, name) for name in ("heads", "dim", "repeats", "threads")}
    write_json(options.out, about | {"cases": cases})


if __name__ == "__main__":
    main()
