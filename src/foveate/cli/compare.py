"""`foveate compare`: quality, speed and memory of mechanisms on one's own model and text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.screen import STOPPED, complain, keeping, out

HELP = """Measure quality, speed and memory of attention mechanisms on a model and a text.

Each mechanism takes the place of the model's own attention, by turns with
it. Results are written after each, so Ctrl-C loses nothing: --resume goes
on. The report is one HTML file that needs no network.

[bold]Examples[/bold]

  foveate compare
  foveate compare --model path/to/model --text notes.txt --length 4096
  foveate compare -m moba -m "streaming_llm(window=256)"
  foveate compare -m "window(512) & causal | sinks(4)" --max-loss 0.05
  foveate compare --out report --resume
"""


def compare(
    model: Annotated[
        str, typer.Option(help="'builtin', or a folder with a causal language model in Hugging Face format.")
    ] = "builtin",
    text: Annotated[
        str | None, typer.Option(help="A file, a folder, or - for standard input; text of our own unless given.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in a window of text.")] = 8192,
    mechanism: Annotated[
        list[str] | None,
        typer.Option(
            "--mechanisms", "--mechanism", "-m", help="A name, with options or without, or a pattern; all unless given."
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for results.json and report.html.")] = Path("report"),
    max_loss: Annotated[
        float, typer.Option(help="Relative loss in bits per byte that a recommendation may have.")
    ] = 0.01,
    repeats: Annotated[int, typer.Option(help="Timed runs of each mechanism.")] = 5,
    windows: Annotated[int, typer.Option(help="Windows of text to judge quality on.")] = 4,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the folder already holds.")] = False,
) -> None:
    from foveate.lab.compare import compare as measure
    from foveate.lab.compare import table

    with keeping(f"{folder} holds what was there before."):
        results = measure(
            model,
            text,
            length=length,
            mechanisms=mechanism or None,
            out=folder,
            max_loss=max_loss,
            resume=resume,
            repeats=repeats,
            windows=windows,
        )
    console = out()
    console.print(table(results))
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True, highlight=False)
    if results.interrupted:
        complain(f"Stopped. {len(results.entries)} mechanisms are kept in {folder}; --resume measures the rest.")
        raise typer.Exit(STOPPED)
