"""A model's own attention function, which says what of a call counts, and whether Foveate computes the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapt.hf.layers import Layer, names_in_forward
from foveate.attention import attend, softmax

KNOWN = frozenset(
    {"module", "query", "key", "value", "query_states", "key_states", "value_states", "attention_mask", "dropout"}
    | {"scaling", "is_causal", "sliding_window", "softcap", "s_aux", "position_bias", "kwargs"}
)
_TOLERANCE = 1e-3


_unknown: dict[type[nn.Module], frozenset[str]] = {}


def unknown_options(module: nn.Module) -> frozenset[str]:
    """What the model's own function reads and Foveate does not know; whatever it does not read cannot matter."""
    kind = type(module)
    if kind not in _unknown and not torch.compiler.is_compiling():
        own = _own_function(kind)
        _unknown[kind] = frozenset() if own is None else frozenset(inspect.signature(own).parameters) - KNOWN
    return _unknown.get(kind, frozenset())


def _own_function(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """The function that a class of layers falls back to, named in the file of its forward."""
    for owner in kind.__mro__:
        forward = inspect.unwrap(vars(owner).get("forward", lambda: None))
        for name in getattr(getattr(forward, "__code__", None), "co_names", ()):
            if name.endswith("eager_attention_forward"):
                return forward.__globals__.get(name)
    return None


@torch.no_grad()
def disagreement(layer: Layer) -> str | None:
    """Why Foveate would not compute what a layer's own function does; None where it does on small numbers."""
    module = layer.module
    own, sinks = _own_function(type(module)), getattr(module, "sinks", None)
    passed = unknown_options(module) & names_in_forward(module)
    if passed:
        return f"it depends on {', '.join(sorted(passed))}, which Foveate does not know"
    if own is None or (isinstance(sinks, Tensor) and sinks.is_meta):
        return None
    q, k, v, options = _small_call(module, sinks)
    try:
        expected = own(module, q, k, v, q.new_zeros(1, 1, 3, 3), dropout=0.0, **options)[0]
    except (AttributeError, RuntimeError, TypeError):
        return None  # it wants more than these; what it lacks shows at the first call
    sink = sinks.float() if isinstance(sinks, Tensor) and "s_aux" in names_in_forward(module) else None
    found = attend(q, k, v, scale=options["scaling"], weights=softmax(sink=sink), impl="reference").transpose(1, 2)
    if expected.shape == found.shape and torch.allclose(found, expected.to(found), atol=_TOLERANCE, rtol=_TOLERANCE):
        return None
    return "its own attention function is not softmax(q kᵀ) v, so that nothing could take its place"


def _small_call(module: nn.Module, sinks: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """q (1, H, 3, 8), k and v (1, G, 3, 8) of any numbers, which leave torch's generator alone."""
    fold = int(getattr(module, "num_key_value_groups", 1) or 1)
    heads = sinks.numel() if isinstance(sinks, Tensor) else 2 * fold
    device = sinks.device if isinstance(sinks, Tensor) else "cpu"
    numbers = torch.arange(heads * 24, dtype=torch.float32, device=device)
    q = torch.sin(numbers).view(1, heads, 3, 8)
    k, v = (torch.sin(numbers * step)[: heads // fold * 24].view(1, heads // fold, 3, 8) for step in (1.7, 2.3))
    dim = getattr(module, "head_dim", None)
    return q, k, v, {"scaling": dim**-0.5 if isinstance(dim, int) else 0.3}
