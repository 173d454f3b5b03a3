"""Swapped models become one graph, under torch.compile and torch.export, and say in it what they say outside."""

from __future__ import annotations

import pytest
import torch
from tests.adapt.test_families import tiny
from tests.adapt.test_transformers import padded_batch
from torch import Tensor

from foveate import full, sinks, topk_blocks, window
from foveate.adapt import replace_attention

pytest.importorskip("transformers", reason="needs pip install 'foveate[hf]'")

PATTERN = window(6) | sinks(2)


def given(masked: bool) -> dict[str, Tensor]:
    ids, mask = padded_batch()
    return {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}


@pytest.mark.parametrize(
    ("name", "masked"), [("Llama", False), ("Llama", True), ("Mistral", True), ("Bert", True), ("MPNet", False)]
)
@torch.no_grad()
def test_one_graph(name: str, masked: bool) -> None:
    model, inputs = tiny(name), given(masked)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with replace_attention(model, PATTERN, layers=[0]):
        expected = model(**inputs, **uncached(name))[0]
        torch.testing.assert_close(compiled(**inputs, **uncached(name))[0], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_another_swap_is_another_graph() -> None:
    model, inputs = tiny("Llama", num_hidden_layers=1), given(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for pattern in (PATTERN, full, topk_blocks(4, k=2), window(6), window(3), PATTERN):
        with replace_attention(model, pattern):
            expected = model(**inputs, use_cache=False)[0]
            torch.testing.assert_close(compiled(**inputs, use_cache=False)[0], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_documents_in_one_row_stay_apart_in_a_graph() -> None:
    model, lengths = tiny("Mistral", num_hidden_layers=1), [14, 5, 18]
    ids = torch.randint(3, 61, (1, 37))
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with replace_attention(model, PATTERN):
        apart = torch.cat([model(part, use_cache=False)[0] for part in ids.split(lengths, dim=1)], dim=1)
        found = compiled(ids, position_ids=positions, use_cache=False)[0]
    torch.testing.assert_close(found, apart, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_choice_is_narrowed_by_the_windows_of_a_model_in_a_graph_too(masked: bool) -> None:
    model, inputs = tiny("Mistral", num_hidden_layers=1), given(masked)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with replace_attention(model, topk_blocks(4, k=2, causal=True)):
        expected = model(**inputs, use_cache=False)[0]
        torch.testing.assert_close(compiled(**inputs, use_cache=False)[0], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_step_with_a_cache_in_a_graph() -> None:
    model = tiny("Mistral", num_hidden_layers=1)
    ids = torch.randint(3, 61, (2, 23))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with replace_attention(model, PATTERN):
        expected = model(ids, use_cache=False)[0][:, -1:]
        cache = model(ids[:, :-1]).past_key_values
        found = compiled(ids[:, -1:], past_key_values=cache)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_models_own_mask_is_not_mistaken_for_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    made = modeling_llama.create_causal_mask

    def every_other(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k) % 2 == 0

    monkeypatch.setattr(
        modeling_llama, "create_causal_mask", lambda **told: made(**told, and_mask_function=every_other)
    )
    model, ids = tiny("Llama", num_hidden_layers=1), torch.randint(3, 61, (2, 23))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with replace_attention(model, PATTERN):
        expected = model(ids, use_cache=False)[0]
        with pytest.raises(Exception, match="own mask function"):
            compiled(ids, use_cache=False)
        found = compiled(ids, torch.ones_like(ids), use_cache=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def uncached(name: str) -> dict[str, bool]:
    return {} if name in ("Bert", "MPNet") else {"use_cache": False}


@pytest.mark.parametrize(("name", "masked"), [("Llama", False), ("Llama", True), ("Mistral", False), ("Bert", True)])
@torch.no_grad()
def test_export(name: str, masked: bool) -> None:
    model, inputs = tiny(name), given(masked)
    with replace_attention(model, PATTERN):
        expected = model(**inputs, **uncached(name))[0]
        exported = torch.export.export(model, (), inputs | uncached(name), strict=False)
    found = exported.module()(**inputs, **uncached(name))
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)


def test_one_graph_learns_as_eager_code() -> None:
    model, inputs = tiny("Llama", num_hidden_layers=1).train(), given(True)
    for layer in model.layers:
        layer.self_attn.attention_dropout = 0.2
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with replace_attention(model, PATTERN):
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            torch.manual_seed(4)
            run(**inputs, use_cache=False)[0][inputs["attention_mask"].bool()].square().mean().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
