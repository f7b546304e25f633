"""The loss that distillation minimizes, as `training.fit` wants it: a function of (model, batch).

What is tried and checked before the first step is in preparing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize import check
from quantize.calibration import (
    call,
    in_eval_mode,
    on_tensors,
    output_tensors,
    relative_error,
    untouched,
    watching,
    without_cache,
)
from quantize.compression.distillation import match
from quantize.compression.distillation.batches import Batch
from quantize.compression.distillation.losses import row_weights, soft_kl
from quantize.compression.distillation.state import Carried, running_norms
from quantize.seeding import seed_devices
from quantize.surgery import device_of
from quantize.training import TrainingError

MOST_HEARD = 1 << 28  # bytes of the teacher's answers on what is held out


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
    """alpha * match + (1 - alpha) * task + hidden_weight * hidden.

    Fields as the arguments of `distill`, with hidden as a dict; checked when made.
    """

    student: nn.Module
    teacher: nn.Module
    temperature: float
    alpha: float
    loss: Callable[[Any, Any], Tensor] | None
    hidden: dict[str, str]
    hidden_weight: float
    select: Callable[[Any], Tensor]
    kind: str
    # outputs of the modules that are compared: of the student, and of the teacher
    seen: dict[str, Tensor] = field(default_factory=dict)
    taught: dict[str, Tensor] = field(default_factory=dict)
    teacher_stateful: bool = False

    def __post_init__(self) -> None:
        check.number("temperature", self.temperature, "(0, inf)")
        check.number("alpha", self.alpha, "[0, 1]")
        check.number("hidden_weight", self.hidden_weight, "[0, inf)")
        check.one_of("kind", self.kind, ("auto", "logits", "values"))
        if self.alpha < 1 and self.loss is None:
            rest = f"which leaves {1 - self.alpha:g} to the task"
            raise ValueError(
                f"alpha is {self.alpha!r}, {rest}: give loss=function(output, targets) too"
            )
        self.trained = Trained(self.student)
        self.carried = Carried(self.student, set(), stateful=False)
        self._before: dict[str, Tensor] = {}  # what the student carries, before the last step
        self._heard: dict[int, tuple[Any, dict[str, Tensor]]] = {}  # by the number of a batch
        self._room = MOST_HEARD

    def settings(self) -> dict:
        """What must agree between two runs for one to go on where the other stopped."""
        return {
            "temperature": self.temperature,
            "alpha": self.alpha,
            "kind": self.kind,
            "hidden": [self.hidden, self.hidden_weight],
        }

    @property
    def needs_teacher(self) -> bool:
        return self.alpha > 0 or bool(self.hidden)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The teacher in eval mode and both models looked into; all of it undone at the end, but
        for what was learned.
        """
        with ExitStack() as stack:
            stack.enter_context(without_cache(self.student, self.teacher))
            stack.enter_context(watching((), self.teacher))
            stack.enter_context(self.carried.attached())
            self.seen = stack.enter_context(match.watching(self.student, self.hidden))
            targets = self.hidden.values()
            self.taught = stack.enter_context(match.watching(self.teacher, targets))
            yield

    @property
    def device(self) -> torch.device:
        return device_of(self.student)

    def moved(self, inputs: Any) -> Any:
        return on_tensors(inputs, lambda tensor: tensor.to(self.device))

    def __call__(self, trained: Any, batch: Batch) -> Tensor:
        self.carried.renew()
        self._before = self.carried.copies()
        # first: the teacher's activations are gone before the student's graph is there
        taught = self._ask_teacher(batch[0])
        total = self._total(trained, batch, taught)
        if not total.requires_grad:
            raise TrainingError(
                f"no gradient reaches the student ({type(self.student).__name__}): its output "
                f"depends on no parameter that requires one, or it runs without gradients"
            )
        return total

    @torch.no_grad()
    def held_out(self, batches: Sequence[Batch]) -> float:
        """The mean of what is minimized over batches, in eval mode and in float32."""
        self.carried.renew()
        losses = []
        for inputs, targets, index in batches:
            batch = (self.moved(inputs), self.moved(targets), index)
            taught = self._hear(batch)
            with untouched(self.student), in_eval_mode(self.student):
                losses.append(self._total(self.trained, batch, taught).item())
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
                    seed_devices(0)
                    outputs[-1].append(self.select(call(model, self.moved(inputs))).clone())
        return relative_error(*outputs)

    def _hear(self, batch: Batch) -> Any:
        """`_ask_teacher` about a batch that is held out, whose answers are kept while there is room
        for them: each of them is asked for whenever training is judged.
        """
        inputs, _, index = batch
        if index not in self._heard:
            taught = self._ask_teacher(inputs)
            kept = [taught, *self.taught.values()]
            size = sum(one.nbytes for one in kept if isinstance(one, Tensor))
            if taught is None or size > self._room:
                return taught
            self._room -= size
            self._heard[index] = taught.clone(), dict(self.taught)
        taught, inside = self._heard[index]
        self.taught.update(inside)
        return taught

    def _total(self, trained: Trained, batch: Batch, taught: Any) -> Tensor:
        inputs, targets, index = batch
        output = self.run_student(inputs, index)
        parts = []
        if self.alpha > 0:
            parts.append(self.alpha * self._match(self.select(output), taught, inputs))
        if self.alpha < 1:
            parts.append((1 - self.alpha) * self._task(output, targets))
        if self.hidden:
            near = match.compare_hidden(
                self.hidden, self.seen, self.taught, trained.projections, inputs
            )
            parts.append(self.hidden_weight * near)
        self.seen.clear()
        self.taught.clear()
        return sum(parts[1:], start=parts[0])

    def _task(self, output: Any, targets: Any) -> Tensor:
        exact = output.float() if isinstance(output, Tensor) else output
        assert self.loss is not None  # checked with the arguments
        task = self.loss(exact, targets)
        if not isinstance(task, Tensor) or task.numel() != 1:
            raise TypeError(f"loss must return a scalar tensor, got {task!r}")
        return task

    def run_student(self, inputs: Any, index: int) -> Any:
        first = next(iter(output_tensors(inputs)), None)
        rows = 0 if first is None or first.ndim == 0 else len(first)
        try:
            # one row has no statistics of its own: the running ones normalize it
            with in_eval_mode(*(running_norms(self.student) if rows == 1 else ())):
                return call(self.student, inputs)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"the student ({type(self.student).__name__}) fails on batch {index}: {reason}"
            ) from error

    def _ask_teacher(self, inputs: Any) -> Any:
        """The teacher's output that is matched, without a graph."""
        if not self.needs_teacher:
            return None
        known = untouched(self.teacher) if self.teacher_stateful else nullcontext()
        with torch.inference_mode(), known:
            output = call(self.teacher, inputs)
        for name, x in self.taught.items():
            self.taught[name] = x.clone()  # a plain tensor: the way back may need it
        return self.select(output) if self.alpha > 0 else None

    def _match(self, student: Tensor, taught: Any, inputs: Any) -> Tensor:
        mask = match.row_mask(inputs, student)
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
