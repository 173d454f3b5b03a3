"""Every operator without parameters is a method: its core in the place of a model's attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foveate.adapt.named import as_core
from foveate.adapt.swap import Swap, use
from foveate.catalogue import registry
from foveate.mixers.core import Core

if TYPE_CHECKING:
    from torch import nn

    from foveate.adapt.hf.layers import Layers
    from foveate.catalogue.registry import Row


@dataclass(frozen=True)
class CoreMethod:
    """A method that is a core (or a pattern): attention with it, in some layers or heads or all; the cache as it is."""

    core: Core
    layers: Layers | None = None
    heads: Iterable[int] | None = None

    def install(self, model: nn.Module) -> Swap:
        """Let the model attend so from now on; see `foveate.adapt.use`."""
        return use(model, self.core, layers=self.layers, heads=self.heads)


def method_of(
    operator: Row | str, *, layers: Layers | None = None, heads: Iterable[int] | None = None, **options: Any
) -> CoreMethod:
    """The method that an operator of the catalogue is, by its row, its name or a pattern written out.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small)
    >>> change = method_of("streaming_llm", window=256).install(model)
    >>> change.core.pattern
    sinks(4) | window(255, 0)
    >>> change.undo()

    Raises ValueError for an operator that has parameters of its own, and for an option that it does not have.
    """
    name = operator.name if isinstance(operator, registry.Row) else operator
    return CoreMethod(as_core(name, **options), layers, heads)
