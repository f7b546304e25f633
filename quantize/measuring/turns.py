"""The artifacts of one comparison, each in a process of its own, taking turns.

A `Turn` is one of them while it is being measured. `open_turns` starts the processes, `take_turns`
asks them, one computing at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from quantize import surgery
from quantize.allocator import allocator_state
from quantize.checkpoint import CheckpointError
from quantize.checkpoint.building import without_data
from quantize.host import waiting_policy, with_waiting
from quantize.measuring.artifact import Artifact, Build, MeasurementError
from quantize.measuring.child import CannotSend
from quantize.measuring.nursery import Nursery, modules_of
from quantize.measuring.process import Worker, pack, pack_inputs, payload
from quantize.measuring.result import Latency, Measurement, latency_of
from quantize.saying import Say

BUSY_ABOVE = 1.5  # times p10: on a quiet machine p90 stays below
_ENOUGH = 5  # timed calls to tell that from

Source = str | Path | nn.Module | Callable[..., Any] | Build
Evaluate = Callable[[Any], Any]
Fresh = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class Given:
    """What all artifacts of a comparison share: see `compare`."""

    example_inputs: Any
    evaluate: Evaluate | None
    model: Fresh | None
    threads: int
    keep: bool = True
    timeout_s: float = 600.0
    nursery: Nursery | None = None


@dataclass
class Turn:
    """One artifact while it is being measured.

    Args:
        holder: what is asked: the artifact in its own process, or `here`.
        here: the same in the calling process; not loaded unless it is the holder.
        fresh: whether the holder has a process of its own.
        evaluates_here: whether only `evaluate` is called in the calling process.
        facts: what the holder has answered.
        bursts: milliseconds per call, a list per round.
        failed: why it is left out from now on.
    """

    name: str
    holder: Artifact | Worker
    here: Artifact
    fresh: bool
    evaluates_here: bool = False
    allocator: str = ""
    waiting: str = ""
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    bursts: list[list[float]] = field(default_factory=list)
    failed: str | None = None

    def start(self, warm_up_s: float) -> None:
        """Load and warm up."""
        self.facts = self.holder.load()
        if self.facts["callable"]:
            self.facts |= self.holder.warm_up(warm_up_s)

    def evaluate(self) -> None:
        """Ask for the memory, then for the metrics."""
        if self.fresh and not self.here.in_memory:
            self.facts["peak_rss_mb"] = self.holder.peak_rss_mb()
        if self.evaluates_here:
            self.here.load()
        self.facts["metrics"] = (self.here if self.evaluates_here else self.holder).evaluate()
        if self.evaluates_here:
            self.here.module = None  # one model at a time


def open_turns(stack: ExitStack, sources: Mapping[str, Source], given: Given) -> list[Turn]:
    """A started process per artifact, the calling process for what another one can't have.

    Args:
        stack: ends the processes.
        sources: the artifacts by name.
        given: what they share.
    """
    packed, why_here, why_evaluate_here = _packed(given)
    nursery = given.nursery
    if nursery is None and not why_here:
        modules = modules_of(given.model, *sources.values())
        nursery = stack.enter_context(Nursery(threads=given.threads, modules=modules))
    turns: list[Turn] = []
    for name, source in sources.items():
        here = Artifact(source, given.example_inputs, evaluate=given.evaluate, model=given.model)
        turn = Turn(name, here, here, fresh=False)
        turn.allocator, turn.waiting = allocator_state(), waiting_policy()
        turns.append(turn)
        if here.in_memory:
            turn.notes.append("in memory: no file was loaded")
        try:
            if nursery is None or why_here:
                raise CannotSend(why_here)
            worker = _worker(nursery, here, source, packed, given)
        except CannotSend as reason:
            turn.notes.append(f"measured in the calling process: {reason}")
            continue
        stack.callback(worker.close)
        turn.holder, turn.fresh, turn.allocator = worker, True, worker.allocator
        turn.waiting = waiting_policy(with_waiting(os.environ))
        turn.evaluates_here = bool(why_evaluate_here)
        turn.notes += [why_evaluate_here] if why_evaluate_here else []
    return turns


def _worker(
    nursery: Nursery, here: Artifact, source: Source, packed: dict[str, bytes], given: Given
) -> Worker:
    things = dict(packed) if here.path else {**packed, "source": pack(source)}
    options = {"name": here.name, "keep": given.keep, "timeout_s": given.timeout_s}
    return Worker(nursery, here.path, payload(**things), **options)


def _packed(given: Given) -> tuple[dict[str, bytes], str, str]:
    """What every fresh process needs; why it can't have that, and why it can't have `evaluate`, if
    so.
    """
    try:
        inputs = pack_inputs(given.example_inputs)
        model = given.model
        if surgery.is_eager(model):  # files have its data
            model = without_data(surgery.uncompiled(model))
        things = {"example_inputs": inputs, "model": pack(model)}
    except CannotSend as reason:
        return {}, str(reason), ""
    try:
        things["evaluate"] = pack(given.evaluate)
    except CannotSend as reason:
        return things, "", f"evaluated in the calling process: {reason}"
    return things, "", ""


def take_turns(
    turns: list[Turn],
    rounds: int,
    burst_seconds: float,
    say: Say,
    *,
    threads: int,
    keep_going: bool = False,
) -> list[Measurement]:
    """Load all, time them in rounds, evaluate all; what is measured, in the same order."""

    def each(some: Sequence[Turn], work: Callable[[Turn], None]) -> None:
        for turn in some:
            if turn.failed is None:
                _attempt(turn, work, keep_going and turn is not turns[0])

    say("loading and warming up")
    each(turns, lambda turn: turn.start(burst_seconds))
    timed = [turn for turn in turns if turn.facts.get("callable")]
    say(f"timing in {rounds} rounds")
    for _ in range(rounds):
        each(timed, lambda turn: turn.bursts.append(turn.holder.burst(burst_seconds)))
    say("evaluating")
    each(turns, Turn.evaluate)
    return [_measurement(turn, turns[0], threads) for turn in turns]


def _attempt(turn: Turn, work: Callable[[Turn], None], may_fail: bool) -> None:
    try:
        work(turn)
    except (CheckpointError, MeasurementError) as error:
        if not may_fail:
            raise
        turn.failed = str(error)


def _measurement(turn: Turn, baseline: Turn, threads: int) -> Measurement:
    latency = latency_of(turn.bursts) if turn.bursts and turn.failed is None else None
    speedup = None
    if latency and baseline.bursts:
        speedup = latency_of(baseline.bursts).median / latency.median
    facts = turn.facts
    return Measurement(
        name=turn.name,
        file=None if turn.here.file is None else str(turn.here.file),
        bytes=facts.get("bytes"),
        parameters=facts.get("parameters"),
        latency_ms=latency,
        speedup=speedup,
        metrics=facts.get("metrics", {}),
        load_s=facts.get("load_s"),
        first_call_ms=facts.get("first_call_ms"),
        peak_rss_mb=facts.get("peak_rss_mb"),
        output_sha256=facts.get("output_sha256"),
        threads=threads,
        allocator=turn.allocator,
        notes=(*turn.notes, *_remarks(turn, latency)),
        waiting=turn.waiting,
        failed=turn.failed,
    )


def _remarks(turn: Turn, latency: Latency | None) -> list[str]:
    if turn.failed is not None:
        return []
    if latency is None:
        return ["no example inputs: latency not measured"]
    if latency.calls < _ENOUGH or latency.p90 <= BUSY_ABOVE * latency.p10:
        return []
    return [f"busy machine: p90 is {latency.p90 / latency.p10:.1f} times p10"]
