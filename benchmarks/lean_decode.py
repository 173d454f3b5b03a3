"""How evenly workers are kept busy when one text of a batch is long and fifteen are short.

python -m benchmarks.lean_decode [--long 262144] [--short 16384] [--repeats 9]

Every worker's share of a decoding step is run by itself, by turns, and the least of its CPU times taken: lean tiles,
beside whole heads, of which workers take as many as any other (as kernels do that give a head of a text to a worker).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import RESULTS, write_json
from foveate import attend
from foveate.cache.lean import Segment, attend_dealt, attend_share, deal
from foveate.lab.measure import machine

SETTINGS = {"long": 262144, "short": 16384, "repeats": 9}
WORKERS = (4, 8, 16)


def whole_heads(ranges: Sequence[tuple[int, int]], heads: int, workers: int) -> list[list[Segment]]:
    outputs = [Segment(entry, head, *keys) for entry, keys in enumerate(ranges) for head in range(heads)]
    return [outputs[worker::workers] for worker in range(workers)]


def case(workers: int, options: Any) -> dict[str, Any]:
    lengths = [options.long] + [options.short] * 15
    q = torch.randn(len(lengths), 4, 1, 64)
    k, v = (torch.randn(len(lengths), 1, options.long, 64) for _ in range(2))
    ranges = [(0, length) for length in lengths]
    dealt = {
        "lean": deal(ranges, 1, workers, 256),
        "whole heads": whole_heads(ranges, 1, workers),
    }
    taken: dict[str, list[list[float]]] = {name: [[] for _ in range(workers)] for name in dealt}
    with torch.no_grad():
        for _ in range(options.repeats):
            for name, shares in dealt.items():
                for worker, share in enumerate(shares):
                    start = time.thread_time()
                    attend_share(q, k, v, {}, share)
                    taken[name][worker].append(time.thread_time() - start)
        out = attend_dealt(q, k, v, dealt["lean"], {})
        error = max(
            float((out[b : b + 1] - attend(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])).abs().max())
            for b, n in enumerate(lengths)
        )
    seconds = {name: [min(one) for one in each] for name, each in taken.items()}
    return {
        "workers": workers,
        "greatest error": error,
        "seconds of workers": seconds,
        "slowest worker over even": {name: max(one) / (sum(one) / len(one)) for name, one in seconds.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=RESULTS / "lean_decode.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record: dict[str, Any] = {"settings": {name: getattr(options, name) for name in SETTINGS}}
    record |= {"machine": machine.describe(), "cases": [case(workers, options) for workers in WORKERS]}
    for one in record["cases"]:
        print(one["workers"], one["slowest worker over even"], one["greatest error"])
    write_json(options.out, record)


if __name__ == "__main__":
    main()
