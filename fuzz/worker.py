"""A process that runs many cases: ``python -m fuzz.worker PLAN BOARD``, both written by the parent.

Whatever it finds is a line of JSON on standard output; the case in hand stands on the board, in case it is the last.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

from foveate.kernels.cpu.loader import library
from fuzz.cases import Refused, load, run_case
from fuzz.judge import Disagreement
from fuzz.plan import Plan
from fuzz.shared import CURRENT, FINISHED, Board


def prepare() -> None:
    """One thread, warnings as errors, and memory that nothing wrote filled with NaN."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    library()  # compiled now, where it must be, and not in the first case


def work(plan: Plan, board: Board) -> None:
    """Run the cases of a plan."""
    for number in plan.numbers():
        kind, seed = plan.case(number)
        board.numbers[CURRENT] = number
        start = time.process_time_ns()
        outcome, message = verdict(kind, seed)
        board.add(kind, "nanoseconds", time.process_time_ns() - start)
        board.add(kind, "cases")
        if outcome:
            board.add(kind, outcome)
        if message:
            print(json.dumps({"kind": kind, "seed": seed, "outcome": outcome, "message": message}), flush=True)
    board.numbers[FINISHED] = 1


def verdict(kind: str, seed: int) -> tuple[str, str]:
    """What became of a case ("" where all is well), and in words what was found."""
    try:
        run_case(kind, seed)
    except Refused:
        return "refused", ""
    except Disagreement as found:
        return "disagreements", str(found)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "errors", f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"
    return "", ""


def main(plan_file: str, board_file: str) -> None:
    prepare()
    load()
    plan = Plan(**json.loads(Path(plan_file).read_text(encoding="utf-8")))
    work(plan, Board(Path(board_file), plan.kinds))


if __name__ == "__main__":
    main(*sys.argv[1:])
