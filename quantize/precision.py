"""16-bit weights: half the file, and the arithmetic that is fast on this machine.

What a file keeps and what a CPU computes in are two choices. float16 keeps 10 bits of mantissa, but a float16 matrix product is
5 to 15 times slower than a float32 one on CPUs without it; bfloat16 keeps 7 bits and is twice as fast where the CPU multiplies
it natively. So `to_half` rounds the parameters, makes `state_dict()` (and so the file) give 16-bit tensors, and lets each layer
compute in `compute_dtype`: the fastest type that loses none of the bits the file keeps. From outside such a layer is what
it was: it takes, gives, and its weight reads in the dtype that it had.

Only parameters are rounded. Buffers (running statistics, position ids, int8 weights and scales) stay exact: they are small, or
must be.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import surgery
from quantize.host import compute_dtype
from quantize.nn import Operands, PackedLayer, WeightReading, dtype_name, dtype_named, is_transposed

HALF_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_ROUNDING_ERROR = 0.01  # of a tensor's Euclidean norm; overflow gives inf, a tensor of subnormals nearly 1


def to_half(model: nn.Module, dtype: torch.dtype = torch.float16, *, skip: surgery.Skip = ()) -> nn.Module:
    """A copy of `model` whose floating-point parameters are stored in 16 bits.

    Inputs, outputs and what lies between layers keep their dtypes. Linear and convolution layers compute in
    `compute_dtype(dtype, device)`, and follow when the model moves to another device; everything else computes in the dtype it
    had, on rounded parameters. That holds for a model that comes in 16 bits too: a float16 model gives float16, and its linear
    layers compute in float32 where float16 is slow.

    A parameter that 16 bits can't hold (values that would overflow to inf, vanish, or that aren't finite) stays as it is, with
    a UserWarning naming it. Compressed layers keep what they store. `quantize.summary(result)` names them all.

    Args:
        dtype: torch.float16 or torch.bfloat16.
        skip: see `surgery.select`.

    Raises:
        TypeError: for something that is no nn.Module.
        ValueError: for another dtype, a model without floating-point parameters, one that is stored in 16 bits already, and a
            name in `skip` that the model doesn't have.
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
        kept = {module._parameters[key].dtype for key in fits}
        arguments = {"dtype": dtype_name(dtype), "names": fits, "casts": casts}
        if len(kept) == 1:
            arguments["computed"] = dtype_name(kept.pop())
        half(module, **arguments)
        surgery.record(module, "half", **arguments)
        done[name] = dtype_name(dtype)
    if rounding.unfit:
        warnings.warn(
            f"kept exact, because {dtype_name(dtype)} can't hold them: {', '.join(rounding.unfit.values())}", stacklevel=2
        )
    if not done:
        kept = f"left: {rounding.left}" if rounding.left else "it has none"
        raise ValueError(f"{type(model).__name__} has no floating-point parameter to store in 16 bits ({kept})")
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
            if id(parameter) not in self._rounded and not self._round(f"{name}.{key}".strip("."), parameter):
                continue
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


@surgery.builder
def half(module: nn.Module, dtype: str, names: list[str], casts: bool, computed: str | None = None) -> nn.Module:
    """Make `state_dict()` give the named parameters of `module` in 16 bits and, if it casts, compute in the dtype for it.

    `computed`: the dtype that the parameters have in a layer that doesn't cast, and in which one that casts takes and gives.
    """
    if dtype not in HALF_DTYPES or not set(names) <= set(module._parameters):
        raise ValueError(f"no such 16-bit storage: {dtype!r} for {names}")
    if computed is not None:
        for name in names:
            parameter = module._parameters[name]
            parameter.data = parameter.data.to(dtype_named(computed))
    module._half = HALF_DTYPES[dtype], tuple(names)
    module.register_state_dict_post_hook(_give_half)
    kind = _casting(module)
    if casts and kind is not None:
        # The class changes and the object stays, with its hooks, its edits and whoever else holds it.
        module._reads = torch.float32 if computed is None else dtype_named(computed)
        module.__class__ = kind
        module._settle()
    return module


def _give_half(module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    dtype, names = module._half
    computed = {module._parameters[name].dtype for name in names}
    if len(computed) == 1 and not isinstance(module, _Casting):  # a file repeats a later `.to(dtype)`, too
        surgery.amend(module, "half", computed=dtype_name(computed.pop()))
    for key in (prefix + n for n in names):
        if not isinstance(state[key], nn.Parameter):  # with keep_vars=True the caller wants the parameters themselves
            state[key] = state[key].to(dtype)


class _Casting:
    """Mixed into a layer: parameters in the compute dtype; input, output and what others read in the dtype `_reads`."""

    stands_in = True

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        return self._multiply(input.to(weight.dtype), weight, bias).to(self._reads)

    @property
    def weight(self) -> Tensor:
        return self._reading("weight")

    @property
    def bias(self) -> Tensor | None:
        return self._reading("bias")

    def _reading(self, name: str) -> Any:
        """The parameter as the layer that this one was had it."""
        stored = self._parameters[name]
        if stored is None or stored.dtype == self._reads:
            return stored
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return stored.to(self._reads)
        return WeightReading.described(
            lambda: stored.to(self._reads), stored.shape, self._reads, stored.device, stored.requires_grad
        )

    def operands(self) -> Operands:
        return Operands(self._parameters["weight"].detach(), self._parameters["bias"])

    def _settle(self) -> None:
        for parameter in self.parameters(recurse=False):
            parameter.data = parameter.data.to(compute_dtype(self._half[0], parameter.device))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        moved = fn(torch.empty(0, dtype=self._reads)).dtype
        if moved != self._reads:
            self._reads = moved
            surgery.amend(self, "half", computed=dtype_name(moved))
        self._settle()
        return self


class HalfLinear(_Casting, nn.Linear):
    """`nn.Linear` on weights stored in 16 bits: [..., in_features] to [..., out_features] in the dtype that the layer had."""

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class HalfConv1D(_Casting, nn.Module):
    """GPT-2's linear layer, weight [in, out], stored in 16 bits."""

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight.t(), bias)


class HalfConv1d(_Casting, nn.Conv1d):
    """`nn.Conv1d` on weights stored in 16 bits."""

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class HalfConv2d(_Casting, nn.Conv2d):
    """`nn.Conv2d` on weights stored in 16 bits."""

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


_CASTING = {nn.Linear: HalfLinear, nn.Conv1d: HalfConv1d, nn.Conv2d: HalfConv2d}
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # their fast paths take weights without calling layers


def _casting(module: nn.Module) -> type[nn.Module] | None:
    """The class that computes what `module` does on 16-bit weights; None where its weight is computed, or for other layers."""
    if not {"weight"} <= set(module._parameters) <= {"weight", "bias"} or "forward" in module.__dict__:
        return None
    return HalfConv1D if is_transposed(module) else _CASTING.get(type(module))


def _free_layers(model: nn.Module) -> set[str]:
    """Layers that may cast: weights that nobody else holds, and no module around them that bypasses the layer's forward."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    bypassed = {id(m) for p in model.modules() if isinstance(p, _READS_WEIGHTS) for m in p.children()}
    casting = {torch.float32, *HALF_DTYPES.values()}
    return {
        name
        for name, module in model.named_modules()
        if _casting(module) is not None
        and id(module) not in bypassed
        and all(p.dtype in casting and owners[id(p)] == 1 for p in module.parameters(recurse=False))
    }


def _rounding_error(tensor: Tensor, dtype: torch.dtype) -> float:
    """Relative Euclidean error of rounding to `dtype`: inf where a value overflows, nan where one isn't finite."""
    exact = tensor.detach().double()
    norm = exact.norm().item()
    return (exact.to(dtype).double() - exact).norm().item() / norm if norm else 0.0
