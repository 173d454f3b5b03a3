"""check_row: any row of the catalogue, by the suite of its tier."""

from __future__ import annotations

from typing import Any

from foveate.catalogue.index import entry
from foveate.catalogue.tiers import check_tier
from foveate.testing.doc import check_doc
from foveate.testing.hook import check_hook
from foveate.testing.method import check_method
from foveate.testing.mixer import check_mixer
from foveate.testing.model import check_model
from foveate.testing.parallel import check_parallel
from foveate.testing.probe import check_probe
from foveate.testing.recipe import check_recipe
from foveate.testing.report import Report

SUITES = {
    "operator": check_mixer,
    "model": check_model,
    "inference": check_method,
    "recipe": check_recipe,
    "distributed": check_parallel,
    "hook": check_hook,
    "probe": check_probe,
    "doc": check_doc,
}


def check_row(name: str, *, tier: str | None = None, **options: Any) -> Report:
    """Put a row of the catalogue to the suite of its tier, or of another that it is of, too.

    >>> print(check_row("streaming_llm", tier="inference", seed=0))
    streaming_llm: 7 passed, 1 skipped (seed=0)

    Args:
        name: of the row.
        tier: "inference" for an operator without parameters, as a method; its own by default.
        options: the suite's, ``seed`` and ``raise_on_failure`` among them.

    Raises ValueError for a tier that it is not of, and what the suite raises.
    """
    found = entry(name)
    wanted = found.tier if tier is None else check_tier(tier)
    if wanted not in found.tiers:
        raise ValueError(f"{name} is of the tier {' and '.join(found.tiers)}, not {wanted}")
    return SUITES[wanted](name, **options)  # type: ignore[operator]
