"""Audio models of the catalogue."""

from foveate.models.audio.audio_mamba import audio_mamba_classifier

__all__ = ["audio_mamba_classifier"]
