"""What `distill` refuses before anything runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from quantize import surgery
from quantize.nn import holds_integers
from quantize.training import TrainingError


def check_steps(steps: Any) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; allowed: an integer >= 1")


def check_modules(student: nn.Module, teacher: nn.Module) -> None:
    for role, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{role} must be an nn.Module, got {type(model).__name__}")
        surgery.check_initialised(model)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                f"the {role} ({type(model).__name__}) has no numbers, only shapes: it is on the "
                f"meta device"
            )
    for name, module in student.named_modules():
        if holds_integers(module):
            kind = f"module {name!r} ({type(module).__name__}) of the student holds integers"
            raise ValueError(f"{kind}, which can't be trained: distil or recover before quantizing")
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            if parameter.dtype in (torch.float16, torch.bfloat16):
                path = f"{name}.{key}".strip(".")
                kind = f"parameter {path!r} of the student is {parameter.dtype}"
                raise ValueError(f"{kind}, too coarse for small steps: train in float32, then cast")


def check_trainable(student: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise TrainingError(
            f"the student ({type(student).__name__}) has no parameter that requires a gradient: "
            f"nothing to train"
        )


def check_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def check_number(
    name: str, value: Any, *, low: float, high: float = math.inf, strict: bool = False
) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (strict and value == low):
        least = f"> {low:g}" if strict else f">= {low:g}"
        bounds = f"in [{low:g}, {high:g}]" if high < math.inf else least
        raise ValueError(f"{name} is {value!r}; allowed: a finite number {bounds}")
