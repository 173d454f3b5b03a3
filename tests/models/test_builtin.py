"""The shipped model: small, honest about its data, and in need of attention."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from foveate.lab.train.corpus import is_heldout
from foveate.lab.train.evaluate import bits_per_byte
from foveate.lab.train.licences import is_permissive
from foveate.lab.train.loop import Recipe
from foveate.models import builtin

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return builtin.load()


def test_a_short_window_costs_more_than_three_percent(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer(builtin.heldout_text(20_000), verbose=False).input_ids[:4096]
    text = tokenizer.decode(ids)
    full = bits_per_byte(model, tokenizer, text, context=4096)
    near = bits_per_byte(model, tokenizer, text, context=4096, window=128)
    assert full < 1.5
    assert near > 1.03 * full


def test_it_is_a_small_causal_model_in_float32(loaded: tuple[Any, Any], seed: int) -> None:
    model, tokenizer = loaded
    assert not model.training and model.dtype == torch.float32
    assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 10e6
    assert (builtin.path() / "model.safetensors").stat().st_size < 12e6
    assert model.config.max_position_embeddings == 8192
    ids = torch.randint(0, len(tokenizer), (2, 65), generator=torch.Generator().manual_seed(seed))
    changed = ids.clone()
    changed[:, 40] = (changed[:, 40] + 1) % len(tokenizer)
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_its_tokens_give_any_text_back(loaded: tuple[Any, Any], seed: int) -> None:
    _, tokenizer = loaded
    points = torch.randint(1, 0xD7FF, (500,), generator=torch.Generator().manual_seed(seed)).tolist()
    for text in ("".join(map(chr, points)), "\tif x:\r\n        y  =  'é😀'\n\n", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_heldout_text_is_real_and_never_learned_from() -> None:
    assert all(map(is_heldout, builtin.heldout_files()))
    text = builtin.heldout_text(300_001)
    assert len(text.encode()) == 300_001
    assert "class ArgumentParser" in text and "class TarFile" in text
    assert builtin.heldout_text(1000) == text[:1000]
    with pytest.raises(ValueError, match="ask for less"):
        builtin.heldout_text(10**9)


def test_its_card_lists_permissive_data_and_its_recipe() -> None:
    folder = builtin.path()
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    assert all(is_permissive(row["licence"]) for row in data["sources"])
    assert data["bytes"] == sum(row["bytes"] for row in data["sources"])
    assert Recipe.from_json((folder / "recipe.json").read_text(encoding="utf-8")) == Recipe.builtin()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"| {row['name']} | {row['version']} |" in card for row in data["sources"])
