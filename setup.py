"""A wheel that carries the compiled kernels, where there is a compiler; all else is said in
pyproject.toml.
"""

import runpy
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGE = Path(__file__).with_name("quantize")
CARRIED = "quantize/native/carried"  # as in quantize/native/build.py


class Build(build_py):
    """Also compiles, unless the source tree itself is installed: there, first use does."""

    def run(self):
        """Copy the package's files, and put the libraries beside them."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, CARRIED)
        shutil.rmtree(folder, ignore_errors=True)
        toolchain = runpy.run_path(str(PACKAGE / "native/toolchain.py"))
        for line in toolchain["carry"](PACKAGE, folder):
            print(line, file=sys.stderr)


class Wheel(bdist_wheel):
    """Libraries with a plain C interface need this platform, but no particular Python."""

    def get_tag(self):
        """Asked after everything was built."""
        folder = Path(self.get_finalized_command("build_py").build_lib, CARRIED)
        if not any(folder.glob("*.so")):
            return super().get_tag()
        self.root_is_pure = False
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel})
