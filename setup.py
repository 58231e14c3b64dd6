"""Two import packages in one distribution: `polyvit_fast` and, from kernels/, `polyvit_kernels`.

With POLYVIT_AOT=1 in the environment, a wheel also holds the kernels as a C library (CMakeLists.txt), compiled by the Triton that is
installed for the Python that builds; CMAKE_ARGS goes to CMake. The wheel is then one for this platform, but for any Python 3.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BinaryDistribution(Distribution):
    """One whose wheel is not for every platform."""

    def has_ext_modules(self) -> bool:
        """As if it had a module in C."""
        return True


class AnyPythonWheel(bdist_wheel):
    """A library without a line of Python's C API is no part of any version of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """(Python, ABI, platform)."""
        return "py3", "none", super().get_tag()[2]


class BuildWithLibrary(build_py):
    """Puts the C library and its header into `polyvit_kernels/lib`."""

    def run(self) -> None:
        """Build; an editable install gets no library."""
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "polyvit_kernels", "lib")
            folder.mkdir(parents=True, exist_ok=True)
            for path in (build_library(ROOT / "build" / "library"), ROOT / "kernels" / "csrc" / "polyvit_kernels.h"):
                shutil.copy2(path, folder)


def build_library(folder: Path) -> Path:
    """Run CMake in `folder`; the library's path."""
    # pip hides the installed packages from a build by PYTHONPATH; Triton and PyTorch are wanted as they are installed.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    missing = [name for name in ("torch", "triton", "jaxtyping") if subprocess.run([sys.executable, "-c", FIND, name], env=env).returncode]
    if missing:
        raise SystemExit(
            f"POLYVIT_AOT=1 compiles with the packages of {sys.executable}, which lacks {' '.join(missing)}: install them first"
        )
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not cmake:
        raise SystemExit("POLYVIT_AOT=1 needs CMake 3.22 or newer: install the system's, or pip install cmake")
    (folder / "CMakeCache.txt").unlink(missing_ok=True)  # the options of an earlier build are not those of this one
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run([*configure, *shlex.split(os.environ.get("CMAKE_ARGS", ""))], env=env, check=True)
    subprocess.run([cmake, "--build", str(folder), "--target", "polyvit_kernels"], env=env, check=True)
    return folder / "libpolyvit_kernels.so"


FIND = "import importlib.util, sys; sys.exit(not importlib.util.find_spec(sys.argv[1]))"
WITH_LIBRARY = {"distclass": BinaryDistribution, "cmdclass": {"build_py": BuildWithLibrary, "bdist_wheel": AnyPythonWheel}}

setup(
    packages=find_packages(include=["polyvit_fast", "polyvit_fast.*"])
    + find_packages("kernels", include=["polyvit_kernels", "polyvit_kernels.*"]),
    package_dir={"polyvit_fast": "polyvit_fast", "polyvit_kernels": "kernels/polyvit_kernels"},
    package_data={"polyvit_fast": ["py.typed"], "polyvit_kernels": ["py.typed"], "polyvit_kernels.tiles": ["measured/*.json"]},
    **(WITH_LIBRARY if os.environ.get("POLYVIT_AOT") == "1" else {}),
)
