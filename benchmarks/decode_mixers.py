"""What a decoding step of each sparse mechanism costs after a long text, beside dense attention to as many keys.

python -m benchmarks.decode_mixers [--length 32768] [--dim 512] [--heads 8] [--repeats 300] [--threads 1] [--row moba]

Each step is a whole mixer's, projections included, after a prompt of ``length`` tokens; its rival is flash_attention's
step after a prompt of as many tokens as the mechanism reads keys. Both go on from step to step, by turns, and what
counts is the processor's time of the process, which other work on the machine adds least to. Rodimus+ has
its recurrence beside the rival, too; NSA, which has three keys and values to a token, its own projections before it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.contest import RESULTS, Run, Times, write_json
from foveate import attend
from foveate.cache import KVCache
from foveate.catalogue.registry import mixer as made
from foveate.kernels.cpu.loader import status
from foveate.lab.measure import machine
from foveate.mixers.base import Mixer, join_heads, split_heads
from foveate.mixers.dynamic_sparse.nsa import NSA
from foveate.mixers.linear.rodimus_plus import RodimusPlus
from foveate.patterns.ranges import total, visible_ranges

GOAL = 1.5  # times the dense step
TOLERANCE = 1e-3  # between the step and the whole sequence
SETTINGS = {"length": 32768, "dim": 512, "heads": 8, "repeats": 300, "threads": 1}
WARM = 5  # steps before the first that is timed
CHECKED = 5000  # tokens of the prompt before that step
PIECE = 4096  # tokens of the prompt read at once

Keys = Callable[[Any, int], float]


def of_pattern(mixer: Any, length: int) -> float:
    """Keys that a query at the end sees, on average over the heads."""
    pattern = mixer.core.pattern
    return sum(total(visible_ranges(pattern, length, length + 1, h)) for h in range(pattern.heads)) / pattern.heads


def of_delta(mixer: Any, length: int) -> float:
    return total(visible_ranges(mixer.base.pattern, length, length + 1)) + length / mixer.stride


def of_nsa(mixer: Any, length: int) -> float:
    """Compressed blocks, chosen blocks, the window."""
    chosen = mixer.selector
    return length // chosen.stride + chosen.count * chosen.size + mixer.window


READ: dict[str, Keys] = {
    "streaming_llm": of_pattern,
    "swat": of_pattern,
    "mswa": of_pattern,
    "minference_a_shape": of_pattern,
    "power_attention": of_pattern,
    "shared_key_window": of_pattern,
    "rodimus_plus": lambda mixer, length: of_pattern(mixer.window, length),
    "delta_attention": of_delta,
    "moba": lambda mixer, length: mixer.core.pattern.block * mixer.core.pattern.budget,
    "nsa": of_nsa,
}


@dataclass(frozen=True)
class Step:
    """A mechanism's step, the dense step, and attention alone to as many keys."""

    row: str
    keys: int
    error: float
    cycle: int  # one in so many steps attends to all keys
    times: dict[str, Times]
    least: dict[
        str, float
    ]  # seconds of a step, each of a cycle at its best: other work on the machine moves that least

    @property
    def ratio(self) -> float:
        return self.least["step"] / self.least["dense"]


class Decoder:
    """A mixer after a prompt, and what goes with it; each call decodes one more token."""

    def __init__(self, mixers: list[Mixer], x: Tensor, capacity: int) -> None:
        self.mixers, self.token = mixers, x[:, -1:]
        self.states = [mixer.init_state(1, capacity) for mixer in mixers]
        for piece in x[:, :-1].split(PIECE, dim=1):
            self.outs, self.states = self._all(Mixer.prefill, piece)

    def _all(self, way: Any, x: Tensor) -> tuple[list[Tensor], list[Any]]:
        done = [way(mixer, x, state) for mixer, state in zip(self.mixers, self.states, strict=True)]
        return [out for out, _ in done], [state for _, state in done]

    def __call__(self) -> tuple[Tensor, ...]:
        self.outs, self.states = self._all(Mixer.decode, self.token)
        return tuple(self.outs)


class Behind:
    """A dense step behind NSA's projections: the window's keys and values go to a cache, so many are attended to."""

    def __init__(self, mixer: NSA, token: Tensor, keys: int, capacity: int) -> None:
        self.mixer, self.token = mixer, token
        shape = (2, 1, mixer.kv_heads, keys, mixer.head_dim)
        self.cache = KVCache(1, capacity).append(*torch.randn(shape))

    def __call__(self) -> tuple[Tensor, ...]:
        mixer, token = self.mixer, self.token
        self.cache = self.cache.append(*mixer.keys_values(token)[2])
        torch.sigmoid(mixer.to_gates(token))
        heads = attend(split_heads(mixer.to_q(token), mixer.heads), self.cache.k, self.cache.v)
        return (mixer.to_out(join_heads(heads)),)


def measure(row: str, options: argparse.Namespace) -> Step:
    torch.manual_seed(0)
    given = {"heads": options.heads}
    mixer = made(row, options.dim, **given).eval()
    near = mixer.window if isinstance(mixer, RodimusPlus) else mixer
    dense = made("flash_attention", options.dim, rotary=getattr(near, "rotary", None), **given).eval()
    beside = [mixer.recurrent] if isinstance(mixer, RodimusPlus) else []  # its recurrence, which reads no keys
    x = torch.randn(1, options.length + 1, options.dim)
    checked = min(CHECKED, options.length)
    cycle = getattr(mixer, "stride", 1)  # one in so many steps attends to all keys
    turns = max(options.repeats // cycle, 8)
    keys, steps = round(READ[row](mixer, options.length)), turns * cycle + WARM
    capacity = options.length + steps + 1
    (out,) = Decoder([mixer], x[:, : checked + 1], checked + 1)()
    error = float((out - mixer(x[:, : checked + 1])[:, -1:]).abs().max())
    if not error <= TOLERANCE:
        raise SystemExit(f"{row}: a step is {error:.1e} off the whole sequence; nothing timed")
    step = Decoder([mixer], x, capacity)
    rival: Run = Decoder([dense, *beside], x[:, : max(keys - steps // 2, 2)], capacity)
    width = options.dim // options.heads
    if isinstance(mixer, NSA):
        rival = Behind(mixer, x[:, -1:], max(keys - steps // 2, 2), capacity)
    q, k, v = (torch.randn(1, options.heads, n, width) for n in (1, keys, keys))
    runs: dict[str, Run] = {"step": step, "dense": rival, "attend": lambda: (attend(q, k, v),)}
    for run in runs.values():
        for _ in range(WARM):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns * cycle):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run))
    times = {name: Times.of(values) for name, values in seconds.items()}
    least = {name: min(values) for name, values in seconds.items()}
    if cycle > 1:  # the least of the dearer step counts once in a cycle
        dearer = min(seconds["step"][-(options.length + WARM) % cycle :: cycle])
        least["step"] += (dearer - least["step"]) / cycle
    return Step(row, keys, error, cycle, times, least)


def seconds_of(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--row", action="append", choices=READ, help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode_mixers.json", help="JSON to bring up to date")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    steps = []
    with Progress(transient=True) as progress, torch.no_grad():
        for row in progress.track(options.row or list(READ)):
            steps.append(measure(row, options))
            save(steps[-1], options)
    show(steps, options)


def save(step: Step, options: argparse.Namespace) -> None:
    """Bring the record up to date in one row, measured with these settings under this load of the machine."""
    found = json.loads(options.out.read_text(encoding="utf-8"))["steps"] if options.out.exists() else {}
    settings = {name: getattr(options, name) for name in SETTINGS}
    found[step.row] = asdict(step) | {"ratio": step.ratio, "settings": settings, "load": os.getloadavg()[0]}
    about = {"machine": machine.describe(), "isa": status().isa, "goal": GOAL}
    write_json(options.out, about | {"steps": {row: found[row] for row in READ if row in found}})


def show(steps: list[Step], options: argparse.Namespace) -> None:
    table = Table(
        "row", "keys read", "step: min, median, quartiles", "dense: min, median", "attend alone", "step / dense"
    )
    for step in steps:
        own, dense, alone = (step.times[name] for name in ("step", "dense", "attend"))
        table.add_row(
            step.row,
            f"{step.keys:,}",
            f"{1e6 * own.minimum:,.0f}, {1e6 * own.median:,.0f} ({1e6 * own.low:,.0f} to {1e6 * own.high:,.0f}) µs",
            f"{1e6 * dense.minimum:,.0f}, {1e6 * dense.median:,.0f} µs",
            f"{1e6 * alone.median:,.0f} µs",
            f"{step.ratio:.2f}x{'' if step.ratio <= GOAL else ' !'}",
        )
    words = f"{options.length:,} tokens, {options.heads} heads of {options.dim // options.heads}, float32"
    Console(width=130).print(table, f"{words}; {machine.in_words()}; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
