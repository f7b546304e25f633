"""What `fusion.py` shows: a model's file fused into one that answers the same, and what that
gained.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize import checkpoint, clock
from quantize.checkpoint import atomic_write
from quantize.host import describe_machine, machine
from quantize.measuring.comparison import compare as measure_files
from quantize.measuring.plot import bar_chart
from quantize.measuring.result import Measurement
from quantize.run.fusion import BACKENDS, Contender, compare
from quantize.run.fusion.backends import open_file
from quantize.run.fusion.equality import difference, outputs, race

SUFFIXES = {"torchscript": ".pt", "inductor": ".pt2", "onnxruntime": ".onnx", "openvino": ".xml"}
MOST_NAMES = 8  # of operators, in a line

Result = dict[str, Any]


def fuse_file(path: Path, out: Path, *, backend: str, batch: int, threads: int) -> Result:
    """Fuse the model in a file, write the result beside a chart and its numbers, and measure both
    files.

    Args:
        path: a checkpoint of a built-in model.
        out: folder for model_fused.*.
        backend: one of `quantize.run.fusion.BACKENDS`, or "auto" for the fastest that is installed.
        batch: rows of the inputs to fuse for; measured at 1 row too.
        threads: of the measuring processes.

    Returns:
        What model_fused.json holds; `describe` says it in words.

    Raises:
        ValueError: no back end can take the model.
        CheckpointError, MeasurementError: a file can't be read or measured.
        OSError: a file can't be written.
    """
    model: Any = checkpoint.load(path)
    say = partial(print, "fusing:", file=sys.stderr, flush=True)
    names = BACKENDS if backend == "auto" else (backend,)
    rows = compare(model, model.example_inputs(batch), names=names, progress=say)
    present = [row for row in rows[1:] if row.model is not None]
    if not present:
        raise ValueError("; ".join(row.reason for row in rows[1:]))
    best = min(present, key=lambda row: row.latency_ms or math.inf)
    target = write(best.model, out, best.backend)
    result = _facts(model, best, model.example_inputs(batch), path, target)
    result["left_out"] = {row.backend: row.reason for row in rows if row.reason}
    contenders = {row.backend: row.model for row in rows if row.model is not None}
    for size in sorted({1, batch}):
        inputs = model.example_inputs(size)
        _measure(result, contenders, inputs, path, target, threads)
    with atomic_write(target.with_suffix(".png")) as file:
        file.write(bar_chart(result["latency_ms"], "ms per call"))
    with atomic_write(target.with_suffix(".json")) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    return result


def kernel_calls(model: Any, inputs: Tensor) -> Counter[str]:
    """Operators that run during one forward pass, by name, as the profiler sees them."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it complains of the GPU that isn't there
    outputs(model, inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outputs(model, inputs)
    events = profile.key_averages()
    return Counter(
        {e.key: e.count for e in events if "::" in e.key and not e.key.startswith("profiler")}
    )


def write(fused: Any, folder: Path, backend: str) -> Path:
    """Save elsewhere first: each file that stands in `folder` is replaced whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "model_fused" + SUFFIXES[backend]
    with tempfile.TemporaryDirectory() as temporary:
        fused.save(str(Path(temporary) / name))
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == name):
            with atomic_write(folder / file.name) as target, file.open("rb") as source:
                shutil.copyfileobj(source, target)
    return folder / name


def describe(result: Result) -> list[str]:
    """The lines that `fusion.py` prints of what `fuse_file` found."""
    lines = describe_machine(result["machine"])
    if "operators_before" in result:
        before, after = Counter(result["operators_before"]), Counter(result["operators_after"])
        lines.append(f"\noperators before: {before.total():4}  {_common(before)}")
        lines.append(f"operators after:  {after.total():4}  {_common(after)}")
        lines += [f"  - {note}" for note in result["fused"]]
    calls = result["kernel_calls"]
    lines.append(
        f"kernel calls per forward (profiler): {calls['eager']} eager, {calls['fused']} fused"
    )
    lines += result["notes"]
    backend = result["backend"]
    for title, times in result["latency_ms"].items():
        speedup = times["eager"] / times[backend]
        listed = ", ".join(f"{name} {time:.3g} ms" for name, time in times.items())
        lines.append(f"{title}: {listed} ({backend} {speedup:.2f}x)")
    largest = max(result["difference"].values())
    lines.append(f"largest difference, relative to the largest output: {largest:.1e}")
    for name, seconds in result["cold_start_s"].items():
        lines.append(f"cold start, {name}: {seconds:.2f} s from the file to the first answer")
    for name, reason in result["left_out"].items():
        lines.append(f"not used: {name}: {reason}")
    sizes = result["bytes"]
    file, source = result["file"], result["model"]
    lines.append(f"{file}: {sizes[file]:,} bytes ({source}: {sizes[source]:,})")
    return lines


def _facts(model: nn.Module, best: Contender, inputs: Tensor, path: Path, target: Path) -> Result:
    """What is known without a stopwatch."""
    eager, fused = kernel_calls(model, inputs), kernel_calls(best.model, inputs)
    result: Result = {
        "machine": machine(),
        "model": path.name,
        "file": target.name,
        "backend": best.backend,
        "bytes": {path.name: path.stat().st_size, target.name: target.stat().st_size},
        "kernel_calls": {"eager": eager.total(), "fused": fused.total()},
        "difference": {},
        "latency_ms": {},
        "cold_start_s": {},
        "notes": [],
    }
    if best.plan:
        result["operators_before"] = dict(best.plan.before)
        result["operators_after"] = dict(best.plan.after)
        result["fused"] = best.plan.notes
        result["way"] = best.plan.way
    return result


def _measure(
    result: Result,
    contenders: dict[str, nn.Module],
    inputs: Tensor,
    path: Path,
    target: Path,
    threads: int,
) -> None:
    """Time all back ends in turns; of TorchScript and eager the files, in fresh processes."""
    title, backend = f"batch {len(inputs)}", result["backend"]
    expected = outputs(contenders["eager"], inputs)
    result["difference"][title] = difference(outputs(contenders[backend], inputs), expected)
    times = race(contenders, inputs)
    if backend == "torchscript":
        files = {"eager": path, backend: target}
        for measured in measure_files(files, inputs, threads=threads):
            if measured.latency_ms is not None:
                times[measured.name] = measured.latency_ms.median
            result["cold_start_s"][measured.name] = _cold_start(measured)
            result["notes"] += [f"{title}, {measured.name}: {note}" for note in measured.notes]
    elif not result["cold_start_s"]:
        result["cold_start_s"] = {backend: _engine_cold_start(backend, target, inputs)}
    result["latency_ms"][title] = times


def _cold_start(measured: Measurement) -> float:
    return (measured.load_s or 0.0) + (measured.first_call_ms or 0.0) / 1000


def _engine_cold_start(backend: str, file: Path, inputs: Tensor) -> float:
    """Seconds from the file of another engine to its first answer, in this process, which knows
    it.
    """
    return clock.timed(lambda: open_file(backend, file)(inputs))[1]


def _common(counts: Counter[str]) -> str:
    names = ", ".join(f"{count} {name}" for name, count in counts.most_common(MOST_NAMES))
    return f"{names} ..." if len(counts) > MOST_NAMES else names
