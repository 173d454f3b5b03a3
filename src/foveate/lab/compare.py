"""The main job: every applicable mechanism, on one's own model and text, side by side."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foveate
from foveate.lab import compare_subject, machine, workload
from foveate.lab.compare_contenders import Candidate, enlist
from foveate.lab.compare_progress import Steps, steps
from foveate.lab.compare_subject import LanguageModel
from foveate.lab.measure import Arm, compare_times, peak_memory
from foveate.lab.measure_looks import Looks
from foveate.lab.metrics import Predictions, judge
from foveate.lab.recommend import recommend
from foveate.lab.report_table import table
from foveate.lab.results import FILE, Contender, Entry, Refusal, Results
from foveate.lab.workload import Workload
from foveate.mixers.core import Core
from foveate.patterns import full

__all__ = ["Results", "compare", "table"]

SEED = 0


def compare(
    model: str | Path = compare_subject.BUILTIN,
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
    """Measure quality, speed and memory of attention mechanisms inside a model, on a text.

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
    subject = compare_subject.load(model)
    subject.check_length(length)
    fed = workload.cut(subject.tokenizer, workload.read(text, length * windows * workload.FIRST_ASK), length, windows)
    about = subject.about()
    candidates, refused = enlist(mechanisms, heads=about["heads"], kv_heads=about["kv_heads"])
    job = Job(subject, fed, Path(out), repeats)
    settings = {"length": length, "windows": fed.windows, "repeats": repeats, "max_loss": max_loss, "seed": SEED}
    before = _resumed(job, settings) if resume else None
    with steps(candidates, job.ticks, show=progress) as bar:
        return job.run(candidates, refused, settings, before, bar)


@dataclass(frozen=True)
class Job:
    """One run of compare: the parts it is put together from."""

    subject: LanguageModel
    fed: Workload
    out: Path
    repeats: int

    @property
    def lengths(self) -> list[int]:
        """Prefill lengths to time: a quarter, a half and the whole of a window."""
        return sorted({max(1, self.fed.length // part) for part in (4, 2, 1)})

    @property
    def ticks(self) -> int:
        """Steps of the progress bar for one contender."""
        return 3 + self.repeats * len(self.lengths)

    def identity(self) -> dict[str, Any]:
        """What must be the same for figures to stand in one table."""
        facts = machine.describe()
        same = {name: facts[name] for name in ("cpu", "threads", "torch")}
        model = self.subject.about() | {"digest": self.subject.digest}
        text = {"source": self.fed.source, "digest": self.fed.digest, "bytes": self.fed.num_bytes}
        return {"model": model, "text": text, "machine": same}

    def run(
        self,
        candidates: list[Candidate],
        refused: list[Refusal],
        settings: dict[str, Any],
        before: Results | None,
        bar: Steps,
    ) -> Results:
        """Measure one candidate after the other, writing the file after each."""
        results = before
        try:
            exact = self.subject.predict(self.fed.ids)
            results = before or self._begin(settings, exact, bar)
            results.refused, results.interrupted = refused, False
            for candidate in candidates:
                if results.entry(candidate.about.name) is None:
                    self._add(results, candidate, exact, bar)
        except KeyboardInterrupt:
            if results is None:
                raise
            results.interrupted = True
        return self._finish(results, settings)

    def _begin(self, settings: dict[str, Any], exact: Predictions, bar: Steps) -> Results:
        bar.start("exact attention")
        own = self.subject.model.config._attn_implementation
        about = Contender("exact", "causal", "", family="exact", note=f"the model's own attention ({own})")
        entry = self._entry(about, None, exact, exact, bar)
        bar.done()
        results = Results(self.identity(), settings, machine.describe(), entry, notes=list(self.fed.notes))
        results.created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        results.foveate = foveate.__version__
        return results

    def _add(self, results: Results, candidate: Candidate, exact: Predictions, bar: Steps) -> None:
        bar.start(candidate.about.name)
        try:
            results.entries.append(self._entry(candidate.about, candidate.core, exact, None, bar))
        except (ValueError, TypeError, RuntimeError, MemoryError) as error:
            results.refused = [*results.refused, Refusal(candidate.about.name, _reason(error))]
        results.save(self.out)
        bar.done()

    def _entry(
        self, about: Contender, core: Core | None, exact: Predictions, found: Predictions | None, bar: Steps
    ) -> Entry:
        arm = self._arm(core)
        if found is None:
            with arm():
                found = self.subject.predict(self.fed.ids)
        quality = judge(found, exact, self.fed.num_bytes, seed=SEED)
        bar.tick()
        looks = Looks(full if core is None else core.pattern)
        with self.subject.attending_with(looks):
            self.subject.prefill(self.fed.ids[:1])
        bar.tick()
        with arm():
            memory = peak_memory(self._prefill(self.fed.length))
        bar.tick()
        timings = [
            compare_times(length, nullcontext, arm, self._prefill(length), self.repeats, bar.tick)
            for length in self.lengths
        ]
        return Entry(about, quality, looks.result(), memory, timings)

    def _arm(self, core: Core | None) -> Arm:
        return nullcontext if core is None else lambda: self.subject.attending_with(core)

    def _prefill(self, length: int) -> Callable[[], None]:
        return lambda: self.subject.prefill(self.fed.ids[:1, :length])

    def _finish(self, results: Results, settings: dict[str, Any]) -> Results:
        from foveate.lab.report import write

        results.settings = settings
        results.recommendation = recommend(results.entries, settings["max_loss"])
        results.save(self.out)
        write(results, self.out)
        return results


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _resumed(job: Job, settings: dict[str, Any]) -> Results | None:
    """The results of an earlier run with this model, text and machine; ValueError where they are of another."""
    if not (job.out / FILE).exists():
        return None
    before, now = Results.load(job.out), job.identity()
    other = [name for name, facts in now.items() if before.about[name] != facts]
    other += [name for name in ("length", "windows", "repeats", "seed") if before.settings[name] != settings[name]]
    if other:
        raise ValueError(
            f"{job.out} holds results of another {', '.join(other)}: figures would not compare; choose another "
            "--out, or measure anew without --resume"
        )
    return before
