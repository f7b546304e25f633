"""16-bit weights: which parameters are rounded, and which can't be. The layers that compute on them
are in `nn/half.py`.

Only parameters are rounded. Buffers (running statistics, position ids, int8 weights and scales)
stay exact: they are small, or must be.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from quantize import surgery
from quantize.nn import PackedLayer, dtype_name
from quantize.nn.half import HALF_DTYPES, casting_class, half

MAX_ROUNDING_ERROR = (
    0.01  # of a tensor's Euclidean norm; overflow gives inf, a tensor of subnormals nearly 1
)


def to_half(
    model: nn.Module, dtype: torch.dtype = torch.float16, *, skip: surgery.Skip = ()
) -> nn.Module:
    """A copy of `model` whose floating-point parameters are stored in 16 bits.

    Inputs, outputs and what lies between layers keep their dtypes. Linear and convolution layers
    compute in `compute_dtype(dtype, device)`, and follow when the model moves to another device;
    everything else computes in the dtype it had, on rounded parameters. That holds for a model that
    comes in 16 bits too: a float16 model gives float16, and its linear layers compute in float32
    where float16 is slow.

    A parameter that 16 bits can't hold (values that would overflow to inf, vanish, or that aren't
    finite) stays as it is, with a UserWarning naming it. Compressed layers keep what they store.
    `quantize.summary(result)` names them all.

    Args:
        model: any nn.Module; it stays as it is.
        dtype: torch.float16 or torch.bfloat16.
        skip: names, globs or types of modules that stay as they are (`surgery.skip_filter`).

    Returns:
        The copy, which takes and gives the dtypes that `model` does.

    Raises:
        TypeError: for something that is no nn.Module.
        ValueError: for another dtype, a model without floating-point parameters, one that is stored
            in 16 bits already, and a name in `skip` that the model doesn't have.
    """
    if dtype not in HALF_DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(HALF_DTYPES)}, got {dtype_name(dtype)}")
    new = surgery.clone(model)
    skipped = surgery.skip_filter(new, skip)
    if any("_half" in m.__dict__ for m in new.modules()):
        raise ValueError("the model's parameters are stored in 16 bits already")
    rounding = _Rounding(dtype)
    for name, module in new.named_modules():
        if skipped(name, module):
            rounding.leave(name, module, "named by skip")
        elif isinstance(module, PackedLayer):
            rounding.leave(name, module, f"a {type(module).__name__} keeps what it stores")
    free = _free_layers(new)
    done: dict[str, str] = {}
    for name, module in new.named_modules():
        fits = rounding.parameters_of(name, module)
        if not fits:
            continue
        casts = name in free and fits == [key for key, _ in module.named_parameters(recurse=False)]
        held = dict(module.named_parameters(recurse=False))
        kept = {held[key].dtype for key in fits}
        arguments = {"dtype": dtype_name(dtype), "names": fits, "casts": casts}
        if len(kept) == 1:
            arguments["computed"] = dtype_name(kept.pop())
        half(module, **arguments)
        surgery.record(module, "half", **arguments)
        done[name] = dtype_name(dtype)
    if rounding.unfit:
        warnings.warn(
            f"kept exact, because {dtype_name(dtype)} can't hold them: "
            f"{', '.join(rounding.unfit.values())}",
            stacklevel=2,
        )
    if not done:
        kept = f"left: {rounding.left}" if rounding.left else "it has none"
        raise ValueError(
            f"{type(model).__name__} has no floating-point parameter to store in 16 bits ({kept})"
        )
    surgery.note(new, "half", done=done, left=rounding.left, dtype=dtype_name(dtype))
    return new


class _Rounding:
    """Rounds parameters to `dtype`, each once, and notes those that stay."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.left: dict[str, str] = {}
        self.unfit: dict[str, str] = {}
        self._untouched: set[int] = set()
        self._rounded: set[int] = set()

    def leave(self, name: str, module: nn.Module, reason: str) -> None:
        """Keep the parameters that `module` itself holds, under every name that they have."""
        own = list(module.parameters(recurse=False))
        self._untouched |= {id(p) for p in own}
        if own:
            self.left[name] = reason

    def parameters_of(self, name: str, module: nn.Module) -> list[str]:
        """Round what `module` itself holds; names of the parameters that are rounded now."""
        fits = []
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in self._untouched or not parameter.is_floating_point():
                continue
            if id(parameter) in self._rounded or self._round(f"{name}.{key}".strip("."), parameter):
                fits.append(key)
        return fits

    def _round(self, name: str, parameter: nn.Parameter) -> bool:
        if nn.parameter.is_lazy(parameter):
            self.left[name] = "it has no shape yet: run the model once"
            return False
        if parameter.is_meta:
            self.left[name] = "it has no numbers, only shapes: it is on the meta device"
            return False
        error = _rounding_error(parameter, self.dtype)
        if not error <= MAX_ROUNDING_ERROR:
            self.unfit[name] = f"{name} (would change by {error:.3g} of its norm)"
            self.left[name] = f"{dtype_name(self.dtype)} would change it by {error:.3g} of its norm"
            self._untouched.add(id(parameter))
            return False
        parameter.data = parameter.data.to(self.dtype).to(parameter.dtype)
        self._rounded.add(id(parameter))
        return True


# their fast paths take weights without calling layers
_READS_WEIGHTS = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
)


def _free_layers(model: nn.Module) -> set[str]:
    """Layers that may cast: weights that nobody else holds, and no module around them that bypasses
    the layer's forward.
    """
    holders = surgery.holders(model)
    bypassed: set[int] = set()
    for module in model.modules():
        if isinstance(module, _READS_WEIGHTS):
            bypassed |= {id(child) for child in module.children()}
    casting = {torch.float32, *HALF_DTYPES.values()}
    free: set[str] = set()
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        fits = all(p.dtype in casting and len(holders[id(p)]) == 1 for p in own)
        if fits and casting_class(module) is not None and id(module) not in bypassed:
            free.add(name)
    return free


def _rounding_error(tensor: Tensor, dtype: torch.dtype) -> float:
    """Relative Euclidean error of rounding to `dtype`: inf where a value overflows, nan where one
    isn't finite.
    """
    exact = tensor.detach().double()
    norm = exact.norm().item()
    return (exact.to(dtype).double() - exact).norm().item() / norm if norm else 0.0
