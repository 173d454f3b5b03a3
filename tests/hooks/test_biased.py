"""Applications that add a number to logits: weights multiplied one by one, and what the fused path makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate import explain
from foveate.adapt import as_core
from foveate.catalogue import tiers
from foveate.catalogue.contracts import Hook


def hook(name: str, **sizes: object) -> Hook:
    row = tiers.row(name)
    assert isinstance(row, tiers.HookRow)
    return row.make(**sizes)


def weighed(q: Tensor, k: Tensor, v: Tensor, factors: Tensor) -> Tensor:
    """Σ_j e^{q·k_j / √d} f_ij v_j / Σ_j e^{q·k_j / √d} f_ij."""
    weights = torch.exp(q @ k.mT / math.sqrt(q.shape[3])) * factors
    return weights @ v / weights.sum(-1, keepdim=True)


def compare(found: Hook, factors: Tensor) -> None:
    """Values and gradients; and the kernels of this machine take it, the definition is not needed."""
    core, keys = as_core(found.operator), found.keys
    shapes = (found.queries or keys, keys, keys)
    q, k, v = (torch.randn(2, 2, length, 6, dtype=torch.float64, requires_grad=True) for length in shapes)
    assert found.bias is not None
    outs = core(q, k, v, bias=found.bias.double()), weighed(q, k, v, factors)
    torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-6)  # logs of factors are float32
    towards = torch.randn_like(outs[0])
    for one, other in zip(*(torch.autograd.grad(out, (q, k, v), towards) for out in outs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    single = q.float(), k.float(), v.float()
    chosen = explain(*single, core.pattern, bias=found.bias.float()).chosen
    assert chosen != "reference"
    torch.testing.assert_close(core(*single, bias=found.bias.float()).double(), outs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.paper("MAKIMA", "definition")
@pytest.mark.paper("MAKIMA", "works_when")
@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_pairs_of_a_region_are_strengthened_and_pairs_across_suppressed(strength: float) -> None:
    labels, words = torch.randint(-1, 3, (37,)), torch.randint(-1, 3, (9,))
    for keys, found in (
        (labels, hook("makima_self", labels=labels, strength=strength)),
        (words, hook("makima_cross", labels=labels, words=words, strength=strength)),
    ):
        factors = torch.ones(len(labels), len(keys), dtype=torch.float64)
        for i, one in enumerate(labels.tolist()):
            for j, other in enumerate(keys.tolist()):
                if one >= 0 and other >= 0:
                    factors[i, j] = math.exp(strength if one == other else -strength)
        compare(found, factors)


@pytest.mark.paper("DreamVideo-2", "definition")
@pytest.mark.paper("DreamVideo-2", "works_when")
def test_the_references_weights_are_multiplied_by_the_mask_of_the_querys_place() -> None:
    mask = torch.tensor([0.0, 0.25, 1.0, 0.5, 1e-9, 0.75])
    factors = torch.ones(6, 5 + 6, dtype=torch.float64)
    factors[:, :5] = mask.double().clamp_min(1e-4).unsqueeze(1)
    found = hook("dreamvideo2", mask=mask, reference=5)
    assert found.keys == 11 and found.queries == 6
    compare(found, factors)


@pytest.mark.paper("DreamVideo-2", "works_when")
def test_outside_its_mask_a_frame_sees_nothing_of_the_reference() -> None:
    shut = hook("dreamvideo2", mask=torch.zeros(6), reference=5, least=1e-30)
    q, k, v = (torch.randn(1, 1, n, 6, dtype=torch.float64) for n in (6, 11, 11))
    assert shut.bias is not None
    out = as_core(shut.operator)(q, k, v, bias=shut.bias.double())
    torch.testing.assert_close(out, weighed(q, k[:, :, 5:], v[:, :, 5:], torch.ones(6, 6, dtype=torch.float64)))
