"""Video models of the catalogue."""

from foveate.models.video.holocine import holocine
from foveate.models.video.timesformer import timesformer
from foveate.models.video.videomamba import videomamba_classifier

__all__ = ["holocine", "timesformer", "videomamba_classifier"]
