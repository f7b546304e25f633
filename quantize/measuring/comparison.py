"""Measure an artifact: its size, latency, memory and quality, from the file, loaded again in a
fresh process.

    quantize.measure("int8.pth", inputs, baseline="model.pth", evaluate=partial(accuracy, data))
    python -m quantize measure artifacts/int8.pth        # one JSON line

Every artifact has a process of its own (`process.py` says how fresh it is). All are alive side by
side and take turns (A B C A B C ...), one computing at a time, so that a machine that gets slower
in the meantime slows all of them. Each round weighs the same in a latency, and the speed-up is the
ratio of two of these latencies, so that no row contradicts itself. Models run under
`torch.no_grad`, as `generate` runs them and most users do: `torch.inference_mode` gives tensors
without a version counter, by which int8 layers know that they have quantized an input before. Left
out: GPUs (this package is about CPUs) and throughput over several streams.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize.host import (
    allocator_state,
    default_threads,
    describe_machine,
    keep_allocations,
    machine,
    waiting_policy,
    with_waiting,
)  # fmt: skip
from quantize.measuring.artifact import Artifact, MeasurementError, check_there, fingerprint
from quantize.measuring.child import CannotSend
from quantize.measuring.process import Nursery, Worker, pack, pack_inputs, payload

__all__ = [
    "Latency",
    "Measurement",
    "MeasurementError",
    "allocator_state",
    "compare",
    "describe_machine",
    "fingerprint",
    "keep_allocations",
    "machine",
    "measure",
]

BUSY_ABOVE = 1.5  # times p10: on a quiet machine p90 stays below
_ENOUGH = 5  # timed calls to tell that from

Source = str | Path | nn.Module | Callable[..., Any]
Evaluate = Callable[[Any], Any]
Fresh = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call: percentiles over all timed calls, each round weighing the same."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Measurement:
    """What was measured of one artifact."""

    name: str
    file: str | None  # None: a model in memory
    bytes: int  # of the file; in memory: of the stored tensors
    parameters: int  # stored elements: weights in parameters and buffers, shared ones once
    latency_ms: Latency | None  # None: there were no inputs to call it with
    speedup: (
        float | None
    )  # median latency of the first artifact of the same comparison over that of this one
    metrics: dict[str, float]  # what `evaluate` returned; the first one is the one to show
    load_s: float | None  # from the file to a usable model, torch already imported
    first_call_ms: float | None  # cold: kernels are chosen and weights packed in it
    peak_rss_mb: (
        float | None
    )  # most memory the fresh process had resident before `evaluate`; of torch, what it touched
    output_sha256: str | None  # `fingerprint` of the output for the example inputs
    threads: int
    allocator: str
    notes: tuple[str, ...] = ()
    waiting: str = "unknown"  # what OpenMP's threads do at a barrier

    def machine(self) -> dict[str, Any]:
        """`quantize.host.machine()` as it was where this was measured."""
        return {
            **machine(),
            "threads": self.threads,
            "allocator": self.allocator,
            "waiting": self.waiting,
        }


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

    Arguments, the other options (threads, rounds, ...) and what is raised: see `compare`.
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
    timeout_s: float = 600.0,
    progress: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Measure artifacts side by side; the first one is the baseline of `speedup`.

    artifacts: files (checkpoints, TorchScript) by name, or a sequence of them, named by their
        stems; models in memory too, which a fresh process gets a copy of, and whose notes say that
        no file was loaded.
    example_inputs: what `torch.export.export` takes: a tensor, a tuple of positional arguments or a
        dict of keyword arguments. None: the model's own `example_inputs()` if it has that, else no
        latency.
    evaluate: called with the loaded model; returns a number, a (name, number) pair or a dict of
        them. It runs in the fresh process and may come from the running script or be a lambda; what
        it uses is sent with it. What it started is ended with the process.
    model: for an architecture that isn't built in, as in `quantize.load`: a fresh instance or a
        function that makes one.
    threads: torch threads of each process; default: those of the caller, at most the cores that it
        may use.
    rounds, burst_seconds: each artifact is called for about `burst_seconds` in each of the rounds,
        once at least.
    keep: whether the fresh processes call `keep_allocations()`.
    timeout_s: for each answer of a process (loading, a burst, `evaluate`), not for its start.
    progress: called with a line for people before each phase: starting, loading, timing,
        evaluating.

    What can't be sent to another process (an open file, say) keeps an artifact, or only its
    `evaluate`, in the calling process; `progress` and the row's notes say so, with the reason. They
    also say when times moved so much that the machine was busy.

    Raises CheckpointError for a file that can't be read, MeasurementError for a model that fails on
    the inputs or a process that dies or doesn't answer, TypeError or ValueError for arguments out
    of range.
    """
    sources = _named(artifacts)
    threads = default_threads() if threads is None else threads
    _check(threads, rounds, burst_seconds, timeout_s)
    say = progress or (lambda line: None)
    with ExitStack() as stack:
        stack.enter_context(_torch_threads(threads))
        say(f"starting {len(sources)} processes")
        turns = _open(
            stack,
            sources,
            example_inputs,
            evaluate,
            model,
            threads=threads,
            keep=keep,
            timeout_s=timeout_s,
        )
        for turn in turns:
            for note in turn.notes:
                say(f"{turn.name}: {note}")
        return _take_turns(turns, threads, rounds, burst_seconds, say)


@dataclass
class _Turn:
    """One artifact while it is being measured."""

    name: str
    holder: Artifact | Worker
    here: Artifact  # the same, in the calling process; not loaded unless it is the holder
    fresh: bool  # whether the holder has a process of its own
    evaluates_here: bool = False
    allocator: str = ""
    waiting: str = ""
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    bursts: list[list[float]] = field(default_factory=list)


def _check(threads: int, rounds: int, burst_seconds: float, timeout_s: float) -> None:
    for name, count in (("threads", threads), ("rounds", rounds)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
    if not 0 <= burst_seconds < math.inf:
        raise ValueError(f"burst_seconds must be a finite number >= 0, got {burst_seconds!r}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be above 0, got {timeout_s!r}")


def _named(artifacts: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    if isinstance(artifacts, Mapping):
        named = dict(artifacts)
    elif isinstance(artifacts, Sequence) and not isinstance(artifacts, str):
        named = {}
        for source in artifacts:
            name = Path(source).stem if isinstance(source, (str, Path)) else type(source).__name__
            copies = 1 + sum(n == name or n.startswith(f"{name} (") for n in named)
            named[name if copies == 1 else f"{name} ({copies})"] = source
    else:
        raise TypeError(
            f"artifacts must be a dict or a sequence of paths and models, got "
            f"{type(artifacts).__name__}"
        )
    if not named:
        raise ValueError("artifacts is empty: nothing to measure")
    for name, source in named.items():
        if isinstance(source, (str, Path)):
            check_there(Path(source))
        elif not callable(source):
            raise TypeError(
                f"artifact {name!r} must be a path or a model, got {type(source).__name__}"
            )
    return named


def _open(
    stack: ExitStack,
    sources: Mapping[str, Source],
    example_inputs: Any,
    evaluate: Evaluate | None,
    model: Fresh | None,
    *,
    threads: int,
    keep: bool,
    timeout_s: float,
) -> list[_Turn]:
    """A started process per artifact, the calling process for what another one can't have."""
    packed, why_here, why_evaluate_here = _packed(example_inputs, evaluate, model)
    nursery = None if why_here else stack.enter_context(Nursery(threads=threads))
    turns: list[_Turn] = []
    for name, source in sources.items():
        here = Artifact(source, example_inputs, evaluate=evaluate, model=model)
        turn = _Turn(
            name, here, here, fresh=False, allocator=allocator_state(), waiting=waiting_policy()
        )
        turns.append(turn)
        if here.path is None:
            turn.notes.append("in memory: no file was loaded")
        try:
            if nursery is None:
                raise CannotSend(why_here)
            things = payload(**packed) if here.path else payload(**packed, source=pack(source))
            worker = Worker(
                nursery, here.path, things, name=here.name, keep=keep, timeout_s=timeout_s
            )
        except CannotSend as reason:
            turn.notes.append(f"measured in the calling process: {reason}")
            continue
        stack.callback(worker.close)
        turn.holder, turn.fresh, turn.allocator = worker, True, worker.allocator
        turn.waiting = waiting_policy(with_waiting(os.environ))
        turn.evaluates_here = bool(why_evaluate_here)
        turn.notes += [why_evaluate_here] if why_evaluate_here else []
    return turns


def _packed(
    example_inputs: Any, evaluate: Evaluate | None, model: Fresh | None
) -> tuple[dict[str, bytes], str, str]:
    """What every fresh process needs; why it can't have that, and why it can't have `evaluate`, if
    so.
    """
    try:
        things = {"example_inputs": pack_inputs(example_inputs), "model": pack(model)}
    except CannotSend as reason:
        return {}, str(reason), ""
    try:
        things["evaluate"] = pack(evaluate)
    except CannotSend as reason:
        return things, "", f"evaluated in the calling process: {reason}"
    return things, "", ""


def _take_turns(
    turns: list[_Turn], threads: int, rounds: int, burst_seconds: float, say: Callable[[str], None]
) -> list[Measurement]:
    say("loading and warming up")
    for turn in turns:
        turn.facts = turn.holder.load()
        if turn.facts["callable"]:
            turn.facts |= turn.holder.warm_up()
    timed = [turn for turn in turns if turn.facts["callable"]]
    say(f"timing in {rounds} rounds")
    for _ in range(rounds):
        for turn in timed:
            turn.bursts.append(turn.holder.burst(burst_seconds))
    say("evaluating")
    for turn in turns:
        turn.facts["peak_rss_mb"] = (
            turn.holder.peak_rss_mb() if turn.fresh and turn.here.path else None
        )
        turn.facts["metrics"] = _evaluate(turn)
    return [_measurement(turn, turns[0], threads) for turn in turns]


def _evaluate(turn: _Turn) -> dict[str, float]:
    if not turn.evaluates_here:
        return turn.holder.evaluate()
    turn.here.load()
    metrics = turn.here.evaluate()
    turn.here.module = None  # one model at a time
    return metrics


def _measurement(turn: _Turn, baseline: _Turn, threads: int) -> Measurement:
    facts, notes = turn.facts, list(turn.notes)
    latency = latency_of(turn.bursts) if turn.bursts else None
    speedup = None
    if latency is None:
        notes.append("no example inputs: latency not measured")
    elif baseline.bursts:
        speedup = latency_of(baseline.bursts).median / latency.median
    if latency and sum(map(len, turn.bursts)) >= _ENOUGH and latency.p90 > BUSY_ABOVE * latency.p10:
        notes.append(f"busy machine: p90 is {latency.p90 / latency.p10:.1f} times p10")
    return Measurement(
        name=turn.name,
        file=None if turn.here.path is None else str(turn.here.path),
        bytes=facts["bytes"],
        parameters=facts["parameters"],
        latency_ms=latency,
        speedup=speedup,
        metrics=facts["metrics"],
        load_s=facts["load_s"],
        first_call_ms=facts.get("first_call_ms"),
        peak_rss_mb=facts["peak_rss_mb"],
        output_sha256=facts.get("output_sha256"),
        threads=threads,
        allocator=turn.allocator,
        notes=tuple(notes),
        waiting=turn.waiting,
    )


def latency_of(bursts: Sequence[Sequence[float]]) -> Latency:
    """Percentiles of the times (ms) of all rounds' calls; a fast round has more calls, but no more
    weight.
    """
    weights = torch.cat(
        [torch.full([len(burst)], 1 / len(burst), dtype=torch.float64) for burst in bursts]
    )
    times, order = torch.cat([torch.tensor(burst, dtype=torch.float64) for burst in bursts]).sort()
    share = weights[order].cumsum(0) / len(bursts)  # of all weight, up to this time
    median, p10, p90 = (times[int((share < part - 1e-9).sum())].item() for part in (0.5, 0.1, 0.9))
    return Latency(median, p10, p90)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
