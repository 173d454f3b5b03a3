"""A small, killable, resumable training loop for the language models of `foveate train`."""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn import functional as F

from foveate.lab import corpus
from foveate.lab.train_data import batch_at, prepare
from foveate.lab.train_eval import bits_per_byte
from foveate.lab.train_recipe import Phase, Recipe

SAVE_EVERY_SECONDS = 120
PROBE_EVERY_SECONDS = 300
PROBE_TOKENS = 4096
PROBE_WINDOW = 128


def train(recipe: Recipe, out: Path, *, minutes: float | None = None, resume: bool = True) -> Path:
    """Train a model, or go on with the run in `out`, until its steps or its minutes are spent."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(recipe.threads)
    run = Run(recipe, out, minutes if minutes is not None else recipe.minutes)
    if resume and run.checkpoint.exists():
        run.load()
    (out / "recipe.json").write_text(recipe.to_json(), encoding="utf-8")
    with _asked_to_stop() as stop, _progress() as bar:
        task = bar.add_task("training", total=1.0, note="")
        while run.progress() < 1 and not stop:
            loss = run.step_once()
            bar.update(task, completed=run.progress(), note=f"step {run.step} loss {loss:.3f}")
            run.housekeeping(loss)
    run.save()
    return out


class Run:
    """The state of one training run: model, optimisers, step and time used."""

    def __init__(self, recipe: Recipe, out: Path, minutes: float | None) -> None:
        self.recipe, self.out, self.minutes = recipe, out, minutes
        self.checkpoint = out / "checkpoint.pt"
        self.tokenizer, self.tokens = prepare(recipe, out)
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe, self.tokenizer)
        self.optimizers = build_optimizers(self.model, recipe)
        self.step, self.seen, self.used = 0, 0, 0.0
        self.clock = self.saved = time.monotonic()
        self.probed = -PROBE_EVERY_SECONDS + 60.0

    def elapsed(self) -> float:
        return self.used + time.monotonic() - self.clock

    def progress(self) -> float:
        by_time = self.elapsed() / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(self.step / self.recipe.steps, by_time))

    def step_once(self) -> float:
        progress = self.progress()
        phase = self.recipe.phase(progress)
        batch = batch_at(self.tokens, phase, self.recipe.seed, self.step)
        loss = language_loss(self.model, batch, bf16=self.recipe.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self._update(self.recipe.rate(self.step, progress))
        self.step += 1
        self.seen += phase.batch * phase.context
        self.phase = phase
        return loss.item()

    def _update(self, rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]
            optimizer.step()
            optimizer.zero_grad()

    def housekeeping(self, loss: float) -> None:
        if self.step % 10 == 0:
            self.log(loss=round(loss, 4), context=self.phase.context)
        if self.elapsed() - self.probed > PROBE_EVERY_SECONDS:
            self.probed = self.elapsed()
            self.log(**self.probe())
        if time.monotonic() - self.saved > SAVE_EVERY_SECONDS:
            self.save()

    def log(self, **values: float) -> None:
        row = {"step": self.step, "seconds": round(self.elapsed(), 1), "tokens": self.seen, **values}
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def probe(self) -> dict[str, float]:
        """Held-out bits per byte with full attention and with a short window: their gap is what is wanted."""
        text = corpus.heldout_text(60_000)
        ids = self.tokenizer(text).input_ids[: 2 * PROBE_TOKENS]
        text = self.tokenizer.decode(ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            full = bits_per_byte(self.model, self.tokenizer, text, context=PROBE_TOKENS)
            near = bits_per_byte(self.model, self.tokenizer, text, context=PROBE_TOKENS, window=PROBE_WINDOW)
        return {"full": round(full, 4), "window_128": round(near, 4), "gap_percent": round(100 * (near / full - 1), 2)}

    def save(self) -> None:
        self.used, self.clock = self.elapsed(), time.monotonic()
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seen": self.seen,
            "used": self.used,
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)
        self.saved = time.monotonic()

    def load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            peaks = [group["peak"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak"] = peak
        self.step, self.seen, self.used = state["step"], state["seen"], state["used"]


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=recipe.context,
        rope_theta=recipe.rope_theta,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def build_optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the hidden matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.muon_decay)
    adam = torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def language_loss(model: Any, batch: Tensor, *, bf16: bool) -> Tensor:
    """Mean next-token cross-entropy of (B, N + 1) tokens."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that becomes non-empty at the first SIGINT or SIGTERM, so that the loop can save and leave."""
    asked: list[int] = []
    before = {name: signal.signal(name, lambda number, _: asked.append(number)) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", choices=["builtin", "tiny"], default="builtin")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    recipe = Recipe.builtin() if options.preset == "builtin" else Recipe.tiny()
    train(recipe, options.out, minutes=options.minutes, resume=not options.fresh)


if __name__ == "__main__":
    main()
