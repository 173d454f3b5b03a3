"""BlindSight: masks by a list of segments, heads of several classes in a model, and which class a head is of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.counting import count_operations
from foveate.methods.blindsight import blindsight, classify_heads
from foveate.patterns.rules.segments import image_segments
from foveate.testing import check_pattern
from foveate.testing.method import small_llama

IMAGES, N = ((2, 6), (9, 5), (14, 9)), 31
CLASSES: Any = (("document", "sink", "dense", "document_sink"), ("sink", "document_sink", "document", "document"))


def mask(kind: str, images: Any = IMAGES, length: int = N, sinks: int = 2) -> Tensor:
    """Pair by pair, from the description of the classes."""
    image = {
        position: number for number, (start, count) in enumerate(images) for position in range(start, start + count)
    }
    sunk = {start + i for start, count in images for i in range(min(sinks, count))}

    def sees(i: int, j: int) -> bool:
        if j > i:
            return False
        if kind == "dense" or j not in image:
            return True
        own = i in image and image[i] == image[j]
        if kind == "document":
            return own or i not in image
        if kind == "sink":
            return j in sunk or i == j
        return own or j in sunk

    return torch.tensor([[sees(i, j) for j in range(length)] for i in range(length)])


@pytest.mark.paper("BlindSight", "definition")
@pytest.mark.paper("BlindSight", "works_when")
@pytest.mark.parametrize("kind", ["dense", "sink", "document", "document_sink"])
def test_masks_are_made_from_a_list_of_segments(kind: Any, seed: int) -> None:
    pattern = image_segments(IMAGES, kind, 2)
    assert torch.equal(pattern.mask(N)[0, 0], mask(kind))
    assert torch.equal(image_segments(((0, 4),), kind, 2).mask(9)[0, 0], mask(kind, ((0, 4),), 9))
    check_pattern(pattern, seed=seed, lengths=(1, 41))


def layer_by_layer(model: Any, tokens: Tensor) -> Tensor:
    x = model.model.embed_tokens(tokens)
    turns = model.model.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    for layer, kinds in zip(model.model.layers, CLASSES, strict=True):
        x = layer(x, attention_mask=torch.stack([mask(kind) for kind in kinds])[None], position_embeddings=turns)
    return model.lm_head(model.model.norm(x))


@pytest.mark.paper("BlindSight", "definition")
@pytest.mark.paper("BlindSight", "works_when")
@torch.no_grad()
def test_every_head_of_a_model_reads_by_its_class() -> None:
    model: Any = small_llama().double().eval()
    tokens = torch.randint(64, (2, N))
    model.set_attn_implementation("sdpa")
    expected, plain = layer_by_layer(model, tokens), model(tokens).logits
    change = blindsight(IMAGES, CLASSES, 2).install(model)
    assert_close(model(tokens).logits, expected, rtol=1e-9, atol=1e-9)
    change.undo()
    assert torch.equal(model(tokens).logits, plain)


@pytest.mark.paper("BlindSight", "works_when")
@torch.no_grad()
def test_hidden_pairs_are_not_computed() -> None:
    model: Any = small_llama().eval()
    images = tuple((3 + 70 * number, 67) for number in range(6))
    tokens = torch.randint(64, (1, 440))
    counts = {}
    for kind in ("sink", "document_sink", "document", "dense"):
        change = blindsight(images, kind, 2).install(model)
        with count_operations() as counted:
            model(tokens)
        counts[kind] = counted.pairs
        change.undo()
        assert counted.pairs == 2 * 4 * mask(kind, images, 440).sum()
    assert counts["sink"] < counts["document_sink"] < counts["document"] < 0.4 * counts["dense"]


@pytest.mark.paper("BlindSight", "works_when")
@torch.no_grad()
def test_heads_are_classified_by_what_classes_keep_of_their_attention() -> None:
    """Wherever the images lie; a head is of the sparsest class that keeps enough."""
    model: Any = small_llama().double().eval()
    samples = [(torch.randint(64, (1, N)), IMAGES), (torch.randint(64, (1, 23)), ((1, 8), (12, 7)))]
    model.set_attn_implementation("eager")
    shares: dict[str, Tensor] = {}
    for kind in ("sink", "document_sink", "document"):
        own = [
            torch.stack([(one[0] * mask(kind, images, tokens.shape[1])).sum(-1).mean(-1) for one in maps])
            for tokens, images in samples
            for maps in [model(tokens, output_attentions=True).attentions]
        ]
        shares[kind] = (own[0] + own[1]) / 2
    model.set_attn_implementation("sdpa")
    found_kinds = set()
    for mass in sorted(float(share) - 1e-6 for one in shares.values() for share in one.flatten()):
        found = classify_heads(model, samples, mass=mass, sinks=2)
        expected = [
            [next((kind for kind, share in shares.items() if share[layer, head] >= mass), "dense") for head in range(4)]
            for layer in range(2)
        ]
        assert found == expected
        found_kinds |= {kind for layer in found for kind in layer}
    assert len(found_kinds) >= 3 and model.config._attn_implementation == "sdpa"
    assert classify_heads(model, samples, mass=1.1) == [["dense"] * 4] * 2


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not overlap"):
        blindsight([(2, 6), (7, 3)])
    with pytest.raises(ValueError, match="dense, sink, document or document_sink; got 'text'"):
        blindsight([(2, 6)], "text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each of 2 layers; got 1 layers"):
        blindsight([(2, 6)], CLASSES[:1]).install(small_llama())
    with pytest.raises(ValueError, match="got none"):
        classify_heads(small_llama(), [])
