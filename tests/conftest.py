"""For every test: a fresh seed that a failure names, uninitialised memory full of NaN, few threads."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Generator, Iterator

import pytest
import torch

THREADS = 2
SEED = int(os.environ.get("FOVEATE_SEED", random.SystemRandom().randrange(2**31)))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    # torch then fills what torch.empty and its kin return with NaN (or the greatest integer).
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()


def pytest_report_header() -> str:
    return f"random numbers: FOVEATE_SEED={SEED} repeats this run's"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This test's own seed: another in every run, the same whichever tests run beside it."""
    return zlib.crc32(f"{SEED} {request.node.nodeid}".encode())


@pytest.fixture(autouse=True)
def _fresh_random_numbers(seed: int) -> Iterator[None]:
    """Seed torch and Python for the test; code under test that seeds them again leaves no trace."""
    states = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.manual_seed(seed)
    yield
    random.setstate(states[0])
    torch.set_rng_state(states[1])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("random numbers", f"FOVEATE_SEED={SEED} repeats this failure"))
    return report
