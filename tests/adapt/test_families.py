"""Sixty families of transformers: with the full pattern each says what it said, or is refused at once, in words."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import full
from foveate.adapt import replace_attention, use

transformers = pytest.importorskip("transformers", reason="needs pip install 'foveate[hf]'")

LENGTH = 12
SMALL: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, d_model=32, n_embd=32, dim=32, embedding_size=32, word_embed_proj_dim=32,
    intermediate_size=48, hidden_dim=48, d_ff=48, ffn_dim=48, encoder_ffn_dim=48, decoder_ffn_dim=48,
    num_hidden_layers=2, num_layers=2, n_layer=2, n_layers=2, encoder_layers=2, decoder_layers=2, num_decoder_layers=2,
    num_attention_heads=4, num_heads=4, n_head=4, n_heads=4, encoder_attention_heads=4, decoder_attention_heads=4,
    num_key_value_heads=2, head_dim=8, d_kv=8, max_position_embeddings=64, n_positions=64, max_target_positions=64,
    max_source_positions=16, num_mel_bins=8, image_size=32, patch_size=8, sliding_window=9, num_experts=4,
    num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, projection_dim=16,
)  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {}, "Mistral": {}, "Mixtral": {}, "Gemma": {}, "Gemma2": {}, "Gemma3Text": {}, "GPT2": {},
    "GPTNeoX": {}, "OPT": {}, "Phi": {}, "Phi3": {}, "Qwen2": {}, "Qwen2Moe": {}, "Qwen3": {}, "Qwen3Moe": {},
    "GptOss": {}, "Llama4Text": dict(intermediate_size_mlp=48, attention_chunk_size=8), "Cohere": {}, "Cohere2": {},
    "Olmo": {}, "Olmo2": {}, "StableLm": {}, "Starcoder2": {}, "Granite": {}, "SmolLM3": {}, "Glm4": {},
    "Nemotron": {}, "Persimmon": {}, "BioGpt": {}, "Doge": {}, "Bloom": {}, "Falcon": {},
    "CodeGen": dict(rotary_dim=4), "Mpt": {},
    "DeepseekV3": dict(
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, num_key_value_heads=4,
        n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, head_dim=4,
    ),
    "Lfm2": dict(layer_types=["conv", "full_attention"]),
}  # fmt: skip
ENCODERS = [
    "Bert",
    "Roberta",
    "Albert",
    "Electra",
    "DistilBert",
    "XLMRoberta",
    "ModernBert",
    "MPNet",
    "Deberta",
    "LayoutLM",
]
VISION: dict[str, dict[str, Any]] = {
    "ViT": {}, "DeiT": {}, "Dinov2": {}, "Dinov2WithRegisters": {}, "Beit": {}, "CLIPVision": {}, "PixtralVision": {},
    "SiglipVision": {},
    "Swin": dict(num_heads=[2, 4], depths=[2, 2], embed_dim=8, window_size=4, patch_size=2),
    "Swinv2": dict(num_heads=[2, 4], depths=[2, 2], embed_dim=8, window_size=4, patch_size=2),
    "SamVision": dict(window_size=3, mlp_dim=16, output_channels=8, patch_size=4),
}  # fmt: skip
SEQ2SEQ = ["T5", "Bart", "MBart", "Pegasus", "Marian", "Whisper"]
REFUSED = ["XLNet", "Nystromformer", "Yoso", "Longformer", "ConvBert", "FNet", "RemBert", "Mamba", "XLM"]


def tiny(family: str, **sizes: Any) -> Any:
    kind = getattr(transformers, f"{family}Config")
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    fields |= set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "attribute_map", {}))
    if "depths" in sizes:  # one number a stage, where others have one for all
        fields = {"image_size"}
    config = kind(**{name: value for name, value in SMALL.items() if name in fields} | sizes)
    model = getattr(transformers, f"{family}Model")._from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def padded() -> dict[str, Tensor]:
    ids, mask = torch.randint(3, 61, (2, LENGTH)), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def check(model: Any, given: dict[str, Tensor], real: Any = slice(None)) -> None:
    expected = model(**given)[0][real]
    with replace_attention(model, full) as swap:
        found = model(**given)[0][real]
    assert swap.calls > 0 and expected.std() > 0
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(**given)[0][real], expected, atol=0, rtol=0)


@pytest.mark.parametrize("family", DECODERS)
def test_decoders(family: str) -> None:
    given = padded()
    check(tiny(family, **DECODERS[family]), given, given["attention_mask"].bool())


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family: str) -> None:
    given = padded()
    check(tiny(family), given, given["attention_mask"].bool())


@pytest.mark.parametrize("family", VISION)
def test_vision(family: str) -> None:
    check(tiny(family, **VISION[family]), {"pixel_values": torch.randn(2, 3, 32, 32)})


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoders_with_decoders(family: str) -> None:
    given = {"input_features": torch.randn(2, 8, 32)} if family == "Whisper" else padded()
    check(tiny(family), given | {"decoder_input_ids": torch.randint(3, 61, (2, 5))})


def test_wav2vec2() -> None:
    sizes = dict(conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 4), num_conv_pos_embedding_groups=2)
    model = tiny("Wav2Vec2", **sizes, num_feat_extract_layers=2, num_conv_pos_embeddings=4, mask_time_prob=0.0)
    check(model, {"input_values": torch.randn(2, 400)})


def test_clip_and_sam_of_several_parts() -> None:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision = sizes | dict(image_size=32, patch_size=8)
    text = sizes | dict(vocab_size=61, max_position_embeddings=16, eos_token_id=2)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel._from_config(config, attn_implementation="eager").eval()
    check(model, {"input_ids": torch.randint(3, 61, (2, 7)), "pixel_values": torch.randn(2, 3, 32, 32)})
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    vision |= dict(window_size=2, mlp_dim=16, output_channels=16, num_pos_feats=8)
    decoder = dict(hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16)
    prompt = dict(hidden_size=16, image_size=32, patch_size=8, mask_input_channels=4)
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    model = transformers.SamModel._from_config(config, attn_implementation="eager").eval()
    check(model, {"pixel_values": torch.randn(1, 3, 32, 32), "input_points": torch.rand(1, 1, 1, 2) * 32})


@pytest.mark.parametrize("family", REFUSED)
def test_what_nothing_can_take_the_place_of_is_refused_at_once(family: str) -> None:
    model = tiny(family, **(dict(attention_window=4) if family == "Longformer" else {}))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="attention"):
        use(model, full)
    assert model.config._attn_implementation == before


def test_a_model_around_another_is_switched_with_it_and_back() -> None:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text = transformers.LlamaConfig(**sizes, vocab_size=61, num_key_value_heads=2)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=60)
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    given = padded()
    check(model, given, given["attention_mask"].bool())
    configs = (model.config, model.config.text_config, model.config.vision_config)
    whole, part = use(model, full), use(model.model.language_model, full, name="other")
    assert [config._attn_implementation for config in configs] == ["foveate", "other", "foveate"]
    whole.undo()
    assert [config._attn_implementation for config in configs] == ["eager", "other", "eager"]
    part.undo()
    assert [config._attn_implementation for config in configs] == ["eager"] * 3
