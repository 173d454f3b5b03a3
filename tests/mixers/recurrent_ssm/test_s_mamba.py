"""S-Mamba against two naive blocks."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.scan_formulas import (
    DIM,
    agree,
    begun_and_shaken,
    gated,
    tokens,
)

from foveate.mixers.recurrent_ssm.s_mamba import SMamba


@pytest.mark.paper("S-Mamba", "definition")
@begun_and_shaken
def test_s_mamba_is_two_blocks(begun: Any) -> None:
    mixer, x = begun(SMamba(DIM, state=5)), tokens(9).requires_grad_()
    agree(mixer, mixer(x), gated(mixer.forwards, x) + gated(mixer.backwards, x.flip(1)).flip(1), x)
