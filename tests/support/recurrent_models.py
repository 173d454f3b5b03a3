"""Small models with recurrent layers, one of each kind that adapters know."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 61
_IDS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_SMALL = _IDS | dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
_HYBRID = ["linear_attention", "full_attention"]
_DELTA = dict(
    head_dim=8,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=_HYBRID,
)
# Every token takes every expert: which ones it takes would hang on roundings.
_EXPERTS = dict(num_experts=2, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
_MAMBA = _IDS | dict(hidden_size=24, num_hidden_layers=2, state_size=5, time_step_rank=3)
_HEADS = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=5, mamba_chunk_size=16)

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", _SMALL | _DELTA | _EXPERTS),
    "qwen3_5": ("Qwen3_5TextConfig", _SMALL | _DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", _SMALL | _DELTA | _EXPERTS),
    "olmo_hybrid": ("OlmoHybridConfig", _SMALL | _DELTA),
    "kimi_linear": (
        "KimiLinearConfig",
        _SMALL
        | dict(num_key_value_heads=4, moe_intermediate_size=16, num_local_experts=2, num_experts_per_tok=2)
        | dict(kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
        | dict(linear_head_dim=8, linear_num_heads=3, layer_types=_HYBRID, mlp_layer_types=["dense", "sparse"]),
    ),
    "bailing_hybrid": (
        "BailingHybridConfig",
        _SMALL
        | dict(num_key_value_heads=4, moe_intermediate_size=16, num_local_experts=2, num_experts_per_tok=2)
        | dict(kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, head_dim=8, n_group=1)
        | dict(topk_group=1, layer_types=_HYBRID, mlp_layer_types=["dense", "sparse"]),
    ),
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        _SMALL | _DELTA | _EXPERTS
        | dict(hc_lowrank=8, indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=16)
        | dict(indexer_compress_ratio=4),
    ),
    "minimax": (
        "MiniMaxConfig",
        _SMALL | dict(head_dim=8, block_size=16, num_local_experts=2, num_experts_per_tok=2, layer_types=_HYBRID),
    ),
    "mamba": ("MambaConfig", _MAMBA),
    "falcon_mamba": ("FalconMambaConfig", _MAMBA),
    "jamba": (
        "JambaConfig",
        _SMALL
        | dict(mamba_d_state=5, mamba_dt_rank=3, attn_layer_period=2, attn_layer_offset=1)
        | dict(num_experts=2, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1),
    ),
    "zamba": (
        "ZambaConfig",
        _SMALL
        | dict(num_hidden_layers=3, num_key_value_heads=4, mamba_d_state=5, mamba_dt_rank=3, n_mamba_heads=2)
        | dict(layers_block_type=["mamba", "hybrid", "hybrid"]),
    ),
    "mamba2": (
        "Mamba2Config",
        _IDS | dict(hidden_size=32, num_hidden_layers=2, state_size=5, num_heads=4, head_dim=16)
        | dict(n_groups=2, chunk_size=16, time_step_limit=(0.2, 0.8)),
    ),
    "bamba": ("BambaConfig", _SMALL | _HEADS | dict(attn_layer_indices=[1])),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        _SMALL | _HEADS
        | dict(layer_types=["mamba", "attention"], num_local_experts=2, num_experts_per_tok=2)
        | dict(shared_intermediate_size=32),
    ),
    "falcon_h1": (
        "FalconH1Config",
        _SMALL | _HEADS
        | dict(mamba_d_ssm=64, head_dim=8, ssm_in_multiplier=1.5, ssm_multipliers=[1.2, 0.8, 1.1, 0.9, 1.3]),
    ),
    "falcon_h1_normed": (
        "FalconH1Config",
        _SMALL | _HEADS | dict(mamba_d_ssm=64, head_dim=8, mamba_rms_norm=True),
    ),
    "zamba2": (
        "Zamba2Config",
        _SMALL
        | dict(num_hidden_layers=3, num_key_value_heads=4, mamba_d_state=5, mamba_ngroups=1, n_mamba_heads=4)
        | dict(chunk_size=16, layers_block_type=["mamba", "hybrid", "mamba"]),
    ),
    "nemotron_h": (
        "NemotronHConfig",
        _SMALL
        | dict(head_dim=8, ssm_state_size=5, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, chunk_size=16)
        | dict(layers_block_type=["mamba", "attention", "mamba", "mlp"]),
    ),
    "lfm2": ("Lfm2Config", _SMALL | dict(layer_types=["conv", "full_attention"], conv_bias=True)),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        _SMALL | _EXPERTS | dict(layer_types=["conv", "full_attention"], num_dense_layers=1, conv_L_cache=4),
    ),
    "xlstm": ("xLSTMConfig", _IDS | dict(hidden_size=128, num_hidden_layers=2, num_heads=4, chunk_size=16)),
    "rwkv": ("RwkvConfig", _IDS | dict(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        _SMALL | dict(lru_width=32, block_types=("recurrent", "attention"), attention_window_size=16),
    ),
}  # fmt: skip


def make(name: str) -> Any:
    """A model with random weights of a size at which every layer matters, and every error of one shows."""
    config_name, options = CONFIGS[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_name)(**options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.3 * parameter.shape[-1] ** -0.5)
        else:
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model
