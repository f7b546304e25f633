"""Before the first step of a distillation: run both models once, so that whatever doesn't fit is
found now, and choose the precision.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration import call, in_eval_mode, main_output, relative_error, untouched
from quantize.compression.distillation import match
from quantize.compression.distillation.batches import Batch
from quantize.compression.distillation.losses import remoteness
from quantize.compression.distillation.objective import Objective
from quantize.compression.distillation.state import (
    answers,
    changed_buffers,
    is_stateful,
    running_norms,
)
from quantize.training import TrainingError, autocast

ROUNDING = 0.1  # most that bf16 may change the student's outputs, relative to their size


@torch.no_grad()
def prepare(objective: Objective, batch: Batch) -> float:
    """Run both models on a batch, so that whatever doesn't fit is found before training.

    Returns how far apart they are (`losses.remoteness`); inf where outputs aren't matched.
    """
    model = objective.student
    inputs = objective.moved(batch[0])
    with untouched(model), in_eval_mode(model):
        student = _try(objective, "student", model, inputs)
        passing = changed_buffers(model, lambda: call(model, inputs))
        objective.carried.stateful = bool(passing) or is_stateful(model, inputs)
    teacher = None
    if objective.needs_teacher:
        with untouched(objective.teacher):
            teacher = _try(objective, "teacher", objective.teacher, inputs)
        objective.teacher_stateful = is_stateful(objective.teacher, inputs)
    if objective.alpha > 0:
        _check_outputs(objective, student, teacher)
    _check_called(objective)
    changed = changed_buffers(model, lambda: _train_once(objective, inputs))
    objective.carried.statistics = changed - passing
    if objective.hidden:
        _run_with_batch_statistics(objective, inputs, batch[2])
    for name, target in objective.hidden.items():
        s, t = match.aligned(name, target, objective.seen, objective.taught)
        if s.shape != t.shape:
            objective.trained.projections.add(name, s.flatten(0, -2), t.flatten(0, -2))
    if not objective.alpha:
        return math.inf
    s, t = objective.select(student), objective.select(teacher)
    return remoteness(s, t, objective.kind, match.row_mask(inputs, s))


def precision(objective: Objective, batch: Batch, bf16: bool | None) -> tuple[bool, str]:
    """Whether to train in bf16 (None: where the device multiplies it natively), and why not.

    A model may do what autocast doesn't allow (`index_add` of two dtypes), or lose too much by
    rounding. One step is tried.
    """
    wanted = not isinstance(autocast(objective.device, bf16), nullcontext)
    reason = _trial(objective, batch, True) if wanted else ""
    if reason and bf16:
        raise ValueError(f"bf16=True: {reason}")
    if not wanted or reason:
        broken = _trial(objective, batch, False)
        if broken:
            raise ValueError(broken)
    return wanted and not reason, reason


def _try(objective: Objective, role: str, model: nn.Module, inputs: Any) -> Any:
    try:
        return call(model, inputs)
    except Exception as error:
        pair = "; if a batch is a pair of inputs and targets, give loss too"
        hint = "" if objective.loss else pair
        reason = f"{type(error).__name__}: {error}{hint}"
        raise ValueError(
            f"the {role} ({type(model).__name__}) doesn't run on the first batch: {reason}"
        ) from error


def _check_called(objective: Objective) -> None:
    """Raises ValueError for a module that is compared, but isn't called when its model runs."""
    for name, target in objective.hidden.items():
        for role, module, seen in (
            ("student", name, objective.seen),
            ("teacher", target, objective.taught),
        ):
            if module not in seen:
                raise ValueError(
                    f"module {module!r} of the {role} isn't called when it runs: it can't "
                    f"be matched"
                )


def _train_once(objective: Objective, inputs: Any) -> None:
    with in_eval_mode(objective.student):
        objective.student.train()
        objective.run_student(inputs, 0)


def _run_with_batch_statistics(objective: Objective, inputs: Any, index: int) -> None:
    """Show the student's hidden outputs as training will see them: its norms use the batch's
    statistics, which a new student's running ones aren't near.
    """
    student = objective.student
    with untouched(student), in_eval_mode(student):
        for norm in running_norms(student):
            norm.train()
        objective.run_student(inputs, index)


def _trial(objective: Objective, batch: Batch, bf16: bool) -> str:
    """Why one training step fails in this precision; empty if it doesn't. No trace is left."""
    student = objective.student
    with untouched(student, objective.teacher), in_eval_mode(student):
        student.train()
        try:
            with autocast(objective.device, bf16):
                loss = objective(objective.trained, batch)
            loss.backward()
        except TrainingError:
            raise
        except Exception as error:
            return f"a training step of the student fails ({type(error).__name__}: {error})"
        finally:
            for parameter in objective.trained.parameters():
                parameter.grad = None
    return _rounding(objective, objective.moved(batch[0])) if bf16 else ""


@torch.no_grad()
def _rounding(objective: Objective, inputs: Any) -> str:
    """Why the student's outputs in bf16 are too far from those in float32; empty if they aren't."""
    outputs = []
    for bf16 in (True, False):
        with in_eval_mode(objective.student), autocast(objective.device, bf16):
            (tensors,) = answers(objective.student, inputs, 1)
        outputs.append([t for t in tensors if t.is_floating_point()])
    try:
        error = relative_error(*outputs)
    except ValueError as reason:
        return f"in bf16 {reason}"
    return f"bf16 changes its outputs by {error:.0%}" if error > ROUNDING else ""


def _check_outputs(objective: Objective, student: Any, teacher: Any) -> None:
    """Compare both outputs; where `kind` is "auto", decide it by the teacher's."""
    s, t = objective.select(student), objective.select(teacher)
    for role, x in (("student", s), ("teacher", t)):
        _check_output(role, x)
    if objective.kind == "auto":
        whole = teacher if objective.select is main_output else t
        objective.kind = "logits" if match.is_categories(whole) else "values"
    logits = objective.kind == "logits"
    if s.shape != t.shape:
        classes = logits and s.shape[:-1] == t.shape[:-1]
        what = "classes (or vocabulary)" if classes else "shape"
        raise ValueError(
            f"student and teacher differ in {what}: outputs {list(s.shape)} and {list(t.shape)}; "
            f"give select=function(output) -> tensor that makes them alike"
        )
    if s.numel() == 0:
        raise ValueError(f"the first batch is empty: the models' outputs are {list(s.shape)}")
    if logits and s.shape[-1] < 2:
        raise ValueError(
            f"kind='logits' needs at least two classes, the output is {list(s.shape)}; "
            f"allowed: 'values'"
        )


def _check_output(role: str, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(
            f"select gives {kind} for the {role}'s output; it must give a floating tensor"
        )
    if torch.isnan(x).any():
        raise ValueError(f"the {role}'s output on the first batch has NaN in it")
