"""How this package's C++ is compiled: the compiler, its flags, and the key of what comes out.

Imports Python's own library alone: setup.py runs this file without the package, whose
dependencies aren't there, to compile what a wheel carries.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

# Contraction is off: it would round differently where the CPU multiplies and adds in one step.
FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-Wno-psabi", "-shared", "-fPIC"),
)
# Flags of the levels of instruction sets, the best last. Each has all that those before it have.
_DOTPROD = ("-march=armv8.2-a+dotprod",)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_VNNI = (*_AVX512, "-mavx512vnni")
_AMX = (*_VNNI, "-mamx-tile", "-mamx-int8")
_X86 = {"generic": (), "avx2": _AVX2, "avx512": _AVX512, "vnni": _VNNI, "amx": _AMX}
_ARM = {"generic": (), "dotprod": _DOTPROD}
LEVELS = _X86 | _ARM
IS_X86 = platform.machine() in ("x86_64", "AMD64")
IS_ARM = platform.machine() in ("aarch64", "arm64")

HERE = Path(__file__).parent
DIGEST_BYTES = hashlib.sha256().digest_size
# it takes up to 25 s; a compiler that hangs is stopped, and others wait no longer for its result
COMPILER_S = 120.0
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


class UnavailableError(OSError):
    """A library can't be had here for this level of instruction sets; one for a lower level may."""


@dataclass(frozen=True)
class Target:
    """A library: a source for a level of instruction sets.

    Args:
        source: the file to compile. What it includes stands beside it or in this folder.
        level: one of LEVELS.
    """

    source: Path
    level: str

    @property
    def flags(self) -> tuple[str, ...]:
        """All that the compiler is given beside files."""
        return (*FLAGS, *LEVELS[self.level])

    def name(self, *known: bytes) -> str:
        """The file name of the library: it tells sources and flags.

        Args:
            known: what else it depends on.
        """
        flags = " ".join(self.flags).encode()
        parts = (*(path.read_bytes() for path in files(self.source)), *known, flags)
        key = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        return f"{self.source.stem}-{self.level}-{key}.so"


def levels() -> list[str]:
    """Those of this machine's architecture, the best last."""
    if IS_X86:
        return list(_X86)
    return list(_ARM) if IS_ARM else ["generic"]


@functools.cache
def files(source: Path) -> tuple[Path, ...]:
    """A source and all that it includes of this package. Raises OSError."""
    found = [source]
    for path in found:  # grows
        for name in _INCLUDE.findall(path.read_text()):
            beside = source.with_name(name)
            included = beside if beside.exists() else HERE / name
            if included not in found:
                found.append(included)
    return tuple(found)


def compiler() -> list[str] | None:
    """The compiler's command, or None."""
    for command in (shlex.split(os.environ.get("CXX", "")) or ["g++"], ["clang++"]):
        program = shutil.which(command[0])
        if program is not None:
            return [program, *command[1:]]
    return None


@functools.cache
def kept_name(target: Target, command: tuple[str, ...]) -> str:
    """The name of a library that a user's cache keeps: it also tells what the compiler knows, since
    machines may share a folder.

    Raises: UnavailableError: the compiler doesn't know the level. OSError: it can't be run.
    """
    done = run([*command, *target.flags, "-dM", "-E", "-x", "c++", os.devnull])
    if done.returncode != 0:
        raise UnavailableError(_refusal(target, command[0], done))
    return target.name(done.stdout)


def compiled(target: Target, command: list[str]) -> bytes:
    """The content of the library. Raises OSError."""
    with tempfile.TemporaryDirectory(prefix="quantize-") as scratch:
        made = Path(scratch) / "made.so"
        call = [*command, *target.flags, f"-I{HERE}", str(target.source), "-o", str(made)]
        for threads in (["-fopenmp"], []):  # a compiler without OpenMP gives one thread
            done = run([*call, *threads])
            if done.returncode == 0:
                return made.read_bytes()
    raise OSError(_refusal(target, command[0], done))


def _refusal(target: Target, command: str, done: subprocess.CompletedProcess[bytes]) -> str:
    message = done.stderr.decode(errors="replace").strip()
    return f"{command} can't compile {target.source.name}: {message[-500:]}"


def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run a compiler for at most COMPILER_S; it and all that it started are stopped then.

    Raises: OSError: it can't be run, or was stopped.
    """
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(
        command, stdin=nothing, stdout=pipe, stderr=pipe, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=COMPILER_S)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise OSError(f"{command[0]} took over {COMPILER_S:g} s and was stopped") from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


# ------------------------------------------------------------------------------------------------
# files with a digest


def sealed(content: bytes) -> bytes:
    """The content with its SHA-256 digest behind it."""
    return content + hashlib.sha256(content).digest()


def opened(data: bytes) -> bytes | None:
    """The content of what was sealed; None if it was cut short or changed."""
    content, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


# ------------------------------------------------------------------------------------------------
# a wheel


def carry(package: Path, folder: Path) -> list[str]:
    """Compile every source of the package for every level that the compiler knows.

    Args:
        package: the folder of the package's sources.
        folder: gets the libraries.

    Returns: a line for each library that can't be had, or one that says that none can.
    """
    command = compiler()
    if command is None or os.name != "posix":
        return ["no C++ compiler: the wheel carries no compiled kernels"]
    targets = [Target(*parts) for parts in product(package.rglob("*.cpp"), levels())]
    folder.mkdir(parents=True, exist_ok=True)

    def make(target: Target) -> str | None:
        try:
            (folder / target.name()).write_bytes(sealed(compiled(target, command)))
        except OSError as error:
            return f"the wheel carries no {target.source.stem} for {target.level}: {error}"
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [line for line in pool.map(make, targets) if line is not None]
