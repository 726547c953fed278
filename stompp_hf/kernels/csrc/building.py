"""The compiled kernels in setuptools' terms: how they are built, and what a wheel is without them.

pyproject.toml names these classes. They lie beside the C files, in a folder that is no package, so that no wheel has
them, and setuptools loads them without importing the library.
"""

import sys
import sysconfig
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import BaseError, CCompilerError

HERE = "stompp_hf/kernels/csrc"
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")
"""Whether one file serves this Python and all later ones: there is no stable ABI without the global lock."""

# Without contraction: a product and a sum that become one operation round once, and torch's round twice.
GCC = ["-O3", "-g0", "-std=c11", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
MSVC = ["/O2", "/std:c11", "/experimental:c11atomics", "/fp:precise"]

LEFT_BY_RUNS = r"(^|/)(runs|__pycache__|\.[^/]*_cache)/|\.(so|pyd|pyc)$"
NO_KERNELS = """
  =====================================================================================
  stompp-hf: THE COMPILED KERNELS COULD NOT BE BUILT. Everything works without them, and
  packed models are slower than real ones. With a C compiler, this gives them, where
  pip's cache would give this build again:
  pip install --force-reinstall --no-deps --no-cache-dir stompp-hf
  What failed: {}
  =====================================================================================
"""


class Build(build):
    """Everything that is built, the kernels among it."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.distribution.ext_modules = [
            Extension(
                "stompp_hf.kernels._native",
                sorted(str(file) for file in Path(HERE).glob("*.c")),
                depends=sorted(str(file) for file in Path(HERE).glob("*.[hi]*")),
                define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE else [],
                py_limited_api=STABLE,
                optional=True,
            )
        ]


class BuildExt(build_ext):
    """The kernels, if a compiler is there; without one the distribution is a pure one."""

    def build_extension(self, ext: Extension) -> None:
        msvc = self.compiler.compiler_type == "msvc"
        ext.extra_compile_args, ext.extra_link_args = (MSVC, []) if msvc else (GCC, ["-pthread"])
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError) as error:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build
            self.distribution.ext_modules = None
            print(NO_KERNELS.format(error), file=sys.stderr)


class BdistWheel(bdist_wheel):
    """A wheel whose tag says what it holds: py3-none-any without kernels, which no index can take for more.

    pip's cache goes by the name of the sources, and hands out either kind again: hence --no-cache-dir above.
    """

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        self.py_limited_api = "cp311" if STABLE else False
        super().run()


class Sdist(sdist):
    """The sources, with what the tests need and the examples."""

    def make_distribution(self) -> None:
        for folder in (".ci", "examples", "stompp_hf", "tests"):
            self.filelist.graft(folder)
        self.filelist.append("CHANGELOG.md")
        self.filelist.exclude_pattern(LEFT_BY_RUNS, is_regex=True)
        super().make_distribution()
