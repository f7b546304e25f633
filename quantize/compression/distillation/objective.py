"""The loss that distillation minimizes, as `training.fit` wants it: a function of (model,
batch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.calibration import (
    call,
    main_output,
    on_tensors,
    output_tensors,
    relative_error,
    untouched,
    watching,
    without_cache,
)
from quantize.compression.distillation import match
from quantize.compression.distillation.batches import Batch
from quantize.compression.distillation.cache import TeacherCache
from quantize.compression.distillation.losses import remoteness, row_weights, soft_kl, top_kl
from quantize.compression.distillation.state import (
    Carried,
    answers,
    changed_buffers,
    is_stateful,
    norms_in_eval_mode,
    running_norms,
)
from quantize.training import TrainingError, autocast, eval_mode

ROUNDING = 0.1  # most that bf16 may change the student's outputs, relative to their size


class Trained(nn.Module):
    """What `fit` trains: the student behind the projections, so that the student's head is still
    the last linear.
    """

    def __init__(self, student: nn.Module):
        super().__init__()
        self.projections = match.Projections()
        self.student = student


@dataclass
class Objective:
    """alpha * match + (1 - alpha) * task + hidden_weight * hidden + relation_weight * relations.

    Fields as the arguments of `distill`, with hidden and relations as dicts; checked when made.
    """

    student: nn.Module
    teacher: nn.Module
    temperature: float
    alpha: float
    loss: Callable[[Any, Any], Tensor] | None
    hidden: dict[str, str]
    hidden_weight: float
    hidden_kind: str
    relations: dict[str, str]
    relation_weight: float
    relation_heads: int
    select: Callable[[Any], Tensor]
    kind: str
    cache: TeacherCache | None = None
    _seen: dict[str, Tensor] = field(
        default_factory=dict
    )  # outputs of the student's modules that are compared
    _taught: dict[str, Tensor] = field(default_factory=dict)  # and of the teacher's
    _teacher_stateful: bool = False

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, low=0, strict=True)
        _check_number("alpha", self.alpha, low=0, high=1)
        _check_number("hidden_weight", self.hidden_weight, low=0)
        _check_number("relation_weight", self.relation_weight, low=0)
        _check_number("relation_heads", self.relation_heads, low=1, kind=int)
        for name, allowed in (
            ("kind", ("auto", "logits", "values")),
            ("hidden_kind", ("mse", "cosine")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}"
                )
        if self.alpha < 1 and self.loss is None:
            rest = f"which leaves {1 - self.alpha:g} to the task"
            raise ValueError(
                f"alpha is {self.alpha!r}, {rest}: give loss=function(output, targets) too"
            )
        self.trained = Trained(self.student)
        self.carried = Carried(self.student, set(), stateful=False)
        self._before: dict[str, Tensor] = {}  # what the student carries, before the last step

    def settings(self) -> dict:
        """What must agree between two runs for one to go on where the other stopped."""
        return {
            "temperature": self.temperature,
            "alpha": self.alpha,
            "kind": self.kind,
            "hidden": [self.hidden, self.hidden_weight, self.hidden_kind],
            "relations": [self.relations, self.relation_weight, self.relation_heads],
        }

    @property
    def needs_teacher(self) -> bool:
        return self.alpha > 0 or bool(self.hidden or self.relations)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The teacher in eval mode and both models looked into; all of it undone at the end, but
        for what was learned.
        """
        names, targets = (
            [*self.hidden, *self.relations],
            [*self.hidden.values(), *self.relations.values()],
        )
        with ExitStack() as stack:
            stack.enter_context(without_cache(self.student, self.teacher))
            stack.enter_context(watching((), self.teacher))
            stack.enter_context(self.carried.attached())
            self._seen = stack.enter_context(match.watching(self.student, names))
            self._taught = stack.enter_context(match.watching(self.teacher, targets))
            yield

    # ------------------------------------------------------------------------------- before the
    # first step

    @torch.no_grad()
    def prepare(self, batch: Batch) -> float:
        """Run both models on a batch, so that whatever doesn't fit is found before training.

        Returns how far apart they are (`losses.remoteness`); inf where outputs aren't matched.
        """
        inputs = self._moved(batch[0])
        with untouched(self.student), eval_mode(self.student):
            student = self._try("student", self.student, inputs)
            passing = changed_buffers(self.student, lambda: call(self.student, inputs))
            self.carried.stateful = bool(passing) or is_stateful(self.student, inputs)
        teacher = None
        if self.needs_teacher:
            with untouched(self.teacher):
                teacher = self._try("teacher", self.teacher, inputs)
            self._teacher_stateful = is_stateful(self.teacher, inputs)
        if self.alpha > 0:
            self._check_outputs(student, teacher)
        for name, target in [*self.hidden.items(), *self.relations.items()]:
            for role, module, seen in (
                ("student", name, self._seen),
                ("teacher", target, self._taught),
            ):
                if module not in seen:
                    raise ValueError(
                        f"module {module!r} of the {role} isn't called when it runs: it can't "
                        f"be matched"
                    )
        self.carried.statistics = (
            changed_buffers(self.student, lambda: self._train_once(inputs)) - passing
        )
        if (
            self.hidden
        ):  # norms will use the batch's statistics, which a new student's running ones aren't near
            with untouched(self.student), eval_mode(self.student):
                for norm in running_norms(self.student):
                    norm.train()
                self._run_student(inputs, batch[2])
        for name, target in self.hidden.items():
            s, t = match.aligned(name, target, self._seen, self._taught)
            if s.shape != t.shape:
                self.trained.projections.add(name, s.flatten(0, -2), t.flatten(0, -2))
        if self.relations:
            match.compare_relations(
                self.relations, self._seen, self._taught, self.relation_heads, inputs
            )
        if not self.alpha:
            return math.inf
        s, t = self.select(student), self.select(teacher)
        return remoteness(s, t, self.kind, match.row_mask(inputs, s))

    def _train_once(self, inputs: Any) -> None:
        with eval_mode(self.student):
            self.student.train()
            self._run_student(inputs, 0)

    def _try(self, role: str, model: nn.Module, inputs: Any) -> Any:
        try:
            return call(model, inputs)
        except Exception as error:
            hint = (
                "" if self.loss else "; if a batch is a pair of inputs and targets, give loss too"
            )
            reason = f"{type(error).__name__}: {error}{hint}"
            raise ValueError(
                f"the {role} ({type(model).__name__}) doesn't run on the first batch: {reason}"
            ) from error

    def precision(self, batch: Batch, bf16: bool | None) -> tuple[bool, str]:
        """Whether to train in bf16 (None: where the device multiplies it natively), and why not.

        A model may do what autocast doesn't allow (`index_add` of two dtypes), or lose too much by
        rounding. One step is tried.
        """
        wanted = not isinstance(autocast(self.device, bf16), nullcontext)
        reason = self._trial(batch, True) if wanted else ""
        if reason and bf16:
            raise ValueError(f"bf16=True: {reason}")
        if not wanted or reason:
            broken = self._trial(batch, False)
            if broken:
                raise ValueError(broken)
        return wanted and not reason, reason

    def _trial(self, batch: Batch, bf16: bool) -> str:
        """Why one training step fails in this precision; empty if it doesn't. No trace is left."""
        with untouched(self.student, self.teacher), eval_mode(self.student):
            self.student.train()
            try:
                with autocast(self.device, bf16):
                    loss = self(self.trained, batch)
                loss.backward()
            except TrainingError:
                raise
            except Exception as error:
                return f"a training step of the student fails ({type(error).__name__}: {error})"
            finally:
                for parameter in self.trained.parameters():
                    parameter.grad = None
        return self._rounding(self._moved(batch[0])) if bf16 else ""

    @torch.no_grad()
    def _rounding(self, inputs: Any) -> str:
        """Why the student's outputs in bf16 are too far from those in float32; empty if they
        aren't.
        """
        outputs = []
        for bf16 in (True, False):
            with eval_mode(self.student), autocast(self.device, bf16):
                (tensors,) = answers(self.student, inputs, 1)
            outputs.append([t for t in tensors if t.is_floating_point()])
        try:
            error = relative_error(*outputs)
        except ValueError as reason:
            return f"in bf16 {reason}"
        return f"bf16 changes its outputs by {error:.0%}" if error > ROUNDING else ""

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.student.parameters()), torch.device("cpu"))

    def _moved(self, inputs: Any) -> Any:
        return on_tensors(inputs, lambda tensor: tensor.to(self.device))

    def _check_outputs(self, student: Any, teacher: Any) -> None:
        s, t = self.select(student), self.select(teacher)
        for role, x in (("student", s), ("teacher", t)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                kind = (
                    f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                )
                raise TypeError(
                    f"select gives {kind} for the {role}'s output; it must give a floating tensor"
                )
            if torch.isnan(x).any():
                raise ValueError(f"the {role}'s output on the first batch has NaN in it")
        if self.kind == "auto":
            whole = teacher if self.select is main_output else t
            self.kind = "logits" if match.is_categories(whole) else "values"
        if s.shape != t.shape:
            classes = self.kind == "logits" and s.shape[:-1] == t.shape[:-1]
            raise ValueError(
                f"student and teacher differ in "
                f"{'classes (or vocabulary)' if classes else 'shape'}: outputs "
                f"{list(s.shape)} and {list(t.shape)}; give select=function(output) -> tensor "
                f"that makes them alike"
            )
        if s.numel() == 0:
            raise ValueError(f"the first batch is empty: the models' outputs are {list(s.shape)}")
        if self.kind == "logits" and s.shape[-1] < 2:
            raise ValueError(
                f"kind='logits' needs at least two classes, the output is {list(s.shape)}; "
                f"allowed: 'values'"
            )

    # ---------------------------------------------------------------------------------------------
    # a step

    def __call__(self, trained: Any, batch: Batch) -> Tensor:
        self.carried.renew()
        self._before = self.carried.copies()
        total = self._total(trained, batch)
        if not total.requires_grad:
            raise TrainingError(
                f"no gradient reaches the student ({type(self.student).__name__}): its output "
                f"depends on no parameter "
                "that requires one, or it runs without gradients"
            )
        return total

    @torch.no_grad()
    def held_out(self, batches: Sequence[Batch]) -> float:
        """The mean of what is minimized over batches, in eval mode and in float32."""
        self.carried.renew()
        losses = []
        for inputs, targets, index in batches:
            batch = (self._moved(inputs), self._moved(targets), index)
            with untouched(self.student), eval_mode(self.student):
                losses.append(self._total(self.trained, batch).item())
        return sum(losses) / len(losses)

    @torch.no_grad()
    def distance(self, batches: Sequence[Batch]) -> float | None:
        """How far the student's matched outputs are from the teacher's, relative to their size;
        None if none are matched.
        """
        if not self.alpha:
            return None
        outputs: list[list[Tensor]] = []
        for model in (self.student, self.teacher):
            outputs.append([])
            for inputs, _, _ in batches:
                with watching((), model), without_cache(model):
                    torch.manual_seed(0)
                    outputs[-1].append(self.select(call(model, self._moved(inputs))).clone())
        return relative_error(*outputs)

    def _total(self, trained: Trained, batch: Batch) -> Tensor:
        inputs, targets, index = batch
        taught = self._ask_teacher(
            inputs, index
        )  # first: its activations are gone before the student's graph is there
        output = self._run_student(inputs, index)
        parts = []
        if self.alpha > 0:
            parts.append(self.alpha * self._match(self.select(output), taught, inputs))
        if self.alpha < 1:
            task = self.loss(output.float() if isinstance(output, Tensor) else output, targets)  # type: ignore[misc]
            if not isinstance(task, Tensor) or task.numel() != 1:
                raise TypeError(f"loss must return a scalar tensor, got {task!r}")
            parts.append((1 - self.alpha) * task)
        if self.hidden:
            near = match.compare_hidden(
                self.hidden, self._seen, self._taught, trained.projections, self.hidden_kind, inputs
            )
            parts.append(self.hidden_weight * near)
        if self.relations:
            near = match.compare_relations(
                self.relations, self._seen, self._taught, self.relation_heads, inputs
            )
            parts.append(self.relation_weight * near)
        self._seen.clear()
        self._taught.clear()
        return sum(parts[1:], start=parts[0])

    def _run_student(self, inputs: Any, index: int) -> Any:
        first = next(iter(output_tensors(inputs)), None)
        rows = 0 if first is None or first.ndim == 0 else len(first)
        try:
            with norms_in_eval_mode(self.student, rows):
                return call(self.student, inputs)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"the student ({type(self.student).__name__}) fails on batch {index}: {reason}"
            ) from error

    def _ask_teacher(self, inputs: Any, index: int) -> Any:
        """The teacher's answer, without a graph: its output, or the likeliest classes from the
        cache.
        """
        if not self.needs_teacher:
            return None
        stored = self.cache.get(index) if self.cache else None
        if stored is not None:
            return stored
        known = untouched(self.teacher) if self._teacher_stateful else nullcontext()
        with torch.inference_mode(), known:
            output = call(self.teacher, inputs)
        for name, x in self._taught.items():
            self._taught[name] = x.clone()  # a plain tensor: the way back may need it
        if self.alpha == 0:
            return None
        chosen = self.select(output)
        return self.cache.put(index, chosen) if self.cache else chosen

    def _match(self, student: Tensor, taught: Any, inputs: Any) -> Tensor:
        mask = match.row_mask(inputs, student)
        if isinstance(taught, tuple):
            log_p, ids = (x.to(student.device) for x in taught)
            return top_kl(student, log_p, ids, self.temperature, mask)
        if student.shape != taught.shape:
            raise ValueError(
                f"the student's output is {list(student.shape)}, the teacher's {list(taught.shape)}"
            )
        if self.kind == "logits":
            return soft_kl(student, taught, self.temperature, mask)
        student, taught = student.float(), taught.clone().float()
        if mask is None:
            return F.mse_loss(student, taught)
        return (student - taught).square().mean(-1).flatten() @ row_weights(
            mask.shape, mask, student.device
        )

    def take_back_step(self) -> None:
        """Take back what the last pass did to statistics: it is done before its loss is seen to be
        broken.
        """
        if self._before:
            self.carried.put(self._before)


def _check_number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = math.inf,
    strict: bool = False,
    kind: type = float,
) -> None:
    good = isinstance(value, int | kind) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (strict and value == low):
        least = f"> {low:g}" if strict else f">= {low:g}"
        bounds = f"in [{low:g}, {high:g}]" if high < math.inf else least
        raise ValueError(
            f"{name} is {value!r}; allowed: "
            f"{'an integer' if kind is int else 'a finite number'} {bounds}"
        )
