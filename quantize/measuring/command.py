"""Measure one artifact in a fresh process and print one JSON line.

    python -m quantize measure artifacts/int8.pth
    python -m quantize measure artifacts/int8.pth --baseline artifacts/model.pth
    python -m quantize measure net.pth --model mypackage.net:Net --inputs batch.safetensors \\
        --evaluate mypackage.test:accuracy

Standard output carries that line and nothing else; what models and libraries print goes to standard
error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import nn

from quantize.checkpoint import IN_FOLDER
from quantize.host import default_threads
from quantize.measuring.comparison import measure
from quantize.measuring.rows import strict
from quantize.measuring.streams import reserved_stdout
from quantize.models.opening import fresh_for, open_model
from quantize.script import Parser, exit_code, imported

_PROG = "quantize measure"


def main(argv: Sequence[str] | None = None, *, out: BinaryIO | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after a user's mistake, 130 after Ctrl-C.

    Args:
        argv: the arguments; None: those of the process.
        out: where the JSON line goes; None: standard output.
    """

    def work() -> None:
        arguments = _flags().parse_args(argv)
        with reserved_stdout() as stdout:
            line = _line(arguments)
            stream = out or stdout
            stream.write(line)
            stream.flush()

    return exit_code(_PROG, work, "stopped")


def _flags() -> Parser:
    parser = Parser(_PROG, __doc__)
    inputs_help = "example inputs: one array as .npy, or .safetensors named as arguments"
    model_help = "module:callable that makes a fresh instance of a foreign architecture"
    baseline_help = "artifact to compare with: timed in turns, each in its own process"
    evaluate_help = "module:function, called with the loaded model; returns the metric"
    parser.add_argument("file", type=Path, help="artifact to measure, or a folder of one")
    parser.flag("--baseline", baseline_help, type=Path)
    parser.flag("--inputs", inputs_help, type=Path)
    parser.flag("--evaluate", evaluate_help)
    parser.flag("--model", model_help)
    parser.flag("--threads", "torch threads", type=int, default=default_threads())
    parser.flag("--rounds", "timed bursts", type=int, default=7)
    parser.flag("--burst-seconds", "length of a burst", type=float, default=0.2)
    allocator_help = "leave malloc as it is"
    parser.add_argument("--default-allocator", action="store_true", help=allocator_help)
    return parser


def _line(arguments: argparse.Namespace) -> bytes:
    source, model = arguments.file, imported(arguments.model)
    if model is None:
        source, model = _of_folder(arguments.file)
    result = measure(
        source,
        read_inputs(arguments.inputs) if arguments.inputs else None,
        baseline=arguments.baseline,
        evaluate=imported(arguments.evaluate),
        model=model,
        threads=arguments.threads,
        rounds=arguments.rounds,
        burst_seconds=arguments.burst_seconds,
        keep=not arguments.default_allocator,
    )
    values = strict({**dataclasses.asdict(result), "machine": result.machine()})
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def _of_folder(path: Path) -> tuple[Path | nn.Module, nn.Module | None]:
    """What is measured of a folder, and what its file is loaded into: the config beside it says
    what that is. A folder of transformers, which has no file of ours, is measured as it was opened.
    """
    file = path / IN_FOLDER if path.is_dir() else path
    if file.name == IN_FOLDER and file.is_file():
        return file, fresh_for(file)
    return (open_model(path), None) if path.is_dir() else (path, None)


def read_arrays(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of a `.npz` or `.safetensors` file by name, that of a `.npy` file as "x"."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return {"x": torch.from_numpy(loaded)}
    return {name: torch.from_numpy(loaded[name]) for name in loaded.files}


def read_inputs(path: Path) -> Any:
    """Example inputs from a file: `.npy` is one tensor; `.safetensors` keyword arguments, or
    positional ones named 0, 1, ...
    """
    if path.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"--inputs must be a .npy or .safetensors file, got {path}")
    try:
        arrays = read_arrays(path)
    except Exception as error:  # numpy and safetensors raise a dozen kinds
        raise ValueError(f"--inputs {path} can't be read: {error}") from error
    if path.suffix == ".npy":
        return arrays["x"]
    positions = [str(i) for i in range(len(arrays))]
    return tuple(arrays[p] for p in positions) if set(arrays) == set(positions) else arrays
