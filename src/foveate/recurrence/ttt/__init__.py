"""Test-time training."""

from foveate.recurrence.ttt.api import TTT, TTTOutput, ttt_linear, ttt_mlp
from foveate.recurrence.ttt.inputs import InnerModel, Norm, init_inner_state

__all__ = ["TTT", "InnerModel", "Norm", "TTTOutput", "init_inner_state", "ttt_linear", "ttt_mlp"]
