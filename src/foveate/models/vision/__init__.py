"""Vision backbones of the catalogue."""

from foveate.models.vision.backbones import l2vit, ravlt, swiftformer
from foveate.models.vision.vmamba import vmamba_backbone

__all__ = ["l2vit", "ravlt", "swiftformer", "vmamba_backbone"]
