"""check_method: what every inference method must hold to, on a small language model, or a video model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from foveate.catalogue import registry, tiers
from foveate.catalogue.contracts import Method
from foveate.catalogue.options import options_of
from foveate.catalogue.tiers import MethodRow
from foveate.methods.core import method_of
from foveate.testing import on_clips, on_images, on_text
from foveate.testing.on_text import TextSubject, small_llama
from foveate.testing.report import Report
from foveate.testing.suite import row_of, run_suite


def check_method(
    method: MethodRow | registry.Row | str | Callable[..., Method],
    *,
    model: Callable[[], nn.Module] | None = None,
    seed: int | None = None,
    raise_on_failure: bool = True,
) -> Report:
    """Put an inference method to every property that methods hold to: one of its own, or an operator's core.

    >>> print(check_method("streaming_llm", seed=0))
    streaming_llm: 7 passed, 1 skipped (seed=0)
    >>> print(check_method("jenga", seed=0))
    jenga: 7 passed (seed=0)

    At full budget the model computes what it did, at a small one something else; undoing restores every bit; batch
    entries and padding change nothing. Of a method for texts: no later token reaches an output; decoding with a cache
    equals the whole; ``generate`` writes for each prompt of a padded batch what it writes for that alone; and a method
    that claims to keep few tokens (``keeps``) has no more in its cache. Of one for video (``inputs="video"``), over a
    few steps of denoising: the clip depends on its text; denoised again it has the same bits, without a random number
    of the caller's; and a clip of a size that it is not for is refused in words. Of one for images
    (``inputs="image"``): an image read again has the same bits.

    The class of an operator's core may define ``exempt``: properties that fail by design, each with the reason.

    Args:
        method: its row, its name, the function that makes it, or an operator without parameters that has a causal form.
        model: makes the model to try it on: a transformers model for texts, or one that reads images, or for video a
            module like `foveate.testing.video_model.SmallVideoModel`, which is what it is by default; for images a
            small Swin, else a random Llama of two layers.
        seed: of all random numbers; a fresh one by default. Every failure names it.
        raise_on_failure: whether a failure raises, or is only reported.

    Raises AssertionError naming each property that fails, with the numbers and the seed; TypeError for what is no
    method; ValueError for an operator that has parameters, or that has no causal form.
    """
    row = registry.row(method) if isinstance(method, str) and tiers.row(method).tier == "operator" else method
    options: dict[str, Any] = {"seed": seed, "raise_on_failure": raise_on_failure}
    if isinstance(row, registry.Row):
        subject, exempt = _of_operator(row, model or small_llama)
        return run_suite(row.name, subject, on_text.PROPERTIES, exempt=exempt, **options)
    row = row_of(method, MethodRow, "check_method")
    full = None if row.full_budget is None else {**row.tiny, **row.full_budget}
    if row.inputs == "video":
        clips = on_clips.subject_of(row.make, options_of(row.function), row.tiny, full, model)
        return run_suite(row.name, clips, on_clips.PROPERTIES, exempt=row.exempt, **options)
    if row.inputs == "image":
        images = on_images.ImageSubject(row.make, row.tiny, full, model or on_images.small_swin)
        return run_suite(row.name, images, on_images.PROPERTIES, exempt=row.exempt, **options)
    texts = TextSubject(row.make, row.tiny, full, model or small_llama, keeps=row.keeps)
    return run_suite(row.name, texts, on_text.PROPERTIES, exempt=row.exempt, **options)


def _of_operator(row: registry.Row, model: Callable[[], nn.Module]) -> tuple[TextSubject, dict[str, str]]:
    """An operator's core as a method, with the options of its tests as far as the core has them, and its exemptions."""
    if row.core is None:
        raise ValueError(f"{row.name} has parameters of its own: it is no method")
    if "causal" not in row.supports:
        raise ValueError(f"{row.name} has no causal form: methods are tried on a causal language model")
    known = options_of(row.core)
    tiny = {key: value for key, value in getattr(row.mixer, "tiny", {}).items() if key in known}
    full = getattr(row.mixer, "full_budget", None)
    if full is not None and not full.keys() <= set(known):
        full = None
    at_full = None if full is None else {**tiny, **full}

    def make(**options: Any) -> Method:
        return method_of(row, **options)

    core = method_of(row, **tiny).core
    ahead = "it chooses for all queries of a prompt with a view of the last" if core.pattern.chooses_ahead else ""
    subject = TextSubject(make, tiny, at_full, model, ahead, "decode" in row.supports)
    return subject, getattr(core, "exempt", {})
