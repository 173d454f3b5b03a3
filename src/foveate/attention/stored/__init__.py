"""Attention to what a decoder keeps in few bits, in pages, or as many tokens as each head has."""

from foveate.attention.stored.api import STORED, attend_stored
from foveate.attention.stored.codes import Codes, Scale, pack, quantise, unpack
from foveate.attention.stored.segment import Segment

__all__ = ["STORED", "Codes", "Scale", "Segment", "attend_stored", "pack", "quantise", "unpack"]
