"""What pyproject.toml cannot say: a wheel holds the native kernels, if there is a compiler where it is made."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "src"))

from foveate.kernels.cpu.build import build  # noqa: E402
from foveate.kernels.cpu.compiler import CannotCompile, Compiler, find_compiler  # noqa: E402
from foveate.kernels.cpu.processor import family, lacks  # noqa: E402
from foveate.kernels.cpu.variants import SOURCES, VARIANTS, Variant  # noqa: E402


class MaybeNative(Distribution):
    """A distribution for one platform once it holds kernels, else for any."""

    holds_kernels = False

    def has_ext_modules(self) -> bool:
        return self.holds_kernels


class BuildKernels(build_py):
    """Copy the package and compile the kernels into it; an editable install leaves that to their first use."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.distribution.holds_kernels = compile_into(Path(self.build_lib, "foveate", "kernels", "cpu", "lib"))


class Wheel(bdist_wheel):
    """A wheel for any Python 3: kernels are called through ctypes and know no Python."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def compile_into(folder: Path) -> bool:
    """Compile the best variant for this processor that the compiler takes; whether there is any.

    Another processor's is compiled where it is first used. With FOVEATE_VARIANTS=all every one for this kind of
    processor, for a wheel that goes to other machines.
    """
    shutil.rmtree(folder, ignore_errors=True)
    kin = [variant for variant in VARIANTS if variant.family == family()]
    wants_all = os.environ.get("FOVEATE_VARIANTS") == "all"
    fit = [variant for variant in kin if lacks(variant) is None] or kin[-1:]
    groups = [kin] if wants_all else [[variant] for variant in fit]
    try:
        compiler = find_compiler()
        folder.mkdir(parents=True)
        return any(compiled(group, folder, compiler) for group in groups)
    except (CannotCompile, OSError) as reason:
        print(f"no native kernels in this wheel: {reason}")
        shutil.rmtree(folder, ignore_errors=True)
        return False


def compiled(variants: list[Variant], folder: Path, compiler: Compiler) -> bool:
    results = build(variants, SOURCES, folder, compiler)
    for built in results:
        print(f"native kernels for {built.variant.name}: {built.error or 'compiled'}")
    return any(built.error is None for built in results)


setup(distclass=MaybeNative, cmdclass={"build_py": BuildKernels, "bdist_wheel": Wheel})
