"""The parent: starts workers, watches them, names the case of one that dies or hangs, and goes on after it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fuzz.plan import Plan
from fuzz.shared import CURRENT, FIELDS, FINISHED, IDLE, Board

PATIENCE = 60.0  # seconds for one case
START = 120.0  # seconds until the first: importing, and kernels yet to be compiled
BATCH = 50_000  # cases of one process
POLL = 0.2


@dataclass
class Finding:
    kind: str
    seed: int
    outcome: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.seed}  {self.outcome.rstrip('s')}: {self.message}"


@dataclass
class Report:
    """What a run counted for each kind, and what it found."""

    seed: int
    seconds: float = 0.0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return sum(row["cases"] for row in self.counts.values())

    def add(self, board: Board) -> None:
        for kind in board.kinds:
            row = self.counts.setdefault(kind, dict.fromkeys((*FIELDS, "crashes", "hangs"), 0))
            for name in FIELDS:
                row[name] += board.get(kind, name)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"cases": self.cases}


class Worker:
    """One process after another over every ``step``-th case."""

    def __init__(self, plan: Plan, folder: Path, command: list[str], environment: dict[str, str]) -> None:
        self.plan, self.folder, self.command, self.environment = plan, folder, command, environment
        self.process: subprocess.Popen[bytes] | None = None
        self.next = plan.first
        self.started = 0

    def start(self) -> None:
        plan = replace(self.plan, first=self.next, end=min(self.plan.end, self.next + BATCH * self.plan.step))
        self.started += 1
        name = f"{self.plan.first}-{self.started}"
        self.batch, self.board = plan, Board(self.folder / f"{name}.board", plan.kinds, create=True)
        (self.folder / f"{name}.json").write_text(json.dumps(asdict(plan)))
        arguments = [str(self.folder / f"{name}.json"), str(self.folder / f"{name}.board")]
        self.out, self.err = (self.folder / f"{name}.{stream}" for stream in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen([*self.command, *arguments], stdout=out, stderr=err, env=self.environment)
        self.read = 0
        self.seen, self.since = IDLE, time.monotonic()

    def findings(self) -> list[Finding]:
        """What the process has reported since last asked."""
        told = self.out.read_bytes()[self.read :]
        whole = told[: told.rfind(b"\n") + 1]
        self.read += len(whole)
        return [Finding(**json.loads(line)) for line in whole.splitlines()]

    def stuck(self, patience: float) -> bool:
        """Whether one case has taken longer than that."""
        current = self.board.numbers[CURRENT]
        if current != self.seen:
            self.seen, self.since = current, time.monotonic()
        limit = START if current == IDLE else patience
        return time.monotonic() - self.since > limit

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def ended(self) -> Finding | None:
        """After the process is gone: the case that took it down, if any did, and where to go on."""
        assert self.process is not None
        current, self.next = self.board.numbers[CURRENT], self.batch.end
        if self.board.numbers[FINISHED]:
            remainder = (self.next - self.plan.first) % self.plan.step
            self.next += (self.plan.step - remainder) % self.plan.step
            return None
        if current == IDLE:
            raise RuntimeError(f"a worker could not start: {tail(self.err)}")
        kind, seed = self.plan.case(current)
        self.next = current + self.plan.step
        return Finding(kind, seed, "crashes", f"{cause(self.process.returncode)}; {tail(self.err)}".rstrip("; "))

    @property
    def done(self) -> bool:
        return self.next >= self.plan.end


def run(
    plan: Plan,
    *,
    workers: int = 1,
    seconds: float | None = None,
    command: list[str] | None = None,
    environment: dict[str, str],
    say: Callable[[str], None] = print,
    patience: float = PATIENCE,
) -> Report:
    """Run the cases of a plan on some processes, until they are through or the time is up."""
    report, start, told = Report(plan.seed), time.monotonic(), time.monotonic()
    command = command or [sys.executable, "-X", "faulthandler", "-m", "fuzz.worker"]
    with TemporaryDirectory(prefix="fuzz-") as name:
        crew = [
            Worker(replace(plan, first=plan.first + w, step=workers), Path(name), command, environment)
            for w in range(min(workers, plan.end - plan.first))
        ]
        for worker in crew:
            worker.start()
        while crew:
            time.sleep(POLL)
            late = seconds is not None and time.monotonic() - start > seconds
            crew = [worker for worker in crew if watched(worker, report, late, say, patience)]
            if time.monotonic() - told > 10 and crew:
                told = time.monotonic()
                say(progress(report, crew, told - start))
    report.seconds = time.monotonic() - start
    return report


def watched(worker: Worker, report: Report, late: bool, say: Callable[[str], None], patience: float) -> bool:
    """Look after one worker; False when it has nothing more to do."""
    assert worker.process is not None
    alive = worker.process.poll() is None
    if alive and not late and not worker.stuck(patience):
        record(worker.findings(), report, say)
        return True
    hung = alive and not late
    if alive:
        worker.stop()
    record(worker.findings(), report, say)
    report.add(worker.board)
    finding = worker.ended() if not (alive and late) else None
    if finding is not None:
        if hung:
            finding = replace(finding, outcome="hangs", message=f"no answer within {patience:g} s")
        report.counts[finding.kind][finding.outcome] += 1
        report.counts[finding.kind]["cases"] += 1
        record([finding], report, say)
    if late or worker.done:
        return False
    worker.start()
    return True


def record(findings: list[Finding], report: Report, say: Callable[[str], None]) -> None:
    for finding in findings:
        report.findings.append(finding)
        say(str(finding))


def progress(report: Report, crew: list[Worker], seconds: float) -> str:
    cases = report.cases + sum(worker.board.total("cases") for worker in crew)
    return f"{cases:,} cases in {seconds:.0f} s ({cases / seconds:.0f} a second), {len(report.findings)} findings"


def cause(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"the process ended with {code}"
    return f"the process was ended by {signal.Signals(-code).name}"


def tail(path: Path, most: int = 12) -> str:
    """What a process said before it ended: a sanitizer's report, or the first lines of the stack."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line.strip() for line in lines if line.strip() and not line.startswith("Extension modules")]
    return " | ".join(told[:most])
