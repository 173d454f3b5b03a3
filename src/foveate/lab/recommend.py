"""Which mechanism to take."""

from __future__ import annotations

from foveate.lab.results import Entry, Recommendation
from foveate.lab.results_words import percent, round_percent


def recommend(entries: list[Entry], max_loss: float, *, noise: float = 1.0) -> Recommendation:
    """The fastest mechanism that surely costs at most ``max_loss`` of the bits per byte and is surely faster.

    Surely: by the upper end of the 95 % interval of the loss, and by the lower quartile of the speed-up, which must
    exceed ``noise``, the upper quartile of what exact attention seems to gain on itself.
    """
    good = [entry for entry in entries if entry.quality.change_high <= max_loss]
    faster = [entry for entry in good if entry.speedup.low > max(1.0, noise)]
    if not faster:
        return Recommendation(None, _why_none(entries, good, max_loss))
    best = max(faster, key=lambda entry: entry.speedup.median)
    return Recommendation(
        best.name,
        f"{best.speedup.median:.2f} times as fast as exact attention, and at most "
        f"{percent(max(best.quality.change_high, 0))} more bits per byte ({round_percent(max_loss)} allowed)",
    )


def _why_none(entries: list[Entry], good: list[Entry], max_loss: float) -> str:
    if not entries:
        return "no other mechanism was measured"
    if not good:
        return f"every mechanism may cost more than {round_percent(max_loss)} of the bits per byte"
    return f"no mechanism that surely costs at most {round_percent(max_loss)} of the bits per byte is surely faster"
