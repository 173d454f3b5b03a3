"""Adapters: a mechanism in the place of the attention of a model that somebody else wrote."""

from foveate.adapt.named import as_core
from foveate.adapt.swap import Swap, replace_attention, use

__all__ = ["Swap", "as_core", "replace_attention", "use"]
