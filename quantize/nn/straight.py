"""Gradients of layers that compute in integers: those of the float layer that each stands for, at
the same input (straight-through: Bengio et al., arXiv 1308.3432).

What is stored gets none. Left out: gradients of gradients, but in functions that `torch.func`
transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

Compute = Callable[..., Any]  # from some tensors and other values to a tensor, or to several


def in_transform() -> bool:
    """Do derivatives go forward with the results, or is the function that runs transformed?"""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def straight(compute: Compute, in_float: Compute, tensors: Sequence[Tensor], *rest: Any) -> Any:
    """`compute(*tensors, *rest)`, with the derivatives of `in_float(*tensors, *rest)`."""
    if any(tensor.requires_grad for tensor in tensors) and torch.is_grad_enabled():
        if not in_transform():
            return _Straight.apply(compute, in_float, rest, *tensors)
    elif not in_transform():
        return compute(*tensors, *rest)
    results = compute(*[tensor.detach() for tensor in tensors], *rest)
    return derived(results, in_float(*tensors, *rest))


def derived(results: Any, floats: Any) -> Any:
    """Results with the derivatives of others: what is added to them is 0 but for these."""
    if isinstance(results, Tensor):
        return results + (floats - floats.detach()).to(results.dtype)
    return tuple(map(derived, results, floats))


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Compute, in_float: Compute, rest: Sequence[Any], *tensors: Tensor
    ) -> Any:
        ctx.in_float, ctx.rest = in_float, rest
        ctx.save_for_backward(*tensors)
        return compute(*tensors, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        asked = ctx.needs_input_grad[3:]
        with torch.enable_grad():
            pairs = zip(ctx.saved_tensors, asked, strict=True)
            leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in pairs]
            results = ctx.in_float(*leaves, *ctx.rest)
        results = (results,) if isinstance(results, Tensor) else results
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(results, wanted, gradients, allow_unused=True))
        return None, None, None, *(next(found) if needed else None for needed in asked)
