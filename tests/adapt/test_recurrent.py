"""Accelerated models say what their own slow paths say, and leave behind what those paths would."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs pip install 'foveate[hf]'")

import transformers
from tests.support.recurrent_models import CONFIGS, VOCABULARY, make

import foveate.adapt
from foveate.adapt.hf.install import accelerate

CACHE_NAMES = {"mamba": "cache_params", "falcon_mamba": "cache_params", "mamba2": "cache_params"} | {
    "xlstm": "cache_params",
    "rwkv": "state",
}
SLOW = ("conv1d", "causal_conv1d_fn", "_scan", "state_update", "delta_rule", "delta_attention")
TRAINED = [
    "qwen3_next",
    "kimi_linear",
    "mamba",
    "mamba2",
    "minimax",
    "rwkv",
    "recurrent_gemma",
    "zamba",
    "xlstm",
    "lfm2",
]


def tokens(batch: int = 2, length: int = 37) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def padded(side: str) -> tuple[Tensor, Tensor]:
    ids = tokens(3, 29)
    mask = torch.ones_like(ids)
    mask[1, :6], mask[2, :17] = 0, 0
    mask = mask.flip(1) if side == "right" else mask
    return ids.where(mask.bool(), 0), mask


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Norms of all numbers together: a single logit behind a norm of nearly nothing may magnify its roundings."""
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


def step(name: str, model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    key = CACHE_NAMES.get(name, "past_key_values")
    if cache is None and name == "recurrent_gemma":  # which does not hand its cache back
        cache = transformers.DynamicCache(config=model.config)
    out = model(ids, use_cache=True, **{key: cache})
    return out.logits, getattr(out, key, cache)


def run_in_pieces(name: str, model: Any, ids: Tensor, accelerated: list[bool]) -> list[Tensor]:
    """Logits of a prompt and of single tokens after it, each on Foveate or on the model's own path."""
    pieces = ids.split([ids.shape[1] - len(accelerated) + 1, *[1] * (len(accelerated) - 1)], dim=1)
    cache, said = None, []
    for piece, fast in zip(pieces, accelerated, strict=True):
        if fast:
            with accelerate(model):
                logits, cache = step(name, model, piece, cache)
        else:
            logits, cache = step(name, model, piece, cache)
        said.append(logits)
    return said


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_the_slow_path(name: str) -> None:
    model = make(name)
    ids = tokens()
    expected = model(ids).logits
    with accelerate(model) as acceleration:
        assert_same(model(ids).logits, expected)
    assert len(acceleration.layers) >= 1
    for side in ("left", "right"):
        ids, mask = padded(side)
        expected = model(ids, attention_mask=mask).logits
        with accelerate(model):
            found = model(ids, attention_mask=mask).logits
        assert_same(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_cached_steps_go_on_from_either_path(name: str) -> None:
    model = make(name)
    ids = tokens(2, 24)
    expected = run_in_pieces(name, model, ids, [False] * 5)
    for accelerated in ([True] * 5, [True, False, True, False, True], [False, True, False, True, True]):
        for found, logits in zip(run_in_pieces(name, model, ids, accelerated), expected, strict=True):
            assert_same(found, logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_is_the_same(name: str) -> None:
    model = make(name)
    ids, mask = padded("left") if name not in ("rwkv", "xlstm") else (tokens(), None)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    options |= {} if mask is None else dict(attention_mask=mask)
    expected = model.generate(ids, **options)
    with accelerate(model):
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("name", ["qwen3_next", "mamba", "mamba2", "bamba"])
def test_beams_take_their_states_along(name: str) -> None:
    model = make(name)
    options = dict(max_new_tokens=6, do_sample=False, num_beams=3, eos_token_id=None, pad_token_id=0)
    ids = tokens(2, 11)
    expected = model.generate(ids, **options)
    with accelerate(model):
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_the_slow_path(name: str) -> None:
    model = make(name)
    ids = tokens(2, 21)
    options = dict(labels=ids, use_cache=False)
    model(ids, **options).loss.backward()
    expected = {
        key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    with accelerate(model):
        model(ids, **options).loss.backward()
    for key, parameter in model.named_parameters():
        if key in expected:
            assert_same(parameter.grad, expected[key], tolerance=1e-3)


def test_training_has_no_path_of_its_own() -> None:
    model = make("mamba2").train()
    ids = tokens()
    expected = model(ids, use_cache=False).logits
    with accelerate(model):
        assert_same(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["qwen3_next", "mamba", "zamba", "falcon_h1", "kimi_linear"])
@torch.no_grad()
def test_the_slow_path_may_be_broken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by flash-linear-attention, which transformers takes for CPU tensors, too, once it can be imported."""
    model = make(name)
    ids = tokens()
    expected = model(ids).logits

    def no_driver(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("0 active drivers")

    for key, value in vars(importlib.import_module(type(model).__module__)).items():
        if inspect.isfunction(value) and any(word in key for word in SLOW):
            monkeypatch.setattr(f"{type(model).__module__}.{key}", no_driver)
    with pytest.raises(RuntimeError, match="0 active drivers"):
        model(ids)
    with accelerate(model):
        assert_same(model(ids).logits, expected)
        assert_same(torch.cat(run_in_pieces(name, model, ids, [True] * 3), dim=1), expected)


@pytest.mark.parametrize("name", ["mamba", "falcon_h1", "qwen3_next", "zamba", "xlstm", "lfm2"])
@torch.no_grad()
def test_a_prompt_may_come_in_pieces(name: str) -> None:
    model = make(name)
    ids = tokens()
    with accelerate(model):
        expected = model(ids).logits
        cache, said = None, []
        for piece in ids.split([1, 2, 17, 1, 16], dim=1):
            logits, cache = step(name, model, piece, cache)
            said.append(logits)
    assert_same(torch.cat(said, dim=1), expected)


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
@torch.no_grad()
def test_a_cache_may_be_used_again(name: str) -> None:
    model = make(name)
    ids = tokens()
    with accelerate(model):
        expected, cache = step(name, model, ids, None)
        step(name, model, ids[:, :1], cache)
        cache.reset()
        assert_same(step(name, model, ids, cache)[0], expected)


@pytest.mark.parametrize("name", ["qwen3_next", "olmo_hybrid", "lfm2"])
@torch.no_grad()
def test_packed_sequences_stay_apart(name: str) -> None:
    model = make(name)
    ids, lengths = tokens(1, 30), [11, 19]
    positions = torch.cat([torch.arange(length) for length in lengths]).view(1, -1)
    ends = torch.tensor([0, 11, 30], dtype=torch.int32)
    index = torch.repeat_interleave(torch.tensor(lengths)).view(1, -1)
    with accelerate(model):
        expected = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)], dim=1)
        for packing in (dict(cu_seq_lens_q=ends), dict(seq_idx=index)):
            assert_same(model(ids, position_ids=positions, use_cache=False, **packing).logits, expected)
        with pytest.raises(ValueError, match="use_cache=False"):
            model(ids, position_ids=positions, use_cache=True, cu_seq_lens_q=ends)
        with pytest.raises(ValueError, match="one row"):
            model(tokens(), use_cache=False, seq_idx=torch.zeros(2, 37, dtype=torch.int32))


@pytest.mark.parametrize(
    "name", ["qwen3_next", "minimax", "mamba", "zamba", "mamba2", "xlstm", "rwkv", "recurrent_gemma"]
)
@torch.no_grad()
def test_half_precision_errs_no_more_than_the_slow_path(name: str) -> None:
    model = make(name).bfloat16()
    exact = copy.deepcopy(model).float()
    ids = tokens(2, 24)
    expected = torch.cat(run_in_pieces(name, exact, ids, [False] * 4), dim=1)
    slow = torch.cat(run_in_pieces(name, model, ids, [False] * 4), dim=1)
    for accelerated in ([True] * 4, [True, False, True, True]):
        found = torch.cat(run_in_pieces(name, model, ids, accelerated), dim=1)
        assert found.dtype == slow.dtype
        assert (found - expected).norm() < 4 * (slow - expected).norm()  # an expert chosen otherwise weighs as much


@pytest.mark.parametrize(
    "name", ["qwen3_5", "olmo_hybrid", "mamba", "zamba", "mamba2", "xlstm", "rwkv", "recurrent_gemma"]
)
@torch.no_grad()
def test_double_precision_runs_from_either_path(name: str) -> None:
    model = make(name).double()
    ids = tokens(2, 12)
    expected = run_in_pieces(name, model, ids, [False] * 3)
    for accelerated in ([True] * 3, [False, True, True], [True, False, True]):
        for found, logits in zip(run_in_pieces(name, model, ids, accelerated), expected, strict=True):
            assert_same(found, logits)


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
@torch.no_grad()
def test_a_cache_that_records_its_past_sees_no_more(name: str) -> None:
    model = make(name)
    ids = tokens(2, 14)
    expected = model(ids).logits
    cache = transformers.DynamicCache(config=model.config)
    for layer in cache.layers:
        if hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()
    with accelerate(model):
        for piece, logits in zip(ids.split([2, 7, 5], dim=1), expected.split([2, 7, 5], dim=1), strict=True):
            assert_same(step(name, model, piece, cache)[0], logits)


@pytest.mark.parametrize("mode", ["train", "inference"])
@torch.no_grad()
def test_mlstm_returns_states_where_it_is_asked_for_them(mode: str) -> None:
    model = make("xlstm")
    backend = model.backbone.blocks[0].mlstm_layer.mlstm_backend
    query, key, value = torch.randn(3, 2, 4, 32, 16)
    query = 1e-5 * query  # so that the epsilon in the divisor shows
    igate, fgate = 14 + torch.randn(2, 4, 32), 3 * torch.randn(2, 4, 32)
    options = dict(query=query, key=key, value=value, igate=igate, fgate=fgate, mode=mode)
    for asked in (None, True, False):
        expected = backend(**options, return_last_states=asked)
        with accelerate(model):
            found = backend(**options, return_last_states=asked)
        assert isinstance(found, tuple) == isinstance(expected, tuple) == (mode == "inference" or asked is not False)
        if not isinstance(found, tuple):
            assert_same(found, expected)
            continue
        for ours, own in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
            assert_same(ours, own)


@torch.no_grad()
def test_any_activation_after_the_convolution() -> None:
    config = copy.deepcopy(make("mamba").config)
    config.hidden_act = "gelu"
    model = transformers.MambaForCausalLM(config).eval()
    ids = tokens()
    expected = model(ids).logits
    with accelerate(model):
        assert_same(model(ids).logits, expected)


def test_undo_leaves_no_trace() -> None:
    model = make("qwen3_next")
    ids = tokens()
    modules = {name: (module, dict(module.__dict__)) for name, module in model.named_modules()}
    with torch.no_grad():
        expected = model(ids).logits
        acceleration = accelerate(model)
        assert acceleration.layers == ["model.layers.0.linear_attn"]
        assert [name for name, _ in model.named_modules()] == list(modules)
        assert all(module is modules[name][0] for name, module in model.named_modules())
        assert not torch.equal(model(ids).logits, expected)
        acceleration.undo()
        acceleration.undo()
        assert torch.equal(model(ids).logits, expected)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == modules[name][1].keys()


def test_an_exception_undoes_and_accelerations_nest() -> None:
    model = make("mamba")
    layer = model.backbone.layers[0].mixer
    with pytest.raises(KeyError), accelerate(model):
        raise KeyError
    assert "forward" not in vars(layer)
    with accelerate(model):
        outer = vars(layer)["forward"]
        with accelerate(model):
            pass
        assert vars(layer)["forward"] is outer
    assert "forward" not in vars(layer)


@torch.no_grad()
def test_copies_use_their_own_weights() -> None:
    model = make("mamba")
    ids = tokens()
    with accelerate(model):
        expected = model(ids).logits
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for parameter in model.parameters():
            parameter.zero_()
    for twin in twins:
        assert_same(twin(ids).logits, expected)


@torch.no_grad()
def test_other_devices_keep_to_their_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mamba").to("meta")
    calls = []
    own = type(model.backbone.layers[0].mixer).forward
    monkeypatch.setattr(
        type(model.backbone.layers[0].mixer), "forward", lambda *args, **kw: calls.append(1) or own(*args, **kw)
    )
    with accelerate(model):
        assert model(tokens().to("meta")).logits.shape == (2, 37, VOCABULARY)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
def test_lora_finds_its_modules() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = make("mamba")
    ids = tokens()
    accelerate(model)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj", "x_proj"]))
    before = tuned(ids).logits
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    assert not torch.allclose(tuned(ids).logits, before)
    with accelerate(tuned) as acceleration:
        assert len(acceleration.layers) == 2


def test_other_models_are_refused_in_words() -> None:
    config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no recurrent layer.*mamba.*qwen3_next"):
        accelerate(transformers.LlamaForCausalLM(config))
    with pytest.raises(TypeError, match="transformers model"):
        accelerate(torch.nn.Linear(2, 2))
    model = make("mamba")
    model.backbone.layers[1].mixer.in_proj._hf_hook = object()
    with pytest.raises(ValueError, match="device_map"):
        accelerate(model)
    assert "forward" not in vars(model.backbone.layers[0].mixer)


def test_one_name_in_two_places() -> None:
    assert foveate.adapt.accelerate is accelerate
