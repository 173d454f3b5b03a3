"""Video models of the catalogue."""

from foveate.models.video.timesformer import timesformer
from foveate.models.video.videomamba import videomamba_classifier

__all__ = ["timesformer", "videomamba_classifier"]
