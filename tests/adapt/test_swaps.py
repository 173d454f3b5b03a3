"""Swaps in part of a model, on one another, in copies of it, and in training."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tests.adapt.test_families import tiny
from tests.adapt.test_transformers import make, padded_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foveate import Pattern, attend, causal, full, sinks, topk_blocks, topk_keys, window
from foveate.adapt import replace_attention, swaps, use
from foveate.adapt.hf.attention_function import attention_function
from foveate.adapt.hf.layers import Layer

transformers = pytest.importorskip("transformers", reason="needs pip install 'foveate[hf]'")


def ids_of(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 61, (batch, length))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, use_cache=False, **options).logits


def by_hand(model: Any, ids: Tensor, patterns: dict[int, dict[int, Pattern]]) -> Tensor:
    """Logits of a Llama whose heads see what patterns[layer][head] says, else all that is past, by the formula."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    inner, (batch, length) = model.model, ids.shape
    hidden = inner.embed_tokens(ids)
    rotary = inner.rotary_emb(hidden, position_ids=torch.arange(length).unsqueeze(0))
    at = torch.arange(length)
    for number, layer in enumerate(inner.layers):
        x, attention = layer.input_layernorm(hidden), layer.self_attn
        q, k, v = (
            project(x).view(batch, length, -1, 8).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        heads = []
        for head in range(4):
            pattern = patterns.get(number, {}).get(head, full) & causal
            visible = pattern.visible(0, 0, at.view(-1, 1), at)
            scores = (q[:, head] @ k[:, head // 2].mT * 8**-0.5).masked_fill(~visible, -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, head // 2])
        hidden = hidden + attention.o_proj(torch.cat(heads, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(inner.norm(hidden))


EVERY = range(4)


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({"layers": 1}, {1: EVERY}),
        ({"layers": [0, -1]}, {0: EVERY, 2: EVERY}),
        ({"layers": slice(1, None)}, {1: EVERY, 2: EVERY}),
        ({"layers": range(2), "heads": [3]}, {0: [3], 1: [3]}),
        ({"heads": [2, 0]}, {0: [0, 2], 1: [0, 2], 2: [0, 2]}),
        ({"heads": range(2, 4)}, {0: [2, 3], 1: [2, 3], 2: [2, 3]}),
    ],
)
@torch.no_grad()
def test_layers_and_heads_meant_change_and_no_others(options: dict[str, Any], meant: dict[int, Any]) -> None:
    model, ids = make("llama"), ids_of(21, 2)
    patterns = {layer: {head: window(3) for head in heads} for layer, heads in meant.items()}
    with replace_attention(model, window(3), **options) as swap:
        torch.testing.assert_close(logits_of(model, ids), by_hand(model, ids, patterns), atol=1e-4, rtol=1e-4)
    assert swap.calls == len(meant)


@torch.no_grad()
def test_a_part_of_a_model_may_be_given() -> None:
    model, ids = make("llama"), ids_of(21)
    expected = by_hand(model, ids, {1: dict.fromkeys(EVERY, window(3))})
    swap = use(model.model.layers[1], window(3))
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-4, rtol=1e-4)
    other = use(model.model.layers[0], window(2))
    swap.undo()
    expected = by_hand(model, ids, {0: dict.fromkeys(EVERY, window(2))})
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-4, rtol=1e-4)
    other.undo()
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
@torch.no_grad()
def test_swaps_are_undone_in_any_order(order: tuple[int, ...]) -> None:
    model, ids = make("llama"), ids_of(25)
    plans = [({}, window(5), "one"), ({"heads": [1]}, window(2), "two"), ({"layers": [0, 1]}, window(9), "three")]
    placed = [use(model, pattern, name=name, **options) for options, pattern, name in plans]
    alive = [0, 1, 2]
    for undone in (None, *order):
        if undone is not None:
            placed[undone].undo()
            alive.remove(undone)
        patterns: dict[int, dict[int, Pattern]] = {layer: {} for layer in range(3)}
        for number in alive:
            options, pattern, _ = plans[number]
            for layer in options.get("layers", range(3)):
                patterns[layer] |= dict.fromkeys(options.get("heads", EVERY), pattern)
        torch.testing.assert_close(logits_of(model, ids), by_hand(model, ids, patterns), atol=1e-4, rtol=1e-4)
        assert model.config._attn_implementation == (plans[alive[-1]][2] if alive else "eager")
        assert [swap.core.pattern for swap in swaps(model)] == [plans[number][1] for number in alive]


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_a_file])
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_copies_attend_as_the_model_does_and_have_their_own_way_back(copied: Any, name: str) -> None:
    model = make("llama") if name == "llama" else bloom()
    ids = ids_of(19)
    before = logits_of(model, ids)
    swap = use(model, window(3) | sinks(1))
    expected = logits_of(model, ids)
    twin = copied(model)
    swap.undo()
    assert not torch.equal(expected, before)
    torch.testing.assert_close(logits_of(twin, ids), expected)
    torch.testing.assert_close(logits_of(model, ids), before)
    second = use(twin, full)
    swaps(twin)[0].undo()
    torch.testing.assert_close(logits_of(twin, ids), before, atol=1e-4, rtol=1e-4)
    second.undo()
    assert swaps(twin) == [] and twin.config._attn_implementation == model.config._attn_implementation
    torch.testing.assert_close(logits_of(twin, ids), before)


def bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0)
    return transformers.BloomForCausalLM(config).eval()


def seq2seq(name: str) -> Any:
    small: dict[str, Any] = dict(vocab_size=61, d_model=32, pad_token_id=0, decoder_start_token_id=0)
    if name == "t5":
        config = transformers.T5Config(**small, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        return transformers.T5ForConditionalGeneration(config).eval()
    bart = dict(
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    if name == "bart":
        config = transformers.BartConfig(**small, **bart, max_position_embeddings=64)
        return transformers.BartForConditionalGeneration(config).eval()
    config = transformers.WhisperConfig(
        **small,
        **bart,
        max_source_positions=16,
        max_target_positions=64,
        num_mel_bins=8,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.WhisperForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
@torch.no_grad()
def test_cross_attention_is_spared_unless_it_is_asked_for(name: str) -> None:
    model = seq2seq(name)
    given: dict[str, Any] = dict(decoder_input_ids=ids_of(5))
    given |= dict(input_features=torch.randn(1, 8, 32)) if name == "whisper" else dict(input_ids=ids_of(16))
    own = model(**given).logits
    wide = window(15)  # all of the 16 tokens beside one another: of 16 keys, a last query sees every one
    with replace_attention(model, wide) as swap:
        torch.testing.assert_close(model(**given).logits, own, atol=1e-4, rtol=1e-4)
        assert swap.calls == 4
    few = topk_keys(2, causal=False)
    with replace_attention(model, few, cross=True) as swap:
        assert not torch.allclose(model(**given).logits, own, atol=1e-4)
        assert swap.calls == 6
    narrow = {}
    for cross in (False, True):
        with replace_attention(model.get_decoder(), few, cross=cross):
            narrow[cross] = model(**given).logits
    assert not torch.allclose(narrow[True], narrow[False], atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
@torch.no_grad()
def test_cross_attention_decodes_with_a_cache_as_without(name: str) -> None:
    model, given = seq2seq(name), dict(input_ids=ids_of(16))
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    for pattern in (topk_keys(3, causal=False), topk_blocks(4, k=2, causal=False)):
        with replace_attention(model, pattern, cross=True):
            cached, whole = (model.generate(**given, **options, use_cache=use) for use in (True, False))
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mechanism", [window(2), sinks(1), topk_keys(2), "streaming_llm", "minference_a_shape"])
def test_cross_attention_refuses_what_counts_from_its_queries(mechanism: Any) -> None:
    model = seq2seq("t5")
    with pytest.raises(ValueError, match="no place among the keys"):
        use(model, mechanism, cross=True)
    assert swaps(model) == []


def test_self_attention_beside_cross_attention_is_told_from_it() -> None:
    names = {
        "cross_modal_text_layers.0.attention.self": False,
        "cross_modal_text_layers.0.crossattention.self": True,
        "decoder.block.1.layer.1.EncDecAttention": True,
        "decoder.layers.0.encoder_attn": True,
        "encoder.layers.0.self_attn": False,
    }
    for name, is_cross in names.items():
        assert Layer(name, torch.nn.Identity(), None).is_cross == is_cross


def test_layers_and_heads_that_are_not_there_are_refused_and_leave_no_trace() -> None:
    model = make("llama")
    for options, words in (
        (dict(layers=3), "layers are numbered"),
        (dict(layers=slice(5, 9)), "layers are numbered"),
        (dict(heads=[4]), "4 query heads"),
        (dict(heads=[]), "heads are numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            use(model, full, **options)
    assert model.config._attn_implementation == "eager" and swaps(model) == []


def test_sam_heeds_a_swap_or_refuses_it() -> None:
    config = transformers.SamVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8, window_size=2,
        mlp_dim=16, output_channels=8,
    )  # fmt: skip
    model = transformers.SamModel(transformers.SamConfig(vision_config=config.to_dict()))
    with replace_attention(model.mask_decoder, full) as swap:
        queries = torch.randn(1, 1, 5, 256)
        model.mask_decoder.transformer.layers[0].self_attn(queries, queries, queries)
    assert swap.calls == 1


def test_what_the_models_own_attention_ignores_is_ignored() -> None:
    model, ids = make("llama"), ids_of(9)
    expected = logits_of(model, ids)
    with replace_attention(model, full) as swap:
        found = logits_of(model, ids, num_items_in_batch=torch.tensor(9), spice=torch.ones(1))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert swap.calls == 3


@pytest.mark.parametrize("positions", [False, True])
def test_packed_documents_are_kept_apart(positions: bool) -> None:
    model, ids, lengths = make("llama"), ids_of(30), [11, 2, 17]
    ends = torch.tensor([0, 11, 13, 30], dtype=torch.int32)
    packing: dict[str, Any] = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=17, max_length_k=17)
    places = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    if positions:
        packing["position_ids"] = places
    with replace_attention(model, window(5)):
        packed = logits_of(model, ids, **packing)
        if not positions:  # without them the model rotates by the place in the row: relative, so the same
            packing["position_ids"] = torch.arange(30).unsqueeze(0)
        apart = [logits_of(model, part) for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), atol=1e-4, rtol=1e-4)
    for wrong in (torch.tensor([0, 4, 9]), torch.tensor([0, 200, 30], dtype=torch.uint8)):
        with replace_attention(model, full), pytest.raises(ValueError, match="counts from 0 to the 30 tokens"):
            logits_of(model, ids, cu_seq_lens_q=wrong)
    ids, wraps = ids_of(266), torch.tensor([0, 255, 10], dtype=torch.uint8)
    with replace_attention(model, full), pytest.raises(ValueError, match="counts from 0 to the 266 tokens"):
        logits_of(model, ids, cu_seq_lens_q=wraps)


def test_weights_are_handed_out_at_small_sizes() -> None:
    model, (ids, mask) = make("llama"), padded_batch()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, output_attentions=True).attentions
        with replace_attention(model, full):
            found = model(ids, attention_mask=mask, output_attentions=True).attentions
        with replace_attention(model, window(3)):
            near = model(ids, attention_mask=mask, output_attentions=True).attentions
    for one, other in zip(found, expected, strict=True):
        real = mask.bool().unsqueeze(1).expand_as(one[..., 0])
        torch.testing.assert_close(one[real], other[real], atol=1e-5, rtol=1e-4)
    assert (near[0][..., 9, :6] == 0).all() and len(found) == 3
    long = torch.zeros(1, 2049, dtype=torch.long)
    with replace_attention(model, window(3)), pytest.raises(ValueError, match="up to 2048 keys"):
        model(long, output_attentions=True)


@pytest.mark.parametrize("family", ["GPT2", "OPT", "StableLm"])
@torch.no_grad()
def test_weights_are_handed_out_by_layers_that_do_not_pass_the_question_on(family: str) -> None:
    model, ids = tiny(family), ids_of(9, batch=2)
    expected = model(ids, output_attentions=True, use_cache=False).attentions
    with replace_attention(model, full):
        found = model(ids, output_attentions=True, use_cache=False).attentions
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_dropout_in_training_is_served() -> None:
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.3
    )
    model = transformers.GPT2LMHeadModel(config).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = ids_of(20)
    use(model, full)
    torch.manual_seed(1)
    one, other = (model(ids, use_cache=False).logits for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(model(ids, use_cache=False).logits, one) and not torch.equal(one, other)
    q = torch.randn(1, 4, 20, 8)
    torch.manual_seed(1)
    seed = torch.get_rng_state()
    expected = attend(q, q, q, causal, dropout=0.3)
    torch.set_rng_state(seed)
    from foveate.adapt.hf.attention_function import attention_function

    found, _ = attention_function(model.transformer.h[0].attn, q, q, q, None, dropout=0.3)
    assert torch.equal(found.transpose(1, 2), expected)
    k = torch.randn(1, 4, 20, 8)
    found, weights = attention_function(
        model.transformer.h[0].attn, q, k, q, None, dropout=0.3, is_causal=True, output_attentions=True
    )
    assert weights is not None
    torch.testing.assert_close(found.transpose(1, 2), weights @ q, atol=1e-5, rtol=1e-4)
    assert (weights.tril(-1) == 0).sum() > 100
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


def test_trainer_trains_a_swapped_model(tmp_path: Any) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model = make("llama")
    swap = use(model, window(4))
    rows = [{"input_ids": row, "labels": row} for row in ids_of(12, 4)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    before = model.lm_head.weight.clone()
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    assert swap.calls == 6 and not torch.equal(model.lm_head.weight, before)


def checkpointed(name: str, reentrant: bool) -> Any:
    if name in ("vit", "swin"):
        sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
        kind, classifier = transformers.ViTConfig, transformers.ViTForImageClassification
        if name == "swin":  # which makes its masks itself
            kind, classifier = transformers.SwinConfig, transformers.SwinForImageClassification
            sizes = dict(num_heads=[2, 4], depths=[2, 2], embed_dim=8, window_size=4, drop_path_rate=0.0)
        model = classifier(kind(**sizes, image_size=32, patch_size=4))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    else:
        model = bloom() if name == "bloom" else make(name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model.train()


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def loss_of(model: Any, name: str, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if name in ("vit", "swin"):
        return model(torch.randn(2, 3, 32, 32, generator=generator)).logits.square().sum()
    return model(torch.randint(3, 61, (2, 17), generator=generator), use_cache=False).logits.square().mean()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("name", "reentrant"),
    [("llama", False), ("llama", True), ("bloom", True), ("vit", False), ("vit", True), ("swin", False)],
)
def test_checkpointed_layers_are_recomputed_as_they_were_or_not_at_all(name: str, reentrant: bool) -> None:
    model = checkpointed(name, reentrant)
    model.gradient_checkpointing_disable()
    with replace_attention(model, window(3)):
        expected = gradients(model, loss_of(model, name))
    own = gradients(model, loss_of(model, name))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with replace_attention(model, window(3)):
        loss = loss_of(model, name)
        for one, other in zip(gradients(model, loss), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        loss = loss_of(model, name)
        second = use(model, full, name="another")
        if name == "swin":
            with pytest.raises(RuntimeError, match="run backward before"):
                loss.backward()
        else:
            for one, other in zip(gradients(model, loss), expected, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        second.undo()
        loss = loss_of(model, name)
    with pytest.raises(RuntimeError, match="run backward before"):
        loss.backward()
    for one, other in zip(gradients(model, loss_of(model, name)), own, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_implementation_chosen_later_has_the_last_word() -> None:
    model = make("llama")
    ids = ids_of(12)
    own = model(ids).logits
    first = use(model, window(2))
    model.set_attn_implementation("sdpa")
    assert swaps(model) == []
    torch.testing.assert_close(model(ids).logits, own, atol=1e-5, rtol=1e-5)
    second = use(model, window(1))
    assert len(swaps(model)) == 2 and not torch.allclose(model(ids).logits, own, atol=1e-4)
    model.set_attn_implementation("eager")
    for swap in (second, first):
        swap.undo()
        assert model.config._attn_implementation == "eager"


class Operations(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_ready_made_mask_is_compared_only_where_a_pattern_asks() -> None:
    model = make("llama")
    mask = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    compared = []
    for pattern in (full, window(3)):
        with replace_attention(model, pattern), Operations() as seen:
            layer = model.model.layers[0].self_attn
            attention_function(layer, *torch.randn(3, 1, 4, 5, 4).unbind(0), mask, scaling=0.5)
        compared.append("gt" in seen.names)
    assert compared == [False, True]
