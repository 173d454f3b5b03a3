"""Small causal language models of several architectures of transformers, of random weights, in float64."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
KINDS = ["sliding_attention", "full_attention"]
SIX = ("llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "gpt_oss")
BY_DISTANCE = ("bloom", "mpt")


@cache
def small_model(name: str) -> Any:
    """One of them; the same object each time, so whoever changes it puts it back."""
    hf: Any = import_module("transformers")
    torch.manual_seed(11)
    one_each = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "vocab_size": 50, "initializer_range": 0.25}
    match name:
        case "llama":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
        case "qwen3":
            model = hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=8, **SIZES))
        case "gemma3":
            config = hf.Gemma3TextConfig(sliding_window=16, head_dim=8, layer_types=KINDS, **SIZES)
            model = hf.Gemma3ForCausalLM(config)
        case "gpt2":
            model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **ends))
        case "gpt_neox":
            model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(rotary_pct=0.5, **one_each))
        case "gpt_oss":
            experts = {
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            }
            config = hf.GptOssConfig(sliding_window=16, head_dim=8, layer_types=KINDS, **experts, **SIZES)
            model = hf.GptOssForCausalLM(config)
            model.set_experts_implementation("eager")  # others know no float64
        case "bloom":
            model = hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **ends))
        case "mpt":
            model = hf.MptForCausalLM(hf.MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=256, **ends))
        case _:
            raise KeyError(name)
    return model.double().eval()
