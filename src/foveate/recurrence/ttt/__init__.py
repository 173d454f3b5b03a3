"""Test-time training."""

from foveate.recurrence.ttt.api import TTT, Taught, ttt_linear, ttt_mlp
from foveate.recurrence.ttt.inputs import Learner, Norm, beginner

__all__ = ["TTT", "Learner", "Norm", "Taught", "beginner", "ttt_linear", "ttt_mlp"]
