"""Each token's predecessor: within documents, and over pieces of a sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.linear_text import DIM, LENGTH, make, tokens
from tests.support.rwkv_formulas import before
from torch.testing import assert_close

from foveate.layers.token_shift import previous
from foveate.mixers.recurrent_ssm.rwkv4 import RWKV4
from foveate.mixers.recurrent_ssm.rwkv6 import RWKV6
from foveate.mixers.recurrent_ssm.rwkv7 import RWKV7


def test_token_shift_stays_inside_documents() -> None:
    x, lengths = tokens(10, batch=1), [3, 0, 1, 6]
    expected = torch.cat([before(piece) for piece in x.split(lengths, 1)], 1)
    assert_close(previous(x, tokens(1, batch=1)[:, 0], lengths), expected)
    assert previous(x[:, :0], x[:, 0]).shape == (1, 0, DIM)


@pytest.mark.parametrize("kind", [RWKV4, RWKV6, RWKV7])
def test_sequences_in_pieces_are_the_whole(kind: Any) -> None:
    mixer, x = make(kind), tokens()
    state, outs = mixer.init_state(2), []
    for piece in x.split([1, 0, 20, LENGTH - 21], dim=1):
        out, state = mixer.prefill(piece, state)
        outs.append(out)
    assert_close(torch.cat(outs, 1), mixer(x))
