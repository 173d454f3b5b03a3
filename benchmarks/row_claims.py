"""What rows of the catalogue claim of time and memory, one measurement each, written to benchmarks/results.

    python -m benchmarks.row_claims mixture_of_heads     or others: see --help

Times are CPU seconds of one thread, which other programs on the machine disturb least, the least of several rounds, of
contenders by turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import RESULTS, write_json
from benchmarks.limits import arithmetic
from benchmarks.peak_memory import measured
from foveate import attend, block_mask, causal, full
from foveate.lab.measure import machine
from foveate.mixers.head_sharing.mixture import queries_asked

Contenders = Mapping[str, Callable[[], object]]


def least_seconds(contenders: Contenders, rounds: int) -> dict[str, float]:
    """CPU seconds of each, the least of so many rounds, by turns."""
    found = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            found[name] = min(found[name], time.process_time() - start)
    return found


def mixture_of_heads() -> list[dict[str, Any]]:
    """MoH: attention of some heads a token against that of all, forward, and forward with backward."""
    cases = []
    for tokens in (2048, 8192):
        qkv = [torch.randn(1, 8, tokens, 64, requires_grad=True) for _ in range(3)]
        for asked in (2, 4, 6):
            chosen = torch.zeros(1, tokens, 8, dtype=torch.bool)
            chosen.scatter_(-1, torch.rand(1, tokens, 8).topk(asked, dim=-1).indices, True)
            some = partial(_asked, chosen, *qkv)
            every = partial(attend, *qkv, causal)
            with torch.no_grad():
                forward = least_seconds({"some": some, "all": every}, 5)
            both = least_seconds({"some": partial(_trained, some), "all": partial(_trained, every)}, 3)
            for task, seconds in (("forward", forward), ("forward + backward", both)):
                cases.append({"tokens": tokens, "asked": asked, "heads": 8, "task": task, "seconds": seconds})
    return cases


def _asked(chosen: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, queries_asked(chosen, k.shape[2]) & causal)


def _trained(run: Callable[[], Tensor]) -> None:
    run().sum().backward()


def flash_attention() -> list[dict[str, Any]]:
    """FlashAttention: peak memory by length, and time by the share of blocks that a mask shows, forward + backward."""
    cases: list[dict[str, Any]] = []
    for impl, longest in (("native", 2**15), ("sdpa", 2**15), ("tiles", 2**15), ("reference", 2**12)):
        for tokens in (2**power for power in range(11, longest.bit_length())):
            cases.append({"task": "memory", "impl": impl, "tokens": tokens, "bytes": measured(impl, tokens)})
    tokens, block = 4096, 64
    qkv = [torch.randn(1, 2, tokens, 64, requires_grad=True) for _ in range(3)]
    for impl in ("native", "tiles"):
        for share in (1.0, 0.5, 0.25, 0.125):
            pattern = block_mask(torch.rand(1, 1, tokens // block, tokens // block) < share, block)
            run = partial(attend, *qkv, pattern, impl=impl)
            with torch.no_grad():
                forward = least_seconds({"forward": run}, 5)
            seconds = forward | least_seconds({"forward + backward": partial(_trained, run)}, 3)
            cases.append({"task": "time", "impl": impl, "tokens": tokens, "share": share, "seconds": seconds})
    return cases


def flash_attention_2() -> list[dict[str, Any]]:
    """FlashAttention-2: operations per second of one thread beside the multiply-adds that it reaches at best."""
    cases: list[dict[str, Any]] = []
    for dim in (64, 128, 256):
        for pattern in (full, causal):
            qkv = [torch.randn(1, 4, 2048, dim, requires_grad=True) for _ in range(3)]
            run = partial(attend, *qkv, pattern, impl="native")
            with torch.no_grad():
                forward = least_seconds({"forward": run}, 7)["forward"]
            both = least_seconds({"both": partial(_trained, run)}, 5)["both"]
            pairs = 4 * 2048 * (2049 / 2 if pattern is causal else 2048)
            limit = arithmetic(1)["float32"]
            for task, products, seconds in (("forward", 2, forward), ("forward + backward", 7, both)):
                rate = 2 * dim * products * pairs / seconds
                case = {"task": task, "dim": dim, "pattern": str(pattern), "seconds": seconds}
                cases.append(case | {"operations_per_second": rate, "limit": limit, "of_limit": rate / limit})
    return cases


MEASUREMENTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "flash_attention": flash_attention,
    "flash_attention_2": flash_attention_2,
    "mixture_of_heads": mixture_of_heads,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", choices=sorted(MEASUREMENTS))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in parser.parse_args().names:
        what = " ".join((MEASUREMENTS[name].__doc__ or "").split())
        record = {"title": what, "machine": machine.describe(), "cases": MEASUREMENTS[name]()}
        for case in record["cases"]:
            print(case)
        print("written to", write_json(RESULTS / f"{name}.json", record))


if __name__ == "__main__":
    main()
