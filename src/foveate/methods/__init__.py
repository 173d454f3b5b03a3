"""The inference tier: methods that pretrained models use as they are, installed and undone in a line."""

from foveate.methods.core import CoreMethod, method_of

__all__ = ["CoreMethod", "method_of"]
