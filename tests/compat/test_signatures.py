"""Every door of foveate.compat is in docs/compat.md and takes its peer's arguments in their places."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
DOORS = {"fla": "## flash-linear-attention", "mamba": "## mamba_ssm and causal_conv1d"}
RAISES_THERE = {"fused_chunk_gla", "fused_chunk_delta_rule"}  # their peers take anything, and only raise


def recorded() -> dict[str, str]:
    """Arguments by "library.function"."""
    lines = (HERE / "peer_signatures.txt").read_text(encoding="utf-8").splitlines()[1:]
    return {line.partition("(")[0]: line.partition("(")[2].removesuffix(")") for line in lines}


def listed(library: str) -> set[str]:
    """Names in the first column of the library's table in docs/compat.md."""
    text = (DOCS / "compat.md").read_text(encoding="utf-8")
    part = text[text.index(DOORS[library]) :]
    part = part[: part.index("\n## ", 3)]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize("library", DOORS)
def test_the_page_lists_every_door(library: str) -> None:
    module = importlib.import_module(f"foveate.compat.{library}")
    assert listed(library) == set(module.__all__)
    assert {name.partition(".")[2] for name in recorded() if name.startswith(f"{library}.")} == set(module.__all__)


@pytest.mark.parametrize("door", recorded())
def test_doors_take_their_peers_arguments(door: str) -> None:
    library, name = door.split(".")
    if name in RAISES_THERE:
        assert recorded()[door] == ""
        return
    theirs = ast.parse(f"def f({recorded()[door]}): ...").body[0]
    assert isinstance(theirs, ast.FunctionDef)
    names = [argument.arg for argument in theirs.args.args]
    defaults = [plain(ast.unparse(x)) for x in theirs.args.defaults]
    parameters = inspect.signature(getattr(importlib.import_module(f"foveate.compat.{library}"), name)).parameters
    ours = [x for x in parameters.values() if x.kind is x.POSITIONAL_OR_KEYWORD]
    assert [x.name for x in ours] == names
    assert [plain(repr(x.default)) for x in ours[len(names) - len(defaults) :]] == defaults


def plain(value: str) -> str:
    return value.replace("float('inf')", "inf").replace("1e-05", "1e-5").replace("1e-06", "1e-6")


def test_the_record_is_that_of_the_installed_peer() -> None:
    spec = importlib.util.find_spec("fla")
    if spec is None or spec.origin is None:
        pytest.skip("flash-linear-attention is not installed (pip install 'foveate[dev]')")
    known = {name.partition(".")[2]: arguments for name, arguments in recorded().items() if name.startswith("fla.")}
    found = {}
    for path in (Path(spec.origin).parent / "ops").rglob("*.py"):
        if "backends" not in path.parts:
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and node.name in known:
                    arguments = node.args
                    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
                    found[node.name] = ", ".join(
                        a.arg if d is None else f"{a.arg}={ast.unparse(d)}"
                        for a, d in zip(arguments.args, defaults, strict=True)
                    )
    short = {"chunk_gdn": "chunk_gated_delta_rule", "fused_recurrent_gdn": "fused_recurrent_gated_delta_rule"}
    found |= {name: found[name_there] for name, name_there in short.items()}
    assert found == known
