"""`foveate show` for models, methods, recipes and the other tiers beside operators."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foveate.cli.screen import cited

if TYPE_CHECKING:
    from foveate.catalogue.contracts import Hook
    from foveate.catalogue.index import Entry
    from foveate.catalogue.namespace import TierRow


def find(name: str) -> Entry | None:
    """The entry that has exactly this name, if there is one."""
    from foveate.catalogue.index import catalogue, indexed, is_current

    found = indexed().get(name.strip())
    if found is not None and is_current(found.module):
        return found
    if not name.strip().isidentifier():
        return None
    return next((entry for entry in catalogue().entries if entry.name == name.strip()), None)


def described(entry: Entry) -> Iterator[Text | Padding]:
    """What to print of a row: what it is, its papers, how it is used, and what its tier asks."""
    row: Any = entry.load()
    papers = "".join(f"  {cited(source)}\n" for source in row.papers or (row.source,))
    notes = f"\n\n  {row.notes}" if row.notes else ""
    use = "\n  ".join(USE[row.tier].format(name=repr(row.name)).splitlines())
    yield Text.assemble(
        (f"{row.name}\n", "bold"),
        (f"{row.summary}\n\n", ""),
        (f"{papers}\n", ""),
        (f"  {row.tier} of the family {row.family}\n\n", "dim"),
        (f"  {use}", "cyan"),
        notes,
        "\n",
    )
    if row.tier in DETAILS:
        yield Padding(DETAILS[row.tier](row), (0, 0, 0, 2), expand=False)


USE = {
    "model": "from foveate.catalogue import tiers\nmodel = tiers.row({name}).make()",
    "inference": "from foveate.catalogue import tiers\nchange = tiers.row({name}).make().install(model)",
    "recipe": "from foveate.catalogue import tiers\nstudent = tiers.row({name}).make(...).prepare(model)",
    "distributed": "from foveate.catalogue import tiers\nout = tiers.row({name}).function(*shards, group=group)",
    "hook": "from foveate.testing import check_hook\ncheck_hook({name}, full=True)  # at the sizes below",
    "probe": "from foveate.catalogue import tiers\nprint(tiers.row({name}).run().verdict)",
    "doc": "from foveate.catalogue import tiers\nprint(tiers.row({name}).make().path)",
}


def _presets(row: Any) -> Table:
    """Sizes of the paper: parameters of the model here and what the paper counts."""
    import torch

    table = _headed("preset", "parameters", "the paper's", "sizes")
    for name, preset in row.presets.items():
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in row.make(name).parameters())
        told = "" if preset.parameters is None else f"{preset.parameters / 1e6:,.1f} M"
        sizes = ", ".join(f"{key}={value}" for key, value in preset.sizes.items())
        table.add_row(name, f"{count / 1e6:,.1f} M", told, sizes)
    return table


def _options(row: Any) -> Table:
    table = _headed("option", "default")
    for option in inspect.signature(row.function).parameters.values():
        table.add_row(option.name, "" if option.default is option.empty else repr(option.default))
    return table


def _stages(row: Any) -> Table:
    table = _headed("stage", "steps", "learning rate")
    for stage in row.make(**row.tiny).stages:
        table.add_row(stage.name, f"{stage.steps:,}", f"{stage.lr:g}")
    return table


def _shapes(row: Any) -> Table:
    hook: Hook = row.make()
    table = _headed("operator", "batch", "heads", "queries", "keys", "head width", "layout")
    options = ", ".join(f"{key}={value!r}" for key, value in hook.options.items())
    heads = str(hook.heads) if hook.kv_heads is None else f"{hook.heads} on {hook.kv_heads}"
    numbers = (hook.batch, heads, hook.queries or hook.keys, hook.keys, hook.head_dim)
    table.add_row(
        f"{hook.operator}({options})" if options else str(hook.operator), *map(str, numbers), str(hook.layout or "")
    )
    return table


def _page(row: Any) -> Table:
    page = row.make()
    table = _headed("page", "covers")
    table.add_row(page.path, ", ".join(page.covers))
    return table


def _headed(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


DETAILS: dict[str, Callable[[TierRow], Table]] = {
    "model": _presets,
    "inference": _options,
    "recipe": _stages,
    "hook": _shapes,
    "probe": _options,
    "doc": _page,
}
