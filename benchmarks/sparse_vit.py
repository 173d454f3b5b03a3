"""Swin-T with windows left out: processor seconds of one thread by the share left out, random weights.

python -m benchmarks.sparse_vit [--side 448] [--repeats 3]
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console

from benchmarks.contest import RESULTS, write_json
from foveate.lab.measure import machine
from foveate.methods.sparse_vit import sparse_vit

RATIOS = (0.0, 0.3, 0.6, 0.8)


def main() -> None:
    from transformers import SwinConfig, SwinModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=448, help="of images, in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = SwinModel(SwinConfig(image_size=arguments.side), add_pooling_layer=False).eval()
    image = torch.randn(1, 3, arguments.side, arguments.side)
    best = dict.fromkeys(RATIOS, float("inf"))
    with torch.no_grad():
        for turn in range(arguments.repeats + 1):
            for ratio in RATIOS:
                change = sparse_vit(ratio).install(model)
                start = time.process_time()
                model(image)
                if turn:
                    best[ratio] = min(best[ratio], time.process_time() - start)
                change.undo()
    lines = [{"ratio": ratio, "seconds": seconds} for ratio, seconds in best.items()]
    record = {
        "title": f"SparseViT: Swin-T at {arguments.side} pixels, the share of windows left out in every layer",
        "machine": machine.describe(),
        "lines": lines,
    }
    for line in lines:
        Console().print(line)
    Console().print(str(write_json(RESULTS / "sparse_vit.json", record)))


if __name__ == "__main__":
    main()
