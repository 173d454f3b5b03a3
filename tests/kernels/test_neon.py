"""The NEON kernels on another processor: built by a cross compiler, and held against the definition in an emulator."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.attention.test_attend import PATTERNS
from tests.kernels.test_recur import assert_errs_no_more
from tests.support.attend_inputs import LENGTHS, leaf, random_call
from tests.support.native_checks import assert_native_agrees, every_dtype, needs_native
from tests.support.recur_inputs import UPDATES, make_inputs
from tests.support.remote_library import Emulator, RemoteLibrary

from foveate import causal
from foveate.kernels.cpu import loader
from foveate.kernels.cpu.build import build
from foveate.kernels.cpu.compiler import Compiler
from foveate.kernels.cpu.processor import family
from foveate.kernels.cpu.search import Loaded, Status
from foveate.kernels.cpu.variants import BY_NAME, SOURCES

COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
CALLER = Path(__file__).parent / "remote_call.cpp"

emulator = next(filter(shutil.which, EMULATORS), None)
pytestmark = [
    pytest.mark.long,
    needs_native,  # selections are built by the kernels of this machine
    pytest.mark.skipif(family() == "arm", reason="this processor runs the NEON kernels in all other tests"),
    pytest.mark.skipif(not (shutil.which(COMPILER) and emulator), reason=f"{COMPILER} or {EMULATORS[0]} is not here"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The kernels, and the program that calls them, both for ARM."""
    folder = tmp_path_factory.mktemp("neon")
    caller = folder / "remote_call"
    subprocess.run([COMPILER, "-O2", "-std=c++17", str(CALLER), "-o", str(caller), "-ldl"], check=True)
    (kernels,) = build([BY_NAME["neon"]], SOURCES, folder, Compiler((COMPILER,), "cross"))
    assert kernels.error is None, kernels.error.output
    assert emulator is not None
    return Emulator((emulator, "-L", "/usr/aarch64-linux-gnu", str(caller)), kernels.path)


@pytest.fixture
def neon(made: Emulator, monkeypatch: pytest.MonkeyPatch) -> RemoteLibrary:
    """attend(impl="native") runs the NEON kernels."""
    local = loader.library()
    assert local is not None
    library = RemoteLibrary(made, local)
    monkeypatch.setattr(loader, "_loaded", Loaded(library, Status("neon", str(made.library), "compiled")))
    return library


@pytest.fixture(autouse=True)
def _was_used(neon: RemoteLibrary) -> Iterator[None]:
    yield
    assert neon.calls > 0, "nothing ran in the emulator"


@every_dtype
@pytest.mark.parametrize("lengths", [*LENGTHS, (3, 700)], ids=str)
def test_agrees_with_the_definition(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    assert_native_agrees(random_call(*lengths) | {"pattern": random.choice(PATTERNS)}, dtype)


@every_dtype
@pytest.mark.parametrize("dim", [33, 64, 129, 256])
def test_any_number_of_channels(dim: int, dtype: torch.dtype) -> None:
    q, k, v = (
        leaf(2, heads, length, channels, dtype=torch.float64)
        for heads, length, channels in ((4, 40, dim), (2, 70, dim), (2, 70, 257 - dim))
    )
    assert_native_agrees({"q": q, "k": k, "v": v, "pattern": causal}, dtype)


@every_dtype
def test_many_short_sequences(dtype: torch.dtype) -> None:
    q, k, v = (leaf(50, 3, 49, 32, dtype=torch.float64) for _ in range(3))
    bias = leaf(3, 49, 49, dtype=torch.float64)
    assert_native_agrees({"q": q, "k": k, "v": v, "bias": bias}, dtype)


@pytest.mark.parametrize("update", UPDATES)
def test_recurrences(update: str) -> None:
    for decay, dims in (("token", (33, 21)), ("channel", (9, 70))):
        assert_errs_no_more(make_inputs(decay, update, heads=(4, 2, 2, 4), length=70, dims=dims))
