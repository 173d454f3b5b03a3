"""Exchanging a model's attention and putting it back: what is common to all kinds of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from foveate.adapt.named import as_core
from foveate.patterns import Pattern

if TYPE_CHECKING:
    from torch import nn

    from foveate.mixers.core import Core


class Change:
    """Something done to a model, and the way back."""

    def __init__(self) -> None:
        self._way_back: list[Callable[[], None]] = []

    def on_undo(self, step: Callable[[], None]) -> None:
        """Add a step of the way back; steps are walked last one first."""
        self._way_back.append(step)

    def undo(self) -> None:
        """Give the model back what it had; a second call does nothing."""
        while self._way_back:
            self._way_back.pop()()


class Swap(Change):
    """A mechanism at work inside a model: which core, how often it was called, and the way back."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core
        self.calls = 0


def use(model: nn.Module, core: Core | Pattern | str, *, name: str = "foveate", **options: Any) -> Swap:
    """Let a model attend with another mechanism from now on; no parameter of it is touched.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from foveate import sinks, window
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small)
    >>> swap = use(model, window(512) | sinks(4))
    >>> model.config._attn_implementation
    'foveate'
    >>> swap.undo()
    >>> model.config._attn_implementation
    'sdpa'

    Args:
        model: a transformers model (or a PEFT model around one) that asks transformers for its attention.
        core: a core, a pattern, the name of a mechanism of the catalogue that needs no training, or a pattern
            written out, such as "window(512) & causal | sinks(4)". What the model itself allows (causality,
            its sliding windows, padding) always stays in force.
        name: under which transformers will know it.
        options: passed on where ``core`` is a name.

    Returns:
        The swap, whose ``undo()`` gives the model its own attention back.

    Raises:
        TypeError: a model of a kind that no adapter knows.
        ValueError: a model that cannot be switched, in words.
    """
    from foveate.adapt import transformers

    swap = Swap(as_core(core, **options))
    transformers.install(model, swap, name)
    return swap


@contextmanager
def replace_attention(
    model: nn.Module, core: Core | Pattern | str, *, name: str = "foveate", **options: Any
) -> Iterator[Swap]:
    """Like :func:`use`, for the length of a ``with`` block, however it ends.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from foveate import window
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small)
    >>> with replace_attention(model, window(16)) as swap:
    ...     logits = model(torch.arange(40).view(1, 40)).logits
    >>> swap.calls
    1
    """
    swap = use(model, core, name=name, **options)
    try:
        yield swap
    finally:
        swap.undo()
