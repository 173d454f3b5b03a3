"""check_probe: what every probe of the catalogue must hold to, at the sizes of its ``tiny``."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from xml.etree import ElementTree

import torch

from foveate.catalogue.contracts import Finding
from foveate.catalogue.tiers import ProbeRow
from foveate.testing.report import Report
from foveate.testing.suite import Property, row_of, run_suite

SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class ProbeSubject:
    """A probe, and a way to run it."""

    row: ProbeRow

    def run(self, seed: int = 7) -> Finding:
        return self.row.run(seed, **self.row.tiny)


def check_probe(
    probe: ProbeRow | str | Callable[..., Finding], *, seed: int | None = None, raise_on_failure: bool = True
) -> Report:
    """Put a probe of the catalogue to every property that probes hold to.

    It names the claim and says whether that is confirmed or refuted, with finite figures and a picture; the same seed
    finds the same; and the caller's random numbers are left alone.

    Args:
        probe: its row, its name or its function.
        seed: of the random numbers around it; a fresh one by default. The probe's own seeds are fixed.
        raise_on_failure: whether a failure raises, or is only reported.

    Raises AssertionError naming each property that fails; TypeError for what is no probe of the catalogue.
    """
    row = row_of(probe, ProbeRow, "check_probe")
    return run_suite(
        row.name, ProbeSubject(row), PROPERTIES, exempt=row.exempt, seed=seed, raise_on_failure=raise_on_failure
    )


def verdict(subject: ProbeSubject) -> None:
    """It says which claim it tried, and whether that is confirmed or refuted."""
    found = subject.run()
    assert isinstance(found, Finding), f"a probe returns a Finding; got {type(found).__name__}"
    assert found.claim.strip(), "it does not say which claim it tried"
    assert isinstance(found.confirmed, bool), f"confirmed is True or False; got {found.confirmed!r}"


def figures(subject: ProbeSubject) -> None:
    """The verdict rests on figures, and these are finite."""
    found = subject.run().figures
    assert found, "there are no figures"
    wild = {name: value for name, value in found.items() if not math.isfinite(value)}
    assert not wild, f"figures are not finite: {wild}"


def picture(subject: ProbeSubject) -> None:
    """The picture is SVG, with something drawn in it."""
    try:
        root = ElementTree.fromstring(subject.run().picture)
    except ElementTree.ParseError as error:
        raise AssertionError(f"the picture is no XML: {error}") from None
    assert root.tag in ("svg", f"{SVG}svg"), f"the picture is no SVG but <{root.tag}>"
    assert len(root), "nothing is drawn"


def repeatable(subject: ProbeSubject) -> None:
    """The same seed finds the same, whatever random numbers were drawn before."""
    first = subject.run()
    torch.rand(3)
    random.random()
    second = subject.run()
    assert first.figures == second.figures, f"figures differ: {dict(first.figures)} and {dict(second.figures)}"
    assert (first.verdict, first.picture) == (second.verdict, second.picture), "verdict or picture differ"


def random_numbers(subject: ProbeSubject) -> None:
    """The caller's random numbers go on as if the probe had not run."""
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    subject.run()
    assert torch.equal(torch.get_rng_state(), torch_before), "torch's random numbers are others after it"
    assert random.getstate() == python_before, "Python's random numbers are others after it"


PROPERTIES = (
    Property("verdict", verdict),
    Property("figures", figures),
    Property("picture", picture),
    Property("repeatable", repeatable),
    Property("random numbers", random_numbers),
)
