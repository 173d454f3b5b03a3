"""What attention by oriented gradients is worth in a small HOGformer: stripes of any direction, under noise.

    python -m benchmarks.restoration_hog            two seeds

Each image has stripes of a direction, width and height of its own. The same model is trained with its attention and
without: its blocks are then feed-forward alone. Both begin alike and see the same images.
"""

from __future__ import annotations

import argparse
import math

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.contest import RESULTS, write_json
from benchmarks.restoration import Nothing
from foveate.lab.measure import machine
from foveate.models.vision import hogformer
from foveate.models.vision.hogformer import HOGBlock

NOISE, SIDE, BATCH, LEARNED = 0.8, 16, 8, 4e-3
SIZES = {"dim": 8, "depths": (1, 1), "refinement": 1, "heads": (2, 2), "ratio": 2.0}


def draw() -> tuple[Tensor, Tensor]:
    """Noisy and clean images (B, 1, SIDE, SIDE)."""
    angle, phase, waves, level = (torch.rand(4, BATCH, 1, 1)).unbind(0)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    along = (columns * (math.pi * angle).cos() + rows * (math.pi * angle).sin()) * (1.5 + waves) / 2
    clean = ((along + 2 * math.pi * phase).sin().sign() * (0.5 + level)).unsqueeze(1)
    return clean + NOISE * torch.randn_like(clean), clean


def trained(seed: int, steps: int, *, attends: bool) -> float:
    """Mean squared error over the last hundred steps, each on images not seen before."""
    torch.manual_seed(seed)
    model = hogformer(1, **SIZES)  # type: ignore[arg-type]
    for block in model.modules():
        if isinstance(block, HOGBlock) and not attends:
            block.attention = Nothing()  # type: ignore[assignment]
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=LEARNED), []
    for _ in range(steps):
        noisy, clean = draw()
        loss = (model(noisy) - clean).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return sum(losses[-100:]) / 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for seed in range(options.seeds):
        errors = {name: trained(seed, options.steps, attends=name == "attention") for name in ("attention", "none")}
        found.append({"seed": seed, "errors": errors})
        Console().print(found[-1])
    record = {"machine": machine.describe(), "settings": vars(options), "noise": NOISE, "sizes": SIZES, "runs": found}
    Console().print("written to", str(write_json(RESULTS / "restoration_hog.json", record)))


if __name__ == "__main__":
    main()
