"""Language models of the catalogue."""

from foveate.models.lm.decoder import geb, swan_gpt
from foveate.models.lm.longcoder import longcoder
from foveate.models.lm.mix_attention import mix_attention
from foveate.models.lm.phd import phd_transformer
from foveate.models.lm.plt import plt
from foveate.models.lm.transnormer import transnormer

__all__ = ["geb", "longcoder", "mix_attention", "phd_transformer", "plt", "swan_gpt", "transnormer"]
