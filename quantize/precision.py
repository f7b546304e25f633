"""16-bit weights: half the file, and the arithmetic that is fast on this machine.

What a file keeps and what a CPU computes in are two choices. float16 keeps 10 bits of mantissa, but a float16 matrix product is
5 to 15 times slower than a float32 one on CPUs without it; bfloat16 keeps 7 bits and is twice as fast where the CPU multiplies
it natively. So `to_half` rounds the parameters, makes `state_dict()` (and so the file) give 16-bit tensors, and lets each layer
compute in `compute_dtype`: the fastest type that loses none of the bits the file keeps.

Only parameters are rounded. Buffers (running statistics, position ids, int8 weights and scales) stay exact: they are small, or
must be. No casts inside a model that computes in float32: its parameters are float32 in memory.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from quantize import surgery
from quantize.host import compute_dtype

HALF_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_ROUNDING_ERROR = 0.01  # of a tensor's Euclidean norm; overflow gives inf, a tensor of subnormals nearly 1


def to_half(model: nn.Module, dtype: torch.dtype = torch.float16, *, skip: surgery.Skip = ()) -> nn.Module:
    """A copy of `model` whose floating-point parameters are stored in 16 bits.

    `dtype` is torch.float16 or torch.bfloat16. Inputs and outputs keep their dtypes. Linear and convolution layers compute in
    `compute_dtype(dtype, device)`, and follow when the model moves to another device; everything else computes in the dtype it
    had, on rounded parameters. A model that comes in 16 bits is widened where its own dtype would be slow.

    A parameter that 16 bits can't hold (values that would overflow to inf, vanish, or that aren't finite) stays as it is, with
    a UserWarning naming it.

    Raises TypeError for something that is no nn.Module, ValueError for another dtype, for a model without floating-point
    parameters, one that is stored in 16 bits already, and for a name in `skip` that the model doesn't have.
    """
    if dtype not in HALF_DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(HALF_DTYPES)}, got {str(dtype).removeprefix('torch.')}")
    new = surgery.clone(model)
    skipped = surgery.skip_filter(new, skip)
    if any("_half" in m.__dict__ for m in new.modules()):
        raise ValueError("the model's parameters are stored in 16 bits already")
    widened = {torch.float16, torch.bfloat16} - {compute_dtype(dtype)}
    if any(p.dtype in widened for p in new.parameters()):
        new.float()

    untouched = {id(p) for n, m in new.named_modules() if skipped(n, m) for p in m.parameters(recurse=False)}
    free = _free_layers(new)
    rounded, unfit = set(), {}
    for name, module in new.named_modules():
        fits = []
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in untouched or not parameter.is_floating_point():
                continue
            if id(parameter) not in rounded:
                error = _rounding_error(parameter, dtype)
                if not error <= MAX_ROUNDING_ERROR:
                    unfit[f"{name}.{key}" if name else key] = error
                    untouched.add(id(parameter))
                    continue
                parameter.data = parameter.data.to(dtype).to(parameter.dtype)
                rounded.add(id(parameter))
            fits.append(key)
        if fits:
            casts = type(module) in _CASTING and name in free and len(fits) == len(list(module.parameters(recurse=False)))
            half(module, dtype=str(dtype).removeprefix("torch."), names=fits, casts=casts)
            surgery.record(module, "half", dtype=str(dtype).removeprefix("torch."), names=fits, casts=casts)
    if unfit:
        shown = ", ".join(f"{n} (would change by {e:.3g} of its norm)" for n, e in unfit.items())
        warnings.warn(f"kept exact, because {str(dtype).removeprefix('torch.')} can't hold them: {shown}", stacklevel=2)
    if not rounded:
        raise ValueError(f"{type(model).__name__} has no floating-point parameter to store in 16 bits (skipped: {list(skip)})")
    return new


@surgery.builder
def half(module: nn.Module, dtype: str, names: list[str], casts: bool) -> nn.Module:
    """Make `state_dict()` give the named parameters of `module` in 16 bits and, if it casts, compute in the dtype for it."""
    if dtype not in HALF_DTYPES or not set(names) <= set(module._parameters):
        raise ValueError(f"no such 16-bit storage: {dtype!r} for {names}")
    module._half = HALF_DTYPES[dtype], tuple(names)
    module.register_state_dict_post_hook(_give_half)
    if casts and type(module) in _CASTING:
        # The class changes and the object stays, with its hooks, its edits and whoever else holds it.
        module.__class__ = _CASTING[type(module)]
        module._settle()
    return module


def _give_half(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, _metadata: object) -> None:
    dtype, names = module._half
    for key in (prefix + n for n in names):
        if not isinstance(state[key], nn.Parameter):  # with keep_vars=True the caller wants the parameters themselves
            state[key] = state[key].to(dtype)


class _Casting:
    """Mixed into a layer: weights in the compute dtype, input cast to it, float32 out."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.to(self.weight.dtype)).float()

    def _settle(self) -> None:
        for parameter in self.parameters(recurse=False):
            parameter.data = parameter.data.to(compute_dtype(self._half[0], parameter.device))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._settle()
        return self


class HalfLinear(_Casting, nn.Linear):
    """`nn.Linear` on weights stored in 16 bits: [..., in_features] to float32 [..., out_features]."""


class HalfConv1d(_Casting, nn.Conv1d):
    """`nn.Conv1d` on weights stored in 16 bits, float32 out."""


class HalfConv2d(_Casting, nn.Conv2d):
    """`nn.Conv2d` on weights stored in 16 bits, float32 out."""


_CASTING = {nn.Linear: HalfLinear, nn.Conv1d: HalfConv1d, nn.Conv2d: HalfConv2d}
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # their fast paths take weights without calling layers


def _free_layers(model: nn.Module) -> set[str]:
    """Layers whose weights nobody else uses: float32, not shared, not under a module that bypasses the layer's forward."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    bypassed = {id(m) for p in model.modules() if isinstance(p, _READS_WEIGHTS) for m in p.children()}
    return {
        name
        for name, module in model.named_modules()
        if id(module) not in bypassed
        and all(p.dtype == torch.float32 and owners[id(p)] == 1 for p in module.parameters(recurse=False))
    }


def _rounding_error(tensor: torch.Tensor, dtype: torch.dtype) -> float:
    """Relative Euclidean error of rounding to `dtype`: inf where a value overflows, nan where one isn't finite."""
    exact = tensor.detach().double()
    norm = exact.norm().item()
    return (exact.to(dtype).double() - exact).norm().item() / norm if norm else 0.0
