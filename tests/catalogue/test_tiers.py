"""Rows of all tiers: one set of names, papers of the tier, and what is shown of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from foveate.catalogue import index, namespace, papers, registry, tiers
from foveate.catalogue.contracts import Finding, Hook, Page, Stage
from foveate.catalogue.registry import Reference
from foveate.catalogue.tiers import Preset, doc, hook, method, model, parallel, probe, recipe
from foveate.cli import app

OWN: dict[str, Any] = {"papers": None, "reference": Reference("Nobody", "Nothing", ""), "family": "none"}
MODEL: dict[str, Any] = {"inputs": "vectors", "presets": {}, "tiny": {}}


@pytest.fixture(autouse=True)
def _names_as_they_were() -> Iterator[None]:
    yield  # rows of modules that a test was the first to import stay: they are not registered a second time
    for name in [name for name, row in namespace.ROWS.items() if row.target.__module__ == __name__]:
        del namespace.ROWS[name]


def added(name: str, **options: Any) -> Any:
    @model(name, **(MODEL | options))
    def small(width: int = 3) -> torch.nn.Module:
        """A linear layer."""
        return torch.nn.Linear(width, width)

    return small


def of_every_tier() -> dict[str, str]:
    """A row of each tier, and something that is shown of it."""
    added("my_model", **OWN, **MODEL | {"presets": {"wide": Preset({"width": 1000}, 1.1e6)}})

    @method("my_method", **OWN, tiny={"budget": 3}, full_budget={"budget": 999})
    def a_method(budget: int = 512) -> Any:
        """Keeps a budget of keys."""

    class Recipe:
        stages = (Stage("imitate", lambda name: True, lambda student, teacher, batch: batch, steps=70),)

    @recipe("my_recipe", **OWN, teacher=lambda: torch.nn.Linear(2, 2), batch=lambda: None)
    def a_recipe() -> Any:
        """Makes a student of a teacher."""
        return Recipe()

    @parallel("my_parallel", **OWN, whole=torch.neg, inputs=lambda length: (torch.randn(length),), axes=(0,), out=0)
    def a_parallel(x: torch.Tensor, group: Any = None) -> torch.Tensor:
        """Negates what each rank has."""
        return -x

    @hook("my_hook", **OWN, tiny={"length": 9})
    def a_hook(length: int = 4096) -> Hook:
        """Windows over a long text."""
        return Hook("window(8)", heads=6, head_dim=64, length=length, kv_heads=2)

    @probe("my_probe", **OWN, tiny={"samples": 3})
    def a_probe(seed: int = 0, samples: int = 800) -> Finding:
        """Tosses a coin."""
        return Finding("coins are fair", True, {"heads": 0.5}, "<svg/>")

    @doc("my_doc", **OWN)
    def a_doc() -> Page:
        """Surveys blocks."""
        return Page("docs/catalogue.md", ("moba",))

    return {
        "my_model": "1.0 M wide",
        "my_method": "512",
        "my_recipe": "imitate 70",
        "my_parallel": "group=group",
        "my_hook": "6 on 2 4096",
        "my_probe": "800",
        "my_doc": "docs/catalogue.md moba",
    }


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def test_every_tier_is_listed_and_shown() -> None:
    shown = of_every_tier()
    listed = {one["name"]: one for one in json.loads(run("list", "--json"))}
    for name, words in shown.items():
        tier = tiers.row(name).tier
        assert listed[name]["tier"] == tier
        assert name in {one["name"] for one in json.loads(run("list", "--tier", tier, "--json"))}
        told = run("show", name)
        assert tiers.row(name).summary in told and all(word in told for word in words.split())
        assert json.loads(run("show", name, "--json")) == listed[name]
    assert {tiers.row(name).tier for name in shown} == set(papers.TIERS) - {"operator"}
    assert run("list").count("my_model") == 1


def test_names_are_one_set_across_tiers() -> None:
    added("mine", **OWN)
    with pytest.raises(ValueError, match=r"'mine' is taken by .*added.<locals>.small"):
        method("mine", **OWN, tiny={}, full_budget=None)(of_every_tier)
    with pytest.raises(ValueError, match=r"'moba' is taken by foveate\.mixers"):
        added("moba", **OWN)
    with pytest.raises(ValueError, match=r"'ravlt' is taken by foveate\.models\.vision\.backbones\.ravlt"):
        probe("ravlt", **OWN, tiny={})(of_every_tier)
    assert tiers.row("mine").make(width=5).in_features == 5
    assert added("mine", **OWN) is tiers.row("mine").target, "a module that is run again replaces its own"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"papers": ("L2VIT",)}, "did you mean L2ViT"),
        ({"papers": ("StreamingLLM",)}, "registered as model, but StreamingLLM is kept by a row of tier inference"),
        (OWN | {"family": "lineer"}, "did you mean linear"),
        ({"papers": None}, "pass reference"),
        (OWN | {"inputs": "words"}, "one of tokens"),
        (OWN | {"supports": {"decoding"}}, "decoding, none of decode"),
    ],
)
def test_what_a_row_cannot_say_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        added("mine", **options)
    assert "mine" not in namespace.ROWS


def test_a_model_may_show_the_operator_published_with_it_but_no_method_may() -> None:
    assert added("mine", papers=("MoBA",)) is tiers.row("mine").target
    assert tiers.row("mine").family == "dynamic-sparse"
    with pytest.raises(ValueError, match="is kept by a row of tier operator"):
        method("other", papers=("MoBA",), tiny={}, full_budget=None)


def test_a_row_without_a_word_about_it_is_refused() -> None:
    with pytest.raises(ValueError, match="no docstring"):
        model("mine", **OWN, **MODEL)(lambda: torch.nn.Linear(2, 2))


def test_presets_are_sizes_by_name() -> None:
    ravlt = tiers.row("ravlt")
    assert isinstance(ravlt, tiers.ModelRow)
    with torch.device("meta"):
        assert ravlt.make("tiny", classes=7).head.out_features == 7
    with pytest.raises(ValueError, match="no preset 'huge'; it has tiny, small, base, large"):
        ravlt.make("huge")
    with pytest.raises(ValueError, match=r"no option 'depth'; it has .*did you mean 'depths'"):
        ravlt.make(depth=3)


def test_operators_without_parameters_are_methods_too() -> None:
    listed = json.loads(run("list", "--tier", "inference", "--json"))
    assert {"streaming_llm", "moba"} <= {one["name"] for one in listed}
    assert all(one["training_free"] for one in listed)
    assert "gla" not in {one["name"] for one in listed}


def test_each_kind_of_name_is_asked_where_it_belongs() -> None:
    with pytest.raises(ValueError, match="of the tier model, not an operator"):
        registry.row("ravlt")
    assert "ravlt" not in registry.names() and "moba" in registry.names()
    with pytest.raises(ValueError, match="no mechanism is called 'ravlp'; did you mean ravlt"):
        tiers.row("ravlp")
    assert "there are the tiers operator, model" in run("list", "--tier", "models", status=2)
    assert "has no picture" in run("show", "ravlt", "--length", "9", status=2)
    assert "--json is for a name" in run("show", "window(3)", "--json", status=2)


def test_the_index_knows_every_row_of_the_package() -> None:
    ours = {row.name for row in namespace.ROWS.values() if row.target.__module__ in index.modules()}
    assert ours <= index.indexed().keys()
    for entry in index.indexed().values():
        if entry.tier != "operator":
            row = entry.load()
            assert (row.tier, row.family, row.summary) == (entry.tier, entry.family, entry.summary)


def test_a_row_is_checked_by_the_suite_of_its_tier() -> None:
    assert "neighbours" in run("check", "swiftformer", "--seed", "3")
    assert "generation" in run("check", "streaming_llm", "--tier", "inference", "--seed", "3")
    assert "ravlt is of the tier model, not inference" in run("check", "ravlt", "--tier", "inference", status=2)
