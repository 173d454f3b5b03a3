"""docs/patterns.md shows every pattern as it is."""

from __future__ import annotations

from pathlib import Path

from foveate.lab.pages import patterns as patterns_page
from foveate.patterns.parse import constructors

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    page = (DOCS / "patterns.md").read_text(encoding="utf-8")
    assert page == patterns_page.filled(page), "run: make docs"
    shown = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "pictures").glob("*.svg")}
    assert shown == patterns_page.pictures(), "run: make docs"


def test_every_pattern_is_on_the_page() -> None:
    assert set(patterns_page.EXAMPLES) == set(constructors())
