"""State spaces that no token changes."""

from foveate.recurrence.ssm.api import EVOLVE, EVOLVE_SHARED, Evolved, evolve, evolve_shared
from foveate.recurrence.ssm.discrete import Discrete, discretize, hippo_rates, linear_rates
from foveate.recurrence.ssm.response import fft_conv, kernel, powers, remembered

__all__ = [
    "EVOLVE",
    "EVOLVE_SHARED",
    "Discrete",
    "Evolved",
    "discretize",
    "evolve",
    "evolve_shared",
    "fft_conv",
    "hippo_rates",
    "kernel",
    "linear_rates",
    "powers",
    "remembered",
]
