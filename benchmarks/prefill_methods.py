"""Methods for prompts on the built-in model's own queries and keys: what they see of the attention, and what it costs.

    python -m benchmarks.prefill_methods                      16k tokens, every layer: some minutes
    python -m benchmarks.prefill_methods --only dhsa          of one method alone

Queries, keys and values are those that the model computes for held-out code (beyond its 8,192 trained positions with a
window, as exact attention there would be none of its own). Recall is the share of the exact weights that fall on keys
which are seen, over evenly spaced queries. Times are CPU seconds of one thread, of dense causal attention and of the
whole method, choosing included, by turns.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeAlias

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.contest import RESULTS, write_json
from foveate import Pattern, attend, causal, topk_blocks, vertical_slash
from foveate.adapt import use
from foveate.lab.measure import machine
from foveate.mixers.dynamic_sparse.sparge_tuning import tune
from foveate.models import builtin
from foveate.patterns.algebra import LINE, Scene, resolve
from foveate.patterns.rules.chunks import chunk_budget
from foveate.patterns.rules.hierarchical import halved_ranges
from foveate.patterns.rules.proxies import proxy_blocks
from foveate.patterns.rules.similar import similar_blocks
from foveate.patterns.rules.stripes import sampled_columns, stripes

Contender: TypeAlias = Pattern | Callable[[Tensor, Tensor, Tensor], Pattern]


def tuned_sparge(q: Tensor, k: Tensor, v: Tensor) -> Pattern:
    """The blocks that each head bears with an error of 7 %, tuned on the first tokens of the prompt."""
    start = slice(0, TUNED)
    return tune(q[:, :, start], k[:, :, start], v[:, :, start], thetas=(0.0, 0.2, 0.4, 0.6), steps=6).core.pattern


CONTENDERS: dict[str, Contender] = {
    "sample_attention": sampled_columns(0.95),
    "sample_attention 0.8": sampled_columns(0.8),
    "anchor_attention": stripes(12.0),
    "anchor_attention 4": stripes(4.0),
    "anchor_attention 2": stripes(2.0),
    "proxy_attention": proxy_blocks(0.95),
    "proxy_attention 0.8": proxy_blocks(0.8),
    "sparge_attention": similar_blocks(0.98, 0.6),
    "sparge_attention 0.9": similar_blocks(0.9, 0.3),
    "sparge_attention tuned": tuned_sparge,
    "dhsa": chunk_budget(2048),
    "hip_attention": halved_ranges(512),
    "hip_attention 2048": halved_ranges(2048),
    "minference_vertical_slash": vertical_slash(512, 512),
    "minference_block_sparse": topk_blocks(64, 16, per="block"),
}
PATH = RESULTS / "prefill_methods.json"
TUNED = 2048  # tokens
ROWS = 128  # queries whose exact weights are formed


@dataclass(frozen=True)
class Line:
    """One method on one layer."""

    method: str
    layer: int
    share_of_pairs: float
    recall: float
    error: float  # of the output, relative, over the same queries
    choosing: float  # CPU seconds
    seconds: float
    dense: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("length", 2**14), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="measure these, and keep what is known of others")
    given = parser.parse_args()
    torch.set_num_threads(1)
    asked = {name: one for name, one in CONTENDERS.items() if name in (given.only or CONTENDERS)}
    known = json.loads(PATH.read_text(encoding="utf-8")) if given.only else {"length": given.length, "lines": []}
    if known["length"] != given.length:
        raise SystemExit(f"what is known is of {known['length']} tokens; {given.length} were asked for")
    lines = [
        line
        for layer, (q, k, v) in enumerate(heads_of(given.length))
        for line in track(measured(layer, q, k, v, given.repeats, asked), f"layer {layer}", total=len(asked))
    ]
    show(lines)
    others = [line for line in known["lines"] if line["method"] not in asked]
    found = {"machine": machine.describe(), "length": given.length, "repeats": given.repeats, "rows": ROWS,
             "load": os.getloadavg()[0], "lines": others + [asdict(line) for line in lines]}  # fmt: skip
    write_json(PATH, found)


@torch.no_grad()
def heads_of(length: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each layer's q (1, H, N, D), k, v of held-out code."""
    model, tokenizer = builtin.load()
    text = builtin.heldout_text(min(6 * length, 800_000))
    ids = torch.tensor([tokenizer(text, verbose=False).input_ids[:length]])
    if ids.shape[1] < length:
        raise SystemExit(f"this machine has {ids.shape[1]:,} tokens of held-out text; {length:,} were asked for")
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    class Seeing:
        pattern = (causal if length <= model.config.max_position_embeddings else None) or recent()

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
            kept.append((q, k, v))
            return attend(q, k, v, self.pattern & causal)

    use(model, Seeing())  # type: ignore[arg-type]
    model(ids, use_cache=False)
    return kept


def recent() -> Pattern:
    from foveate import sinks, window

    return window(4095, 0) | sinks(4)


def measured(
    layer: int, q: Tensor, k: Tensor, v: Tensor, repeats: int, contenders: dict[str, Contender]
) -> Iterator[Line]:
    """A line for each method."""
    rows = torch.linspace(0, q.shape[2] - 1, ROWS).long()
    scores = exact_scores(q, k, rows)
    weights = scores.softmax(-1)
    exact = weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    for name, contender in contenders.items():
        pattern = contender if isinstance(contender, Pattern) else contender(q, k, v)
        scene = Scene(q.shape[2], k.shape[2], LINE, q, k, None)
        chosen = resolve(pattern & causal, scene)
        seen = visible(chosen, q, rows, k.shape[2])
        out = attend(q, k, v, pattern & causal)[:, :, rows]
        kept = weights * seen
        want = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        assert (out - want).norm() <= 1e-3 * want.norm(), f"{name} is not attention over what it sees"
        share = float(seen.double().sum() / (rows + 1).sum() / q.shape[1])
        calls: dict[str, Callable[[], object]] = {
            "dense": partial(attend, q, k, v, causal),
            "choosing": partial((pattern & causal).select, q, k),
            "seconds": partial(attend, q, k, v, pattern & causal),
        }
        least = dict.fromkeys(calls, float("inf"))
        for _ in range(repeats):
            for label, call in calls.items():
                start = time.thread_time()
                call()
                least[label] = min(least[label], time.thread_time() - start)
        error = float((want - exact).norm() / exact.norm())
        yield Line(
            name,
            layer,
            share,
            float(kept.sum() / weights.sum()),
            error,
            least["choosing"],
            least["seconds"],
            least["dense"],
        )


def exact_scores(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q[:, :, rows] @ keys.mT * q.shape[3] ** -0.5
    return scores.masked_fill(torch.arange(k.shape[2]) > rows[:, None], float("-inf"))


def visible(chosen: Pattern, q: Tensor, rows: Tensor, num_keys: int) -> Tensor:
    """(1, H, rows, M) of a resolved pattern."""
    key = torch.arange(num_keys)
    heads = [
        chosen.visible(0, head % chosen.heads if chosen.heads > 1 else 0, rows[:, None], key[None])
        for head in range(q.shape[1])
    ]
    return torch.stack([seen.expand(len(rows), num_keys) for seen in heads]).unsqueeze(0)


def show(lines: list[Line]) -> None:
    table = Table(title="Methods for prompts, mean over layers")
    for column in ("method", "pairs", "recall", "error", "choosing", "time", "dense / method"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name in dict.fromkeys(line.method for line in lines):
        own = [line for line in lines if line.method == name]

        def mean(field: str, own: list[Line] = own) -> float:
            return sum(getattr(line, field) for line in own) / len(own)

        shares = [f"{mean('share_of_pairs'):.1%}", f"{mean('recall'):.1%}", f"{mean('error'):.3f}"]
        times = [f"{mean('choosing'):.2f} s", f"{mean('seconds'):.2f} s", f"{mean('dense') / mean('seconds'):.2f}"]
        table.add_row(name, *shares, *times)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
