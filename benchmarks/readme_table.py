"""Write the README's tables from benchmarks/results, so that no figure in it is typed by hand.

    foveate compare --out out/compare && cp out/compare/results.json benchmarks/results/compare.json
    python -m benchmarks.attend_tiles
    python -m benchmarks.attend_cpu
    python -m benchmarks.recur_cpu
    python -m benchmarks.readme_table

A block between `<!-- table:NAME -->` and `<!-- /table -->` is filled from NAME.json.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.report import best, lead, milliseconds
from benchmarks.targets import OURS
from benchmarks.titles import ATTEND, RECUR
from foveate.lab.compare.results import Entry, Results
from foveate.lab.measure import machine
from foveate.lab.report.table import row

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDER = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
HEADLINES = (
    ("causal", "D 64, N 4096"),
    ("training", "D 64, N 4096"),
    ("window", "N 8192"),
    ("window-training", "N 8192"),
    ("neighborhood", "7x7 on 56x56"),
    ("swin", "512 windows 7x7, 3 heads"),
    ("swin-training", "512 windows 7x7, 3 heads"),
    ("decode", "32768 keys"),
    ("delta", "N 4096"),
    ("delta-training", "N 4096"),
    ("gated", "a decay a channel, N 4096"),
    ("gated-training", "a decay a channel, N 4096"),
    ("scan", "d 1536, N 4096"),
    ("scan-training", "d 1536, N 4096"),
    ("layers", "Mamba, N 4096"),
    ("layers", "Mamba-2, N 4096"),
    ("layers", "Qwen3-Next, N 4096"),
    ("crossover", "gated delta rule, N 16384"),
)
HEADINGS = ["mechanism", "speed-up", "prefill", "peak memory", "bits per byte", "change", "pairs seen"]


def filled(text: str) -> str:
    """A page with its tables written anew; a block whose figures were never measured is left empty."""
    return BLOCK.sub(lambda found: found[1] + table(found[2]) + found[3], text)


def table(name: str) -> str:
    file = FOLDER / f"{name}.json"
    if not file.exists():
        return ""
    text = file.read_text(encoding="utf-8")
    record = json.loads(text)
    if "schema" in record:
        return _of_compare(Results.from_json(text))
    return _of_groups(record["groups"]) if "groups" in record else _of_contest(record)


def front(results: Results) -> list[Entry]:
    """Exact attention, the recommended mechanism, and those that none beats in both speed and quality."""
    chosen = results.recommendation.name if results.recommendation else None

    def beaten(entry: Entry) -> bool:
        return any(
            results.speed(other) > results.speed(entry) and other.quality.change <= entry.quality.change
            for other in results.ranked
        )

    return [one for one in results.ranked if one is results.exact or one.name == chosen or not beaten(one)]


def _of_compare(results: Results) -> str:
    """The mechanisms worth a look, fastest first, the recommended one in bold."""
    chosen = results.recommendation.name if results.recommendation else None
    rows = []
    for entry in front(results):
        name, speed, prefill, memory, bits, change, _, _, _, seen = row(results, entry)
        mark = "**" if entry.name == chosen else ""
        rows.append([f"{mark}{name}{mark}", speed, prefill, memory, bits, change, seen])
    about = results.about
    said = (
        f"The {about['model']['name']} model ({about['model']['parameters'] / 1e6:.1f} M parameters) reading "
        f"{results.settings['length']:,} tokens of {about['text']['source']}. Of {len(results.entries)} mechanisms, "
        "those that no other beats in both speed and quality"
    )
    return _page(HEADINGS, rows, f"{said}{'; bold: recommended' if chosen else ''}", results.machine)


def _of_contest(record: dict[str, Any]) -> str:
    """Each case of a benchmark: the first contender's time, and how much slower the others are."""
    rows = []
    for case in record["cases"]:
        names = list(case["times"])
        times = [f"{case['times'][name]['minimum'] * 1e3:.0f} ms" for name in names]
        rows.append([case["name"], *times, f"{case['speedups'][names[-1]]:.1f}x"])
    return _page(["", *record["cases"][0]["times"], "faster by"], rows, record["title"], record["machine"])


def _of_groups(groups: dict[str, Any]) -> str:
    """A case or two of each group of such a benchmark: ours, the fastest other contender, the share of the limit."""
    rows = []
    for name, wanted in HEADLINES:
        for case in groups[name]["cases"] if name in groups else ():
            if case["name"] == wanted:
                rows.append(_headline((ATTEND | RECUR)[name], case))
    about = next(iter(groups.values()))
    said = f"{about['threads']} threads, batch 1, 8 heads unless said; the limit is what the machine was measured to do"
    return _page(["", "Foveate", "fastest other", "faster by", "of the limit"], rows, said, about["machine"])


def _headline(title: str, case: dict[str, Any]) -> list[str]:
    other, ratio, share = best(case), lead(case), case["of_limit"].get(OURS)
    theirs = f"{_least(case, other)}, {other.replace(',', '')}" if other else ""
    by = "" if ratio is None else f"{ratio:.1f}x"
    words = f"{title}, {case['name']}, {case['dtype']}"
    return [words, _least(case, OURS), theirs, by, "" if share is None else f"{share:.0%}"]


def _least(case: dict[str, Any], label: str) -> str:
    return milliseconds(case["times"][label]["minimum"])


def _page(headings: list[str], rows: list[list[str]], said: str, measured_on: dict[str, Any]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    drawn = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
    return "\n".join(["", *drawn, "", f"<sub>{said}. Measured on {machine.in_words(measured_on)}.</sub>", "", ""])


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
