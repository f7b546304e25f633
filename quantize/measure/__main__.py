"""Measure one artifact in a fresh process and print one JSON line.

    python -m quantize.measure artifacts/int8.pth
    python -m quantize.measure artifacts/int8.pth --baseline artifacts/model.pth
    python -m quantize.measure net.pth --model mypackage.net:Net --inputs batch.safetensors --evaluate mypackage.test:accuracy

Standard output carries that line and nothing else; what models and libraries print goes to standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch

from quantize.checkpoint import CheckpointError
from quantize.host import default_threads
from quantize.measure import MeasurementError, measure
from quantize.measure.artifact import finite
from quantize.measure.child import nursery, serve
from quantize.script import in_words


def main(argv: Sequence[str] | None = None, *, out: BinaryIO | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    out = out or sys.stdout.buffer
    parser = argparse.ArgumentParser(
        prog="python -m quantize.measure",
        description="Measure one artifact (a checkpoint or a TorchScript file) in a fresh process; prints one JSON line.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="artifact to measure")
    parser.add_argument("--baseline", type=Path, help="artifact to compare with: timed in turns, each in its own process")
    parser.add_argument("--inputs", type=Path, help="example inputs: one array as .npy, or .safetensors named as arguments")
    parser.add_argument("--evaluate", help="module:function, called with the loaded model; returns the metric")
    parser.add_argument("--model", help="module:callable that makes a fresh instance of a foreign architecture")
    parser.add_argument("--threads", type=int, default=default_threads(), help="torch threads")
    parser.add_argument("--rounds", type=int, default=7, help="timed bursts")
    parser.add_argument("--burst-seconds", type=float, default=0.2, help="length of a burst")
    parser.add_argument("--default-allocator", action="store_true", help="leave malloc as it is")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # type: ignore[method-assign]  # one line
    arguments = parser.parse_args(argv)
    try:
        options = {
            "evaluate": _imported(arguments.evaluate),
            "model": _imported(arguments.model),
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "burst_seconds": arguments.burst_seconds,
        }
        inputs = read_inputs(arguments.inputs) if arguments.inputs else None
        keep = not arguments.default_allocator
        result = measure(arguments.file, inputs, baseline=arguments.baseline, keep=keep, **options)
    except (CheckpointError, MeasurementError, ValueError, TypeError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    line = json.dumps(_strict({**dataclasses.asdict(result), "machine": result.machine()}), allow_nan=False)
    out.write(line.encode() + b"\n")
    out.flush()
    return 0


def read_inputs(path: Path) -> Any:
    """Example inputs from a file: `.npy` is one tensor; `.safetensors` keyword arguments, or positional ones named 0, 1, ..."""
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
            positions = [str(i) for i in range(len(tensors))]
            return tuple(tensors[p] for p in positions) if set(tensors) == set(positions) else tensors
    except Exception as error:  # numpy and safetensors raise a dozen kinds
        raise ValueError(f"--inputs {path} can't be read: {error}") from error
    raise ValueError(f"--inputs must be a .npy or .safetensors file, got {path}")


def _imported(spec: str | None) -> Callable[..., Any] | None:
    """`module:name` -> the object; modules of the current folder too."""
    if spec is None:
        return None
    module, _, name = spec.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{spec!r} must be module:name of something importable: {error}") from error
    if not callable(found):
        raise ValueError(f"{spec!r} is not callable but {type(found).__name__}")
    return found


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    return [_strict(v) for v in value] if isinstance(value, (list, tuple)) else value


def _reserve_stdout() -> BinaryIO:
    """The real standard output, after sending everything else that writes there (C++ too) to standard error."""
    sys.stdout.flush()
    real = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return real


def _reserve_stdin() -> BinaryIO:
    """The real standard input; what else reads there (a child of `evaluate`, say) finds it empty."""
    real = os.fdopen(os.dup(0), "rb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return real


if __name__ == "__main__":
    if sys.argv[1:] == ["--nursery"]:  # what forks the workers of quantize.measure.compare; each comes back from it
        nursery(socket.socket(fileno=0))
    if sys.argv[1:] in (["--serve"], ["--nursery"]):
        serve(_reserve_stdin(), _reserve_stdout())
    elif set(sys.argv[1:]) & {"-h", "--help"}:
        main()
    else:
        with _reserve_stdout() as real_stdout:
            sys.exit(main(out=real_stdout))
