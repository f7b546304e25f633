"""Experts whose matrices lie in one three-dimensional parameter, as in mixtures of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_LEAST = 8  # rows and columns of a matrix


def expert_weights(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters `[E, a, b]` that hold a matrix for each of the E experts of `module`,
    which says how many it has in an attribute with `expert` in its name.
    """
    counts = {
        value for name, value in vars(module).items() if "expert" in name and type(value) is int
    }
    own = module._parameters.items() if counts else ()
    return tuple(name for name, weight in own if _is_stack(weight, counts))


def _is_stack(weight: Tensor | None, counts: set[int]) -> bool:
    if weight is None or is_lazy(weight) or weight.ndim != 3:
        return False
    plain = type(weight.data) is Tensor and weight.is_floating_point()
    experts, *sizes = weight.shape
    return plain and experts in counts and experts > 1 and min(sizes) >= _LEAST


def has_inputs_first(module: Any) -> bool | None:
    """Are the matrices of its experts `[in, out]`, and not `[out, in]`? None where the module
    doesn't say; those of transformers do.
    """
    return vars(module).get("is_transposed")
