"""The probe of sinks: masses and hidden keys against dense softmax, and a verdict that follows from its figures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate import attend, causal, full
from foveate.catalogue.tiers import row
from foveate.lab.probes.sinks import WatchedLM, key_mass, moves, without, write

VOCABULARY, LENGTH = 5, 9


def small(*, is_causal: bool) -> WatchedLM:
    made = WatchedLM(VOCABULARY, LENGTH, dim=8, heads=2, layers=2, is_causal=is_causal).double()
    with torch.no_grad():
        for mixing in made.mixers:
            mixing.to_q.weight.mul_(3)
            mixing.to_k.weight.mul_(3)
    return made


def dense(model: WatchedLM, tokens: Tensor, *, hide: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Layer by layer with tables of weights; columns of the greatest mass are cut out of the logits."""
    x, masses = model.embed.weight[tokens] + model.places.weight[: tokens.shape[1]], []
    length = tokens.shape[1]
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1) & model.is_causal
    for mixing, norm, mlp in zip(model.mixers, model.norms, model.mlps, strict=True):
        y = norm(x)
        q, k, v = (
            (y @ w.weight.T).unflatten(-1, (2, 4)).transpose(1, 2) for w in (mixing.to_q, mixing.to_k, mixing.to_v)
        )
        logits = (q @ k.mT / 2).masked_fill(ahead, -math.inf)
        masses.append(logits.softmax(-1).mean(2))
        for b in range(len(tokens)):
            for column in sorted(range(length), key=lambda j: -float(masses[-1][b, :, j].mean().detach()))[:hide]:
                for i in range(length):
                    if not (model.is_causal and i == column):
                        logits[b, :, i, column] = -math.inf
        read = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + read @ mixing.to_out.weight.T
        x = x + mlp(x)
    return model.head(x), masses


@pytest.mark.paper("Attention sinks in DLMs", "definition")
@pytest.mark.paper("Attention sinks in DLMs", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_mass_of_each_key_is_reported_by_layer_and_head_and_keys_are_removed(is_causal: bool) -> None:
    model, tokens = small(is_causal=is_causal), torch.randint(VOCABULARY + 1, (3, LENGTH))
    for hide in (0, 2):
        logits, masses = model(tokens, hide_top=hide)
        expected, wanted = dense(model, tokens, hide=hide)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(masses, torch.stack(wanted), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(masses.sum(-1), torch.ones(2, 3, 2, dtype=torch.float64))


@pytest.mark.paper("Attention sinks in DLMs", "works_when")
def test_removed_keys_count_for_nobody_in_bidirectional_attention() -> None:
    """Not the first ones by assumption: any."""
    q, k, v = torch.randn(3, 2, 2, 7, 4, dtype=torch.float64).unbind(0)
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    hidden[0, [3, 6]] = hidden[1, 0] = True
    out = attend(q, k, v, without(hidden, 7))
    for b in range(2):
        kept = ~hidden[b]
        alone = attend(q[b : b + 1], k[b : b + 1, :, kept], v[b : b + 1, :, kept], full)
        torch.testing.assert_close(out[b : b + 1], alone)
    assert (key_mass(q, k, without(hidden, 7))[hidden.unsqueeze(1).expand(-1, 2, -1)] == 0).all()
    assert (key_mass(q, k, without(hidden, 7, causal))[1, :, 1] > 0).all()


@pytest.mark.paper("Attention sinks in DLMs", "works_when")
def test_masses_are_noted_at_every_step_of_writing() -> None:
    written = write(small(is_causal=False).float(), 3, LENGTH, 4)
    assert written.mass.shape == (4, 2, 3, 2, LENGTH)
    assert int(written.tokens.max()) < VOCABULARY  # no mask is left
    torch.testing.assert_close(written.mass.sum(-1), torch.ones(4, 2, 3, 2))
    steps = write(small(is_causal=True).float(), 3, LENGTH, 4)
    assert steps.mass.shape == (LENGTH - 2, 2, 3, 2, LENGTH)


def test_a_move_is_another_key_of_greatest_mass() -> None:
    mass = torch.zeros(3, 1, 2, 1, 4)
    mass[0, 0, :, 0, 1] = mass[1, 0, :, 0, 1] = mass[2, 0, 0, 0, 1] = mass[2, 0, 1, 0, 3] = 1.0
    assert moves(mass) == 0.25


@pytest.mark.paper("Attention sinks in DLMs", "works_when")
def test_the_verdict_follows_from_the_figures() -> None:
    found = row("diffusion_sinks").run(steps=40, length=12, dim=16, batch=16, writing=6)
    cost = {
        n: found.figures[f"{n}: loss with sinks hidden"] - found.figures[f"{n}: loss"] for n in ("diffusion", "causal")
    }
    moved = {n: found.figures[f"{n}: share of steps at which the sink moves"] for n in cost}
    assert found.confirmed == (moved["diffusion"] > moved["causal"] and cost["diffusion"] < cost["causal"])
    assert all(0 <= value <= 1 for value in moved.values())
    assert all(0 < found.figures[f"{n}: greatest mass of a token"] <= 1 for n in cost)
