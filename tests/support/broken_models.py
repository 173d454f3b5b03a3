"""Models that are each broken in one way, around a sound one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate.catalogue.registry import Reference
from foveate.catalogue.tiers import ModelRow, Preset

BROKEN: dict[str, tuple[ModelRow, set[str]]] = {}  # and the properties that it lacks
PARAMETERS = 16 * 8 + 8 * 8 + 8 + 8 * 16 + 16


class Step(NamedTuple):
    out: Tensor
    state: Any


class Sound(nn.Module):
    """The mean of all tokens so far, and two linear layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(16, width), nn.Linear(width, width), nn.Linear(width, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        sums = self.embed(tokens).cumsum(1)
        return self.mix(sums / torch.arange(1, tokens.shape[1] + 1, device=sums.device).view(-1, 1)).tanh()

    def features(self, tokens: Tensor) -> list[Tensor]:
        return [self.hidden(tokens).mT]

    def init_state(self, batch: int) -> Any:
        return self.embed.weight.new_zeros(batch, 8), 0

    def prefill(self, tokens: Tensor, state: Any) -> Step:
        return Step(self(tokens), (self.embed(tokens).sum(1), tokens.shape[1]))

    def decode(self, token: Tensor, state: Any) -> Step:
        total, seen = state[0] + self.embed(token)[:, 0], state[1] + 1
        return Step(self.head(self.mix(total / seen).tanh()).unsqueeze(1), (total, seen))


def row_of(model: Callable[..., nn.Module], parameters: float = PARAMETERS) -> ModelRow:
    nobody = Reference("Nobody", "Nothing", "0000.00000")
    presets = {"small": Preset({}, parameters), "wide": Preset({"width": 40})}
    supports = frozenset({"features", "decode"})
    return ModelRow(model.__name__, (), "none", model, "tokens", supports, presets, reference=nobody)  # type: ignore[arg-type]


def broken(*lacks: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def add(model: type[nn.Module]) -> type[nn.Module]:
        BROKEN[model.__name__] = row_of(model), set(lacks)
        return model

    return add


BROKEN["CountsOthersParameters"] = row_of(Sound, PARAMETERS * 1.03), {"presets"}


@broken("odd sizes")
class OverflowsAtThirtyThree(Sound):
    def forward(self, tokens: Tensor) -> Tensor:
        out = super().forward(tokens)
        return out * torch.inf if tokens.shape[1] == 33 and not out.requires_grad else out


@broken("gradients")
class HasAnIdleParameter(Sound):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.idle = nn.Parameter(torch.zeros(1))


@broken("save and load")
class ForgetsItsShift(Sound):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.shift = torch.randn(16).double()

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.shift

    def decode(self, token: Tensor, state: Any) -> Step:
        out, state = super().decode(token, state)
        return Step(out + self.shift, state)


@broken("neighbours")
class ReadsItsNeighbours(Sound):
    def forward(self, tokens: Tensor) -> Tensor:
        out = super().forward(tokens)
        return out - out[-1:, :1].detach() * (len(out) == 3)


@broken("features")
class CutsItsFeatures(Sound):
    def features(self, tokens: Tensor) -> list[Tensor]:
        return [one.detach() for one in super().features(tokens)]


@broken("features")
class MixesFeatures(Sound):
    def features(self, tokens: Tensor) -> list[Tensor]:
        return [one - one.mean(0) for one in super().features(tokens)]


@broken("decoding")
class DecodesBeside(Sound):
    def decode(self, token: Tensor, state: Any) -> Step:
        out, state = super().decode(token, state)
        return Step(out * (1 + 1e-6), state)


@broken("decoding", "causality")
class SeesTheFuture(Sound):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.embed(tokens).mean((1, 2), keepdim=True)
