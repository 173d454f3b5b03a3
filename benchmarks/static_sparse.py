"""What attention at fixed places takes beside dense attention, in processor seconds of one thread.

python -m benchmarks.static_sparse [--only s2_attention] [--repeats 5]

Contenders take turns in one process, and the least of their times counts: other work on the machine moves that least.
Results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.contest import RESULTS, write_json
from foveate import attend, causal
from foveate.adapt import use
from foveate.counting import count_operations
from foveate.lab.measure import machine
from foveate.mixers.core import PatternCore
from foveate.mixers.static_sparse.s2_attention import s2_core
from foveate.models.video.timesformer import timesformer as timesformer_model
from foveate.patterns import Pattern
from foveate.recipes.zeroi2v import shifted_in_time
from foveate.recipes.zeroi2v import zeroi2v as zeroi2v_recipe

FILE = RESULTS / "static_sparse.json"
Case = dict[str, Any]
Run = Callable[[], Any]


def least_seconds(contenders: Mapping[str, Run], repeats: int) -> dict[str, float]:
    """Of each contender, by turns, after one that does not count."""
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            if turn:
                best[name] = min(best[name], time.process_time() - start)
    return best


def passes(heads: tuple[Tensor, ...], pattern: Pattern) -> dict[str, Run]:
    """Attention, and attention with gradients of all that it takes."""

    def both() -> None:
        leaves = [one.detach().requires_grad_() for one in heads]
        attend(*leaves, pattern).sum().backward()

    return {"forward": lambda: attend(*heads, pattern), "forward + backward": both}


def s2_attention(repeats: int) -> list[Case]:
    """Blocks of 64, 16 local ones, one in 8 beyond: 8 heads of 64 channels."""
    cases = []
    pattern = s2_core().pattern
    for tokens in (16384, 32768):
        heads = tuple(torch.randn(1, 8, tokens, 64) for _ in range(3))
        pairs = pattern.select(heads[0], heads[1]).pairs
        visible = pairs / (8 * tokens * (tokens + 1) / 2)
        runs = {"dense": passes(heads, causal), "s2": passes(heads, pattern)}
        for kind in ("forward", "forward + backward") if tokens < 20000 else ("forward",):
            seconds = least_seconds({name: run[kind] for name, run in runs.items()}, repeats)
            cases.append({"tokens": tokens, "pass": kind, "visible": visible, "seconds": seconds})
    return cases


def timesformer(repeats: int) -> list[Case]:
    """One block of 192 channels and 3 heads on clips of 14 x 14 patches, by scheme."""
    cases = []
    for frames in (8, 32):
        videos = torch.randn(1, 3, frames, 224, 224)
        sizes: dict[str, Any] = {"dim": 192, "depth": 1, "heads": 3, "frames": frames}
        schemes: tuple[Any, ...] = ("joint", "local_global", "divided", "axial", "space")
        models = {name: timesformer_model(10, scheme=name, **sizes).eval() for name in schemes}
        patches = models["joint"].patches
        pairs = {}
        with torch.no_grad():
            for name, made in models.items():
                with count_operations() as counted:
                    made(videos)
                pairs[name] = counted.pairs
            runs = {name: partial(made, videos) for name, made in models.items()}
            seconds = least_seconds({"patches": lambda: patches(videos[0].transpose(0, 1)), **runs}, repeats)  # noqa: B023
        embedding = seconds.pop("patches")
        cases.append({"frames": frames, "pairs": pairs, "embedding": embedding, "seconds": seconds})
    return cases


def zeroi2v(repeats: int) -> list[Case]:
    """ViT-B's layers, four of them, on clips of 8 frames at 224 pixels: as images, and with heads that look aside."""
    from transformers import ViTConfig, ViTForImageClassification

    image: Any = ViTForImageClassification(ViTConfig(num_hidden_layers=4)).eval()
    frames, heads = 8, 1
    video = zeroi2v_recipe(frames=frames).prepare(image).eval()
    video.fold()
    use(image, PatternCore())  # attention by the same kernels
    pictures = torch.randn(1, 3, frames, 224, 224)
    as_images = pictures.transpose(1, 2).flatten(0, 1)
    k = torch.randn(frames, 12, 197, 64)

    def copies() -> None:
        for _ in range(2 * 4):
            shifted_in_time(k, frames, heads)

    runs: dict[str, Run] = {
        "image model": lambda: image(as_images),
        "copy of keys and values": copies,
        "folded": lambda: video(pictures),
    }
    with torch.no_grad():
        return [{"frames": frames, "seconds": least_seconds(runs, repeats)}]


SECTIONS: dict[str, Callable[[int], list[Case]]] = {
    "s2_attention": s2_attention,
    "timesformer": timesformer,
    "zeroi2v": zeroi2v,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="one section; the others' results stay as they are")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    record |= {"title": "Attention at fixed places: processor seconds of one thread", "machine": machine.describe()}
    for name in [arguments.only] if arguments.only else SECTIONS:
        with torch.inference_mode(False):
            record[name] = SECTIONS[name](arguments.repeats)
        for case in record[name]:
            Console().print(name, case)
    Console().print(str(write_json(FILE, record)))


if __name__ == "__main__":
    main()
