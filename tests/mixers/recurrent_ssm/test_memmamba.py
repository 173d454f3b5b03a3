"""MemMamba: Mamba layers that write notes into pools and read them."""

from __future__ import annotations

import pytest
import torch
from tests.support.linear_text import held
from tests.support.scan_formulas import (
    DIM,
    shaken,
    tokens,
)
from torch import Tensor
from torch.testing import assert_close

from foveate.mixers.recurrent_ssm import memmamba
from foveate.mixers.recurrent_ssm.memmamba import MemMamba, NoteLayer


def asked(query: Tensor, notes: list[Tensor]) -> Tensor:
    """Attention of one query (D,) to a list of notes (D,)."""
    if not notes:
        return torch.zeros_like(query)
    pool = torch.stack(notes)
    return (pool @ query / len(query) ** 0.5).softmax(0) @ pool


@pytest.mark.parametrize("block", [7, 1024])
def test_memmamba_reads_pools_of_notes(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memmamba, "BLOCK", block)
    mixer = shaken(MemMamba(DIM, depth=3, every=2, slots=4, width=5, expand=1, state=3))
    x = tokens(30, batch=2)
    for row in range(2):
        assert_close(mixer(x)[row], by_hand(mixer, x[row]), msg=f"sequence {row}")


def by_hand(mixer: MemMamba, x: Tensor) -> Tensor:
    """Token by token with lists of notes, the newest ``slots`` of which are kept."""
    h, pools_of_layers = x, []
    for depth, layer in enumerate(mixer.layers):
        assert isinstance(layer, NoteLayer)
        normed = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
        y = layer.mamba(normed.unsqueeze(0))[0]
        notes, pools, outs, fear = [], [], [], torch.zeros(1, dtype=x.dtype)
        for t, token in enumerate(normed):
            pools.append(notes[-4:])
            query = layer.to_query(token)
            out = y[t]
            if fear > 0.5:
                out = out + layer.from_tokens(fear * asked(query, pools[t]))
            if depth % 2 == 1:
                seen = [note for older in [*pools_of_layers, pools] for note in older[t]]
                out = out + layer.from_layers(asked(query, seen))
            importance = torch.sigmoid(layer.to_importance(token))
            if importance > 0.5:
                notes.append(importance * layer.to_note(token))
            fear = torch.sigmoid(layer.to_fear(y[t]))
            outs.append(out)
        pools_of_layers.append(pools)
        h = h + torch.stack(outs)
    return h - x


def test_the_pool_has_a_fixed_size() -> None:
    mixer = MemMamba(16, slots=6, width=4)
    _, early = mixer.prefill(torch.randn(2, 10, 16), mixer.init_state(2))
    _, state = mixer.prefill(torch.randn(2, 50, 16), mixer.init_state(2))
    assert held(state) == held(early)
    assert state[0].notes.pool.shape == (2, 6, 4)
    assert int(state[0].notes.filled.max()) <= 6


def test_a_note_outlives_what_the_scan_has_forgotten() -> None:
    mixer = shaken(MemMamba(DIM, depth=1, every=1, slots=3, width=5, expand=1, state=3, threshold=0.9))
    layer = mixer.layers[0]
    assert isinstance(layer, NoteLayer)
    layer.mamba.branch.ssm.step_bias.data.fill_(9.0)  # steps so long that the state forgets at once
    layer.to_importance.weight.data.zero_()
    layer.to_importance.weight.data[0, 0] = 50.0
    layer.to_importance.bias.data.fill_(-20.0)
    x = tokens(60)
    x[:, :, 0] = 0.0
    x[:, 5, 0] = 5.0  # the one token worth a note
    changed = x.clone()
    changed[:, 5, 1:] += 1.0
    with torch.no_grad():
        assert (mixer(changed) - mixer(x))[:, 50:].abs().max() > 1e-4
        assert (layer.mamba(changed) - layer.mamba(x))[:, 50:].abs().max() < 1e-9


def test_a_pool_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        MemMamba(8, slots=0)
