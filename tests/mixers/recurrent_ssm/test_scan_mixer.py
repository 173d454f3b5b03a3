"""What all scans along several paths share: documents, costs, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.counted_work import work
from tests.support.scan_formulas import (
    DIM,
    shaken,
    tokens,
)
from torch.testing import assert_close

from foveate import Grid, Packed
from foveate.mixers.base import Mixer
from foveate.mixers.recurrent_ssm.audio_mamba import BidirectionalMamba
from foveate.mixers.recurrent_ssm.dual_path import DualPathMamba
from foveate.mixers.recurrent_ssm.mamba3d import Mamba3D
from foveate.mixers.recurrent_ssm.s_mamba import SMamba
from foveate.mixers.recurrent_ssm.videomamba import VideoMamba
from foveate.mixers.recurrent_ssm.viper import ViperScan
from foveate.mixers.recurrent_ssm.vmamba import VMamba
from foveate.mixers.recurrent_ssm.zigma import ZigMa


@pytest.mark.parametrize("kind", [BidirectionalMamba, SMamba])
def test_documents_are_walked_backwards_each_on_its_own(kind: Any) -> None:
    mixer, x, lengths = shaken(kind(DIM, state=5)), tokens(30), [4, 0, 19, 7]
    expected = torch.cat([mixer(piece) for piece in x.split(lengths, 1)], 1)
    assert_close(mixer(x, layout=Packed(lengths)), expected)


@pytest.mark.parametrize(
    ("kind", "sides"),
    [
        pytest.param(BidirectionalMamba, (), marks=pytest.mark.paper("AuM (Audio Mamba)", "works_when")),
        pytest.param(VideoMamba, (4, 4), marks=pytest.mark.paper("VideoMamba (ST-SSM)", "works_when")),
        (VMamba, (16,)),
        (ZigMa, (16,)),
        (SMamba, ()),
    ],
)
def test_counted_work_grows_linearly(kind: Any, sides: tuple[int, ...]) -> None:
    mixer, counted = kind(DIM, state=4), []
    for count in (8, 16, 32):
        layout = Grid(count, *sides) if sides else None
        x = torch.randn(1, 16 * count, DIM)
        counted.append(work(lambda: mixer(x, layout=layout)))  # noqa: B023
    assert 1.9 < counted[1] / counted[0] < 2.1 and 1.9 < counted[2] / counted[1] < 2.1


def test_refusals_say_what_to_do() -> None:
    x = torch.randn(1, 12, 8)
    wrongs: list[tuple[str, Any]] = [
        ("lives on a grid of 3 axes", lambda: VideoMamba(8)(x, layout=Grid(3, 4))),
        ("lives on a grid of 2 axes", lambda: VMamba(8)(x)),
        ("lives on a grid of 2 or 3 axes", lambda: ZigMa(8)(x)),
        ("space", lambda: VideoMamba(8, first="height")),
        ("axes is 2", lambda: VMamba(8, axes=4)),
        ("odd number", lambda: VMamba(8, conv=2)),
        ("from 0", lambda: ZigMa(8, layer=-1)),
        ("even number", lambda: DualPathMamba(8, chunk=5)),
        ("neighbours", lambda: Mamba3D(8)(x)),
        ("itself", lambda: Mamba3D(8, neighbours=0)),
        ("channels", lambda: Mamba3D(8, backward="tokens")),
        ("positive", lambda: ViperScan(8, top=0)),
        ("no causal form", lambda: BidirectionalMamba(8, causal=True)),
    ]
    for message, wrong in wrongs:
        with pytest.raises(ValueError, match=message):
            wrong()


def test_they_are_mixers() -> None:
    for kind in (BidirectionalMamba, VideoMamba, VMamba, ZigMa, SMamba, DualPathMamba, Mamba3D, ViperScan):
        assert issubclass(kind, Mixer) and kind.row.mixer is kind
