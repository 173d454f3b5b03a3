"""VideoMamba: the model written out, and what its scans through time are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.agreement import accuracy_after, alike
from tests.support.counted_work import work
from tests.support.scan_formulas import agree, as_it_begins, both_ways, shaken
from torch import Tensor

from foveate import Grid
from foveate.mixers.recurrent_ssm.videomamba import VideoMamba
from foveate.models.video import videomamba_classifier
from foveate.patterns import Layout


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.paper("VideoMamba (ST-SSM)", "definition")
@pytest.mark.parametrize("begun", [as_it_begins, shaken])
def test_it_scans_tubelets_frame_after_frame_and_back(begun: Any) -> None:
    sizes: dict[str, Any] = {"dim": 12, "depth": 2, "state": 3, "tubelet": (2, 3, 4), "size": (4, 6, 12)}
    model = begun(videomamba_classifier(5, channels=2, **sizes))
    videos = torch.randn(2, 2, 4, 6, 12, dtype=torch.float64, requires_grad=True)
    corners = [(2 * t, 3 * i, 4 * j) for t in range(2) for i in range(2) for j in range(3)]
    tubelets = [videos[:, :, t : t + 2, i : i + 3, j : j + 4].flatten(1) for t, i, j in corners]
    weight, bias = model.embed.patches.weight.flatten(1), model.embed.patches.bias
    x = torch.stack([tubelet @ weight.mT + bias for tubelet in tubelets], 1) + model.embed.places.flatten(2).mT
    for norm, block in zip(model.body.norms, model.body.mixers, strict=False):
        x = x + both_ways(block, rms(x, norm.weight))
    read = rms(x, model.body.norms[2].weight).mean(1)
    agree(model, model(videos), read @ model.head.weight.mT + model.head.bias, videos)


class Framewise(VideoMamba):
    """Each frame on its own: scans through space, not through time."""

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        assert isinstance(layout, Grid)
        _, height, width = layout.dims
        frames = x.reshape(-1, height * width, self.dim)
        return super().mix(frames, None, Grid(1, height, width), None).reshape(x.shape)


@pytest.mark.paper("VideoMamba (ST-SSM)", "works_when")
def test_it_learns_what_scans_of_single_frames_cannot() -> None:
    """Is the last frame like the first one?"""
    everywhere, size = slice(None), (3, 8, 8)
    frames = ((slice(0, 1), everywhere, everywhere), (slice(2, 3), everywhere, everywhere))
    found = []
    for kind in (VideoMamba, Framewise):
        torch.manual_seed(2)
        model = videomamba_classifier(2, dim=16, depth=2, state=4, tubelet=(1, 4, 4), size=size, channels=1)
        for layer in range(2):
            model.body.mixers[layer] = kind(16, state=4)
        found.append(accuracy_after(model, alike(size, frames), steps=100, lr=3e-3))
    assert found[0] > 0.95 and found[1] < 0.85  # 3 / 4 is what frames alone can tell


@pytest.mark.paper("VideoMamba (ST-SSM)", "works_when")
def test_counted_work_of_the_classifier_grows_linearly() -> None:
    model, counted = videomamba_classifier(2, dim=8, depth=1, state=3, tubelet=(1, 4, 4), size=(2, 8, 8)), []
    for frames, side in ((32, 16), (64, 16), (64, 32)):
        counted.append(work(lambda: model(torch.randn(1, 3, frames, side, side))))  # noqa: B023
    assert 1.9 < counted[1] / counted[0] < 2.1 and 3.8 < counted[2] / counted[1] < 4.2


def test_the_head_begins_small() -> None:
    model = videomamba_classifier(400, depth=0)
    assert 0.019 < model.head.weight.std() < 0.021 and not model.head.bias.any()
