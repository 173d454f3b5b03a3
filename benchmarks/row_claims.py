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
from torch import Tensor, nn

from benchmarks.contest import RESULTS, write_json
from benchmarks.limits import arithmetic
from benchmarks.peak_memory import measured
from foveate import attend, block_mask, causal, full
from foveate.catalogue.tiers import row
from foveate.lab.measure import machine
from foveate.mixers.head_sharing.mixture import queries_asked
from foveate.models.vision.shvit import SHViT, conv_norm

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


@torch.no_grad()
def geb() -> list[dict[str, Any]]:
    """GEB-1.3B at its own sizes with random weights in float32: tokens per CPU second of one thread."""
    with torch.device("meta"):
        empty = row("geb").make("1.3B")  # type: ignore[attr-defined]
    model = empty.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.uniform_(-0.02, 0.02)
    tokens = torch.randint(64_896, (1, 128))
    start = time.process_time()
    _, state = model.prefill(tokens, model.init_state(1, 160))
    prompt = time.process_time() - start
    seconds = []
    for _ in range(8):
        start = time.process_time()
        _, state = model.decode(tokens[:, :1], state)
        seconds.append(time.process_time() - start)
    counted = sum(parameter.numel() for parameter in model.parameters())
    rates = {"prompt": 128 / prompt, "decoding": 1 / sorted(seconds)[4]}
    return [{"parameters": counted, "dtype": "float32", "tokens_per_second": rates}]


class MultiHead(nn.Module):
    """Attention of heads of 32 channels on all channels, in the place of SHViT's one head on a part."""

    def __init__(self, dim: int, part: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(1, dim), dim // 32
        self.to_qkv, self.to_out = conv_norm(dim, 3 * dim), conv_norm(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.flatten(2).unflatten(1, (self.heads, -1)).mT for y in self.to_qkv(self.norm(x)).chunk(3, 1))
        return self.to_out(attend(q, k, v).mT.flatten(1, 2).unflatten(2, x.shape[2:]))


@torch.no_grad()
def shvit() -> list[dict[str, Any]]:
    """SHViT: latency of S1 with one head on a part of the channels and with heads on all; heads of 16 channels."""
    sizes: dict[str, Any] = {"dims": (128, 224, 320), "depths": (2, 4, 5), "parts": (32, 48, 68), "channels": 3}
    one, many = SHViT(1000, **sizes).eval(), SHViT(1000, **sizes, attention=MultiHead).eval()
    cases: list[dict[str, Any]] = []
    for side in (224, 512):
        image = torch.randn(1, 3, side, side)
        seconds = least_seconds({"single head": partial(one, image), "multi head": partial(many, image)}, 9)
        cases.append({"task": "S1", "side": side, "seconds": seconds})
    for tokens in (196, 1024):
        v = torch.randn(8, 1, tokens, 48)
        runs = {}
        for dim in (16, 64):
            q, k = torch.randn(2, 8, 1, tokens, dim)
            runs[str(dim)] = partial(_often, partial(attend, q, k, v))
        cases.append({"task": "attention by channels of keys", "tokens": tokens, "seconds": least_seconds(runs, 7)})
    return cases


def _often(run: Callable[[], Tensor]) -> None:
    for _ in range(5):
        run()


MEASUREMENTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "flash_attention": flash_attention,
    "flash_attention_2": flash_attention_2,
    "geb": geb,
    "mixture_of_heads": mixture_of_heads,
    "shvit": shvit,
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
