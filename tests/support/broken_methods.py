"""Methods that are each broken in one way, around a sound one: a window, and a cache that keeps no more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from foveate.adapt.swap import Change, use
from foveate.catalogue.registry import Reference
from foveate.catalogue.tiers import MethodRow
from foveate.patterns import causal, window

BROKEN: dict[str, tuple[MethodRow, set[str]]] = {}  # and the properties that it lacks
TINY, FULL = {"width": 7}, {"width": 10_000}


class Kept(DynamicSlidingWindowLayer):
    """The last keys, without the memory of those before."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        seen = super().update(key_states, value_states, *args, **named)
        self.keys, self.values = self.keys.clone(), self.values.clone()
        return seen


class Sound:
    """Attention to the last ``width`` keys, of which the cache keeps no more."""

    layer: Callable[[int], Any] | None = Kept

    def __init__(self, width: int = 512) -> None:
        self.width = width

    def install(self, model: Any) -> Change:
        change = Change()
        change.on_undo(use(model, window(self.width - 1) & causal).undo)
        decoder = model.model
        hooks = [
            decoder.register_forward_pre_hook(self.give_cache, with_kwargs=True),
            decoder.register_forward_hook(self.bend_output, with_kwargs=True),
        ]
        for hook in hooks:
            change.on_undo(hook.remove)
        return change

    def give_cache(self, decoder: Any, args: Any, named: dict[str, Any]) -> Any:
        cache = named.get("past_key_values")
        if self.layer is not None and named.get("use_cache") and (cache is None or cache.get_seq_length() == 0):
            cache = DynamicCache() if cache is None else cache
            cache.layers = [self.layer(self.width) for _ in decoder.layers]
            named["past_key_values"] = cache
        return args, named

    def bend_output(self, decoder: Any, args: Any, named: dict[str, Any], out: Any) -> None:
        mask = named.get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.dim() == 2 and not mask.bool().all()
        out.last_hidden_state = self.bend(out.last_hidden_state, padded)

    def bend(self, hidden: Tensor, padded: bool) -> Tensor:
        return hidden


def row_of(method: Callable[..., Any], full_budget: dict[str, Any] | None = None) -> MethodRow:
    nobody = Reference("Nobody", "Nothing", "0000.00000")
    full = full_budget or FULL
    return MethodRow(method.__name__, (), "none", method, full, lambda n: min(n, 7), tiny=TINY, reference=nobody)


def broken(*lacks: str) -> Callable[[type[Sound]], type[Sound]]:
    def add(method: type[Sound]) -> type[Sound]:
        BROKEN[method.__name__] = row_of(method), set(lacks)
        return method

    return add


BROKEN["HasNoFullBudget"] = row_of(Sound, {"width": 20}), {"full budget"}


@broken("full budget", "memory")
class IsNotAtWork(Sound):
    def install(self, model: Any) -> Change:
        return Change()


@broken("undo")
class StaysBehind(Sound):
    def install(self, model: Any) -> Change:
        super().install(model)
        return Change()


@broken("undo")
class RoundsWeights(Sound):
    def install(self, model: Any) -> Change:
        change, weight = super().install(model), model.model.layers[0].mlp.up_proj.weight
        change.on_undo(partial(weight.data.copy_, weight.data * (1 + 1e-15)))
        return change


@broken("undo")
class ForgetsTheConfiguration(Sound):
    def install(self, model: Any) -> Change:
        model.config.method = "window"
        return super().install(model)


@broken("neighbours")
class ReadsItsNeighbours(Sound):
    def bend(self, hidden: Tensor, padded: bool) -> Tensor:
        return hidden - 0.1 * hidden.mean(0) if len(hidden) == 3 else hidden


@broken("padding", "generation")
class StumblesOverPadding(Sound):
    def bend(self, hidden: Tensor, padded: bool) -> Tensor:
        return hidden.roll(1, -1) if padded else hidden


@broken("causality", "decoding")
class SeesTheFuture(Sound):
    def bend(self, hidden: Tensor, padded: bool) -> Tensor:
        if self.width == 7 and hidden.shape[:2] == (2, 45) and not padded:
            hidden = hidden + 0.1 * hidden.mean((1, 2), keepdim=True) * torch.ones_like(hidden).cumsum(2)
        return hidden


@broken("decoding", "full budget")
class DecodesBeside(Sound):
    def bend(self, hidden: Tensor, padded: bool) -> Tensor:
        if hidden.shape[1] == 1:
            hidden = hidden + 1e-6 * hidden.roll(1, -1)
        return hidden


@broken("generation")
class WritesOtherwiseInBatches(Sound):
    def install(self, model: Any) -> Change:
        change, generate = super().install(model), model.generate

        def shifted(prompts: Tensor, **options: Any) -> Tensor:
            return generate(prompts, **options) + (len(prompts) == 2)

        model.generate = shifted
        change.on_undo(partial(delattr, model, "generate"))
        return change


@broken("memory")
class KeepsEverything(Sound):
    layer = None


@broken("memory")
class KeepsTheMemoryOfWhatItDropped(Sound):
    layer = DynamicSlidingWindowLayer
