"""Methods that are a key-value cache: with eviction, quantised, offloaded, ..."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from foveate.mixers.core import Core, PatternCore

if TYPE_CHECKING:
    from torch import nn

    from foveate.adapt.hf.layers import Layers
    from foveate.adapt.hf.memory import MakeMemory
    from foveate.adapt.swap import Swap


@dataclass(frozen=True)
class CachedMethod:
    """A memory for every layer, made anew for each text, and a core that attends as long as all tokens are kept."""

    memory: MakeMemory
    core: Core = field(default_factory=PatternCore)
    layers: Layers | None = None

    def install(self, model: nn.Module) -> Swap:
        """Give a causal language model of transformers caches of this kind from now on."""
        from foveate.adapt.hf.memory import keep

        return keep(model, self.memory, self.core, self.layers)
