"""Methods for video that are each broken in one way, around a sound one: the last and next tokens, and all text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.adapt.swap import Change, use
from foveate.catalogue.registry import Reference
from foveate.catalogue.tiers import MethodRow
from foveate.patterns import Pattern, boolean_mask, global_tokens, window

GRID, TINY, FULL = (3, 3, 5), 6, 10_000
TOKENS = 45
BROKEN: dict[str, tuple[MethodRow, set[str]]] = {}  # and the properties that it lacks


class Sound:
    """Attention to tokens less than ``width`` away, and to text, on clips of one size."""

    def __init__(self, text: int, width: int = FULL) -> None:
        self.text, self.width = text, width

    @property
    def pattern(self) -> Pattern:
        near = window(self.width)
        return near | global_tokens(range(TOKENS, TOKENS + self.text)) if self.text else near

    def install(self, model: Any) -> Change:
        change = Change()
        change.on_undo(use(model, self.pattern).undo)
        for hook in (
            model.register_forward_pre_hook(lambda model, args: self.check(args[0])),
            model.blocks.register_forward_hook(self.bend_output, with_kwargs=True),
        ):
            change.on_undo(hook.remove)
        return change

    def check(self, latents: Tensor) -> None:
        if latents[0, 0].numel() != TOKENS:
            raise ValueError(f"{TOKENS} and {self.text} tokens; got {latents[0, 0].numel() + self.text}")

    def bend_output(self, blocks: Any, args: Any, named: dict[str, Any], out: Any) -> None:
        if self.width == TINY:
            out.last_hidden_state = self.bend(out.last_hidden_state)

    def bend(self, hidden: Tensor) -> Tensor:
        return hidden


def row_of(method: Callable[..., Any], full: int = FULL) -> MethodRow:
    nobody = Reference("Nobody", "Nothing", "0000.00000")
    tiny = {"grid": GRID, "width": TINY}

    def make(grid: tuple[int, int, int], *, text: int = 0, width: int = FULL) -> Any:
        return method(text, width)

    budget = {"width": full}
    return MethodRow(method.__name__, (), "none", make, budget, tiny=tiny, reference=nobody, inputs="video")


def broken(*lacks: str) -> Callable[[type[Sound]], type[Sound]]:
    def add(method: type[Sound]) -> type[Sound]:
        BROKEN[method.__name__] = row_of(method), set(lacks)
        return method

    return add


BROKEN["HasNoFullBudget"] = row_of(Sound, 20), {"full budget"}


@broken("full budget")
class IsNotAtWork(Sound):
    def install(self, model: Any) -> Change:
        return Change()


@broken("undo", "other sizes")
class StaysBehind(Sound):
    def install(self, model: Any) -> Change:
        super().install(model)
        return Change()


@broken("undo")
class ForgetsTheConfiguration(Sound):
    def install(self, model: Any) -> Change:
        model.blocks.config.method = "window"
        return super().install(model)


@broken("undo")
class RoundsAWeightThatNobodyReads(Sound):
    def install(self, model: Any) -> Change:
        change, weight = super().install(model), model.blocks.embeddings.word_embeddings.weight
        change.on_undo(partial(weight.data.copy_, weight.data * (1 + 1e-15) + 1e-300))
        return change


@broken("neighbours")
class ReadsItsNeighbours(Sound):
    def bend(self, hidden: Tensor) -> Tensor:
        return hidden - 0.1 * hidden.mean(0)


@broken("padding")
class ReadsPadding(Sound):
    def bend(self, hidden: Tensor) -> Tensor:
        return hidden + 0.1 * hidden.mean(1, keepdim=True)


@broken("text")
class LosesTheText(Sound):
    @property
    def pattern(self) -> Pattern:
        if self.width != TINY:
            return super().pattern
        mask = torch.ones(TOKENS + self.text, TOKENS + self.text, dtype=torch.bool)
        mask[:TOKENS, TOKENS:] = False
        return boolean_mask(mask) & window(self.width)


@broken("determinism")
class DrawsRandomNumbers(Sound):
    def bend(self, hidden: Tensor) -> Tensor:
        torch.rand(1)
        return hidden


@broken("determinism", "neighbours", "padding")
class RemembersOtherClips(Sound):
    seen = 0

    def bend(self, hidden: Tensor) -> Tensor:
        RemembersOtherClips.seen += 1
        return hidden + 0.01 * RemembersOtherClips.seen * hidden.roll(1, -1)


@broken("other sizes")
class RefusesWithoutNumbers(Sound):
    def check(self, latents: Tensor) -> None:
        if latents[0, 0].numel() != TOKENS:
            raise ValueError("another size")


@broken("other sizes")
class Crashes(Sound):
    def check(self, latents: Tensor) -> None:
        if latents[0, 0].numel() != TOKENS:
            raise KeyError(latents[0, 0].numel() + self.text)
