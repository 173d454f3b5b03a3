"""Layers of transformers' models from end to end, as they are and under `foveate.adapt.accelerate`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contest import Run
from benchmarks.field import Settings, Work, worst_row
from benchmarks.limits import bandwidth
from benchmarks.rivals import Rival

Function = Callable[[Tensor], Tensor]

TOLERANCE = 2e-4  # of a row
WIDTH = 512  # channels of the layers in full size
PROMPT = 64  # tokens before a cached step


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """A model of one layer, tokens (1, N, C) for that layer, and whether the last of them is a cached step.

    A cached step goes on from a state of its own each time it is run; only the first of them is checked.
    """

    model: nn.Module
    name: str  # of the recurrent layer in the model
    x: Tensor
    decodes: bool
    recurrence_operations: float  # for a token

    def ours(self, impl: str) -> Function:
        from foveate.adapt import accelerate

        if impl != "auto":
            raise NotImplementedError("layers run whatever implementation is the fastest: use --impl auto")
        model = copy.deepcopy(self.model)
        accelerate(model)  # for as long as this copy lives
        return self._layer(model)

    def theirs(self) -> Function:
        return self._layer(copy.deepcopy(self.model))

    def _layer(self, model: nn.Module) -> Function:
        layer = model.get_submodule(self.name)
        if not self.decodes:
            return layer
        cache = self._cache(model)
        with torch.no_grad():
            layer(self.x[:, :-1], cache_params=cache)
        return partial(layer, cache_params=cache)

    @staticmethod
    def _cache(model: Any) -> Any:
        return _transformers().DynamicCache(config=model.config)

    def run(self, function: Function) -> Run:
        return partial(self._out, function, self.x[:, -1:] if self.decodes else self.x)

    check = run

    @staticmethod
    @torch.no_grad()
    def _out(function: Function, x: Tensor) -> tuple[Tensor, ...]:
        return (function(x),)

    @property
    def tolerance(self) -> float:
        return TOLERANCE

    def error(self, results: tuple[Tensor, ...]) -> float:
        return float(worst_row(results[0].double(), self.truth))

    @cached_property
    def truth(self) -> Tensor:
        """The layer's own code in float64 (parts of which it computes in float32), without a cache."""
        layer = copy.deepcopy(self.model).double().get_submodule(self.name)
        with torch.no_grad():
            return layer(self.x.double())[:, -1:] if self.decodes else layer(self.x.double())

    def work(self, settings: Settings) -> Work:
        """Products with the weights, and the recurrence; or reading the weights, for one step."""
        weights = [p.numel() for p in self.model.get_submodule(self.name).parameters() if p.dim() == 2]
        if self.decodes:
            num_bytes = 4 * sum(weights)
            return Work("bytes", num_bytes, bandwidth(num_bytes, settings.threads)["copy"])
        operations = self.x.shape[1] * (2.0 * sum(weights) + self.recurrence_operations)
        return Work("operations", operations, settings.limits.get("float32"))


TRANSFORMERS = Rival("transformers", LayerProblem.theirs)


def mamba(length: int, decodes: bool, quick: bool) -> LayerProblem:
    hf, width = _transformers(), 32 if quick else WIDTH
    model = hf.MambaModel(hf.MambaConfig(vocab_size=8, hidden_size=width, num_hidden_layers=1, state_size=16))
    return _problem(model, "layers.0.mixer", width, length, decodes, 15.0 * 2 * width * 16)


def mamba2(length: int, decodes: bool, quick: bool) -> LayerProblem:
    hf = _transformers()
    width, head, states = (32, 16, 16) if quick else (WIDTH, 64, 128)
    config = hf.Mamba2Config(
        vocab_size=8,
        hidden_size=width,
        num_hidden_layers=1,
        num_heads=2 * width // head,
        head_dim=head,
        state_size=states,
        n_groups=1,
    )
    return _problem(hf.Mamba2Model(config), "layers.0.mixer", width, length, decodes, 5.0 * 2 * width * states)


def qwen3_next(length: int, decodes: bool, quick: bool) -> LayerProblem:
    hf = _transformers()
    width, head = (32, 8) if quick else (WIDTH, 64)
    config = hf.Qwen3NextConfig(
        vocab_size=8,
        hidden_size=width,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=width // head // 2,
        linear_num_value_heads=width // head,
        linear_key_head_dim=head,
        linear_value_head_dim=head,
        num_experts=2,  # the rest is not run
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return _problem(hf.Qwen3NextModel(config), "layers.0.linear_attn", width, length, decodes, 7.0 * width * head)


def _problem(
    model: nn.Module, name: str, width: int, length: int, decodes: bool, recurrence_operations: float
) -> LayerProblem:
    return LayerProblem(model.eval(), name, torch.randn(1, length, width), decodes, recurrence_operations)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise SystemExit("layers need transformers (pip install 'foveate[hf]'); name other groups by --case") from None
    return transformers
