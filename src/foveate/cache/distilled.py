"""A text of which a distiller has kept some tokens."""

from __future__ import annotations

from torch import Tensor

from foveate.cache.memory import LayerMemory
from foveate.cache.slots import Slots


class DistilledMemory(LayerMemory):
    """All of a text until somebody puts fewer keys and values in its place; then those and what comes after them."""

    def replace(self, k: Tensor, v: Tensor, position: Tensor) -> None:
        """Keys (B, G, S, D), values and positions (B, S) instead of all tokens so far; FREE where there is none."""
        self.commit()
        self.slots = Slots(k.shape[0]).append(k, v, position.unsqueeze(1).expand(-1, k.shape[1], -1))
