"""The model, its optimisers and its loss, as a recipe asks for them."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.lab.train.recipe import Recipe
from foveate.models.builtin import require_transformers


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """A freshly initialised LlamaForCausalLM of the recipe's shape."""
    transformers = require_transformers()
    config = transformers.LlamaConfig(
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
    return transformers.LlamaForCausalLM(config)


def build_optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms; a group's `peak` is its highest rate.

    Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.muon_decay)
    adam = torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def set_gradients(model: Any, batch: Tensor, *, bf16: bool, pool: Executor) -> float:
    """Fill every `.grad` for tokens (B, N + 1); the mean next-token cross-entropy in nats comes back.

    Each row is a task of the pool, so that a core that other work slows down holds up one row, not every
    operation; gradients are added in the order of the rows, so the sum does not depend on which finished first.
    """
    parameters = list(model.parameters())
    done = list(pool.map(lambda row: _row_gradients(model, row[None], parameters, bf16), batch))
    for parameter, *gradients in zip(parameters, *(gradients for _, gradients in done), strict=True):
        parameter.grad = torch.stack(gradients).mean(0)
    return sum(loss for loss, _ in done) / len(batch)


def _row_gradients(model: Any, row: Tensor, parameters: list[Tensor], bf16: bool) -> tuple[float, tuple[Tensor, ...]]:
    loss = language_loss(model, row, bf16=bf16)
    return loss.item(), torch.autograd.grad(loss, parameters)


def language_loss(model: Any, batch: Tensor, *, bf16: bool) -> Tensor:
    """Mean next-token cross-entropy in nats of tokens (B, N + 1)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
