"""`foveate compare` on models of every kind: judged by what suits them, and right by independent sums."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs pip install 'foveate[hf]'")

import transformers
from tests.support.compare_inputs import TEXT, make_tokenizer
from torch import Tensor
from torch.nn import functional as F

from foveate.adapt import replace_attention
from foveate.lab.compare import subject as compare_subject
from foveate.lab.compare.api import compare
from foveate.lab.compare.load import load
from foveate.lab.compare.subject import DECODED_SHARE, EncoderDecoder, MaskedModel, Subject
from foveate.lab.measure.workload import Frame, Text, Workload, cut
from foveate.patterns import window

LENGTH = 101
SHAPE: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=310,
    max_position_embeddings=256,
)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
GPT2 = dict(vocab_size=310, n_positions=256, n_embd=32, n_layer=2, n_head=4)
BART = dict(vocab_size=310, d_model=32, encoder_layers=1, decoder_layers=1, max_position_embeddings=256)
BART |= dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
VISION |= dict(image_size=28, patch_size=14)
GEMMA = SHAPE | dict(sliding_window=40, head_dim=8)
MIXED = dict(layer_types=["sliding_attention", "full_attention"])

# Of each family: the class, its configuration, what it is judged by.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "Mistral": ("MistralForCausalLM", "MistralConfig", SHAPE | dict(sliding_window=40), "text"),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SHAPE | dict(head_dim=8), "text"),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA | dict(attn_logit_softcapping=5.0), "text"),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA | MIXED, "text"),
    "Gemma3 with eyes": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        dict(text_config=GEMMA | MIXED, vision_config=VISION),
        "text",
    ),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2, "text"),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        SHAPE | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
        "text",
    ),
    "GPT-OSS": ("GptOssForCausalLM", "GptOssConfig", SHAPE | EXPERTS | dict(head_dim=8, sliding_window=40), "text"),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        SHAPE
        | LATENT
        | dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16)
        | dict(num_key_value_heads=4, first_k_dense_replace=1),
        "text",
    ),
    "Llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        SHAPE | dict(num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=40, head_dim=8),
        "text",
    ),
    "Bloom": ("BloomForCausalLM", "BloomConfig", dict(vocab_size=310, hidden_size=32, n_layer=2, n_head=4), "text"),
    "BERT": ("BertForMaskedLM", "BertConfig", SHAPE, "masked"),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", SHAPE | dict(max_position_embeddings=150), "masked"),
    "BERT without a head": ("BertModel", "BertConfig", SHAPE, "states"),
    "BERT that sorts": ("BertForSequenceClassification", "BertConfig", SHAPE, "states"),
    "Llama without a head": ("LlamaModel", "LlamaConfig", SHAPE, "states"),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(vocab_size=310, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        "decoder",
    ),
    "BART": ("BartForConditionalGeneration", "BartConfig", BART, "decoder"),
}
IN_CHUNKS = [name for name, family in FAMILIES.items() if family[3] == "text"]


def save(family: str, folder: Path) -> Path:
    """A random model of the family, with its tokenizer."""
    class_name, config_name, sizes, measure = FAMILIES[family]
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**sizes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    special = dict(mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]") if measure == "masked" else {}
    special |= dict(sep_token="</s>") if measure == "decoder" else {}
    make_tokenizer(**special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family, saved."""
    return {family: save(family, tmp_path_factory.mktemp("model")) for family in FAMILIES}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.py"
    file.write_text(TEXT, encoding="utf-8")
    return file


def fed_to(subject: Subject) -> Workload:
    frame = subject.frame if isinstance(subject, (MaskedModel, EncoderDecoder)) else Frame()
    return cut(subject.tokenizer, [Text(TEXT, "text")], LENGTH, 2, frame)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_pairs_change_nothing_and_a_window_does(
    family: str, folders: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    asked = dict(mechanisms=["flash_attention", "window(5)"], length=LENGTH, repeats=1, windows=2, progress=False)
    results = compare(folders[family], text, out=tmp_path / "out", **asked)
    same, cut_short = results.entries
    assert results.measure.name == FAMILIES[family][3] and not results.refused
    assert abs(same.quality.change) < 1e-5 and same.quality.agreement > 0.98
    assert cut_short.quality.change != 0 and cut_short.looked.visible < 0.5
    assert all(
        entry.quality.change_low <= entry.quality.change <= entry.quality.change_high for entry in results.ranked
    )
    assert results.recommendation is not None and results.recommendation.undecided
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("family", IN_CHUNKS)
def test_logits_in_chunks_are_the_logits(
    family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = load(folders[family])
    ids = torch.randint(300, (2, 37))
    with torch.no_grad():
        expected = -subject.model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    for at_once in (2**26, 310 * 5):
        monkeypatch.setattr(compare_subject, "LOGITS_AT_ONCE", at_once)
        torch.testing.assert_close(subject.predict(ids).nats, expected, atol=1e-5, rtol=1e-5)


def nats_of(logits: Tensor, tokens: Tensor) -> float:
    return float(F.cross_entropy(logits.double(), tokens, reduction="sum"))


def test_an_encoder_is_judged_by_tokens_behind_masks(folders: dict[str, Path]) -> None:
    subject = load(folders["BERT"])
    fed, tokenizer = fed_to(subject), subject.tokenizer
    assert fed.ids[:, 0].tolist() == [tokenizer.cls_token_id] * 2
    assert fed.ids[:, -1].tolist() == [tokenizer.sep_token_id] * 2
    total, size, right, count = 0.0, 0, 0, 0
    for ids, places in zip(fed.ids, subject.hidden_places(fed.ids), strict=True):
        assert len(places) == len(set(places.tolist())) == round(0.15 * (LENGTH - 2))
        assert int(places.min()) >= 1 and int(places.max()) < LENGTH - 1
        shown = ids.clone()
        shown[places] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = subject.model(shown[None]).logits[0, places]
        total += nats_of(logits, ids[places])
        size += sum(len(tokenizer.decode([token]).encode()) for token in ids[places].tolist())
        right, count = right + int((logits.argmax(-1) == ids[places]).sum()), count + len(places)
    found = subject.predict(fed.ids)
    quality = subject.judge(found, found, fed)
    assert quality.loss == pytest.approx(total / math.log(2) / size, rel=1e-4)
    assert quality.agreement == 1


def test_a_decoder_is_judged_by_the_end_of_a_text_given_its_beginning(folders: dict[str, Path]) -> None:
    for family in ("T5", "BART"):
        subject = load(folders[family])
        fed = fed_to(subject)
        said = int(DECODED_SHARE * (LENGTH - 1))
        total, size = 0.0, 0
        for ids in fed.ids:
            encoder_reads = torch.cat([ids[: LENGTH - 1 - said], ids[-1:]])
            assert subject.tokenizer.decode(ids[-1:]) == "</s>"
            target = ids[LENGTH - 1 - said : -1]
            start = getattr(subject.model.config, "decoder_start_token_id", None)
            start = subject.model.config.pad_token_id if start is None else start
            with torch.no_grad():
                given = torch.cat([torch.tensor([start]), target[:-1]])
                logits = subject.model(input_ids=encoder_reads[None], decoder_input_ids=given[None]).logits[0]
            total += nats_of(logits, target)
            size += len(subject.tokenizer.decode(target).encode())
        found = subject.predict(fed.ids)
        assert subject.judge(found, found, fed).loss == pytest.approx(total / math.log(2) / size, rel=1e-4)


def test_a_model_without_a_head_is_judged_by_its_hidden_states(folders: dict[str, Path]) -> None:
    subject = load(folders["BERT without a head"])
    fed = fed_to(subject)
    exact = subject.predict(fed.ids)
    with replace_attention(subject.model, window(5)), torch.no_grad():
        moved = subject.model(fed.ids).last_hidden_state.double()
        found = subject.predict(fed.ids)
    with torch.no_grad():
        at = subject.model(fed.ids).last_hidden_state.double()
    far = ((moved - at).square().sum(-1).sqrt() / at.square().sum(-1).sqrt()).mean()
    cosine = ((moved * at).sum(-1) / moved.norm(dim=-1) / at.norm(dim=-1)).mean()
    quality = subject.judge(found, exact, fed)
    assert quality.loss == quality.change == pytest.approx(float(far), rel=1e-4)
    assert quality.agreement == pytest.approx(float(cosine), rel=1e-4)
    assert quality.change_low < quality.change < quality.change_high


def test_mechanisms_fit_the_way_a_model_looks(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    asked = dict(length=LENGTH, repeats=1, windows=1, progress=False)
    for family in ("BERT", "BART"):
        with pytest.raises(ValueError, match=r"streaming_llm cannot be compared .* only looks back"):
            compare(folders[family], text, mechanisms=["streaming_llm"], out=tmp_path / family, **asked)
    every = compare(folders["BERT"], text, out=tmp_path / "every", **asked)
    assert "flash_attention" in {entry.name for entry in every.entries}
    assert "only looks back" in {one.name: one.reason for one in every.refused}["streaming_llm"]


def test_the_length_is_what_a_model_can_read(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """RoBERTa keeps its padding position and those before it for itself."""
    asked = dict(mechanisms=[], repeats=1, windows=1, progress=False)
    most = 150 - transformers.RobertaConfig().pad_token_id - 1
    results = compare(folders["RoBERTa"], text, out=tmp_path / "out", **asked)
    assert results.settings["length"] == most
    with pytest.raises(ValueError, match=f"has {most} positions"):
        compare(folders["RoBERTa"], text, out=tmp_path / "other", length=most + 1, **asked)


def test_half_precision(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    asked = dict(mechanisms=["window(5)"], length=LENGTH, repeats=1, windows=1, progress=False)
    half = compare(folders["Qwen3"], text, dtype="bfloat16", out=tmp_path / "half", **asked)
    whole = compare(folders["Qwen3"], text, out=tmp_path / "whole", **asked)
    assert half.about["model"]["dtype"] == "bfloat16" and half.about["model"]["device"] == "cpu"
    assert half.exact.quality.loss == pytest.approx(whole.exact.quality.loss, rel=0.02)
    assert half.exact.quality.loss != whole.exact.quality.loss


# ---- what is no model of text, or not a whole one ----------------------------------------------------------


def config_of(folder: Path, **changes: Any) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    config.update(changes)
    config.save_pretrained(folder)


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    folder = save("BERT without a head", tmp_path)
    config_of(folder, architectures=["BertForMaskedLM"])
    with pytest.raises(ValueError, match=r"not all of BertForMaskedLM's: cls\.predictions.* and \d more are missing"):
        load(folder)


def test_a_model_that_sees_what_it_should_predict_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SHAPE)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sees later tokens"):
        load(tmp_path)


def test_an_encoder_needs_a_mask_token(tmp_path: Path) -> None:
    folder = save("BERT", tmp_path)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match="no mask token"):
        load(folder)


@pytest.mark.parametrize(
    ("class_name", "config", "words"),
    [
        ("ViTModel", transformers.ViTConfig(**VISION), "ViTModel reads pixel_values"),
        (
            "MambaForCausalLM",
            transformers.MambaConfig(vocab_size=310, hidden_size=32, num_hidden_layers=1),
            "MambaForCausalLM has no attention",
        ),
    ],
)
def test_other_models_are_refused_in_words(
    class_name: str, config: Any, words: str, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    getattr(transformers, class_name)(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match=words):
        compare(folder, text, mechanisms=["window(5)"], length=LENGTH, repeats=1, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
