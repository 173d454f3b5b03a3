"""With the full pattern in its attention's place, a model says what it said; what cannot work is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from foveate import causal, full, sinks, window
from foveate.adapt import as_core, replace_attention, use
from foveate.mixers.core import PatternCore

transformers = pytest.importorskip("transformers", reason="needs pip install 'foveate[hf]'")

SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", dict(sliding_window=9)),
    "qwen3": ("Qwen3Config", dict(use_sliding_window=True, sliding_window=7, layer_types=SLIDING)),
    "gemma2": ("Gemma2Config", dict(sliding_window=9, attn_logit_softcapping=2.0, layer_types=SLIDING)),
    "gemma3": ("Gemma3TextConfig", dict(sliding_window=9, layer_types=SLIDING)),
    "gpt_oss": (
        "GptOssConfig",
        dict(sliding_window=9, layer_types=SLIDING, num_local_experts=2, num_experts_per_tok=1),
    ),
    "llama4_chunked": (
        "Llama4TextConfig",
        dict(attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=48, no_rope_layers=[1, 1, 0]),
    ),
}


def make(name: str) -> Any:
    config_name, extra = MODELS[name]
    config = getattr(transformers, config_name)(**SMALL | extra)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 61, (3, 37))
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :21] = 0, 0
    return ids.where(mask.bool(), 0), mask


@pytest.mark.parametrize("name", MODELS)
def test_the_full_pattern_changes_no_logit(name: str) -> None:
    model = make(name)
    ids, mask = padded_batch()
    with torch.no_grad():
        for given in (None, mask):
            expected = model(ids, attention_mask=given).logits
            with replace_attention(model, full) as swap:
                logits = model(ids, attention_mask=given).logits
            assert swap.calls == 3
            real = torch.ones_like(mask).bool() if given is None else mask.bool()
            torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4_chunked"])
def test_generation_with_a_cache_is_the_same(name: str, cache: str) -> None:
    model = make(name)
    ids, mask = padded_batch()
    options = dict(
        attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, cache_implementation=cache
    )
    expected = model.generate(ids, **options)
    with replace_attention(model, full) as swap:
        assert torch.equal(model.generate(ids, **options), expected)
    assert swap.calls == 3 * 12


def test_step_by_step_equals_all_at_once_under_a_sparse_pattern() -> None:
    model = make("llama")
    ids = torch.randint(3, 61, (2, 33))
    with torch.no_grad(), replace_attention(model, window(6) | sinks(2)):
        whole = model(ids).logits
        past, steps = None, list[torch.Tensor]()
        for token in ids.split(1, dim=1):
            step = model(token, past_key_values=past, use_cache=True)
            past, steps = step.past_key_values, [*steps, step.logits]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


def test_a_window_is_the_window_of_the_model_that_has_one() -> None:
    sliding = make("mistral")
    plain_config = copy.deepcopy(sliding.config)
    plain_config.sliding_window = None
    plain = type(sliding)(plain_config).eval()
    plain.load_state_dict(sliding.state_dict())
    ids = torch.randint(3, 61, (1, 41))
    with torch.no_grad(), replace_attention(plain, window(8)):
        torch.testing.assert_close(plain(ids).logits, sliding(ids).logits, atol=1e-4, rtol=1e-4)


def test_sequences_packed_by_position_ids_stay_apart() -> None:
    model = make("llama")
    ids = torch.randint(3, 61, (1, 30))
    positions = torch.cat([torch.arange(11), torch.arange(19)]).view(1, 30)
    with torch.no_grad(), replace_attention(model, full):
        packed = model(ids, position_ids=positions, use_cache=False).logits
        apart = [model(part, use_cache=False).logits for part in ids.split([11, 19], dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_eager_attention() -> None:
    model = make("gemma2")
    ids = torch.randint(3, 61, (2, 23))
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with replace_attention(model, full):
        model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_an_encoder_sees_both_ways() -> None:
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.BertModel._from_config(config, attn_implementation="eager").eval()
    ids, mask = padded_batch()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        with replace_attention(model, full):
            found = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


def test_cross_attention_sees_all_of_the_encoder() -> None:
    config = transformers.BartConfig(
        vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    ids, mask = padded_batch()
    asked = dict(input_ids=ids, attention_mask=mask, decoder_input_ids=torch.randint(3, 61, (3, 14)))
    with torch.no_grad():
        expected = model(**asked).logits
        with replace_attention(model, full):
            torch.testing.assert_close(model(**asked).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_implementation_comes_back_after_an_exception_and_in_order() -> None:
    model = make("llama")
    with pytest.raises(KeyError, match="boom"), replace_attention(model, window(4)):
        assert model.config._attn_implementation == "foveate"
        raise KeyError("boom")
    assert model.config._attn_implementation == "eager"
    outer = use(model, window(4))
    with replace_attention(model, full, name="other") as inner:
        model(torch.randint(3, 61, (1, 9)))
    assert (outer.calls, inner.calls, model.config._attn_implementation) == (0, 3, "foveate")
    model(torch.randint(3, 61, (1, 9)))
    assert outer.calls == 3
    outer.undo()
    outer.undo()
    assert model.config._attn_implementation == "eager"


def test_two_models_keep_their_own_mechanisms() -> None:
    one, other = make("llama"), make("llama")
    first, second = use(one, window(4)), use(other, full)
    one(torch.randint(3, 61, (1, 9)))
    assert (first.calls, second.calls) == (3, 0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_is_untouched() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    ids = torch.randint(3, 61, (1, 17))
    with torch.no_grad():
        expected = model(ids).logits
        with replace_attention(model, full) as swap:
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert swap.calls == 3


def test_saving_does_not_write_the_name_down(tmp_path: Any) -> None:
    model = make("llama")
    use(model, full)
    model.save_pretrained(tmp_path)
    assert "foveate" not in (tmp_path / "config.json").read_text()


def test_what_changes_the_result_is_refused_in_words() -> None:
    model = make("llama")
    ids = torch.randint(3, 61, (1, 9))
    hiding = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    hiding[..., :3] = False
    with replace_attention(model, window(4)), pytest.raises(ValueError, match="2-D mask"):
        model(ids, attention_mask=hiding)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with replace_attention(model, "delta_attention"), pytest.raises(ValueError, match="drops attention weights"):
        model.train()(ids)


def test_models_that_cannot_be_switched_are_refused() -> None:
    with pytest.raises(TypeError, match="transformers model"):
        use(torch.nn.Linear(2, 2), full)
    config = transformers.XLNetConfig(vocab_size=61, d_model=32, n_layer=1, n_head=2, d_inner=32)
    with pytest.raises(ValueError, match="its own code"):
        use(transformers.XLNetLMHeadModel(config), full)
    for name in ("my_flash", "a/b", ""):
        with pytest.raises(ValueError, match="name"):
            use(make("llama"), full, name=name)


def test_cores_by_any_name() -> None:
    core = PatternCore(window(3))
    assert as_core(core) is core
    assert as_core(causal).pattern == causal
    with pytest.raises(ValueError, match="no mechanism"):
        as_core("streaming_llama_farm")
    with pytest.raises(TypeError, match="options"):
        as_core(core, size=3)
    with pytest.raises(TypeError, match="expected a core"):
        as_core(3)  # type: ignore[arg-type]
