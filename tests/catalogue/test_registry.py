"""Registering: what a row must say, and whose name is whose."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from foveate.catalogue import namespace
from foveate.catalogue.registry import Reference, register, row
from foveate.mixers.attention import AttentionMixer

NOBODY = Reference("Nobody", "Nothing", "")
OWN: dict[str, Any] = {"papers": None, "reference": NOBODY, "family": "none"}


@pytest.fixture(autouse=True)
def _registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "ROWS", dict(namespace.ROWS))


def added(name: str, **options: Any) -> type[AttentionMixer]:
    @register(name, formula="f", supports={"causal"}, **options)
    class MoBA(AttentionMixer):
        """Plain attention."""

    return MoBA


def test_a_row_takes_title_and_family_from_the_table() -> None:
    found = added("mine", papers=("SSA", "MoBA")).row
    assert [paper.key for paper in found.papers] == ["SSA", "MoBA"]
    assert found.family == "dynamic-sparse"
    assert found.source.title.startswith("SSA: Sparse Sparse Attention")
    assert row("mine") is found


def test_a_mechanism_from_elsewhere_says_where() -> None:
    found = added("mine", **OWN).row
    assert (found.papers, found.source, found.family) == ((), NOBODY, "none")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"papers": ("MoBa",)}, "did you mean MoBA"),
        ({"papers": None, "reference": NOBODY, "family": "lineer"}, "did you mean linear"),
        ({"papers": None}, "pass reference"),
        ({"papers": ()}, "papers=None"),
        ({"papers": ("MoBA",), "family": "linear"}, "these say its family"),
    ],
)
def test_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        added("mine", **options)
    assert "mine" not in namespace.ROWS


def test_one_key_is_not_a_tuple_of_keys() -> None:
    with pytest.raises(TypeError, match=r"papers=\('MoBA',\)"):
        added("mine", papers="MoBA")


def test_a_feature_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="casual"):
        register("mine", formula="f", supports={"casual"}, **OWN)  # type: ignore[arg-type]


def test_another_class_under_a_taken_name_is_refused() -> None:
    theirs = row("moba").mixer
    with pytest.raises(ValueError, match=r"'moba' is taken by foveate\.mixers\.dynamic_sparse\.moba\.MoBA"):
        added("moba", **OWN)
    assert row("moba").mixer is theirs


def test_a_taken_name_is_refused_before_its_owner_is_imported() -> None:
    script = """
import sys
from foveate.catalogue.registry import Reference, register
try:
    register("moba", papers=None, reference=Reference("", "", ""), family="none", formula="", supports={"causal"})(
        type("MoBA", (), {}))
except ValueError as error:
    print(error, "foveate.mixers.dynamic_sparse.moba" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "is taken by foveate.mixers.dynamic_sparse.moba.MoBA" in run.stdout
    assert run.stdout.endswith("False\n")


def test_a_module_that_is_run_again_replaces_its_own() -> None:
    first, second = added("mine", **OWN), added("mine", **OWN)
    assert row("mine").mixer is second is not first


def test_one_mechanism_is_loaded_without_the_others() -> None:
    script = (
        "import sys; from foveate.catalogue.registry import row; row('gla');"
        "print('foveate.mixers.linear.gla' in sys.modules, 'foveate.mixers.dynamic_sparse.nsa' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "True False\n"


def test_a_mechanism_may_name_a_reference_of_the_table() -> None:
    found = added("mine", reference="RetNet").row
    assert (found.papers, found.source.id, found.family) == ((), "2307.08621", "linear")
    with pytest.raises(ValueError, match="did you mean RetNet"):
        added("other", reference="RetNett")


def test_the_docstring_of_a_mechanism_is_complete() -> None:
    said = added("mine", papers=("MoBA",), notes="A note.").__doc__ or ""
    title = "Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189."
    example = ">>> import torch\n>>> mixer = MoBA(64, heads=4)\n>>> mixer(torch.randn(2, 50, 64)).shape\n"
    assert said == f"Plain attention.\n\nf\n\n{title}\n\nA note.\n\n{example}torch.Size([2, 50, 64])\n"


def test_a_class_with_an_example_keeps_its_own() -> None:
    @register("mine", formula="f", supports={"causal"}, **OWN)
    class Mine(AttentionMixer):
        """Plain attention.

        >>> Mine(8).heads
        8
        """

    assert (Mine.__doc__ or "").count(">>>") == 1


def test_a_mechanism_supports_what_its_class_usually_does() -> None:
    class Usual(AttentionMixer):
        usual_supports = frozenset({"noncausal", "padding"})

    assert register("mine", formula="f", **OWN)(Usual).row.supports == {"noncausal", "padding"}
