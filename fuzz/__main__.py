"""``python -m fuzz``: random calls for some minutes, or a number of cases, or one case again."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path

from fuzz import sanitized
from fuzz.cases import load, run_case
from fuzz.plan import SPAN, Plan, named
from fuzz.run import run
from fuzz.table import table

ROOT = Path(__file__).parent.parent


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument("--cases", type=int, help="stop after this number of cases")
    parser.add_argument("--seed", type=int, help="of all random numbers; a fresh one by default, which is printed")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of that seed")
    parser.add_argument("--kind", action="append", help="only these kinds (may be given several times)")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--one", metavar="KIND:SEED", help="run one case in this process, and show its traceback")
    parser.add_argument("--sanitize", action="store_true", help="kernels that check every access and operation")
    parser.add_argument("--json", type=Path, help="write the counts and findings to this file")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    given, kinds = arguments(words), load()
    if given.one:
        return one(given.one)
    unknown = set(given.kind or ()) - set(kinds)
    if unknown:
        raise SystemExit(f"no kind is called {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    end = SPAN if given.cases is None else given.first + given.cases
    minutes = 1.0 if given.minutes is None and given.cases is None else given.minutes
    plan = Plan(seed, tuple(given.kind or kinds), given.first, 1, end)
    print(f"--seed {seed} repeats this run; --one KIND:SEED repeats one case of it", flush=True)
    seconds = None if minutes is None else 60 * minutes
    environment = workers_environment(sanitize=given.sanitize)
    report = run(plan, workers=given.workers, seconds=seconds, environment=environment, say=said)
    print(table(report))
    print(f"{report.cases:,} cases in {report.seconds:.0f} s, {len(report.findings)} findings, --seed {seed}")
    if given.json:
        given.json.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    return 1 if report.findings else 0


def workers_environment(*, sanitize: bool = False) -> dict[str, str]:
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    usual = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    return sanitized.environment(usual) if sanitize else usual


def said(line: str) -> None:
    print(line, flush=True)


def one(case: str) -> int:
    """Run one case here."""
    from fuzz.worker import prepare

    kind, _, seed = case.rpartition(":")
    if kind not in load() or not seed.isdigit():
        raise SystemExit(f"--one takes KIND:SEED as a run printed it; got {case!r}")
    prepare()
    run_case(kind, int(seed))
    print(f"{named(kind, int(seed))} agrees")
    return 0


if __name__ == "__main__":
    sys.exit(main())
