"""The main job: every applicable mechanism, on one's own model and text, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveate.lab.compare_contenders import enlist
from foveate.lab.compare_job import Job
from foveate.lab.compare_progress import steps
from foveate.lab.compare_subject import BUILTIN, load
from foveate.lab.report_table import table
from foveate.lab.results import Results
from foveate.lab.workload import FIRST_ASK, cut, read

__all__ = ["Results", "compare", "table"]


def compare(
    model: str | Path = BUILTIN,
    text: str | Path | None = None,
    *,
    length: int = 8192,
    mechanisms: Sequence[str] | None = None,
    out: str | Path,
    max_loss: float = 0.01,
    resume: bool = False,
    repeats: int = 5,
    windows: int = 4,
    progress: bool = True,
) -> Results:
    """Measure quality, speed and memory of attention mechanisms inside a model, on a text, in float32 on the CPU.

    >>> results = compare("path/to/model", "notes.txt", length=2048, out="report")  # doctest: +SKIP
    >>> results.recommendation.name  # doctest: +SKIP
    'streaming_llm'

    Args:
        model: directory of a causal language model in Hugging Face format, or "builtin".
        text: a file, a directory, "-" for standard input, or None for held-out text of Foveate's own.
        length: tokens a window.
        mechanisms: names of the catalogue, with options as in "streaming_llm(window=256)", or patterns written
            out, as in "window(512) & causal | sinks(4)"; None takes all of the catalogue that needs no training.
        out: folder for ``results.json``, written after each mechanism, and ``report.html``.
        max_loss: the largest relative loss in bits per byte that a recommendation may have.
        resume: keep what ``out`` already holds, if it was measured on the same model, text and machine.
        repeats: timed prefills of each mechanism, by turns with exact attention.
        windows: stretches of text, as many as there are in it.
        progress: show bars on standard error.

    Returns:
        The results; ``interrupted`` tells that Ctrl-C ended them early, and what was measured is in them.

    Raises:
        ValueError: a model, text, length or mechanism that cannot be used, in words.
    """
    if repeats < 1 or windows < 1 or max_loss < 0:
        raise ValueError(
            f"repeats and windows are at least 1, max_loss at least 0; got {repeats}, {windows}, {max_loss}"
        )
    subject = load(model)
    subject.check_length(length)
    fed = cut(subject.tokenizer, read(text, length * windows * FIRST_ASK), length, windows)
    candidates, refused = enlist(mechanisms, heads=subject.heads, kv_heads=subject.kv_heads)
    settings: dict[str, Any] = {"length": length, "windows": fed.windows, "repeats": repeats, "seed": 0}
    settings |= {"max_loss": max_loss, "mechanisms": None if mechanisms is None else list(mechanisms)}
    job = Job(subject, fed, Path(out), settings)
    before = job.resumed() if resume else None
    with steps(candidates, job.ticks, show=progress) as bar:
        return job.run(candidates, refused, before, bar)
