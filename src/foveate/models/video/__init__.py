"""Video models of the catalogue."""

from foveate.models.video.videomamba import videomamba_classifier

__all__ = ["videomamba_classifier"]
