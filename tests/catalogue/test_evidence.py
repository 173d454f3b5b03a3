"""Evidence: which tests say that they show a paper kept, and that the list of them is that of the marks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foveate.catalogue.evidence import PATH, check_mark, evidence, marks_of, render, scan

TESTS = Path(__file__).parents[1]


def marked(tmp_path: Path, text: str) -> list[tuple[str, str, str]]:
    file = tmp_path / "test_it.py"
    file.write_text(f"import pytest\n{text}", encoding="utf-8")
    return [tuple(mark) for mark in marks_of(file, "tests/test_it.py")]  # type: ignore[misc]


def test_the_list_is_up_to_date() -> None:
    assert PATH.read_text(encoding="utf-8") == render(scan(TESTS)), "run: make docs"


def test_every_test_listed_is_one_that_pytest_would_collect() -> None:
    listed = {test for kinds in evidence().values() for tests in kinds.values() for test in tests}
    for test in listed:
        file, _, name = test.partition("::")
        assert f"def {name.split('::')[-1]}(" in (TESTS.parent / file).read_text(encoding="utf-8")


def test_marks_are_found_on_functions_classes_and_single_parameters(tmp_path: Path) -> None:
    text = """
@pytest.mark.paper("MoBA", "definition")
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.paper("NSA", "works_when"))])
def test_one(n): ...

class TestAll:
    @pytest.mark.paper("MoBA", "works_when")
    def test_two(self): ...
"""
    assert sorted(marked(tmp_path, text)) == [
        ("MoBA", "definition", "tests/test_it.py::test_one"),
        ("MoBA", "works_when", "tests/test_it.py::TestAll::test_two"),
        ("NSA", "works_when", "tests/test_it.py::test_one"),
    ]


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ('@pytest.mark.paper("MoBa", "definition")', "did you mean MoBA"),
        ('@pytest.mark.paper("MoBA", "definitions")', "'definition' or 'works_when'"),
        ('@pytest.mark.paper("MoBA")', "in full"),
        ('@pytest.mark.paper(KEY, "definition")', "in full"),
        ('@pytest.mark.long\n@pytest.mark.paper("MoBA", "definition")', "marked long"),
        ('@pytest.mark.paper("MoBA", "definition")\n@pytest.mark.skipif(True, reason="")', "marked skipif"),
    ],
)
def test_what_is_no_evidence_is_refused(mark: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        marked(tmp_path, f"{mark}\ndef test_it(): ...\n")


def test_a_mark_on_what_is_no_test_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no test"):
        marked(tmp_path, '@pytest.mark.paper("MoBA", "definition")\ndef helper(): ...\n')


def test_keys_are_strings() -> None:
    with pytest.raises(ValueError, match="as a string; got 3"):
        check_mark(3, "definition")


CONFTEST = (TESTS / "conftest.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ('paper("MoBa", "definition")', "did you mean MoBA"),
        ('paper("MoBA", "proof")', "'definition' or 'works_when'"),
        ('paper("MoBA")', "kind"),
    ],
)
def test_collection_fails_for_a_mark_nobody_knows(pytester: pytest.Pytester, mark: str, said: str) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(f"import pytest\n\n@pytest.mark.{mark}\ndef test_it(): pass\n")
    found = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-o", "markers=paper(key, kind): evidence")
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    assert said in "\n".join(found.errlines + found.outlines)


def test_the_list_is_by_paper_and_kind() -> None:
    table = json.loads(PATH.read_text(encoding="utf-8"))
    assert all(kinds and set(kinds) <= {"definition", "works_when"} for kinds in table.values())
    assert list(table) == sorted(table)
