"""transformers models with recurrent layers, which then run on Foveate's recurrences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn

from foveate.adapt.hf import products
from foveate.adapt.hf.recurrent import conv as recurrent_conv
from foveate.adapt.hf.recurrent import delta as recurrent_delta
from foveate.adapt.hf.recurrent import mamba as recurrent_mamba
from foveate.adapt.hf.recurrent import others as recurrent_others
from foveate.adapt.hf.recurrent import ssd as recurrent_ssd
from foveate.adapt.swap import Change

_FAMILIES = (recurrent_delta, recurrent_mamba, recurrent_ssd, recurrent_others, recurrent_conv)
LAYERS: dict[str, dict[str, Callable[..., Any]]] = {
    model: layers for family in _FAMILIES for model, layers in family.LAYERS.items()
}
"""Stand-ins for methods, by kind of model (transformers' ``model_type``) and class of layer."""

_STAND_INS = {name: method for layers in LAYERS.values() for name, method in layers.items()}


class Acceleration(Change):
    """What runs on Foveate in a model, by its names there, and the way back.

    ``layers`` are the recurrent ones; ``products`` are the model's linear maps, where a faster library takes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[str] = []
        self.products: list[str] = []

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Acceleration(layers={self.layers}, products={self.products})"


def accelerate(model: nn.Module) -> Acceleration:
    """Let a transformers model run its recurrences, and the convolutions before them, on Foveate.

    For Mamba, Mamba-2, gated delta nets and their like transformers has fast code for GPUs only; on a CPU it takes
    a slow path, or fails where flash-linear-attention is installed. From this call on the layers' own weights go
    through `recur`, `scan`, `linear_scan` and `causal_conv`, for whole prompts as for cached steps, gradients
    included. Layers on another device than the CPU keep to their own code. No module is replaced or renamed.

    Every ``nn.Linear`` of the model in float32 (no subclass of it) goes through `foveate.adapt.hf.products.linear`
    where that is faster on this machine; ``FOVEATE_PRODUCTS=torch`` leaves them as they are.

    >>> import torch
    >>> from transformers import MambaConfig, MambaForCausalLM
    >>> small = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    >>> model = MambaForCausalLM(small).eval()
    >>> tokens = torch.randint(64, (1, 40))
    >>> with torch.no_grad():
    ...     expected = model(tokens).logits
    ...     with accelerate(model) as acceleration:
    ...         logits = model(tokens).logits
    >>> acceleration.layers
    ['backbone.layers.0.mixer', 'backbone.layers.1.mixer']
    >>> torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

    Without ``with`` the model stays accelerated until ``accelerate(model).undo()``; so does a deep copy of it.

    Packed sequences (``cu_seq_lens_q`` or ``seq_idx``) are kept apart where the model hands them on to its layers.
    A prompt given to Mamba in several pieces goes on from its state, where transformers' own path starts anew.

    Raises:
        TypeError: not a transformers model.
        ValueError: a model without a layer that is known here, or one whose weights accelerate moves about.
        ImportError: no transformers, or one before the caches of 5.23.
    """
    from foveate.adapt.hf.install import pretrained

    inner = pretrained(model)
    _check_version()
    found = list(_known_layers(inner))
    if not found:
        raise ValueError(
            f"{type(inner).__name__} has no recurrent layer that Foveate knows; known are the models "
            f"{', '.join(sorted(LAYERS))}"
        )
    acceleration = Acceleration()
    for name, layer in found:
        _check_at_home(name, layer)
    for name, layer in found:
        method = _STAND_INS[type(layer).__name__]
        _put(layer, method.__name__, MethodType(method, layer), acceleration)
        acceleration.layers.append(name)
    _speed_up_products(inner, acceleration)
    return acceleration


def _speed_up_products(model: nn.Module, acceleration: Acceleration) -> None:
    found = [(name, module) for name, module in model.named_modules() if products.takes(module)]
    if not found or products.faster() == "torch":
        return
    for name, module in found:
        _put(module, "forward", MethodType(products.forward, module), acceleration)
        acceleration.products.append(name)


def _known_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__name__ in _STAND_INS and kind.__module__.startswith("transformers."):
            yield name, module


def _put(layer: nn.Module, name: str, method: Callable[..., Any], change: Change) -> None:
    """Set an attribute of this one instance, to be taken away or put back as it was."""
    before = layer.__dict__.get(name)
    change.on_undo(lambda: setattr(layer, name, before) if before is not None else delattr(layer, name))
    setattr(layer, name, method)


def _check_version() -> None:
    from transformers.cache_utils import Cache

    if not hasattr(Cache, "get_recurrent_state"):
        raise ImportError("this version of transformers keeps recurrent states in another way: 5.23 or later is needed")


def _check_at_home(name: str, layer: nn.Module) -> None:
    if any(hasattr(module, "_hf_hook") for module in layer.modules()):
        raise ValueError(
            f"the weights of {name} are moved about by the accelerate library (device_map, offloading), which only "
            "its own code allows for: load the model without device_map"
        )
