"""Which mechanism to take."""

from __future__ import annotations

from foveate.lab.compare.results import Entry, Recommendation, Results
from foveate.lab.compare.words import percent, round_percent

FEWEST_REPEATS = 3  # timed runs, below which quartiles say nothing of chance


def recommend(results: Results) -> Recommendation:
    """The fastest mechanism that surely costs at most the loss allowed and is surely faster.

    Surely: by the upper end of the 95 % interval of the loss, and by the lower quartile of the speed-up, which must
    exceed the upper quartile of what exact attention seems to gain on itself. Fewer than three timed runs have no
    quartiles to speak of: nothing is recommended from them.
    """
    allowed, repeats = results.settings["max_loss"], results.settings["repeats"]
    if repeats < FEWEST_REPEATS:
        runs = "one timed run" if repeats == 1 else f"{repeats} timed runs"
        said = f"{runs} of each mechanism cannot tell a gain from chance; take --repeats {FEWEST_REPEATS} or more"
        return Recommendation(None, said, undecided=True)
    good = [entry for entry in results.entries if entry.quality.change_high <= allowed]
    faster = [entry for entry in good if entry.speedup.low > max(1.0, results.exact.speedup.high)]
    if not faster:
        return Recommendation(None, _why_none(results, good))
    best = max(faster, key=lambda entry: entry.speedup.median)
    most = percent(max(best.quality.change_high, 0))
    cost = f"a distance of at most {most}" if results.measure.is_distance else f"at most {most} more bits per byte"
    return Recommendation(
        best.name,
        f"{best.speedup.median:.2f} times as fast as exact attention, and {cost} ({round_percent(allowed)} allowed)",
    )


def _why_none(results: Results, good: list[Entry]) -> str:
    allowed = round_percent(results.settings["max_loss"])
    if not results.entries:
        return "no other mechanism was measured"
    loss = f"{allowed} of the bits per byte"
    if results.measure.is_distance:
        loss = f"a distance of {allowed}"
    if not good:
        return f"every mechanism may cost more than {loss}"
    return f"no mechanism that surely costs at most {loss} is surely faster"
