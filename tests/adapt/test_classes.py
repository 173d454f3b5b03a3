"""Classes that attend in code of their own: with the full pattern they give what they gave, gradients and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate import full, window
from foveate.adapt import replace_attention, use

transformers = pytest.importorskip("transformers", reason="needs pip install 'foveate[hf]'")

OFF = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", dict(hidden_size=32, n_layer=2, n_head=4, **OFF)),
    "mpt": ("Mpt", dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=64, attn_config={"clip_qkv": 1.5})),
    "falcon": ("Falcon", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **OFF)),
    "falcon_new": (
        "Falcon",
        dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True,
            **OFF,
        ),
    ),
    "falcon_alibi": (
        "Falcon", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, bias=True, **OFF)
    ),
    "codegen": (
        "CodeGen", dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, embd_pdrop=0.0, resid_pdrop=0.0)
    ),
    "gptj": (
        "GPTJ", dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, embd_pdrop=0.0, resid_pdrop=0.0)
    ),
}  # fmt: skip
BERT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
)  # fmt: skip
DISENTANGLED = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mpnet": ("MPNet", BERT),
    "deberta": ("Deberta", BERT | DISENTANGLED),
    "deberta_plain": ("Deberta", BERT | dict(relative_attention=False, pos_att_type=[])),
    "deberta_v2": ("DebertaV2", BERT | DISENTANGLED | dict(share_att_key=True, position_buckets=8)),
    "deberta_v2_c2p": ("DebertaV2", BERT | DISENTANGLED | dict(pos_att_type=["c2p"])),
    "big_bird": ("BigBird", BERT | dict(attention_type="original_full")),
}


def randomised(model: Any) -> Any:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def decoder(name: str) -> Any:
    family, sizes = DECODERS[name]
    config = getattr(transformers, f"{family}Config")(vocab_size=61, **sizes)
    return randomised(getattr(transformers, f"{family}ForCausalLM")(config))


def encoder(name: str) -> Any:
    family, sizes = ENCODERS[name]
    return randomised(
        getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(vocab_size=61, **sizes))
    )


def batch() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[1, :6] = 0
    return {"input_ids": torch.randint(3, 61, (2, 21)).where(mask.bool(), 0), "attention_mask": mask}


def outcome(model: Any, given: dict[str, torch.Tensor], real: Any, direction: torch.Tensor | None) -> Any:
    """Outputs at real tokens, and gradients of all parameters."""
    model.zero_grad()
    out = model(**given)[0][real]
    direction = torch.randn_like(out) if direction is None else direction
    (out * direction).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads, direction


def check(model: Any, given: dict[str, torch.Tensor], real: Any, layers: int) -> None:
    expected, gradients, direction = outcome(model, given, real, None)
    with replace_attention(model, full) as swap:
        found, ours, _ = outcome(model, given, real, direction)
    assert swap.calls == layers
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert ours.keys() == gradients.keys()
    for name, grad in gradients.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(ours[name], grad, atol=1e-4 * max(scale, 1.0), rtol=1e-3, msg=name)
    torch.testing.assert_close(outcome(model, given, real, direction)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("padded", [False, True])
def test_decoders(name: str, padded: bool) -> None:
    given = batch()
    if not padded:
        given = {"input_ids": given["input_ids"]}
    real = given["attention_mask"].bool() if padded else slice(None)
    check(decoder(name), given, real, 2)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_with_a_cache(name: str) -> None:
    model, ids = decoder(name), batch()["input_ids"][:1]
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(ids, **options)
    with replace_attention(model, full) as swap:
        assert torch.equal(model.generate(ids, **options), expected)
    assert swap.calls == 12
    with torch.no_grad(), replace_attention(model, window(4)):
        whole = model(ids).logits
        past, steps = None, list[torch.Tensor]()
        for token in ids.split(1, dim=1):
            step = model(token, past_key_values=past, use_cache=True)
            past, steps = step.past_key_values, [*steps, step.logits]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str) -> None:
    given = batch()
    check(encoder(name), given, given["attention_mask"].bool(), 2)


def test_shifted_windows_of_swin_v2() -> None:
    sizes = dict(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4)
    config = transformers.Swinv2Config(**sizes, hidden_dropout_prob=0.0, drop_path_rate=0.0)
    check(randomised(transformers.Swinv2Model(config)), {"pixel_values": torch.randn(2, 3, 32, 32)}, slice(None), 4)


def test_cvt() -> None:
    sizes = dict(embed_dim=[8, 16], num_heads=[1, 2], depth=[1, 2], patch_sizes=[7, 3], patch_stride=[4, 2])
    twos = {name: value * 2 for name, value in dict(
        patch_padding=[1], mlp_ratio=[2.0], attention_drop_rate=[0.0], drop_rate=[0.0], drop_path_rate=[0.0],
        qkv_bias=[True], qkv_projection_method=["dw_bn"], kernel_qkv=[3], padding_kv=[1], stride_kv=[2],
        padding_q=[1], stride_q=[1],
    ).items()}  # fmt: skip
    config = transformers.CvtConfig(**sizes, **twos, cls_token=[False, True])
    check(randomised(transformers.CvtModel(config)), {"pixel_values": torch.randn(2, 3, 32, 32)}, slice(None), 3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_encoder_of_sam(implementation: str) -> None:
    config = transformers.SamVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4, window_size=3,
        mlp_dim=16, output_channels=8, global_attn_indexes=[1],
    )  # fmt: skip
    model = randomised(transformers.SamVisionModel._from_config(config, attn_implementation=implementation))
    check(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, slice(None), 2)


def test_those_that_form_no_scores_are_refused_in_words() -> None:
    sizes = BERT | dict(vocab_size=61)
    models = {
        "approximates": transformers.NystromformerModel(transformers.NystromformerConfig(**sizes)),
        "projections of their own": transformers.LongformerModel(
            transformers.LongformerConfig(**sizes, attention_window=4)
        ),
        "original_full": transformers.BigBirdModel(transformers.BigBirdConfig(**sizes, attention_type="block_sparse")),
        "no attention": transformers.YosoModel(transformers.YosoConfig(**sizes)),
    }
    for words, model in models.items():
        with pytest.raises(ValueError, match=words):
            use(model, full)


@torch.no_grad()
def test_layers_spared_attend_as_their_model_does() -> None:
    model, given = decoder("bloom"), batch()
    own = model(**given).logits
    with replace_attention(model, full, layers=[0]) as swap:
        real = given["attention_mask"].bool()
        torch.testing.assert_close(model(**given).logits[real], own[real], atol=1e-4, rtol=1e-4)
    assert swap.calls == 1 and "forward" not in vars(model.transformer.h[1].self_attention)
    with pytest.raises(ValueError, match="layers="):
        use(decoder("falcon").transformer.h[0], full)


def test_a_forward_that_is_taken_is_not_taken_again() -> None:
    model = decoder("bloom")
    attention, before = model.transformer.h[1].self_attention, model.config._attn_implementation
    attention.forward = lambda *args, **kwargs: type(attention).forward(attention, *args, **kwargs)
    with pytest.raises(ValueError, match="another library"):
        use(model, full)
    assert "forward" in vars(attention) and "forward" not in vars(model.transformer.h[0].self_attention)
    assert model.config._attn_implementation == before
