"""Recurrent attention: a state that every token updates and every query reads."""

from foveate.recurrence.api import Recurrent, recur, step

__all__ = ["Recurrent", "recur", "step"]
