"""`foveate compare` on models of other families: sliding windows, normalised queries, soft-capped logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs pip install 'foveate[hf]'")

import transformers
from compare_inputs import TEXT, make_tokenizer
from typer.testing import CliRunner

from foveate.cli.app import app
from foveate.lab.results import Results

SHAPE: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=300,
    max_position_embeddings=256,
)
FAMILIES = {
    "Mistral": {"sliding_window": 40},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 40, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    "Gemma3": {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]},
}


def save(family: str, folder: Path) -> Path:
    config_class = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    config = getattr(transformers, config_class)(**SHAPE | FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_compare_runs_and_all_pairs_change_nothing(family: str, tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text(TEXT, encoding="utf-8")
    command = ["compare", "--model", str(save(family, tmp_path / "model")), "--text", str(text)]
    command += ["--length", "101", "--repeats", "1", "--windows", "2", "--out", str(tmp_path / "out")]
    command += ["--mechanisms", "flash_attention", "--mechanisms", "window(5) & causal"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    results = Results.load(tmp_path / "out")
    same, cut = results.entries
    assert abs(same.quality.change) < 1e-5 and same.quality.agreement > 0.98
    assert cut.quality.change != 0 and cut.looked.visible < 0.3
    assert (tmp_path / "out" / "report.html").exists()
