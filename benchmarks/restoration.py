"""What histogram attention is worth in a small Histoformer: images of two levels, scattered, under noise.

    python -m benchmarks.restoration            four seeds, two minutes of one thread

Each image has two brightnesses of its own and every pixel one of them, drawn at random: neighbours say nothing, pixels
of similar intensity all over the image do. The same model is trained with its attention and without: its blocks are
then feed-forward alone. Both begin alike and see the same images.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from benchmarks.contest import RESULTS, write_json
from foveate.lab.measure import machine
from foveate.models.vision import histoformer
from foveate.models.vision.histoformer import HistogramBlock

NOISE, SIDE, BATCH, LEARNED = 0.6, 8, 8, 4e-3
SIZES = {"dim": 8, "depths": (1, 1), "refinement": 1, "heads": (2, 2), "ratio": 2.0}


class Nothing(nn.Module):
    """Zeros in the place of attention."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def draw() -> tuple[Tensor, Tensor]:
    levels, kinds = torch.randn(BATCH, 2), torch.randint(2, (BATCH, SIDE**2))
    clean = levels.gather(1, kinds).view(BATCH, 1, SIDE, SIDE)
    return clean + NOISE * torch.randn_like(clean), clean


def trained(seed: int, steps: int, *, attends: bool) -> float:
    """Mean squared error over the last hundred steps, each on images not seen before."""
    torch.manual_seed(seed)
    model = histoformer(1, **SIZES)  # type: ignore[arg-type]
    for block in model.modules():
        if isinstance(block, HistogramBlock) and not attends:
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
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for seed in range(options.seeds):
        errors = {name: trained(seed, options.steps, attends=name == "attention") for name in ("attention", "none")}
        found.append({"seed": seed, "errors": errors})
        print(found[-1], flush=True)
    record = {"machine": machine.describe(), "settings": vars(options), "noise": NOISE, "sizes": SIZES, "runs": found}
    print("written to", write_json(RESULTS / "restoration.json", record))


if __name__ == "__main__":
    main()
