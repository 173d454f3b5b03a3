"""Recurrent attention: a state that every token updates and every query reads."""

from foveate.recur.api import Recurrent, recur, step

__all__ = ["Recurrent", "recur", "step"]
