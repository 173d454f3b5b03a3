"""`foveate compare`: quality, speed and memory of mechanisms on one's own model and text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from foveate.cli.complete import mechanisms
from foveate.cli.screen import BAD_INPUT, STOPPED, complain, keeping, out, say
from foveate.cli.task_options import (
    PANEL,
    QUESTIONS,
    Batch,
    CompareTask,
    Depths,
    Dim,
    Group,
    Heads,
    Layers,
    Lengths,
    Pairs,
    Rates,
    Samples,
    Seed,
    Steps,
    Vocab,
    model_given,
    numbers,
    rates_of,
    refuse,
    task_and_recipe,
)

HELP = """Measure quality, speed and memory of attention mechanisms on a model and a text.

Each mechanism takes the place of the model's own attention, by turns with
it. Results are written after each, so Ctrl-C loses nothing: --resume goes
on. The report is one HTML file that needs no network.

A causal language model is judged by the cost of each next token, an encoder
by that of masked tokens, an encoder and decoder by that of a text's end
given its beginning, a model without a head by how far its hidden states move.

With --decode, a prompt is read and its continuation goes through the cache
token by token: time and bytes a token, and loss, at several budgets. Methods
take part, and files of assignments (-m layers.json).

With --task needle, or ruler (multikey, variables, aggregation), lines are
hidden in a text at several depths and asked for at its end, at several
--lengths; so with --task recall where a --model or --lengths are given.

With --task recall, copy or state, mechanisms learn a synthetic task, each in
the same small model (`foveate train --help`): the table and the picture show
how much is right against the bytes of state kept for it. With several learning
rates a mechanism tries one after the other until the task is solved.

[bold]Examples[/bold]

  foveate compare
  foveate compare --model path/to/model --text notes.txt --length 4096
  foveate compare --text one.txt --text two.txt --device cuda --dtype bfloat16
  foveate compare -m moba -m "streaming_llm(window=256)"
  foveate compare -m "window(512) & causal | sinks(4)" --max-loss 0.05
  foveate compare --out report --resume

  foveate compare --decode
  foveate compare --decode -m cake -m "rekv(window=256)" --length 2048
  foveate compare --task needle --lengths 1024,4096 -m cake -m hip_attention
  foveate compare --task ruler --model path/to/model --depths 0,0.5,1 --samples 8

  foveate compare --task recall
  foveate compare --task recall -m deltanet -m gla --length 64 --pairs 8
  foveate compare --task recall --lr 0.003,0.01
  foveate compare --task state --group parity --minutes 2
"""

TEXT_ONLY = ("model", "text", "max_loss", "repeats", "windows", "device", "dtype", "decode", "continued")
NOT_ASKED = ("length", "max_loss", "repeats", "windows", "decode", "continued")
ASKED_ONLY = ("lengths", "depths", "samples")
TASK_ONLY = ("pairs", "vocab", "group", "dim", "heads", "layers", "batch", "steps", "minutes", "lr", "seed")


def compare(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="'builtin', or a folder with a model of text in Hugging Face format.")
    ] = "builtin",
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A file, a folder, or - for standard input; text of our own unless given. Given several times, "
            "all are read."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a window of text (8192 unless given, or as many as the model has positions), or in a "
            "task's sequence."
        ),
    ] = None,
    mechanism: Annotated[
        list[str] | None,
        typer.Option(
            "--mechanisms",
            "--mechanism",
            "-m",
            help="A name, with options or without, or a pattern; all (of a task: a few) unless given.",
            autocompletion=mechanisms,
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder for results.json and report.html, or TASK.json and TASK.svg.")
    ] = Path("report"),
    max_loss: Annotated[
        float, typer.Option(help="Relative loss (of bits per byte, or the distance) that a recommendation may have.")
    ] = 0.01,
    repeats: Annotated[int, typer.Option(help="Timed runs of each mechanism; fewer than 3 recommend nothing.")] = 3,
    windows: Annotated[int, typer.Option(help="Windows of text to judge quality on.")] = 2,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Numbers that the model computes with.")
    ] = "float32",
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the folder already holds.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over what the folder already holds.")] = False,
    decode: Annotated[
        bool, typer.Option("--decode", help="Time, bytes and loss of decoding, at several budgets.")
    ] = False,
    continued: Annotated[
        int, typer.Option("--next", help="Tokens that are put through the cache one by one, with --decode.")
    ] = 128,
    task: CompareTask = None,
    lengths: Lengths = None,
    depths: Depths = "0,0.25,0.5,0.75,1",
    samples: Samples = 4,
    pairs: Pairs = None,
    vocab: Vocab = None,
    group: Group = None,
    dim: Dim = 32,
    heads: Heads = 1,
    layers: Layers = 2,
    batch: Batch = 32,
    steps: Steps = 2000,
    minutes: Annotated[
        float | None, typer.Option(help="Stop the schedule of each mechanism after this long.", rich_help_panel=PANEL)
    ] = None,
    lr: Rates = "0.003",
    seed: Seed = 0,
) -> None:
    if task in QUESTIONS or (task == "recall" and (model_given(context) or lengths)):
        refuse(context, (*TASK_ONLY, *NOT_ASKED), "with other tasks, or with none")
        return _compare_on_questions(str(task), context.params, folder)
    refuse(context, ASKED_ONLY, "with --task needle, recall, multikey, variables, aggregation or ruler")
    if task is not None:
        refuse(context, TEXT_ONLY, "with a model and a text, not with --task")
        return _compare_on_task(context.params, folder, resume=resume, force=force)
    refuse(context, TASK_ONLY, "with --task (recall, copy or state)")
    if decode:
        refuse(context, ("max_loss", "repeats"), "with the prefill, not with --decode")
        return _compare_decoding(context.params, folder)
    refuse(context, ("continued",), "with --decode")
    _compare_on_text(
        folder,
        model=model,
        text=text or None,
        length=length,
        mechanisms=mechanism or None,
        max_loss=max_loss,
        resume=resume,
        force=force,
        repeats=repeats,
        windows=windows,
        device=device,
        dtype=dtype,
    )


def _compare_on_text(folder: Path, **options: Any) -> None:
    from foveate.lab.compare.api import compare as measure
    from foveate.lab.compare.api import table

    with keeping(f"{folder} holds what was there before."):
        results = measure(out=folder, **options)
    out().print(table(results))
    say(f"Report: {folder / 'report.html'}")
    if results.interrupted:
        complain(f"Stopped. {len(results.entries)} mechanisms are kept in {folder}; --resume measures the rest.")
        raise typer.Exit(STOPPED)
    if options["mechanisms"] and results.refused:
        complain("; ".join(f"{one.name} was not measured: {one.reason}" for one in results.refused))
        raise typer.Exit(BAD_INPUT)


def _compare_decoding(options: dict[str, Any], folder: Path) -> None:
    from foveate.lab.decode.api import compare_decode
    from foveate.lab.decode.table import table

    shared = ("model", "text", "length", "continued", "windows", "resume", "force", "device", "dtype")
    given: dict[str, Any] = {name: options[name] or None if name == "text" else options[name] for name in shared}
    with keeping(f"{folder} holds what was there before."):
        found = compare_decode(mechanisms=options["mechanism"] or None, out=folder, **given)
    out().print(table(found))
    say(f"Report: {folder / 'report.html'}")
    if found.interrupted:
        complain(f"Stopped. {len(found.entries)} measurements are kept in {folder}; --resume goes on.")
        raise typer.Exit(STOPPED)


def _compare_on_questions(task: str, options: dict[str, Any], folder: Path) -> None:
    from foveate.lab.questions.api import compare_questions
    from foveate.lab.questions.table import table

    shared = ("model", "text", "samples", "resume", "force", "device", "dtype")
    given: dict[str, Any] = {name: options[name] or None if name == "text" else options[name] for name in shared}
    lengths = (
        None if options["lengths"] is None else [int(n) for n in numbers(options["lengths"], "--lengths", whole=True)]
    )
    depths = numbers(options["depths"], "--depths")
    with keeping(f"{folder} holds what was there before."):
        found = compare_questions(
            task, mechanisms=options["mechanism"] or None, lengths=lengths, depths=depths, out=folder, **given
        )
    out().print(table(found))
    say(f"Report: {folder / 'report.html'}")
    if found.interrupted:
        complain(f"Stopped. {len(found.cells)} cells are kept in {folder}; --resume asks the rest.")
        raise typer.Exit(STOPPED)


def _compare_on_task(options: dict[str, Any], folder: Path, *, resume: bool, force: bool) -> None:
    from foveate.lab.tasks.compare import compare_task, table

    rates = rates_of(options["lr"])
    task, recipe = task_and_recipe(options | {"lr": rates[0]})
    mixers = options["mechanism"] or None
    found = compare_task(task, mixers, out=folder, recipe=recipe, rates=rates, resume=resume, force=force)
    out().print(table(task, found))
    if found["interrupted"]:
        complain(f"Stopped. {len(found['results'])} mechanisms are kept in {folder}; --resume teaches the rest.")
        raise typer.Exit(STOPPED)
    written = f"{folder / task.name}.json", f"{folder / task.name}.svg"
    say(f"Figures: {written[0]}; the picture: {written[1]}")
