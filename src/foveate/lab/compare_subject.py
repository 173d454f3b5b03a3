"""What is compared on: a pretrained causal language model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.adapt import Swap, replace_attention
from foveate.lab.metrics import Predictions
from foveate.mixers.core import Core

BUILTIN = "builtin"
LOCAL = {"local_files_only": True, "trust_remote_code": False}  # neither a network nor the model's own code
LOGITS_AT_ONCE = 2**26  # numbers in the table of logits of one chunk: 256 MB


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in float32 on the CPU, with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    digest: str

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return getattr(self.config, "num_key_value_heads", None) or self.heads

    def about(self) -> dict[str, Any]:
        """Facts for a reader."""
        return {
            "name": self.name,
            "architecture": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "layers": self.config.num_hidden_layers,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "exact_attention": self.model.config._attn_implementation,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def check_length(self, length: int) -> None:
        """Refuse a length that the model has no positions for, or that leaves nothing to predict."""
        if length < 16:
            raise ValueError(f"a window needs at least 16 tokens; got --length {length}")
        most = getattr(self.config, "max_position_embeddings", None)
        if most is not None and length > most:
            raise ValueError(f"{self.name} has {most} positions: it cannot read {length} tokens; use --length {most}")

    def attending_with(self, core: Core) -> AbstractContextManager[Swap]:
        return replace_attention(self.model, core)

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> None:
        """Read tokens (1, L) as before generating: all layers, keys and values kept, no logits."""
        self.model.base_model(input_ids=ids, use_cache=True)

    @torch.inference_mode()
    def predict(self, windows: Tensor) -> Predictions:
        """Cost of each token and likeliest token, for windows (W, L)."""
        each = [self._predict_one(ids.unsqueeze(0)) for ids in windows]
        return Predictions(torch.stack([nats for nats, _ in each]), torch.stack([best for _, best in each]))

    def _predict_one(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        step = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        nats, best = [], []
        for states, targets in zip(hidden.split(step, 1), ids[:, 1:].split(step, 1), strict=True):
            with _trunk_that_answers(self.model, states):
                logits = self.model(input_ids=targets, use_cache=False).logits[0].float()
            nats.append(F.cross_entropy(logits, targets[0], reduction="none"))
            best.append(logits.argmax(-1))
        return torch.cat(nats), torch.cat(best)


@contextmanager
def _trunk_that_answers(model: Any, hidden: Tensor) -> Iterator[None]:
    """Inside, the model turns these hidden states into logits as it would its own, a chunk at a time."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    trunk = model.base_model
    trunk.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        yield
    finally:
        del trunk.forward


def load(model: str | Path) -> LanguageModel:
    """The built-in model, or the causal language model of a directory in Hugging Face format.

    ValueError, in one sentence, for a directory that is missing or does not hold one with safetensors weights.
    """
    from foveate.models import builtin

    transformers = builtin.require_transformers()
    transformers.logging.disable_progress_bar()
    if str(model) == BUILTIN:
        network, tokenizer = builtin.load()
        return LanguageModel(BUILTIN, network, tokenizer, _digest(builtin.path()))
    folder = Path(model).expanduser()
    _check_folder(folder)
    try:
        network = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, **LOCAL
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"cannot load a causal language model from {folder}: {_first_line(error)}") from error
    return LanguageModel(folder.resolve().name, network.eval(), tokenizer, _digest(folder))


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory: give 'builtin' or the directory of a model")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a model in Hugging Face format")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ValueError(f"{folder} has its weights as pickles, which can run code: convert them to safetensors")
    raise ValueError(f"{folder} has no weights (*.safetensors)")


def _digest(folder: Path) -> str:
    """Names the model by its configuration and weights."""
    total = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
