"""This machine: what it computes fast, how many cores it leaves us, how threads wait.

A latency means nothing without these facts, so every report prints them, and what malloc does with
memory (allocator.py). Reading them never fails: what a machine doesn't tell is None or left out.

Threads. torch starts a thread per physical core that affinity leaves, and knows nothing of a
container's quota. Threads beyond the quota are stopped in the middle of a parallel loop while the
others wait for them, so `default_threads` counts both.

Waiting. The wheels of torch for Linux bring GNU's OpenMP, libgomp (those for macOS and Windows
bring LLVM's, which yields its core while it waits). A thread of libgomp that comes to a barrier
looks 300,000 times, some 4 ms long, before it sleeps. On a busy machine the thread that it waits
for has no core, and the one that looks keeps a core from it: a run of 35 s took 280. Looking for as
long as falling asleep and waking up would take costs at most twice what one who knows the end of
the wait pays (Karlin et al., "Empirical Studies of Competitive Spinning for a Shared-Memory
Multiprocessor", 1991). SPIN_COUNT is about 0.1 ms, such a time in a virtual machine. Training of
the default decoder there, two threads, tokens per second alone / beside two busy processes: 7,500 /
6,000 with a count of 1,000, 11,600 / 4,300 with 10,000, 12,800 / 2,900 with 100,000. libgomp reads
the count once, when torch is imported: scripts set it before that, and measuring processes get it
in their environment. `benchmarks/threads.py` compares counts on a free and on a loaded machine.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from quantize.allocator import allocator_state

T = TypeVar("T")

# The instruction sets that decide how fast the kernels here run, by architecture; each with the
# names (of `torch.cpu.get_capabilities`) of which one is enough.
_X86 = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512_f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "BF16": ("avx512_bf16", "amx_bf16"),
    "AMX": ("amx_int8", "amx_bf16"),
}
_ARM = {
    "NEON": ("neon",),
    "DOTPROD": ("dot",),
    "I8MM": ("i8mm",),
    "BF16": ("bf16",),
    "SVE": ("sve",),
    "SME": ("sme",),
}

# GOMP_SPINCOUNT: how often a waiting thread looks before it sleeps; see the header.
SPIN_COUNT = "10000"
# Who sets one of these has chosen how threads wait.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def machine() -> dict[str, Any]:
    """What a reader needs to place a latency; JSON values only, never raises.

    `cpu` (name), `architecture`, `instruction_sets` (name -> present, those that matter on this
    architecture), `cores` (physical), `logical_cores`, `usable_cores` (left by affinity and a
    container's quota), `threads` (torch's, now), `waiting` (what OpenMP's threads do at a barrier),
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
        "usable_cores": _attempt(usable_cores, None),
        "threads": torch.get_num_threads(),
        "waiting": waiting_policy(),
        "memory_gb": _attempt(
            lambda: round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1), None
        ),
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
    cores = _counted(host.get("usable_cores") or host.get("logical_cores"), "usable core")
    threads = _counted(host.get("threads"), "thread")
    memory = f", {host['memory_gb']} GB memory" if host.get("memory_gb") else ""
    return [
        f"CPU: {host.get('cpu', '?')} ({host.get('architecture', '?')}), {cores}, "
        f"{threads}{memory}",
        f"Instruction sets: {present}" + (f" (not: {absent})" if absent else ""),
        f"Waiting threads: {host.get('waiting', 'unknown')}",
        f"Software: torch {host.get('torch', '?')}, Python {host.get('python', '?')}, "
        f"{host.get('os', '?')}",
        f"Allocator: {host.get('allocator', 'unknown')}",
    ]


def native_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether bfloat16 matrix products run in hardware here (AVX512-BF16, AMX, Arm BF16; Ampere or
    newer), not emulated.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))


def compute_dtype(stored: torch.dtype, device: torch.device | str = "cpu") -> torch.dtype:
    """The fastest dtype for matrix products with weights stored as float16 or bfloat16 that keeps
    every stored bit.
    """
    if torch.device(device).type == "cuda":
        return stored
    return torch.bfloat16 if stored == torch.bfloat16 and native_bf16(device) else torch.float32


def default_threads() -> int:
    """Threads to compute with: what OMP_NUM_THREADS says, else torch's own choice, but at most
    `usable_cores()`.
    """
    chosen = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS"):
        return chosen
    return min(chosen, usable_cores())


def usable_cores() -> int:
    """Cores that CPU affinity and the quota of the control groups leave this process; a part of a
    core counts as one.
    """
    by_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if by_affinity else os.cpu_count() or 1
    groups = _attempt(Path("/proc/self/cgroup").read_text, "")
    quota = _attempt(lambda: cpu_quota(groups), math.inf)
    return max(1, min(cores, math.ceil(quota))) if quota < math.inf else cores


def cpu_quota(groups: str, mount: Path = Path("/sys/fs/cgroup")) -> float:
    """Seconds of CPU time per second that control groups (versions 1 and 2) allow; infinite where
    none sets a limit.

    Args:
        groups: the text of /proc/self/cgroup, a line `number:controllers:path` per hierarchy. The
            group itself and all above it are asked; in a container the path is often another
            machine's, and only the root is there.
        mount: folder of the hierarchies.
    """
    quotas = [math.inf]
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = Path(path.lstrip("/"))
        for hierarchy in (mount, mount / "unified", mount / "cpu", mount / controllers):
            quotas += [_quota_of(hierarchy / level) for level in (group, *group.parents)]
    return min(quotas)


def _quota_of(group: Path) -> float:
    """The limit in one folder: `cpu.max` holds "200000 100000" for two cores, version 1 has a file
    for each number.
    """
    allowed, *period = _attempt((group / "cpu.max").read_text, "max").split()
    if not period:
        allowed = _attempt((group / "cpu.cfs_quota_us").read_text, "-1").strip()
        period = [_attempt((group / "cpu.cfs_period_us").read_text, "100000")]
    limited = allowed != "max" and int(allowed) > 0
    return int(allowed) / int(period[0]) if limited else math.inf


def with_waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy for a new process in which waiting threads sleep soon, unless `environment` says how
    they wait.
    """
    chosen = any(environment.get(name) for name in _WAITING)
    return dict(environment) if chosen else {**environment, "GOMP_SPINCOUNT": SPIN_COUNT}


def waiting_policy(environment: Mapping[str, str] = os.environ) -> str:
    """What `environment` says about OpenMP's threads at a barrier; in force if it said so when
    torch was imported.
    """
    said = [f"{name}={environment[name]}" for name in _WAITING if environment.get(name)]
    return " ".join(said) or "default (libgomp spins 300,000 times before it sleeps)"


def _counted(count: int | None, thing: str) -> str:
    return f"{count or '?'} {thing}" + ("" if count == 1 else "s")


def _attempt(read: Callable[[], T], default: T) -> T:
    try:
        return read()
    except Exception:
        # odd machines fail in odd ways, and a missing line is better than no measurement
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
    if name.lower() in ("", "unknown"):
        name = info.get("model name") or info.get("Model") or platform.processor()
    if "cpu family" in info and "model" in info:
        # clouds shorten the name to "AMD EPYC"; the numbers still tell which
        name += f" (family {info['cpu family']}, model {info['model']})"
    elif "CPU part" in info:
        told = f"(implementer {info.get('CPU implementer')}, part {info['CPU part']})"
        name = f"{name} {told}".strip()
    return name or None


def _os_name() -> str:
    pretty = _attempt(lambda: platform.freedesktop_os_release().get("PRETTY_NAME"), None)
    return f"{pretty}, {platform.system()} {platform.release()}" if pretty else platform.platform()
