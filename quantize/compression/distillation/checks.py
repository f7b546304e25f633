"""What `distill` refuses before anything runs."""

from __future__ import annotations

import torch
from torch import nn

from quantize import surgery
from quantize.nn import holds_integers
from quantize.training import TrainingError


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
