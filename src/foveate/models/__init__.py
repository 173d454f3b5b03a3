"""Small models for measuring attention: a trained language model ships with the package."""

from foveate.models import builtin

__all__ = ["builtin"]
