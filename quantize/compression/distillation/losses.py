"""What a student is told, as functions of tensors: nothing here knows of models, hooks or
training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def divergences(student: Tensor, teacher: Tensor) -> Tensor:
    """What each class adds to KL(teacher || student), from log probabilities of any one shape;
    never below 0.

    With d = log p - log q, p d alone has either sign and its sum rounds below zero where the two
    agree. The probabilities sum to 1 on both sides, so p d - p + q has the same sum; it is p (d +
    exp(-d) - 1), which is about p d^2 / 2 for a small d.
    """
    p, d = teacher.exp(), teacher - student
    near = p * (d + torch.expm1(-d))  # exact for a small d; overflows for a large negative one
    # a probability of 0 is fine, also where a logit is -inf
    far = torch.where(p == 0, 0.0, p * d) - p + student.exp()
    return torch.where(d.abs() < 1, near, far).clamp(min=0)


class _SoftKL(torch.autograd.Function):
    """The sum over rows of weight * KL(teacher || student), whose gradient is exactly 0 where the
    logits are equal.

    One [N, V] tensor is kept for the way back; through `log_softmax` and `kl_div` it would be
    three.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        s, t = student.log_softmax(-1), teacher.log_softmax(-1)
        rows = divergences(s, t).sum(-1)
        gradient = s.exp_().sub_(t.exp_())
        ctx.save_for_backward(gradient.mul_(weight[:, None]))
        return rows @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * gradient, None, None


def soft_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), in nats, a mean over rows: a scalar.

    student, teacher: logits [..., V], computed on in fp32; no gradient goes to the teacher. mask:
    rows that count, [...] of 0 and 1. T^2 keeps the gradient's size when T grows (Hinton et al.,
    arXiv 1503.02531).
    """
    weight = row_weights(student.shape[:-1], mask, student.device)
    s = rows_of(student.float()) / temperature
    t = rows_of(teacher.detach().float()) / temperature
    return _SoftKL.apply(s, t, weight) * temperature**2


def remoteness(student: Tensor, teacher: Tensor, kind: str, mask: Tensor | None = None) -> float:
    """How far the student's answers are from the teacher's, relative to how much the teacher's
    differ from row to row.

    A ratio of KL divergences (kind "logits") or of squared distances ("values"), never below 0: 0
    where the answers are equal, 1 for a student that always predicts the teacher's mean output.
    Where all rows of the teacher are alike, which tells nothing (a batch of one row), the distance
    is taken relative to log(classes) or to the teacher's mean square.

    Args:
        student, teacher: outputs [..., V].
        mask: rows that count, [...] of 0 and 1.
    """
    weight = row_weights(student.shape[:-1], mask, student.device)
    s = rows_of(student.detach().float())
    t = rows_of(teacher.detach().float())
    kept = None if mask is None else mask.flatten()
    if kind == "logits":
        t = t.log_softmax(-1)
        mean = weight @ t.exp()
        distance = soft_kl(s, t, mask=kept)
        spread = soft_kl(mean.log().expand_as(t), t, mask=kept)
        size = math.log(t.shape[-1])
    else:
        distance = mean_square(s - t, weight)
        spread = mean_square(weight @ t - t, weight)
        size = mean_square(t, weight).item()
    scale = spread.item() if spread > 1e-9 * size else size
    if scale == 0:
        return 0.0 if distance == 0 else math.inf
    return (distance / scale).item()


def rows_of(outputs: Tensor) -> Tensor:
    """Outputs [..., V] as rows [N, V]; a vector is one row, a number a row of one."""
    return outputs.reshape(-1, outputs.shape[-1] if outputs.ndim else 1)


def mean_square(rows: Tensor, weight: Tensor) -> Tensor:
    """Of rows [N, V] that count by their weights [N]."""
    return rows.square().mean(-1) @ weight


def row_weights(shape: torch.Size, mask: Tensor | None, device: torch.device) -> Tensor:
    """What each row, flattened, counts in a mean over those that `mask` keeps: fp32 [N]."""
    if mask is None:
        count = shape.numel()
        share = 1 / max(1, count)
        return torch.full((count,), share, dtype=torch.float32, device=device)
    kept = mask.to(device).float().flatten()
    return kept / kept.sum().clamp(min=1)


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """How far hidden states [..., C] of equal shape are apart: a scalar, 0 when equal, near 1 when
    unrelated.

    The squared distance over the teacher's squared length (Romero et al., arXiv 1412.6550; made
    free of scale, so that one weight suits every layer).
    """
    s = rows_of(student.float())
    t = rows_of(teacher.detach().float())
    if mask is None:  # the same, in fewer passes
        return F.mse_loss(s, t) / t.square().mean().clamp(min=1e-12)
    weight = row_weights(student.shape[:-1], mask, student.device)
    return mean_square(s - t, weight) / mean_square(t, weight).clamp(min=1e-12)
