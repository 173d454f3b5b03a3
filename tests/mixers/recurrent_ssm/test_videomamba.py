"""VideoMamba against naive scans in space and time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.scan_formulas import (
    DIM,
    agree,
    along,
    begun_and_shaken,
    passed,
    tokens,
)
from torch.nn.functional import silu

from foveate import Grid
from foveate.mixers.recurrent_ssm.videomamba import VideoMamba


@pytest.mark.paper("VideoMamba (ST-SSM)", "definition")
@begun_and_shaken
def test_videomamba_turns_space_and_time_round(begun: Any) -> None:
    grid, x = Grid(3, 4, 5), tokens(60).requires_grad_()
    space, time = torch.arange(60), torch.arange(60).view(3, 20).T.flatten()
    for first, forwards in (("space", space), ("time", time)):
        mixer = begun(VideoMamba(DIM, first=first, state=5))
        u, gate = mixer.to_in(x).chunk(2, -1)
        y = along(forwards, lambda v: passed(mixer.passes[0], v), u)  # noqa: B023
        y = y + along(forwards.flip(0), lambda v: passed(mixer.passes[1], v), u)  # noqa: B023
        agree(mixer, mixer(x, layout=grid), mixer.to_out(y * silu(gate)), x)
