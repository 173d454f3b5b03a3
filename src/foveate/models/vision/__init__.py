"""Vision backbones of the catalogue."""

from foveate.models.vision.backbones import l2vit, ravlt, swiftformer

__all__ = ["l2vit", "ravlt", "swiftformer"]
