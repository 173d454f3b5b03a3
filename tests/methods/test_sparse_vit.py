"""SparseViT: layers of Swin transformers written out for the windows kept; the search; measured time."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import RESULTS
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear
from transformers import SwinConfig, SwinModel

from foveate.methods.sparse_vit import evolve, sparse_vit

HEADS, WINDOW = 2, 3


def swin(**options: Any) -> Any:
    sizes: dict[str, Any] = {"image_size": 22, "patch_size": 2, "embed_dim": 12, "depths": [4], "num_heads": [HEADS]}
    config = SwinConfig(**sizes | {"window_size": WINDOW, "initializer_range": 0.4, "drop_path_rate": 0.0} | options)
    return SwinModel(config, add_pooling_layer=False).double().eval()


def windows_of(dims: tuple[int, int], shift: int) -> list[list[tuple[int, int] | None]]:
    """The places (row, column) in each window of a map padded to whole windows and rolled; None beyond its border."""
    sides = [-(-side // WINDOW) * WINDOW for side in dims]
    found = []
    for top, left in itertools.product(range(0, sides[0], WINDOW), range(0, sides[1], WINDOW)):
        places: list[tuple[int, int] | None] = []
        for i, j in itertools.product(range(WINDOW), range(WINDOW)):
            row, column = (top + i + shift) % sides[0], (left + j + shift) % sides[1]
            places.append((row, column) if row < dims[0] and column < dims[1] else None)
        found.append(places)
    return found


def region(at: int, side: int, shift: int) -> int:
    """Which part of a rolled axis a place is in: those that rolling brought together do not see one another."""
    return int(at >= side - WINDOW) + int(at >= side - shift)


def window_out(layer: Any, x: Tensor, places: list[Any], number: int, dims: tuple[int, int], shift: int) -> Tensor:
    """Tokens of a window (L, C) after the layer, zeros beyond the border as keys among them."""
    attention, size = layer.attention, x.shape[1] // HEADS
    normed = layer_norm(x, x.shape[1:], layer.layernorm_before.weight, layer.layernorm_before.bias, 1e-5)
    normed = normed * torch.tensor([[float(place is not None)] for place in places], dtype=x.dtype)
    q, k, v = (
        linear(normed, part.weight, part.bias).view(-1, HEADS, size).transpose(0, 1)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    logits = q @ k.mT / size**0.5 + attention.relative_position_bias()[0]
    if shift:
        sides = [-(-side // WINDOW) * WINDOW for side in dims]
        across = sides[1] // WINDOW
        top, left = number // across * WINDOW, number % across * WINDOW
        parts = [
            (region(top + i, sides[0], shift), region(left + j, sides[1], shift))
            for i, j in itertools.product(range(WINDOW), range(WINDOW))
        ]
        apart = torch.tensor([[one != other for other in parts] for one in parts])
        logits = logits + apart * -100.0
    mixed = (torch.softmax(logits, -1) @ v).transpose(0, 1).flatten(1)
    x = x + linear(mixed, attention.o_proj.weight, attention.o_proj.bias)
    normed = layer_norm(x, x.shape[1:], layer.layernorm_after.weight, layer.layernorm_after.bias, 1e-5)
    first, second = [part for part in layer.mlp.modules() if isinstance(part, nn.Linear)]
    return x + linear(gelu(linear(normed, first.weight, first.bias)), second.weight, second.bias)


def stage_out(stage: Any, x: Tensor, dims: tuple[int, int], ratios: list[float]) -> Tensor:
    """A stage's layers upon maps (H W, C): windows ranked by the L2 norm of mean magnitudes at its first pruning."""
    magnitude, ranked = None, {}
    for number, (layer, ratio) in enumerate(zip(stage.blocks, ratios, strict=True)):
        shift = number % 2 * (WINDOW // 2)
        windows = windows_of(dims, shift)
        kept = list(range(len(windows)))
        if ratio:
            magnitude = x.detach().abs().mean(1) if magnitude is None else magnitude
            if shift not in ranked:
                norms = [
                    float(sum(magnitude[p[0] * dims[1] + p[1]] ** 2 for p in places if p is not None)) ** 0.5
                    for places in windows
                ]
                ranked[shift] = sorted(range(len(windows)), key=lambda w: -norms[w])
            kept = ranked[shift][: int(len(windows) * (1 - ratio) + 1e-9)]
        rows = list(x)
        for w in kept:
            inside = [torch.zeros_like(x[0]) if p is None else x[p[0] * dims[1] + p[1]] for p in windows[w]]
            out = window_out(layer, torch.stack(inside), windows[w], w, dims, shift)
            for place, row in zip(windows[w], out, strict=True):
                if place is not None:
                    rows[place[0] * dims[1] + place[1]] = row
        x = torch.stack(rows)
    return x


@pytest.mark.paper("SparseViT", "definition")
@pytest.mark.paper("SparseViT", "works_when")
@pytest.mark.parametrize(("dims", "ratios"), [((7, 11), [0.0, 0.5, 0.3, 0.7]), ((6, 9), [0.5, 0.5, 0.6, 0.4])])
def test_windows_kept_are_transformed_and_the_others_stay(dims: tuple[int, int], ratios: list[float]) -> None:
    """Gathered, attended, put back: four layers, windows shifted and not, sides that windows do not divide."""
    model = swin()
    stage = model.encoder.layers[0]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    x = torch.randn(2, dims[0] * dims[1], 12, dtype=torch.float64, requires_grad=True)
    change = sparse_vit(ratios).install(model)
    expected = lambda: torch.stack([stage_out(stage, entry, dims, ratios) for entry in x])  # noqa: E731
    follows(stage, lambda: stage(x, dims)[0], expected, x)
    change.undo()


@pytest.mark.paper("SparseViT", "works_when")
@torch.no_grad()
def test_windows_left_out_come_out_bit_for_bit() -> None:
    model = swin(depths=[1])
    stage = model.encoder.layers[0]
    x = torch.randn(1, 81, 12, dtype=torch.float64)
    x[:, 27:] *= 0.01  # all windows but those of the first three rows
    change = sparse_vit((2 / 3,)).install(model)
    moved = (stage(x, (9, 9))[0] != x).any(2)[0].view(9, 9)
    assert moved[:3].all() and not moved[3:].any()
    change.undo()
    assert (stage(x, (9, 9))[0] != x).any(2).all()


@pytest.mark.paper("SparseViT", "works_when")
@torch.no_grad()
def test_each_layer_has_a_ratio_of_its_own() -> None:
    model: Any = swin(depths=[2, 2], num_heads=[2, 4])
    image = torch.randn(1, 3, 22, 22, dtype=torch.float64)
    plain, outs = model(image).last_hidden_state, []
    for layer in range(4):
        change = sparse_vit([0.6 if number == layer else 0.0 for number in range(4)]).install(model)
        outs.append(model(image).last_hidden_state)
        change.undo()
    assert all(float((out - plain).abs().max()) > 1e-3 for out in outs)
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(outs, 2))
    assert torch.equal(model(image).last_hidden_state, plain)
    with pytest.raises(ValueError, match="for each of 4 layers"):
        sparse_vit((0.5, 0.5)).install(model)
    with pytest.raises(TypeError, match="Swin models"):
        sparse_vit(0.5).install(nn.Linear(2, 2))


@pytest.mark.paper("SparseViT", "works_when")
def test_evolution_finds_ratios_of_a_budget_near_the_best_there_are() -> None:
    """Quality falls with squares of ratios, by stages that matter unlike; the best of all 9^3 is found or nearly."""
    weight, depths = (8.0, 1.0, 3.0), (2, 2, 2)

    def quality(ratios: tuple[float, ...]) -> float:
        return -sum(w * r * r for w, r in zip(weight, ratios[::2], strict=True))

    def cost(ratios: tuple[float, ...]) -> float:
        return 1 - sum(ratios) / len(ratios)

    best = max(
        quality((a, a, b, b, c, c))
        for a, b, c in itertools.product([i / 10 for i in range(9)], repeat=3)
        if cost((a, a, b, b, c, c)) <= 0.6 + 1e-9
    )
    found = evolve(depths, quality, cost, 0.6 + 1e-9, rounds=400, population=40, parents=10)
    assert found[::2] == found[1::2] and cost(found) <= 0.6 + 1e-9 and quality(found) > 1.15 * best
    deep = evolve((6,), quality=sum, cost=lambda r: r[5], most=0.7, least=0.3, rounds=60, population=10, parents=3)
    assert list(deep) == sorted(deep) and 0.3 <= deep[5] <= 0.7
    with pytest.raises(ValueError, match="none of"):
        evolve((2,), sum, lambda r: 1.0, 0.5, rounds=5)


@pytest.mark.paper("SparseViT", "works_when")
def test_latency_was_measured_to_fall_with_sparsity() -> None:
    lines = json.loads((RESULTS / "sparse_vit.json").read_text(encoding="utf-8"))["lines"]
    seconds = {line["ratio"]: line["seconds"] for line in lines}
    assert seconds[0.0] > seconds[0.3] > seconds[0.6] > seconds[0.8]
    assert seconds[0.6] < 0.65 * seconds[0.0]
