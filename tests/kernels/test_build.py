"""Building and finding native kernels, on sources of a few lines: each way to get a library, and each to get none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from foveate.kernels.cpu import build_command, cache, loader, search, variants
from foveate.kernels.cpu.build import build
from foveate.kernels.cpu.compiler import CannotCompile, find_compiler
from foveate.kernels.cpu.processor import lacks
from foveate.kernels.cpu.search import Loaded, Places
from foveate.kernels.cpu.variants import BY_NAME, SOURCES, VARIANTS, Variant

ROOT = Path(__file__).parents[2]
RUNNABLE = [variant for variant in VARIANTS if lacks(variant) is None]
FOREIGN = [variant for variant in VARIANTS if lacks(variant) is not None]
KERNEL = 'extern "C" __attribute__((visibility("default"))) int answer(void) { return 42; }\n'
SWITCHES = ("FOVEATE_ISA", "FOVEATE_NO_JIT", "FOVEATE_SANITIZE")


def has_compiler() -> bool:
    try:
        return bool(find_compiler())
    except CannotCompile:
        return False


needs_compiler = pytest.mark.skipif(not (has_compiler() and RUNNABLE), reason="no C++ compiler for this processor")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a temporary folder of this test's own, and no switch of the caller's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home" / "foveate"


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Sources that compile in a moment, and no library beside them."""
    (tmp_path / "csrc").mkdir()
    shutil.copy(SOURCES / "version.cpp", tmp_path / "csrc")
    (tmp_path / "csrc" / "kernel.cpp").write_text(KERNEL, encoding="utf-8")
    return Places(tmp_path / "csrc", tmp_path / "lib")


def make(variant: Variant, places: Places) -> Path:
    """The variant's library, put where an install puts it."""
    places.packaged.mkdir(exist_ok=True)
    (built,) = build([variant], places.sources, places.packaged, find_compiler())
    assert built.error is None
    return built.path


def edit(places: Places) -> None:
    (places.sources / "kernel.cpp").write_text(KERNEL.replace("42", "43"), encoding="utf-8")


def answer(found: Loaded) -> int:
    assert found.library is not None, found.status.reason
    return int(found.library.answer())


def compiler_that(does: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put some shell before the compiler."""
    script = folder / "compiler"
    command = " ".join(find_compiler().command)
    script.write_text(f'#!/bin/sh\n{does}\nexec {command} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


# ---- where a library comes from ---------------------------------------------------------------------------


@needs_compiler
def test_compiled_at_first_then_out_of_the_cache(places: Places, home: Path) -> None:
    first, second = search.search(places), search.search(places)
    assert (first.status.origin, second.status.origin) == ("compiled", "cache")
    assert answer(first) == answer(second) == 42
    assert Path(str(second.status.path)).is_relative_to(home)
    assert second.status.isa == RUNNABLE[0].name


@needs_compiler
def test_the_package_comes_first(places: Places, home: Path) -> None:
    packaged = make(RUNNABLE[0], places)
    found = search.search(places)
    assert (found.status.origin, found.status.path) == ("package", str(packaged))
    assert answer(found) == 42
    assert not home.exists()


@needs_compiler
def test_a_library_older_than_its_sources_is_not_used(places: Places) -> None:
    make(RUNNABLE[0], places)
    assert answer(search.search(places)) == 42
    edit(places)
    found = search.search(places)
    assert found.status.origin == "compiled"
    assert answer(found) == 43


@needs_compiler
def test_a_library_whose_sources_are_not_there_is_used(places: Places) -> None:
    make(RUNNABLE[0], places)
    shutil.rmtree(places.sources)
    assert search.search(places).status.origin == "package"


@needs_compiler
def test_what_was_compiled_serves_where_the_compiler_is_gone(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    search.search(places)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert search.search(places).status.origin == "cache"


# ---- FOVEATE_ISA ------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("variant", RUNNABLE, ids=lambda variant: variant.name)
def test_a_variant_can_be_forced(variant: Variant, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_ISA", variant.name)
    found = search.search(places)
    assert found.status.isa == variant.name
    assert answer(found) == 42
    assert {name for name, _ in found.status.skipped} == BY_NAME.keys() - {variant.name}


@pytest.mark.parametrize("name", ["sse", *(variant.name for variant in FOREIGN)])
def test_a_variant_that_cannot_run_is_refused_with_those_that_can(
    name: str, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOVEATE_ISA", name)
    with pytest.raises(ValueError) as refusal:
        search.search(places)
    assert f"FOVEATE_ISA={name}" in str(refusal.value)
    assert all(word in str(refusal.value) for word in ("none", *(variant.name for variant in RUNNABLE)))


def test_native_kernels_can_be_switched_off(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_ISA", "none")
    found = search.search(places)
    assert found.library is None
    assert "FOVEATE_ISA=none" in str(found.status.reason)


# ---- libraries that must not be used ----------------------------------------------------------------------


def cut_in_half(library: Path) -> None:
    library.write_bytes(library.read_bytes()[: library.stat().st_size // 2])


def no_library_at_all(library: Path) -> None:
    library.write_bytes(b"not a library")
    cache.publish(library, library)  # its checksum is right


def for_another_processor(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[18:20] = b"\xf3\x00"  # ELF's e_machine: RISC-V
    library.write_bytes(content)
    cache.publish(library, library)


@needs_compiler
@pytest.mark.parametrize("damage", [cut_in_half, no_library_at_all, for_another_processor])
def test_a_damaged_library_in_the_cache_is_built_again(damage: Callable[[Path], None], places: Places) -> None:
    # In processes of their own: this one would still have the first library open.
    first = in_a_process(places)
    damage(Path(first.split()[1]))
    assert in_a_process(places) == first
    assert in_a_process(places) == first.replace("compiled", "cache")


@needs_compiler
def test_a_library_of_another_interface_is_built_again(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    first = in_a_process(places)
    cached = Path(first.split()[1])
    shutil.copy(of_another_interface(places, monkeypatch), cached)
    cache.publish(cached, cached)
    shutil.rmtree(places.packaged)
    assert in_a_process(places) == first
    assert in_a_process(places) == first.replace("compiled", "cache")


def of_another_interface(places: Places, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(variants, "ABI", 99)
        return make(RUNNABLE[0], places)


@needs_compiler
def test_packaged_libraries_that_do_not_fit_are_skipped_with_the_reason(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, least = RUNNABLE[0], RUNNABLE[-1]
    monkeypatch.setenv("FOVEATE_ISA", best.name)
    monkeypatch.setenv("FOVEATE_NO_JIT", "1")

    def reason() -> str:
        found = search.search(places)
        assert found.library is None
        return dict(found.status.skipped)[best.name]

    of_another_interface(places, monkeypatch)
    assert "version 99 of the interface" in reason()
    if best is not least:
        shutil.move(make(least, places), places.packaged / f"{best.name}.so")
        assert f"the kernels for {least.name}" in reason()
    for_another_processor(make(best, places))
    assert "does not load" in reason()
    make(best, places)
    edit(places)
    assert "other sources" in reason()


# ---- compiling --------------------------------------------------------------------------------------------


@needs_compiler
def test_processes_at_once_compile_once(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    compiler_that(f'case "$*" in *" -c "*) echo "$*" >> {log}; sleep 1;; esac', tmp_path, monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        origins = sorted(said.split()[0] for said in pool.map(in_a_process, [places] * 3))
    assert origins == ["cache", "cache", "compiled"]
    assert len(log.read_text(encoding="utf-8").splitlines()) == len(variants.units(places.sources))


def in_a_process(places: Places) -> str:
    """Where a new process gets the library from."""
    script = """
import sys
from pathlib import Path
from foveate.kernels.cpu.search import Places, search
found = search(Places(*map(Path, sys.argv[1:])))
assert found.library and found.library.answer() == 42, found.status
print(found.status.origin, found.status.path)
"""
    return run_python(script, str(places.sources), str(places.packaged))


def run_python(script: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_compiler
def test_a_variant_that_the_compiler_refuses_is_passed_over(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = list(RUNNABLE[0].abilities.values())[-1]
    refusal = f'case "$*" in *{flag}*) echo "error: unknown option {flag}" >&2; exit 1;; esac'
    compiler_that(refusal, tmp_path, monkeypatch)
    status = search.search(places).status
    assert status.isa == (RUNNABLE[1].name if RUNNABLE[1:] else None)
    assert f"unknown option {flag}" in dict(status.skipped)[RUNNABLE[0].name]


@needs_compiler
def test_sources_that_do_not_compile_leave_none_with_the_error(places: Places) -> None:
    (places.sources / "kernel.cpp").write_text("nonsense\n", encoding="utf-8")
    found = search.search(places)
    assert found.library is None
    assert "'nonsense'" in str(found.status.reason)


@needs_compiler
def test_who_edits_sources_meanwhile_does_no_harm(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = KERNEL.replace("42", "43").replace('"', '\\"')
    compiler_that(f'case "$*" in *" -c "*) echo "{new}" > {places.sources}/kernel.cpp;; esac', tmp_path, monkeypatch)
    assert (answer(search.search(places)), answer(search.search(places))) == (42, 43)


def test_without_a_compiler_there_are_none_with_the_reason(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(places.sources))
    found = search.search(places)
    assert found.library is None
    assert "no C++ compiler" in str(found.status.reason) or not RUNNABLE


def test_without_a_compiler_everything_else_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    script = """
import torch
import foveate
from foveate.kernels.cpu import loader
q = torch.randn(1, 2, 100, 8, requires_grad=True)
foveate.attend(q, q, q, foveate.window(5)).sum().backward()
assert q.grad.isfinite().all()
print(loader.status().reason if loader.library() is None else "not compiled here")
"""
    assert re.search("no-such-compiler|processor|not compiled here", run_python(script))


def test_compiling_at_first_use_can_be_forbidden(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_NO_JIT", "1")
    found = search.search(places)
    assert found.library is None
    assert "FOVEATE_NO_JIT" in str(found.status.reason) or not RUNNABLE


@needs_compiler
def test_slow_compiling_is_announced(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search.search(places)
    assert capsys.readouterr().err == ""
    edit(places)
    monkeypatch.setattr(search, "PATIENCE", 0.0)
    search.search(places)
    assert f"compiling the {RUNNABLE[0].name} kernels" in capsys.readouterr().err


# ---- the cache --------------------------------------------------------------------------------------------


@needs_compiler
def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_folder(
    places: Places, tmp_path: Path, home: Path
) -> None:
    home.parent.write_text("a file, so that no folder can be made in it", encoding="utf-8")
    first, second = search.search(places), search.search(places)
    assert (first.status.origin, second.status.origin) == ("compiled", "cache")
    assert Path(str(first.status.path)).is_relative_to(tmp_path / "temporary")


@needs_compiler
def test_a_temporary_folder_that_others_can_write_is_not_trusted(places: Places, tmp_path: Path, home: Path) -> None:
    home.parent.write_text("", encoding="utf-8")
    library = Path(str(search.search(places).status.path))
    library.parents[1].chmod(0o777)
    found = search.search(places)
    assert answer(found) == 42
    assert not Path(str(found.status.path)).is_relative_to(library.parents[1])
    assert any("others may write" in caution for caution in found.status.cautions)


def test_only_the_newest_folders_are_kept(home: Path) -> None:
    (home / "something else").mkdir(parents=True)
    for age in range(cache.KEPT + 3):
        folder = home / cache.key(f"{age:016}", "g++")
        folder.mkdir()
        os.utime(folder, (1e9 - age, 1e9 - age))
    cache.prune(home)
    kept = {folder.name[:16] for folder in home.iterdir()}
    assert kept == {"something else", *(f"{age:016}" for age in range(cache.KEPT))}


# ---- the process ------------------------------------------------------------------------------------------


def test_threads_of_python_load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[Places] = []

    def slow_search(places: Places) -> Loaded:
        searches.append(places)
        time.sleep(0.1)
        return Loaded(None, search.Status(reason="none in this test"))

    monkeypatch.setattr(loader, "_loaded", None)
    monkeypatch.setattr(loader, "search", slow_search)
    with ThreadPoolExecutor(8) as pool:
        reasons = {status.reason for status in pool.map(lambda _: loader.status(), range(64))}
    assert (len(searches), reasons) == (1, {"none in this test"})


# ---- by hand, and at install ------------------------------------------------------------------------------


@needs_compiler
def test_by_hand(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_command, "SOURCES", places.sources)
    name = RUNNABLE[-1].name

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            build_command.main(["--isa", name, *arguments])
        assert end.value.code == 0
        return capsys.readouterr().out

    assert re.match(rf"{name}: [\d.]+ s, ", said())
    assert f"{name}: there already, " in said()
    assert re.match(rf"{name}: [\d.]+ s, ", said("--force"))
    assert str(tmp_path / "made" / f"{name}.so") in said("--into", str(tmp_path / "made"))
    assert (tmp_path / "made" / f"{name}.so").exists()


@needs_compiler
def test_by_hand_what_is_wrong_is_said(
    places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_command, "SOURCES", places.sources)
    (places.sources / "kernel.cpp").write_text("nonsense\n", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        build_command.main(["--isa", RUNNABLE[0].name])
    told = capsys.readouterr()
    assert end.value.code == 1
    assert "not compiled" in told.out and "kernel.cpp:1" in told.err


@needs_compiler
def test_a_sanitized_library_is_another_one(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = places.hash_for(RUNNABLE[0])
    monkeypatch.setenv("FOVEATE_SANITIZE", "1")
    assert places.hash_for(RUNNABLE[0]) != plain
    (built,) = build([RUNNABLE[0]], places.sources, tmp_path, find_compiler())
    if built.error:
        pytest.skip(f"sanitizers are not here: {built.error}")
    assert b"__asan" in built.path.read_bytes()


def test_neon_is_built_by_a_cross_compiler(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("aarch64-linux-gnu-g++"):
        pytest.skip("aarch64-linux-gnu-g++ is not here")
    monkeypatch.setenv("CXX", "aarch64-linux-gnu-g++")
    assert make(BY_NAME["neon"], places).read_bytes()[18:20] == b"\xb7\x00"  # ELF's e_machine: AArch64


@pytest.fixture
def checkout(tmp_path: Path, places: Places) -> Path:
    """What an install is made from, with the quick sources."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("weights", "csrc", "lib", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", folder / "src", ignore=ignored)
    shutil.copytree(places.sources, folder / "src" / "foveate" / "kernels" / "cpu" / "csrc")
    return folder


def wheel(checkout: Path) -> zipfile.ZipFile:
    script = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", script, "made"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = (checkout / "made").glob("*.whl")
    return zipfile.ZipFile(made)


@pytest.fixture
def _setuptools() -> None:
    pytest.importorskip("setuptools", minversion="77")


@needs_compiler
@pytest.mark.usefixtures("_setuptools")
def test_a_wheel_holds_what_the_compiler_makes(checkout: Path, tmp_path: Path) -> None:
    with wheel(checkout) as made:
        made.extractall(tmp_path / "installed")
    assert re.search(r"-py3-none-(linux|macosx)\w+\.whl$", str(made.filename))
    native = tmp_path / "installed" / "foveate" / "kernels" / "cpu"
    assert [file.name for file in native.glob("lib/*")] == [f"{RUNNABLE[0].name}.so"], "the best for this processor"
    assert (native / "csrc" / "kernel.cpp").exists()
    found = search.search(Places(native / "csrc", native / "lib"))
    assert found.status.origin == "package"
    assert answer(found) == 42


@pytest.mark.usefixtures("_setuptools")
def test_a_wheel_without_a_compiler_is_for_any_machine(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = checkout / "build" / "lib" / "foveate" / "kernels" / "cpu" / "lib"
    stale.mkdir(parents=True)
    (stale / "avx2.so").touch()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with wheel(checkout) as made:
        names = made.namelist()
    assert str(made.filename).endswith("-py3-none-any.whl")
    assert "foveate/kernels/cpu/csrc/version.cpp" in names
    assert not [name for name in names if name.endswith(".so")]
