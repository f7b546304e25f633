"""`distill` teaches a copy of one module to answer like another; `recover` does so for a model that
was just compressed.

All training is `training.fit`: here is only what it minimizes (objective.py). So a run can be
killed and resumed, and spread by `torchrun`, as any other. Left out: students that teach each
other, adversarial and contrastive losses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantize import check, surgery
from quantize.calibration import main_output
from quantize.compression.distillation import match
from quantize.compression.distillation.batches import Numbered
from quantize.compression.distillation.best import Best
from quantize.compression.distillation.checks import check_modules, check_trainable
from quantize.compression.distillation.objective import Objective
from quantize.compression.distillation.preparing import precision, prepare
from quantize.training import Batches, TrainConfig, TrainingError, fit, ranks

LEAST_RATE = 2**-6  # times the rates of training from scratch


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any] | Batches,
    *,
    steps: int,
    temperature: float = 2.0,
    alpha: float | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    hidden: match.Names | None = None,
    hidden_weight: float = 1.0,
    select: Callable[[Any], Tensor] = main_output,
    kind: str = "auto",
    recipe: TrainConfig | Callable[[int, float], TrainConfig] | None = None,
    technique: str = "distill",
    **fit_options: Any,
) -> nn.Module:
    """A trained copy of `student`, in eval mode, that answers more like `teacher`. Neither of the
    two is changed.

    Minimized is alpha * match + (1 - alpha) * task + hidden_weight * hidden. Some batches are held
    out (`batches.Numbered`); what comes back is the best state on them, the given one included, and
    `quantize.summary` says how many steps were worth it.

    Args:
        student: the module to train, in float32; its copy is what comes back.
        teacher: the module to follow, any nn.Module that takes the same inputs. It runs in eval and
            inference mode, in bf16 where the student does; a cheaper one is given as one:
            `quantize_dynamic(teacher)`.
        batches: re-iterable sequence, gone through again and again, or a function from step to
            batch. A batch is what both models are called with: a tensor, a tuple of positional or a
            dict of keyword arguments; with `loss`, a pair of that and the targets. An
            `attention_mask` [B, T] among keywords leaves padding out.
        steps: training steps, one batch each.
        temperature: both models' logits are divided by it; > 0. The higher, the more the unlikely
            classes count.
        alpha: share of the match, in [0, 1]; default 0.5 with `loss`, else 1. At 0 the teacher
            isn't run for it.
        loss: the task: loss(output, targets) -> scalar, of the model's output as it comes (tensors
            in fp32). `torch.nn.functional.cross_entropy` will do for a classifier, `mse_loss` for a
            regression.
        hidden: modules whose outputs are compared: a dict from names in the student to names in the
            teacher, or a list of names that are the same in both. Where widths differ, a learned
            projection stands between; it is dropped at the end.
        hidden_weight: of what `hidden` compares, beside the match; >= 0.
        select: picks the tensor to match out of a model's output. Default: `logits`, else the first
            floating tensor.
        kind: how outputs are matched. "logits": T^2 KL over the last axis (Hinton et al., arXiv
            1503.02531). "values": mean squared error. "auto": logits for outputs named so and for
            bare tensors [N, V] and [B, T, V].
        recipe: learning rates and schedule; its `steps`, `batch`, `length` and `short` are not
            read. Or a function to it from the number of steps and how far the student is from the
            teacher (`losses.remoteness`, on the first batch); the default is `student_recipe`.
            Where training leads astray, rates fall (`best.Best`).
        technique: what the summary calls this.
        fit_options: `seed`, `bf16`, `checkpoint_path`, `resume`, `identity`, `on_progress`: see
            `training.fit`.

    Returns:
        The best state on the batches held out.

    Raises:
        ValueError, TypeError: arguments out of range, names that don't exist, outputs that don't
            match (other vocabularies or classes), empty batches, a batch on which a model doesn't
            run, an int8 or 16-bit student.
        TrainingError: nothing to train, no gradient, or a loss that isn't finite; `error.student`
            is then the student as it was before that step.
    """
    check_modules(student, teacher)
    check.count("steps", steps)
    if alpha is None:
        alpha = 1.0 if loss is None else 0.5
    check_trainable(student)
    hidden = match.pairs_of(hidden, student, teacher)
    numbered = Numbered(batches, paired=loss is not None, steps=steps)
    objective = Objective(
        surgery.clone(student),
        teacher,
        temperature,
        alpha,
        loss,
        hidden,
        hidden_weight,
        select,
        kind,
    )
    best = _best(objective, numbered, steps)
    with _own_random_numbers(objective.student), torch.enable_grad(), objective.attached():
        first = numbered(0)
        far = _over_ranks(prepare(objective, first), objective.student)
        fit_options["bf16"], not_bf16 = precision(objective, first, fit_options.get("bf16"))
        _fit(objective, numbered, best, _config(recipe, steps, far), fit_options)
    result = _finished(objective.student)
    settings = _settings(steps, best, fit_options["bf16"], not_bf16)
    distance = objective.distance(numbered.held)
    surgery.note(result, technique, done={"": best.describe()}, distance=distance, **settings)
    return result


def _best(objective: Objective, numbered: Numbered, steps: int) -> Best:
    """Keeps the best state of the student on the batches that are held out."""

    def held_out() -> float:
        return _over_ranks(objective.held_out(numbered.held), objective.student)

    return Best(objective.trained, held_out, steps, numbered.about)


def _own_random_numbers(model: nn.Module) -> AbstractContextManager:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return torch.random.fork_rng(devices=list(devices))


def _config(
    recipe: TrainConfig | Callable[[int, float], TrainConfig] | None, steps: int, far: float
) -> TrainConfig:
    if isinstance(recipe, TrainConfig):
        return replace(recipe, steps=steps)
    return (recipe or student_recipe)(steps, far)


def _fit(
    objective: Objective,
    numbered: Numbered,
    best: Best,
    config: TrainConfig,
    fit_options: dict[str, Any],
) -> None:
    """Train; where that fails, the error carries the student of the step before."""
    about = objective.settings()
    if fit_options.get("checkpoint_path") is not None:
        about["teacher"] = fingerprint(objective.teacher)
    identity = {**(fit_options.get("identity") or {}), "distillation": about}
    options = {**fit_options, "identity": identity}
    try:
        fit(objective.trained, numbered, objective, config, judge=best, **options)
    except TrainingError as error:
        objective.take_back_step()
        error.student = _finished(objective.student)  # type: ignore[attr-defined]  # for callers
        raise


def _settings(steps: int, best: Best, bf16: bool, not_bf16: str) -> dict[str, Any]:
    precision = "bf16" if bf16 else "float32"
    settings = {"steps": steps, "worth": best.step, "precision": precision}
    return settings | {"not_bf16": not_bf16} if not_bf16 else settings


def _finished(model: nn.Module) -> nn.Module:
    """In eval mode, with weights that follow from the parameters as they are, without gradients."""
    for parameter in model.parameters():
        parameter.grad = None
    model.eval()
    surgery.round_stored(model)
    surgery.recompute_weights(model)
    return model


def recover(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any] | Batches,
    *,
    steps: int,
    **options: Any,
) -> nn.Module:
    """A copy of a pruned or factorized `model`, in eval mode, that won back quality from `teacher`,
    which it was made of.

    `distill` at temperature 1, with rates that suit weights which are good already. The copy keeps
    the smaller layers and their record, so it is saved and loaded as before.

    Args:
        model: what a technique made smaller, in float32; its copy is what comes back.
        teacher: the model it was made of.
        batches: as for `distill`.
        steps: training steps, one batch each.
        options: the other arguments of `distill`.

    Returns:
        The best state on the batches held out; the given one where no training helped.

    Raises:
        ValueError, TypeError, TrainingError: as `distill` does.
    """
    check.count("steps", steps)
    defaults = {"temperature": 1.0, "recipe": recovery_recipe, "technique": "recover"}
    return distill(model, teacher, batches, steps=steps, **{**defaults, **options})


def recovery_recipe(steps: int, far: float) -> TrainConfig:
    """Rates for weights that are good already, by the way that the model has to go.

    far: `losses.remoteness` of the model. A small distance grows with the square of what is wrong
    with the weights, so its root says how long the way is. Rounded to a power of 2, so that a
    resumed run finds the same.
    """
    return _scaled(steps, far**0.5)


def student_recipe(steps: int, far: float) -> TrainConfig:
    """Rates for a smaller model, which has to find answers of its own also where it is near: they
    fall half as fast.
    """
    return _scaled(steps, far**0.25)


def _scaled(steps: int, share: float) -> TrainConfig:
    """The rates of training from scratch, times `share` as a power of 2 within bounds."""
    scale = 2.0 ** round(math.log2(min(1.0, max(LEAST_RATE, share))))
    return TrainConfig(
        steps=steps,
        lr=3e-3 * scale,
        muon_lr=0.02 * scale,
        warmup=min(20, steps // 10),
        cooldown=0.8,
    )


def _over_ranks(value: float, model: nn.Module) -> float:
    """The mean over all ranks, whose first batches differ."""
    _, world = ranks()
    if world == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=next(model.parameters()).device)
    dist.all_reduce(total)
    return total.item() / world


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and numbers of `model`, in hex."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
