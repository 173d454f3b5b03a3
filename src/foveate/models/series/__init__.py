"""Time-series models of the catalogue."""

from foveate.models.series.s_mamba import s_mamba_forecaster

__all__ = ["s_mamba_forecaster"]
