"""What pyproject.toml cannot say: a wheel holds the native kernels, if there is a compiler where it is made."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "src"))

from foveate.native.build import build  # noqa: E402
from foveate.native.compiler import CannotCompile, find_compiler  # noqa: E402
from foveate.native.processor import family  # noqa: E402
from foveate.native.variants import SOURCES, VARIANTS  # noqa: E402


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
            self.distribution.holds_kernels = compile_into(Path(self.build_lib, "foveate", "native", "lib"))


class Wheel(bdist_wheel):
    """A wheel for any Python 3: kernels are called through ctypes and know no Python."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def compile_into(folder: Path) -> bool:
    """Compile every variant that the compiler takes; whether there is any."""
    shutil.rmtree(folder, ignore_errors=True)
    variants = [variant for variant in VARIANTS if variant.family == family()]
    try:
        compiler = find_compiler()
    except CannotCompile as reason:
        print(f"no native kernels in this wheel: {reason}")
        return False
    folder.mkdir(parents=True)
    results = build(variants, SOURCES, folder, compiler)
    for built in results:
        print(f"native kernels for {built.variant.name}: {built.error or 'compiled'}")
    return any(built.error is None for built in results)


setup(distclass=MaybeNative, cmdclass={"build_py": BuildKernels, "bdist_wheel": Wheel})
