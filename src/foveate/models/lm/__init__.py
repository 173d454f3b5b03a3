"""Language models of the catalogue."""

from foveate.models.lm.longcoder import longcoder
from foveate.models.lm.transnormer import transnormer

__all__ = ["longcoder", "transnormer"]
