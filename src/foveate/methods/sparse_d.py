"""SparseD in diffusion language models: a clock for the steps of denoising, a core for each layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from foveate.adapt.hf.layers import attention_layers, chosen
from foveate.adapt.swap import Change, use
from foveate.catalogue.tiers import method
from foveate.mixers.dynamic_sparse.sparse_d import Clock, SparseDCore

if TYPE_CHECKING:
    from torch import nn

    from foveate.adapt.hf.layers import Layers

STEPWISE = "it is for texts denoised as a whole, step by step: exact in the first steps, told apart by its own clock"
EXEMPT = dict.fromkeys(("full budget", "padding", "causality", "decoding", "generation"), STEPWISE)


class Denoising(Change):
    """SparseD at work in a model: which step it is, and the core of each layer."""

    def __init__(self, clock: Clock, cores: list[SparseDCore]) -> None:
        super().__init__()
        self.clock, self.cores = clock, cores

    @property
    def step(self) -> int:
        return self.clock.step

    @property
    def is_sparse(self) -> bool:
        """Whether this step attends to recorded blocks alone."""
        return self.clock.step >= self.cores[0].exact_steps

    def next_step(self) -> int:
        """End a step, however many passes through the model it took; returns the number of the next."""
        self.clock.step += 1
        return self.clock.step

    def restart(self) -> None:
        """Begin with another text, at step 0."""
        self.clock.step = 0
        for core in self.cores:
            core.table = None


@dataclass(frozen=True)
class SparseDMethod:
    """A core for every layer, all by one clock."""

    core: SparseDCore
    layers: Layers | None = None

    def install(self, model: nn.Module) -> Denoising:
        """Let a model denoise so from now on, with step 0."""
        named = chosen(attention_layers(model)[0], self.layers, False)
        numbers = sorted({layer.number for layer in named if layer.number is not None})
        clock = Clock()
        cores = {number: replace(self.core, clock=clock) for number in numbers}
        change = Denoising(clock, list(cores.values()))
        try:
            for number, core in cores.items():
                change.on_undo(use(model, core, layers=[number]).undo)
        except BaseException:
            change.undo()
            raise
        change.on_undo(change.restart)
        return change


@method(
    "sparse_d",
    papers=("SparseD",),
    tiny={"steps": 10, "block": 4},
    full_budget={"select": 1.0},
    exempt=EXEMPT,
    uses=("encoder",),
)
def sparse_d(
    steps: int,
    skip: float = 0.2,
    select: float = 0.3,
    block: int = 128,
    generated: int = 0,
    layers: Layers | None = None,
) -> SparseDMethod:
    """Diffusion language models attend in full for the first steps, then to blocks that each head recorded once.

    ``steps`` are those of denoising, ``skip`` the share that is exact, ``select`` the share of blocks of ``block`` keys
    that are kept, ``generated`` the tokens behind the prompt, which choose apart from it. What `install` returns counts
    the steps: call its ``next_step()`` after each, ``restart()`` before another text. See
    `foveate.mixers.dynamic_sparse.sparse_d.SparseDCore`; numbers and counting are those of the authors' code.

    Wang et al., SparseD: Sparse Attention for Diffusion Language Models, arXiv 2509.24014.

    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> small = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model, noisy = BertModel(small).eval(), torch.randint(64, (1, 60))
    >>> change = sparse_d(steps=10, block=8, generated=20).install(model)
    >>> for _ in range(10):
    ...     hidden = model(noisy).last_hidden_state
    ...     number = change.next_step()
    >>> change.is_sparse
    True
    >>> change.undo()
    """
    return SparseDMethod(SparseDCore(steps, skip, select, block, generated), layers)
