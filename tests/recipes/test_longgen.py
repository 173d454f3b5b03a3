"""LongGen: masks layer by layer, fine-tuning, and caches that hold what the training mask shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from foveate.catalogue import tiers
from foveate.models import builtin
from foveate.recipes.longgen import LongGen, long_text_loss, longgen, sparse_layers

KINDS: dict[str, tuple[dict[str, Any], Callable[[int, int], bool]]] = {
    "window": ({"window": 6}, lambda i, j: i - j < 6),
    "sinks": ({"window": 6, "sinks": 2}, lambda i, j: i - j < 6 or j < 2),
    "blocks": ({"block": 3, "local": 2, "stride": 4}, lambda i, j: i // 3 - j // 3 < 2 or j // 3 % 4 == 0),
}


def small(depth: int = 3) -> Any:
    row: Any = tiers.row("longgen")
    config = row.teacher().config
    config.num_hidden_layers = depth
    model: Any = LlamaForCausalLM(config)
    return model.double().eval()


def layer_by_layer(model: Any, tokens: Tensor, sees: Callable[[int, int], bool]) -> Tensor:
    """The model's own layers, each under a mask written out: sparse, full, sparse."""
    length = tokens.shape[1]
    masks = [
        torch.tensor([[j <= i and (rule is None or rule(i, j)) for j in range(length)] for i in range(length)])
        for rule in (sees, None, sees)
    ]
    x = model.model.embed_tokens(tokens)
    turns = model.model.rotary_emb(x, torch.arange(length)[None])
    for layer, mask in zip(model.model.layers, masks, strict=True):
        x = layer(x, attention_mask=mask[None, None], position_embeddings=turns)
    return model.lm_head(model.model.norm(x))


@pytest.mark.paper("LongGen", "definition")
@pytest.mark.paper("LongGen", "works_when")
@pytest.mark.parametrize("kind", KINDS)
def test_layers_around_the_middle_are_masked(kind: Any) -> None:
    model, tokens = small(), torch.randint(32, (2, 41))
    options, sees = KINDS[kind]
    student: Any = longgen(kind, **options).prepare(model)
    model.set_attn_implementation("sdpa")
    found, expected = student(tokens).logits, layer_by_layer(model, tokens, sees)
    assert_close(found, expected, rtol=1e-8, atol=1e-8)
    towards = torch.randn_like(expected)
    names = [name for name, _ in model.named_parameters()]
    ours = torch.autograd.grad(found, [dict(student.named_parameters())[name] for name in names], towards)
    theirs = torch.autograd.grad(expected, [dict(model.named_parameters())[name] for name in names], towards)
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert_close(one, other, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.paper("LongGen", "definition")
@pytest.mark.parametrize(("depth", "full"), [(3, [1]), (6, [2, 3]), (12, [4, 5, 6, 7]), (32, list(range(10, 21)))])
def test_a_third_of_the_layers_in_the_middle_is_full(depth: int, full: list[int]) -> None:
    assert [layer for layer in range(depth) if layer not in sparse_layers(depth)] == full


@pytest.mark.paper("LongGen", "works_when")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_served_it_decodes_by_the_training_mask_with_smaller_caches(kind: Any) -> None:
    options, sees = KINDS[kind]
    recipe = longgen(kind, **options)
    student: Any = recipe.prepare(small())
    tokens = torch.randint(32, (2, 160))
    trained = student(tokens).logits
    change = recipe.serve(student)
    out = student(tokens[:, :70], use_cache=True)
    logits = [out.logits]
    for at in range(70, 160):
        out = student(tokens[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    assert_close(torch.cat(logits, 1), trained, rtol=1e-8, atol=1e-8)
    needed = [sum(sees(i, j) for j in range(160)) for i in range(155, 160)]
    kept = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert kept[1] == 160
    assert all(min(needed) <= count <= 1.25 * max(needed) + 34 for count in (kept[0], kept[2])), (needed, kept)
    prompt = tokens[:, :30].clamp(min=1)
    mask = torch.ones_like(prompt)
    mask[1, :11] = 0
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    both = student.generate(prompt.masked_fill(mask == 0, 0), attention_mask=mask, **options)[:, 30:]
    alone = student.generate(prompt[1:, 11:], attention_mask=mask[1:, 11:], **options)[:, 19:]
    assert torch.equal(both[1:], alone), "padding changes nothing of what is written"
    change.undo()


@pytest.mark.paper("LongGen", "works_when")
def test_a_pretrained_model_is_finetuned_and_ahead_of_one_from_scratch() -> None:
    """The built-in model on real code: a few steps mend what windows cost; nothing makes up for its weights."""
    torch.manual_seed(0)
    model, tokenizer = builtin.load()
    recipe = longgen("sinks", window=24, sinks=2, lr=1e-4)
    text = torch.tensor(tokenizer(builtin.heldout_text(40_000)).input_ids)
    batches, judged = text[: 4 * 384].view(4, 2, 192), text[-3 * 192 :].view(3, 192)
    scratch = type(model)(model.config)
    found = []
    for start in (model, scratch):
        student = recipe.prepare(start)
        optimizer = torch.optim.Adam(student.parameters(), lr=recipe.stages[0].lr)
        losses = [judge(student, judged)]
        for batch in batches:
            optimizer.zero_grad()
            long_text_loss(student, start, batch).backward()
            optimizer.step()
        found.append([*losses, judge(student, judged)])
    (before, after), (_, from_scratch) = found
    assert after < before - 0.01 and after < from_scratch - 1, found


@torch.no_grad()
def judge(model: Any, tokens: Tensor) -> float:
    return long_text_loss(model, model, tokens).item()


def test_what_was_not_prepared_is_not_served() -> None:
    recipe = longgen("window", window=6)
    assert isinstance(recipe, LongGen)
    with pytest.raises(ValueError, match="was not prepared"):
        recipe.serve(small())
    with pytest.raises(ValueError, match="kind window, sinks, blocks; got 'strided'"):
        longgen("strided")  # type: ignore[arg-type]
