"""`foveate list` and `foveate show`: the catalogue, and one mechanism of it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.columns import Columns
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foveate.cli.screen import out

if TYPE_CHECKING:
    from foveate.mixers.registry import Row
    from foveate.patterns import Layout, Pattern

LIST_HELP = """List the mechanisms of the catalogue.

[bold]Examples[/bold]

  foveate list
  foveate list --family linear
  foveate list --json | jq -r '.[] | select(.training_free) | .name'
"""
SHOW_HELP = """Show one mechanism, or draw a pattern.

[bold]Examples[/bold]

  foveate show streaming_llm
  foveate show "window(8) & causal | sinks(2)"
  foveate show "blocks(8) & causal" --picture blocks.svg
"""
DIM, HEADS = 512, 8
LENGTHS = (1024, 8192, 65536)
DRAWN_TOKENS = 32


def list_mechanisms(
    family: Annotated[str | None, typer.Option(help="Only mechanisms of this family.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array instead of a table.")] = False,
) -> None:
    from foveate.mixers.registry import rows

    found = _of_family(rows(), family)
    if as_json:
        typer.echo(json.dumps([facts(row) for row in found], indent=2, ensure_ascii=False))
    else:
        out().print(_table(found))


def show(
    mechanism: Annotated[str, typer.Argument(help="A name that `foveate list` shows, or a pattern in quotes.")],
    picture: Annotated[Path | None, typer.Option(help="Save the drawing, too: a .svg or .png file.")] = None,
) -> None:
    from foveate.mixers.registry import row
    from foveate.patterns.parse import parse

    console = out()
    if "(" in mechanism:
        _draw(console, Drawn(parse(mechanism)), picture)
        return
    found = row(mechanism)
    console.print(_head(found), highlight=False)
    drawn = drawn_of(found)
    if drawn is not None:
        _draw(console, drawn, picture)
    elif picture is not None:
        raise ValueError(f"{mechanism} has no picture: what it looks at depends on the input")
    console.print(f"\n  one sequence, dim {DIM}, {HEADS} heads, float32", style="dim", highlight=False)
    console.print(Padding(_costs(found), (0, 0, 0, 2), expand=False))


def facts(row: Row) -> dict[str, Any]:
    """A row of the catalogue, ready for JSON."""
    return {
        "name": row.name,
        "title": row.paper.title,
        "authors": row.paper.authors,
        "arxiv": row.paper.arxiv,
        "family": row.family,
        "supports": sorted(row.supports),
        "formula": row.formula,
        "training_free": row.core is not None,
    }


class Drawn(NamedTuple):
    """A pattern to draw, on a layout where it needs one."""

    pattern: Pattern
    layout: Layout | None = None


def drawn_of(row: Row) -> Drawn | None:
    """What to draw for a mechanism, at a size where it is sparse; None if it depends on the input."""
    from foveate.patterns import causal

    mixer: Any = row.mixer(DIM, **_tiny(row))
    pattern = getattr(getattr(mixer, "core", None), "pattern", None)
    if pattern is None or pattern.is_dynamic:
        return None
    if pattern.needs_axes:
        return Drawn(pattern, mixer.grids[0]) if mixer.grids else None
    return Drawn(pattern & causal if mixer.causal and pattern.sees_future else pattern)


def _tiny(row: Row) -> dict[str, Any]:
    return getattr(row.mixer, "tiny", {}) | _form(row)


def _form(row: Row) -> dict[str, Any]:
    """The usual number of heads, where it has heads; causal, unless it has no such form."""
    accepted = inspect.signature(row.mixer).parameters
    heads = "heads" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return ({"heads": HEADS} if heads else {}) | ({} if "causal" in row.supports else {"causal": False})


def _draw(console: Console, drawn: Drawn, path: Path | None) -> None:
    """Every head of a pattern, side by side as far as there is room."""
    pattern, layout = drawn
    size = None if layout else DRAWN_TOKENS
    drawings = [str(pattern.draw(size, layout=layout, head=head)) for head in range(pattern.heads)]
    panels = Columns([Text(drawing.partition("\n\n")[2]) for drawing in drawings], padding=(1, 4))
    for part in (Text(str(pattern)), panels):
        console.print(Padding(part, (1, 0, 0, 2), expand=False), highlight=False)
    if path is not None:
        pattern.draw(size, layout=layout, path=path)
        console.print(f"\nThe drawing is in {path}", soft_wrap=True)


def _of_family(rows: list[Row], family: str | None) -> list[Row]:
    families = sorted({row.family for row in rows})
    if family is not None and family not in families:
        raise ValueError(f"no family is called {family!r}; there are {', '.join(families)}")
    return [row for row in rows if family in (None, row.family)]


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left", title=f"{len(rows)} mechanisms")
    for heading in ("mechanism", "family", "what it does", "paper"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "mechanism")
    for row in rows:
        table.add_row(row.name, row.family, Text(row.summary), row.paper.arxiv)
    return table


def _head(row: Row) -> Text:
    lines = [
        (f"{row.name}\n", "bold"),
        (f"{row.summary}\n\n", ""),
        (f"  {row.formula}\n\n", "cyan"),
        (f"  {row.paper.authors}, {row.paper.title}\n  {row.paper.url}\n\n", ""),
        (f"  family {row.family}; supports {', '.join(sorted(row.supports))}\n", "dim"),
        (f"  {_use(row)}", "dim"),
        (f"\n\n  {row.notes}" if row.notes else "", ""),
    ]
    return Text.assemble(*lines)


def _use(row: Row) -> str:
    if row.core is None:
        return f"has parameters of its own: build it with foveate.mixers.registry.mixer({row.name!r}, dim)"
    return f"needs no training: foveate.adapt.use(model, {row.name!r})"


def _costs(row: Row) -> Table:
    mixer = row.mixer(DIM, **_form(row))
    decodes = "decode" in row.supports
    table = Table(box=None, pad_edge=False)
    for heading in ("tokens", "GFLOP forward", "decoding state"):
        table.add_column(heading, justify="right")
    for n in LENGTHS:
        table.add_row(f"{n:,}", _cost(mixer.flops, n, _gflop), _cost(mixer.state_bytes, n, _bytes) if decodes else "-")
    return table


def _cost(count: Any, n: int, show: Any) -> str:
    try:
        return show(count(n))
    except NotImplementedError:
        return "-"


def _gflop(flops: int) -> str:
    return f"{flops / 1e9:,.1f}"


def _bytes(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"
