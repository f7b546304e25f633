"""Say what this machine has that decides how fast models run here, and what it lacks.

quantize doctor
quantize doctor --json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize import host
from quantize.native import Kernels, bfloat16, cache, conv, int8_library, isa, recurrent, toolchain
from quantize.run.decoding import structs
from quantize.run.fusion import backends
from quantize.script import Parser, threads
from quantize.script import main as run

# Native code, by what it computes.
KERNELS = {
    "int8": int8_library.KERNELS,
    "convolutions": conv.KERNELS,
    "recurrent layers": recurrent.KERNELS,
    "training in bf16": bfloat16.KERNELS,
    "decoding": structs.KERNELS,
}
ORIGINS = {
    "carried": "carried by this package",
    "kept": "compiled by an earlier process",
    "compiled": "compiled by this process",
}
MISSING = "torch's own operations"
# Packages that this one uses where they are installed, and what for.
OPTIONAL = {
    "transformers": "to open folders of models other than the Llama family",
    "tokenizers": "to read a folder's tokenizer.json",
    "sklearn": "for the built-in images of train.py",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: the arguments; None: those of the process.
    """
    parser = Parser("quantize doctor", __doc__)
    parser.add_argument("--json", action="store_true", help="print the facts as one JSON object")
    parser.flag("--threads", "torch threads; none: the cores that are usable", type=threads)
    return run(parser, argv, _show)


def _show(arguments: argparse.Namespace) -> None:
    found = facts()
    if arguments.json:
        print(json.dumps(found, indent=1, allow_nan=False))
        return
    for line in host.describe_machine(found["machine"]):
        print(line)
    for line in _described(found):
        print(line)
    for line in advice(found):
        print(f"! {line}")


def facts() -> dict[str, Any]:
    """What was found, as JSON values.

    Returns:
        "machine" (see `host.machine`), "affinity" (cores), "quota" (cores' worth of time; None for
        no limit), "compiler" (a command or None), "native" (levels that kernels are compiled for),
        "kernels" (name of KERNELS to where they come from), "cache" (folder of compiled kernels, or
        why there is none), "back_ends" and "packages" (name to None, or why it isn't there).
    """
    compiler = toolchain.compiler()
    return {
        "machine": host.machine(),
        "affinity": _affinity(),
        "quota": _quota(),
        "compiler": None if compiler is None else " ".join(compiler),
        "native": isa.levels(),
        "kernels": {name: _origin(kernels) for name, kernels in KERNELS.items()},
        "cache": _cache(),
        "back_ends": {"torchscript": None} | {n: backends.missing(n) for n in backends.NEEDS},
        "packages": {name: _absent(name) for name in OPTIONAL},
    }


def advice(found: dict[str, Any]) -> list[str]:
    """What would make models faster here, or keep a number from being trusted; a line each.

    Args:
        found: of `facts`.
    """
    lines = []
    sets = found["machine"]["instruction_sets"]
    if found["compiler"] is None and MISSING in str(found["kernels"]):
        lines.append(
            "no C++ compiler: int8 layers and decoding use torch's own operations, which give the "
            "same numbers and are slower; install g++ or clang++"
        )
    if sets and not any(sets.get(name) for name in ("VNNI", "AMX", "DOTPROD", "I8MM")):
        lines.append(
            "no instructions for int8 products (VNNI, AMX): int8 makes models faster here too, "
            "but by less"
        )
    if sets and not host.native_bf16():
        lines.append("no bfloat16 in hardware: 16-bit weights save memory here, not time")
    usable, threads_now = found["machine"]["usable_cores"], found["machine"]["threads"]
    if usable and threads_now > usable:
        lines.append(f"{threads_now} threads share {usable} cores: set OMP_NUM_THREADS={usable}")
    if found["quota"] is not None and found["quota"] < 1:
        lines.append(f"a quota of {found['quota']:g} cores: calls stop in the middle of a period")
    return lines


def _described(found: dict[str, Any]) -> list[str]:
    quota = "none" if found["quota"] is None else f"{found['quota']:g} cores"
    here = [name for name, why in found["back_ends"].items() if why is None]
    packages = [name for name, absent in found["packages"].items() if not absent]
    lines = [
        f"Affinity: {found['affinity'] or 'unknown'} cores; quota: {quota}",
        f"Compiler: {found['compiler'] or 'none'}; kernels for: {', '.join(found['native'])}",
        *(f"  {name}: {origin}" for name, origin in found["kernels"].items()),
        f"Compiled kernels are kept in: {found['cache']}",
        f"Back ends of fuse: {', '.join(here)}",
    ]
    lines += [f"  {why}" for why in found["back_ends"].values() if why is not None]
    lines.append(f"Optional packages: {', '.join(packages) or 'none'}")
    lines += [f"  {why}" for why in found["packages"].values() if why is not None]
    return lines


def _origin(kernels: Kernels) -> str:
    """Where a process finds these."""
    try:
        found = kernels.find(compile_now=False)
    except OSError as error:
        return f"{MISSING} ({error})"
    return "compiled at first use" if found is None else f"{found.level}, {ORIGINS[found.origin]}"


def _affinity() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _quota() -> float | None:
    try:
        quota = host.cpu_quota(Path("/proc/self/cgroup").read_text())
    except (OSError, ValueError):
        return None
    return quota if quota < math.inf else None


def _cache() -> str:
    try:
        path, folder = cache.open_folder()
    except OSError as error:
        return f"nowhere ({error})"
    os.close(folder)
    return str(path)


def _absent(name: str) -> str | None:
    if importlib.util.find_spec(name) is not None:
        return None
    return f"{name} isn't installed, which is needed {OPTIONAL[name]}"
