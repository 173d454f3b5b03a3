"""TimeSformer: every scheme as a masked dense computation, parity with a published model, cost, and what it learns."""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.agreement import accuracy_after, marked
from tests.support.formulas import follows
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from torch.testing import assert_close
from transformers import TimesformerConfig, TimesformerForVideoClassification

from foveate.counting import count_operations
from foveate.models.video import timesformer

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
T, H, W, HEADS = 3, 4, 5, 2
PATCHES = list(product(range(T), range(H), range(W)))
Pair = tuple[tuple[int, int, int], tuple[int, int, int]]


def close(at: int, other: int, size: int, half: int) -> bool:
    """Whether ``other`` is in the window of half the size around, moved inwards at the edges."""
    first = min(max(at - half // 2, 0), size - half)
    return first <= other < first + half


SEES = {
    "time": lambda a, b: a[1:] == b[1:],
    "space": lambda a, b: a[0] == b[0],
    "all": lambda a, b: True,
    "width": lambda a, b: a[:2] == b[:2],
    "height": lambda a, b: a[0] == b[0] and a[2] == b[2],
    "near": lambda a, b: close(a[1], b[1], H, H // 2) and close(a[2], b[2], W, W // 2),
    "strided": lambda a, b: all((i - j) % 2 == 0 for i, j in zip(a, b, strict=True)),
}
SCHEMES = {
    "joint": ("all",),
    "divided": ("time", "space"),
    "axial": ("time", "width", "height"),
    "local_global": ("near", "strided"),
}


def seen(kind: str) -> Tensor:
    return torch.tensor([[SEES[kind](a, b) for b in PATCHES] for a in PATCHES])


def attention(layer: Any, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Dense, with biases: queries (B, N, C), keys (B, M, C), mask (N, M)."""
    q, _, _ = layer.qkv(queries).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    _, k, v = layer.qkv(keys).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2) @ layer.proj.weight.T + layer.proj.bias


def with_token(layer: Any, x: Tensor, token: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Patches see the class token besides; it sees each group of patches with itself, and the mean is taken."""
    keys = torch.cat([token, x], 1)
    own = torch.ones(len(mask), 1, dtype=torch.bool)
    groups = mask.unique(dim=0)
    of_groups = [attention(layer, token, keys, torch.cat([own[:1], group[None]], 1)) for group in groups]
    return attention(layer, x, keys, torch.cat([own, mask], 1)), torch.stack(of_groups).mean(0)


def norm(x: Tensor, module: Any) -> Tensor:
    return layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-6)


def written_out(model: Any, videos: Tensor, scheme: str) -> Tensor:
    pixels = [videos[:, :, t, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten(1) for t, i, j in PATCHES]
    x = torch.stack(pixels, 1) @ model.patches.weight.flatten(1).T + model.patches.bias
    x = x + torch.stack([model.places[0, :, i, j] + model.times[0, :, t] for t, i, j in PATCHES])
    token = (model.token + model.token_place).expand(len(x), 1, -1)
    kinds = SCHEMES[scheme]
    for block in model.blocks:
        for number, kind in enumerate(kinds[:-1]):
            own = norm(x, block.norms[number])
            added = attention(block.attentions[number].attention, own, own, seen(kind))
            x = x + added @ block.joins[number].weight.T + block.joins[number].bias
        last = block.norms[len(kinds) - 1]
        added, of_token = with_token(block.attentions[-1].attention, norm(x, last), norm(token, last), seen(kinds[-1]))
        x, token = x + added, token + of_token
        x, token = (y + block.fc2(gelu(block.fc1(norm(y, block.mlp_norm)))) for y in (x, token))
    return norm(token[:, 0], model.norm) @ model.head.weight.T + model.head.bias


@pytest.mark.paper("TimeSformer", "definition")
@pytest.mark.paper("TimeSformer", "works_when")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_its_dense_computation_with_the_rest_masked(scheme: Any) -> None:
    sizes: dict[str, Any] = {"dim": 12, "depth": 2, "heads": HEADS, "patch": 4, "frames": T, "channels": 2}
    model = timesformer(5, scheme=scheme, size=4 * H, **sizes).double()
    with torch.no_grad():
        model.places = torch.nn.Parameter(torch.randn(1, 12, H, W, dtype=torch.float64))  # of no square
    videos = torch.randn(2, 2, T, 4 * H, 4 * W, dtype=torch.float64, requires_grad=True)
    follows(model, lambda: model(videos), lambda: written_out(model, videos, scheme), videos)


NAMES = {
    "attentions.0.attention.qkv": "temporal_attention.attention.qkv",
    "attentions.0.attention.proj": "temporal_attention.output.dense",
    "norms.0": "temporal_layernorm",
    "joins.0": "temporal_dense",
    "attentions.-1.attention.qkv": "attention.attention.qkv",
    "attentions.-1.attention.proj": "attention.output.dense",
    "norms.-1": "layernorm_before",
    "mlp_norm": "layernorm_after",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}


def published_state(theirs: Any, scheme: str, side: int) -> dict[str, Tensor]:
    """The weights of transformers' model under our names."""
    state = {name.removeprefix("timesformer."): value for name, value in theirs.state_dict().items()}
    places = state["embeddings.position_embeddings"]
    ours = {
        "token": state["embeddings.cls_token"],
        "token_place": places[:, :1],
        "places": places[:, 1:].mT.unflatten(-1, (side, side)),
    }
    if scheme != "space":
        ours["times"] = state["embeddings.time_embeddings"].mT
    for kind in ("weight", "bias"):
        ours[f"patches.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        ours[f"norm.{kind}"], ours[f"head.{kind}"] = state[f"layernorm.{kind}"], state[f"classifier.{kind}"]
        for layer in range(theirs.config.num_hidden_layers):
            for name, other in NAMES.items():
                if scheme != "divided" and "temporal" in other:
                    continue
                own = name.replace("-1", "1" if scheme == "divided" else "0")
                ours[f"blocks.{layer}.{own}.{kind}"] = state[f"encoder.layer.{layer}.{other}.{kind}"]
    return ours


@pytest.mark.paper("TimeSformer", "definition")
@pytest.mark.parametrize(("scheme", "frames"), [("divided", 3), ("joint", 3), ("joint", 5), ("space", 1)])
@torch.no_grad()
def test_it_is_the_published_model(scheme: Any, frames: int) -> None:
    kind = {"divided": "divided_space_time", "joint": "joint_space_time", "space": "space_only"}[scheme]
    config = TimesformerConfig(
        image_size=16,
        patch_size=4,
        num_frames=3,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        attention_type=kind,
        num_labels=5,
    )
    theirs: Any = TimesformerForVideoClassification(config).double().eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.3)
    sizes: dict[str, Any] = {"dim": 12, "depth": 2, "heads": 2, "patch": 4, "frames": 3, "size": 16}
    ours = timesformer(5, scheme=scheme, **sizes).double().eval()
    ours.load_state_dict(published_state(theirs, scheme, 4))
    videos = torch.randn(2, frames, 3, 16, 16, dtype=torch.float64)
    assert_close(ours(videos.transpose(1, 2)), theirs(videos).logits)


@pytest.mark.paper("TimeSformer", "works_when")
def test_cost_falls_from_joint_to_axial() -> None:
    """Pairs as the schemes have them, and seconds as benchmarks/static_sparse.py measured them."""
    pairs = {}
    for scheme in ("joint", "local_global", "divided", "axial"):
        model = timesformer(2, scheme=scheme, dim=4, depth=1, heads=1, patch=4, frames=6, size=32)
        with torch.no_grad(), count_operations() as counted:
            model(torch.randn(1, 3, 6, 32, 32))
        pairs[scheme] = counted.pairs
    t, n = 6, 64
    assert pairs["joint"] == (t * n + 1) ** 2
    assert pairs["divided"] == n * t**2 + t * (n + 1) ** 2
    assert pairs["axial"] == n * t**2 + t * 8 * 8**2 + t * 8 * 9**2
    assert pairs["local_global"] == t * n * t * 16 + 8 * (t * n // 8 + 1) ** 2
    # the class token is written out once in a group
    cases = json.loads((RESULTS / "static_sparse.json").read_text(encoding="utf-8"))["timesformer"]
    assert {case["frames"] for case in cases} == {8, 32}
    for case in cases:
        joint, near, divided, axial = (case["pairs"][name] for name in ("joint", "local_global", "divided", "axial"))
        assert joint > near > divided > axial
        assert case["seconds"]["divided"] < case["seconds"]["joint"]
    ratios = [case["seconds"]["joint"] / case["seconds"]["divided"] for case in cases]
    assert ratios[1] > 2 * ratios[0], "the longer the clip, the more dividing saves"
    long = cases[1]["seconds"]
    order = ["joint", "local_global", "axial", "divided", "space"]  # along axes there are three projections for two
    assert sorted(order, key=lambda name: -long[name]) == order


@cache
def order_told(scheme: Any) -> float:
    """Does the clip go from dark to bright, or back? What frames are on average says nothing of it."""
    everywhere, size = slice(None), (2, 4, 4)
    frames = ((slice(0, 1), everywhere, everywhere), (slice(1, 2), everywhere, everywhere))

    def draw(batch: int) -> tuple[Tensor, Tensor]:
        first = torch.randint(2, (batch,))
        return marked(torch.stack([first, 1 - first]), size, frames), first

    torch.manual_seed(1)
    sizes: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "patch": 2, "frames": 2, "size": 4, "channels": 1}
    return accuracy_after(timesformer(2, scheme=scheme, **sizes), draw, steps=120, lr=3e-3)


@pytest.mark.paper("TimeSformer", "works_when")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_learns_what_attention_in_space_alone_cannot(scheme: Any) -> None:
    assert order_told(scheme) > 0.95 and order_told("space") < 0.65


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="scheme is one of divided, joint, space, axial, local_global; got 'time'"):
        timesformer(2, scheme="time")  # type: ignore[arg-type]
