"""The machine a number was measured on: CPU, instruction sets, cores, threads, memory and its allocator.

A latency means nothing without these lines, so every report prints them. Reading them never fails: what a machine doesn't tell
is None or left out. The allocator is here because it can be half of a CPU latency (see `keep_allocations`).
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# The instruction sets that decide how fast the kernels here run, by architecture; each with the names (of
# `torch.cpu.get_capabilities`) of which one is enough.
_X86 = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512_f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "BF16": ("avx512_bf16", "amx_bf16"),
    "AMX": ("amx_int8", "amx_bf16"),
}
_ARM = {"NEON": ("neon",), "DOTPROD": ("dot",), "I8MM": ("i8mm",), "BF16": ("bf16",), "SVE": ("sve",), "SME": ("sme",)}

# mallopt's parameter numbers (glibc's malloc.h), and the values that make it keep large blocks.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEP_MMAP_BYTES, _KEEP_MMAP_BYTES_OLD_GLIBC, _KEEP_TOP_PAD_BYTES = 1 << 30, 32 << 20, 64 << 20

_kept_mmap_bytes = 0  # what keep_allocations() has set in this process; glibc has no call to ask


def machine() -> dict[str, Any]:
    """What a reader needs to place a latency; JSON values only, never raises.

    `cpu` (name), `architecture`, `instruction_sets` (name -> present, those that matter on this architecture), `cores`
    (physical), `logical_cores`, `usable_cores` (left by affinity and a container's quota), `threads` (torch's, now),
    `memory_gb`, `torch`, `python`, `os`, `allocator`.
    """
    cpu = _attempt(lambda: dict(torch.cpu.get_capabilities()), {})
    architecture = _attempt(platform.machine, "") or cpu.get("architecture") or "unknown"
    return {
        "cpu": _attempt(lambda: _cpu_name(cpu), None) or "unknown CPU",
        "architecture": architecture,
        "instruction_sets": _attempt(lambda: _instruction_sets(architecture, cpu), {}),
        "cores": cpu.get("num_physical_cores"),
        "logical_cores": _attempt(os.cpu_count, None),
        "usable_cores": _attempt(_usable_cores, None),
        "threads": torch.get_num_threads(),
        "memory_gb": _attempt(lambda: round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1), None),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": _attempt(_os_name, "unknown"),
        "allocator": _attempt(allocator_state, "unknown"),
    }


def describe_machine(host: dict[str, Any]) -> list[str]:
    """The dict of `machine()` as a few lines for people."""
    sets: dict[str, bool] = host.get("instruction_sets") or {}
    present = ", ".join(n for n, there in sets.items() if there) or "none known"
    absent = ", ".join(n for n, there in sets.items() if not there)
    cores = f"{host.get('usable_cores') or host.get('logical_cores') or '?'} usable cores"
    memory = f", {host['memory_gb']} GB memory" if host.get("memory_gb") else ""
    return [
        f"CPU: {host.get('cpu', '?')} ({host.get('architecture', '?')}), {cores}, {host.get('threads', '?')} threads{memory}",
        f"Instruction sets: {present}" + (f" (not: {absent})" if absent else ""),
        f"Software: torch {host.get('torch', '?')}, Python {host.get('python', '?')}, {host.get('os', '?')}",
        f"Allocator: {host.get('allocator', 'unknown')}",
    ]


def keep_allocations() -> bool:
    """Tell glibc's malloc to keep large freed blocks for the life of this process. Returns whether that is now so.

    glibc maps every block above a threshold (128 KiB, growing to 32 MiB) afresh and gives it back at once, so each large
    activation is page-faulted again on every call; that can double a convolutional network's latency. This is `mallopt` (see
    mallopt(3)) with M_MMAP_THRESHOLD = 1 GiB (32 MiB where glibc refuses more), M_TRIM_THRESHOLD = never and M_TOP_PAD =
    64 MiB; the environment variables MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ do the same at start.

    The price: memory that was once used isn't returned before the process ends. Nothing in this package calls it on import.
    Where malloc isn't glibc's (musl, macOS, Windows, a preloaded jemalloc or tcmalloc) it changes nothing and returns False;
    `allocator_state()` says so.
    """
    global _kept_mmap_bytes
    if _glibc_version() is None or _preloaded_malloc() is not None:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    for threshold in (_KEEP_MMAP_BYTES, _KEEP_MMAP_BYTES_OLD_GLIBC):
        if mallopt(_MMAP_THRESHOLD, threshold):  # 1 is success
            mallopt(_TRIM_THRESHOLD, -1)
            mallopt(_TOP_PAD, _KEEP_TOP_PAD_BYTES)
            _kept_mmap_bytes = threshold
            return True
    return False


def allocator_state() -> str:
    """One line: which malloc this process uses and whether it keeps large blocks."""
    preloaded = _preloaded_malloc()
    if preloaded is not None:
        return f"{preloaded} (preloaded), its own settings"
    version = _glibc_version()
    if version is None:
        return "not glibc, system default (keep_allocations does nothing here)"
    if _kept_mmap_bytes:
        return f"{version}, keeps large blocks (mmap threshold {_kept_mmap_bytes >> 20} MiB, no trimming)"
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
    given = [f"{n}={os.environ[n]}" for n in names if os.environ.get(n)]
    return f"{version}, set by the environment: {' '.join(given)}" if given else f"{version}, default (returns large blocks)"


def peak_rss_mb() -> float | None:
    """Most memory that this process has had resident, in MiB; None where the system doesn't tell.

    Linux: VmHWM, because `ru_maxrss` of a child starts at the size of the process that started it.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def _attempt(read: Callable[[], T], default: T) -> T:
    try:
        return read()
    except Exception:  # odd machines fail in odd ways, and a missing line is better than no measurement
        return default


def _instruction_sets(architecture: str, cpu: dict[str, Any]) -> dict[str, bool]:
    architecture = architecture.lower()
    if architecture in ("x86_64", "amd64", "i386", "i686", "x86"):
        wanted = _X86
    elif architecture.startswith(("aarch64", "arm")):
        wanted = _ARM
    else:
        return {}
    return {name: any(bool(cpu.get(key)) for key in keys) for name, keys in wanted.items()}


def _cpu_name(cpu: dict[str, Any]) -> str | None:
    name = str(cpu.get("cpu_name") or "").strip()
    info: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            info[key.strip()] = value.strip()
    name = name if name.lower() not in ("", "unknown") else info.get("model name") or info.get("Model") or platform.processor()
    if "cpu family" in info and "model" in info:  # clouds shorten the name to "AMD EPYC"; the numbers still tell which
        name += f" (family {info['cpu family']}, model {info['model']})"
    elif "CPU part" in info:
        name = f"{name} (implementer {info.get('CPU implementer')}, part {info['CPU part']})".strip()
    return name or None


def _usable_cores() -> int | None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _attempt(lambda: Path("/sys/fs/cgroup/cpu.max").read_text().split(), ["max"])  # "200000 100000": 2 cores
    if cores and len(quota) == 2 and quota[0] != "max":
        cores = max(1, min(cores, math.ceil(int(quota[0]) / int(quota[1]))))
    return cores


def _os_name() -> str:
    pretty = _attempt(lambda: platform.freedesktop_os_release().get("PRETTY_NAME"), None)
    return f"{pretty}, {platform.system()} {platform.release()}" if pretty else platform.platform()


def _glibc_version() -> str | None:
    """`"glibc 2.36"`, or None where the C library is another one."""
    return _attempt(lambda: os.confstr("CS_GNU_LIBC_VERSION"), None) if hasattr(os, "confstr") else None


def _preloaded_malloc() -> str | None:
    preload = os.environ.get("LD_PRELOAD", "")
    return next((name for name in ("jemalloc", "tcmalloc", "mimalloc") if name in preload), None)
