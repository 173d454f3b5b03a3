"""Bidirectional Mamba against two naive scans."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.scan_formulas import (
    DIM,
    agree,
    begun_and_shaken,
    both_ways,
    tokens,
)

from foveate.mixers.recurrent_ssm.audio_mamba import BidirectionalMamba


@pytest.mark.paper("AuM (Audio Mamba)", "definition")
@pytest.mark.paper("AuM (Audio Mamba)", "works_when")
@begun_and_shaken
def test_bidirectional_mamba_is_two_scans(begun: Any) -> None:
    mixer, x = begun(BidirectionalMamba(DIM, state=5)), tokens(23).requires_grad_()
    agree(mixer, mixer(x), both_ways(mixer, x), x)
