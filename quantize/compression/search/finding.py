"""`compress`: what it is given is checked and made ready, then a `Walk` tries and chooses."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize import surgery
from quantize.calibration import call, check_batches, on_cpu, run_batch, watching
from quantize.compression.pruning import traced_once
from quantize.compression.recipe import Given
from quantize.compression.search.budget import Budget
from quantize.compression.search.choosing import choose
from quantize.compression.search.divergence import Divergence, fitted, held_out
from quantize.compression.search.judge import Evaluated
from quantize.compression.search.points import ORIGINAL, Points, check_folder, digest
from quantize.compression.search.result import Result, report
from quantize.compression.search.trial import Trial
from quantize.compression.search.walk import Walk
from quantize.host import default_threads, machine
from quantize.measuring import plot
from quantize.measuring.nursery import Nursery, modules_of
from quantize.saying import Say, silent

FORMAT = 7  # of what a folder holds beside the files
_SAME = 5  # standard errors within which a metric is the same again


def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    calibration: Iterable[Any],
    evaluate: Callable[[Any], Any] | None = None,
    budget: Mapping[str, Any],
    minutes: float = 5.0,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool | Say = True,
) -> Result:
    """The best compressed version of `model` that was measured to keep a budget.

    Every point is saved, loaded again, judged, and timed in turns with the original, each in a
    fresh process. Where only a loss is given, the fastest point within it is chosen; where a target
    is given, the point with the least loss that reaches it. The chosen one is measured once more.

    A folder that holds a search of the same model is taken up: its points count for this budget,
    so asking again for something else takes seconds.

    Args:
        model: any nn.Module that `quantize.save` takes; it stays as it is.
        example_inputs: what latency is measured on: a tensor, a tuple of positional arguments or a
            dict of keyword arguments.
        calibration: re-iterable batches like `example_inputs`. Without `evaluate` the second half
            judges, and only the first one calibrates.
        evaluate: evaluate(model), of a model on the CPU, gives a number, a (name, number) pair or a
            dict whose first entry counts; or, in place of the number, an array with a value for
            each example, whose mean counts and whose spread tells the noise. Whether more is
            better its name says ("accuracy", "loss"), or that of the function, or a copy of the
            model with shuffled weights, for which it is worse. Without `evaluate` the loss is the
            KL divergence of logits to the original's, the unexplained share of the variance of
            single numbers, or 1 - cosine of other outputs; of several outputs, of the one that has
            lost the largest share.
        budget: any of "speedup", "latency_ms", "bytes", "memory_mb" (to be reached) and "max_loss"
            (largest change of the metric for the worse: a number, "1%" of the original's value, or
            "2 noise", in standard errors of the metric). Without `evaluate`, percents are of the
            entropy of the original's answers (logits) or of 1 (others).
        minutes: for all of it; what is under way when they are over is finished.
        out: folder for the files, the rows and the report. A search that was interrupted goes on
            from what is there. None: a temporary folder.
        seed: of the trainings.
        progress: True: lines on standard error; or a function that is called with each.

    Returns:
        A `Result`.

    Raises:
        ValueError: a budget, minutes, inputs, calibration or metric that can't be used, or a folder
            that holds something else, or the search of another model, metric or machine.
        TypeError: arguments of the wrong type, a model that no file can hold.
        MeasurementError: the process that measures the original dies.
        OSError: the original can't be written.
    """
    wanted = Budget.of(budget)
    if not (isinstance(minutes, (int, float)) and 0 < minutes < 10_000):
        raise ValueError(f"minutes is {minutes!r}; allowed: a number > 0")
    batches = list(check_batches(calibration))
    if out is not None:
        check_folder(Path(out))
    lines = _line if progress else silent
    say = progress if callable(progress) else lines
    deadline = time.monotonic() + 60 * minutes
    work = surgery.at("cpu", surgery.clone(model)).eval()
    example_inputs, batches = on_cpu(example_inputs), on_cpu(batches)
    with Nursery(threads=default_threads(), modules=modules_of(work)) as nursery:
        nursery.launch()  # it imports while the original is judged
        plot.prepare()
        _check_inputs(work, example_inputs)
        judge = _judge(work, batches, evaluate, 60 * minutes, say)
        _check_noise(wanted, judge)
        seen = batches if evaluate is not None else fitted(batches)
        given = Given(example_inputs=example_inputs, calibration=seen, batches=seen, seed=seed)
        folder = Path(tempfile.mkdtemp(prefix="quantize-") if out is None else out)
        folder.mkdir(parents=True, exist_ok=True)
        identity = {"class": type(model).__name__, "state": digest(dict(work.state_dict()))}
        identity |= {"format": FORMAT}
        identity |= {"calibration": digest(batches), "inputs": digest(example_inputs), "seed": seed}
        identity |= {"metric": judge.name, "cpu": machine()["cpu"], "threads": default_threads()}
        points = Points(folder, identity)
        _check_metric(points, judge)
        trial = Trial(work, example_inputs, given, judge, wanted, points, say, nursery)
        search = Walk(trial, deadline - time.monotonic())
        with traced_once(work, example_inputs):
            search.run()
        result = choose(trial, search.rounds, search.was_cut)
    report(result, folder, minutes, seed, say)
    say(result.reason)
    return result


def _check_inputs(model: nn.Module, example_inputs: Any) -> None:
    """Raises ValueError where the model doesn't run on them."""
    try:
        with torch.no_grad(), watching((), model):
            call(model, example_inputs)
    except Exception as error:  # of somebody's model
        said = f"{type(error).__name__}: {error}"
        name = type(model).__name__
        raise ValueError(f"{name} doesn't run on example_inputs: {said}") from error


def _judge(
    model: nn.Module,
    batches: Sequence[Any],
    evaluate: Callable[[Any], Any] | None,
    seconds: float,
    say: Say,
) -> Any:
    """What tells the losses. Raises ValueError, naming the batch, where the model doesn't run on
    one of calibration.
    """
    with torch.no_grad(), watching((), model):
        for number, batch in enumerate(batches):
            run_batch(model, batch, number)
    if evaluate is None:
        return Divergence(model, held_out(batches))
    return Evaluated(evaluate, model, seconds, say)


def _check_noise(budget: Budget, judge: Any) -> None:
    """Raises ValueError for a loss in multiples of a noise that nobody knows."""
    if budget.loss_unit == "noise" and not judge.noise:
        raise ValueError(
            f'budget["max_loss"] is in multiples of noise, and that of {judge.name} isn\'t known: '
            f"let evaluate return a value for each example, or a dict with "
            f'"standard_error" or "examples" after the metric'
        )


def _check_metric(points: Points, judge: Any) -> None:
    """Raises ValueError for a folder whose points were judged by something else."""
    original = points.find(ORIGINAL)
    if original is None:
        return
    held, noise = original["metric"]["value"], max(judge.noise, original["loss_noise"])
    if abs(held - judge.value) > _SAME * noise + 1e-6 * abs(held):
        raise ValueError(
            f"{points.folder} holds a search where {judge.name} of the original is {held:.6g}, "
            f"here it is {judge.value:.6g}: give another out="
        )


def _line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
