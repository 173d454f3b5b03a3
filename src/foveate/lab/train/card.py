"""The card of a trained model: what it learned from, how, and how well it does, with a picture of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foveate.lab.train.recipe import Recipe

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [en]
tags: [code, attention]
---

# A small code model for measuring attention

A Llama-architecture language model of {parameters:.1f} M parameters with a byte-level BPE tokenizer of
{vocab} tokens and {context} positions. It exists to compare attention mechanisms on: long-range attention
matters to it, as the table shows. It is far too small to write useful code.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

The weights that ship with Foveate are one call away: `model, tokenizer = foveate.models.builtin.load()`.

## How well it does

Bits per byte (lower is better) on {evaluated} tokens of Python's standard library that it never saw, read
in pieces of the given context; a window of w lets each token see itself and the w - 1 before it. In
brackets: what the window costs against full attention.

{results}

The pieces lie apart in the standard library's files of `heldout.txt`, which lists every held-out file.
`evaluation.json` has the numbers.

![Loss and held-out bits per byte over the run](training.svg)

On the right, full attention does badly until the curriculum reaches long contexts: until then, 4096 tokens are
more than the model has ever seen at once.

## How it was trained

{steps:,} steps, {tokens:.1f} M tokens, {minutes:.0f} minutes on: {machine}
(cores shared with other work). Muon for the hidden matrices, AdamW for embeddings and norms, bfloat16
autocast {bf16}; learning rate warmed up over {warmup} steps, held until {hold:.0%} of the run, then decayed
linearly. The curriculum:

{curriculum}

In rows "with a copied span", a span of the text is written a second time further on: it teaches copying
from far back early. `recipe.json` has every number, `training_log.json` the loss.

To make one like it from the packages of your own machine: `foveate train --preset builtin`. The text comes
from what is installed, so the result will not be identical.

## What it learned from

{megabytes:.1f} MB in {files:,} files: sources and READMEs of the packages below, each under a permissive
licence according to its own metadata. Left out: tests, generated files, tables of data, vendored code,
exact duplicates (near ones were not looked for), and {heldout} held-out files. No package gives more than
{cap:.0f} MB. Files of one folder follow each other in one document; batches are drawn from all of it at random.

{data}
"""


def write_card(folder: Path, recipe: Recipe, facts: dict[str, Any]) -> None:
    """README.md of the model in `folder`, from its recipe, its evaluation and its list of data."""
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    card = _CARD.format(
        parameters=_parameters(folder) / 1e6,
        vocab=recipe.vocab,
        context=recipe.context,
        evaluated=f"{facts['evaluated_tokens']:,}",
        results=_table(*_results(facts["heldout"])),
        steps=facts["steps"],
        tokens=facts["tokens"] / 1e6,
        minutes=facts["minutes"],
        machine=facts["machine"],
        bf16="on" if recipe.bf16 else "off",
        warmup=recipe.warmup,
        hold=recipe.hold,
        curriculum=_table(*_curriculum(recipe)),
        megabytes=data["bytes"] / 1e6,
        files=data["files"],
        heldout=data["heldout_files"],
        cap=recipe.max_bytes_per_source / 1e6,
        data=_table(["package", "version", "licence", "bytes"], [_data_row(row) for row in data["sources"]]),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - not a dict


def _data_row(row: dict[str, Any]) -> list[str]:
    return [row["name"], row["version"], row["licence"], f"{row['bytes']:,}"]


def _results(rows: list[dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    windows = [name for name in rows[0] if name.startswith("window_")]
    head = ["context", "full attention", *(name.replace("_", " of ") for name in windows)]
    return head, [[str(row["context"]), f"{row['full']:.3f}", *_costs(row, windows)] for row in rows]


def _costs(row: dict[str, float], windows: list[str]) -> list[str]:
    return [f"{row[name]:.3f} ({100 * (row[name] / row['full'] - 1):+.1f} %)" for name in windows]


def _curriculum(recipe: Recipe) -> tuple[list[str], list[list[str]]]:
    starts = [0.0, *(phase.until for phase in recipe.phases)]
    rows = [
        [f"{start:.0%} to {phase.until:.0%}", str(phase.context), str(phase.batch), f"{phase.repeat:.0%}"]
        for start, phase in zip(starts, recipe.phases, strict=False)
    ]
    return ["part of the run", "context", "rows a step", "with a copied span"], rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(log: list[dict[str, float]], path: Path) -> None:
    """The run as a picture: training loss on the left, held-out bits per byte on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [row for row in log if "loss" in row]
    probes = [row for row in log if "full" in row]
    left.plot(_millions(losses), [row["loss"] for row in losses], color="#9db4c8", linewidth=0.5)
    left.plot(_millions(losses), _smooth([row["loss"] for row in losses]), color="#1f4e79", linewidth=1.6)
    left.set(xlabel="million tokens", ylabel="training loss, nats per token")
    for name, label, colour in (
        ("window_128", "window of 128", "#c8641b"),
        ("full", "full attention", "#1f4e79"),
    ):
        right.plot(_millions(probes), [row[name] for row in probes], color=colour, label=label, marker=".")
    right.set(xlabel="million tokens", ylabel="held-out bits per byte at 4096 tokens")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _millions(rows: list[dict[str, float]]) -> list[float]:
    return [row["tokens"] / 1e6 for row in rows]


def _smooth(values: list[float], reach: int = 8) -> list[float]:
    """Each value's mean with its neighbours, up to `reach` on either side."""
    near = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(around) / len(around) for around in near]
