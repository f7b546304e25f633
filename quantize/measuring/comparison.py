"""Measure an artifact: its size, latency, memory and quality, from the file, loaded again in a
fresh process.

    evaluate = partial(accuracy, data)
    quantize.measure("int8.pth", inputs, baseline="model.pth", evaluate=evaluate)
    python -m quantize measure artifacts/int8.pth        # one JSON line

    # any other engine: a function that the fresh process calls to build it
    compare({"fp32": "model.pth", "onnx": Build(open_session, "model.onnx")}, inputs)

Every artifact has a process of its own (`nursery.py` says how fresh it is). All are alive side by
side and take turns (A B C A B C ...), one computing at a time, so that a machine that gets slower
in the meantime slows all of them. Each round weighs the same in a latency, and the speed-up is the
ratio of two of these latencies, so that no row contradicts itself. Models run under `torch.no_grad`
(`quantize/clock.py` says why). Left out: GPUs (this package is about CPUs) and throughput over
several streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize import check, surgery
from quantize.calibration import on_cpu
from quantize.host import default_threads
from quantize.measuring.artifact import Build, check_there
from quantize.measuring.nursery import Nursery
from quantize.measuring.result import Measurement
from quantize.measuring.turns import Evaluate, Fresh, Given, Source, open_turns, take_turns
from quantize.saying import Say, silent


def measure(
    path_or_model: Source,
    example_inputs: Any,
    *,
    evaluate: Evaluate | None = None,
    baseline: Source | None = None,
    model: Fresh | None = None,
    **options: Any,
) -> Measurement:
    """Measure one artifact; with `baseline`, interleaved with it, which gives `speedup`.

    Args:
        path_or_model: a file (checkpoint, TorchScript), a `Build` for any other engine, or a model,
            of which the fresh process gets a copy.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            None: the model's own `example_inputs()` if it has that, else no latency.
        evaluate: called with the loaded model in the fresh process; returns a number, a (name,
            number) pair or a dict of them.
        baseline: what it is compared with, of the same kinds.
        model: for an architecture that isn't built in, as in `quantize.load`: a fresh instance or a
            function that makes one.
        options: those of `compare` (threads, rounds, ...).

    Returns:
        Latency in ms, size in bytes, memory in MiB and the metrics, with the machine they were
        measured on.

    Raises:
        TypeError, ValueError, MeasurementError: as `compare` does.
    """
    sources = [path_or_model] if baseline is None else [baseline, path_or_model]
    return compare(sources, example_inputs, evaluate=evaluate, model=model, **options)[-1]


def compare(
    artifacts: Mapping[str, Source] | Sequence[Source],
    example_inputs: Any,
    *,
    evaluate: Evaluate | None = None,
    model: Fresh | None = None,
    threads: int | None = None,
    rounds: int = 7,
    burst_seconds: float = 0.2,
    keep: bool = True,
    keep_going: bool = False,
    timeout_s: float = 600.0,
    progress: Say | None = None,
    nursery: Nursery | None = None,
) -> list[Measurement]:
    """Measure artifacts side by side; the first one is the baseline of `speedup`.

    What can't be sent to another process keeps an artifact, or only its `evaluate`, in the calling
    one; `progress` and the notes say so. Notes also say that the machine was busy.

    Args:
        artifacts: by name, or a sequence of them, named by their stems: files (checkpoints,
            TorchScript), a `Build` for any other engine, or models, of which the fresh process gets
            a copy.
        example_inputs: what `torch.export.export` takes: a tensor, a tuple of positional arguments
            or a dict of keyword arguments. None: the model's own `example_inputs()` if it has that,
            else no latency.
        evaluate: called with the loaded model; returns a number, a (name, number) pair or a dict of
            them. It runs in the fresh process, may be a lambda, and what it uses is sent with it.
        model: for an architecture that isn't built in, as in `quantize.load`: a fresh instance or a
            function that makes one.
        threads: torch threads of each process; default: those of the caller, at most the cores that
            it may use.
        rounds: turns of each artifact.
        burst_seconds: how long it is called in each of them, once at least, and before the first.
        keep: whether the fresh processes call `keep_allocations()`.
        keep_going: whether an artifact that fails, other than the first, gets a `Measurement` that
            says why (`failed`) and the others are measured; otherwise its error is raised.
        timeout_s: for each answer of a process (loading, a burst, `evaluate`), not for its start.
        progress: called with a line for people before each phase.
        nursery: what the processes are forked from, with so many `threads`, so that many
            comparisons import torch once; None: one of this comparison's own.

    Raises:
        CheckpointError: a file can't be read.
        MeasurementError: a model fails on the inputs, or a process dies or doesn't answer.
        TypeError, ValueError: arguments out of range.
    """
    sources = {name: _at_home(source) for name, source in _named(artifacts).items()}
    for file in [*map(_file, sources.values())][: 1 if keep_going else None]:
        if file is not None:
            check_there(file)
    if threads is None:
        threads = default_threads() if nursery is None else nursery.threads
    _check(threads, rounds, burst_seconds, timeout_s)
    say = progress or silent
    given = Given(on_cpu(example_inputs), evaluate, model, threads, keep, timeout_s, nursery)
    with ExitStack() as stack:
        stack.enter_context(_torch_threads(threads))
        say(f"starting {len(sources)} processes")
        turns = open_turns(stack, sources, given)
        for turn in turns:
            for note in turn.notes:
                say(f"{turn.name}: {note}")
        return take_turns(turns, rounds, burst_seconds, say, threads=threads, keep_going=keep_going)


def _check(threads: int, rounds: int, burst_seconds: float, timeout_s: float) -> None:
    check.count("threads", threads)
    check.count("rounds", rounds)
    check.number("burst_seconds", burst_seconds, "[0, inf)")
    check.number("timeout_s", timeout_s, "(0, inf]")


def _named(artifacts: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    if isinstance(artifacts, Mapping):
        named = dict(artifacts)
    elif isinstance(artifacts, Sequence) and not isinstance(artifacts, str):
        named = {}
        for source in artifacts:
            name = _stem(source)
            copies = 1 + sum(n == name or n.startswith(f"{name} (") for n in named)
            named[name if copies == 1 else f"{name} ({copies})"] = source
    else:
        raise TypeError(
            f"artifacts must be a dict or a sequence of paths, models and Builds, got "
            f"{type(artifacts).__name__}"
        )
    if not named:
        raise ValueError("artifacts is empty: nothing to measure")
    for name, source in named.items():
        what = source.make if isinstance(source, Build) else source
        if not isinstance(what, (str, Path)) and not callable(what):
            raise TypeError(
                f"artifact {name!r} must be a path, a model or a Build of a function, got "
                f"{type(what).__name__}"
            )
    return named


def _at_home(source: Source) -> Source:
    """A model is measured on the CPU, wherever it was."""
    return surgery.at("cpu", source) if isinstance(source, nn.Module) else source


def _stem(source: Source) -> str:
    file = _file(source)
    return type(source).__name__ if file is None else file.stem


def _file(source: Source) -> Path | None:
    file = source.file if isinstance(source, Build) else source
    return Path(file) if isinstance(file, (str, Path)) else None


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
