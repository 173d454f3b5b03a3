"""State tuning: of a frozen RWKV-7 model the states that it starts from are learned."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from foveate.catalogue.contracts import Stage
from foveate.catalogue.tiers import recipe
from foveate.mixers.recurrent_ssm.rwkv7 import RWKV7
from foveate.mixers.recurrent_ssm.state_tuning import adapt
from foveate.recipes.conversion import Conversion, exchange, next_token_loss
from foveate.recipes.small_lm import SmallLM


@recipe(
    "tune_state",
    papers=("State-Tuning",),
    teacher=lambda: SmallLM(partial(RWKV7, heads=4)),
    batch=lambda: torch.randint(16, (4, 24)),
    inherits=1.0,
    notes="The paper's observer model and its decorrelated backpropagation are left out.",
)
def tune_state(*, features: int | None = None, sharpness: float = 0.5) -> Conversion:
    """A frozen RWKV-7 model learns the states that it starts from alone, enlarged by kernel features on demand.

    Options are those of `foveate.mixers.recurrent_ssm.state_tuning.adapt`; a batch is tokens (B, N).

    Liu, Li, Lin, State Tuning: State-based Test-Time Scaling on RWKV-7, arXiv 2504.05097.

    >>> student = tune_state(features=12).prepare(SmallLM(RWKV7))
    >>> student.mixers[0].initial.shape
    torch.Size([8, 12, 12])
    """

    def convert(model: nn.Module) -> None:
        model.requires_grad_(False)
        exchange(model, RWKV7, partial(adapt, features=features, sharpness=sharpness))

    stage = Stage("tune", lambda name: name.endswith(".initial"), next_token_loss, lr=3e-2)
    return Conversion(convert, (stage,))
