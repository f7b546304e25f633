"""16-bit weights: half the file, and the arithmetic that is fast on this machine.

What a file keeps and what a CPU computes in are two choices. float16 keeps 10 bits of mantissa, but
a float16 matrix product is 5 to 15 times slower than a float32 one on CPUs without it; bfloat16
keeps 7 bits and is twice as fast where the CPU multiplies it natively. So `to_half` rounds the
parameters, makes `state_dict()` (and so the file) give 16-bit tensors, and lets each layer compute
in `compute_dtype`: the fastest type that loses none of the bits the file keeps. From outside such a
layer is what it was: it takes, gives, and its weight reads in the dtype that it had.

Where native code reads the float16 numbers of a linear layer, the layer itself holds no others (see
`hold_stored`): it widens them block by block in the cache as it multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import surgery
from quantize.host import compute_dtype
from quantize.nn import Operands, WeightReading, dtype_name, dtype_named, is_traced, is_transposed

HALF_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_BLOCK = 1 << 18  # weights widened at a time: 1 MiB of float32, which caches hold


@surgery.builder
def half(
    module: Any, dtype: str, names: list[str], casts: bool, computed: str | None = None
) -> nn.Module:
    """Make `state_dict()` give the named parameters of `module` in 16 bits and, if it casts,
    compute in the dtype for it.

    `computed`: the dtype that the parameters have in a layer that doesn't cast, and in which one
        that casts takes and gives.
    """
    if dtype not in HALF_DTYPES or not set(names) <= set(module._parameters):
        raise ValueError(f"no such 16-bit storage: {dtype!r} for {names}")
    if computed is not None:
        for name in names:
            parameter = module._parameters[name]
            parameter.data = parameter.data.to(dtype_named(computed))
    module._half = HALF_DTYPES[dtype], tuple(names)
    module.register_state_dict_post_hook(_give_half)
    kind = casting_class(module)
    if casts and kind is not None:
        # The class changes and the object stays, with its hooks, its edits and whoever else holds
        # it.
        module._reads = torch.float32 if computed is None else dtype_named(computed)
        module.__class__ = kind
        module._settle()
    return module


def _give_half(module: Any, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    dtype, names = module._half
    computed = {module._parameters[name].dtype for name in names}
    if len(computed) == 1 and not isinstance(module, _Casting):
        # a file repeats a later `.to(dtype)`, too
        surgery.amend(module, "half", computed=dtype_name(computed.pop()))
    for key in (prefix + n for n in names):
        # with keep_vars=True the caller wants the parameters themselves
        if not isinstance(state[key], nn.Parameter):
            state[key] = state[key].to(dtype)


class _Casting(nn.Module):
    """Mixed into a layer: parameters in the compute dtype; input, output and what others read in
    the dtype `_reads`.
    """

    stands_in = True
    _half: tuple[torch.dtype, tuple[str, ...]]  # what the file keeps: dtype, names of parameters
    _reads: torch.dtype

    def _multiply(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        parameters: Any = self._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if weight.dtype is input.dtype is self._reads is torch.float32:
            return self._multiply(input, weight, bias)
        trains = torch.is_grad_enabled() and weight.requires_grad
        if _is_narrow(weight) and trains and not is_traced():
            self._settle()  # gradients and optimizers are those of float32
        computed = torch.float32 if _is_narrow(weight) else weight.dtype
        return self._multiply(input.to(computed), weight, bias).to(self._reads)

    @property
    def weight(self) -> Tensor:
        return self._reading("weight")

    @property
    def bias(self) -> Tensor | None:
        return self._reading("bias")

    def _reading(self, name: str) -> Any:
        """The parameter as the layer that this one was had it."""
        stored: Any = self._parameters[name]
        if stored is not None and _is_narrow(stored):
            self._settle()  # whoever asks may write into it
        if stored is None or stored.dtype == self._reads:
            return stored
        if is_traced():
            return stored.to(self._reads)
        return WeightReading.described(
            lambda: stored.to(self._reads),
            stored.shape,
            self._reads,
            stored.device,
            stored.requires_grad,
        )

    def operands(self) -> Operands:
        parameters: Any = self._parameters
        return Operands(parameters["weight"].detach(), parameters["bias"])

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


def _is_narrow(parameter: Tensor) -> bool:
    """Whether a parameter is held in float16 where the CPU computes in float32."""
    return parameter.dtype is torch.float16 and parameter.device.type == "cpu"


class HalfLinear(_Casting, nn.Linear):
    """`nn.Linear` on weights stored in 16 bits: [..., in_features] to [..., out_features] in the
    dtype that the layer had.
    """

    def hold_stored(self, weight: Tensor) -> None:
        """Hold `weight`, the same numbers in float16, instead of the float32 parameter's.

        The parameter stays the same object. Whoever asks for `layer.weight` finds float32 again.
        """
        self._parameters["weight"].data = weight  # type: ignore[union-attr]

    def _multiply(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        if weight.dtype is x.dtype:
            return F.linear(x, weight, bias)
        if is_traced():
            return F.linear(x, weight.to(x.dtype), bias)
        rows = max(1, _BLOCK // self.in_features)
        blocks = [F.linear(x, block.to(x.dtype)) for block in weight.split(rows)]
        y = torch.cat(blocks, dim=-1)
        return y if bias is None else y.add_(bias)


class HalfConv1D(_Casting):
    """GPT-2's linear layer, weight [in, out], stored in 16 bits."""

    def _multiply(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return F.linear(x, weight.t(), bias)


class HalfConv1d(_Casting, nn.Conv1d):
    """`nn.Conv1d` on weights stored in 16 bits."""

    def _multiply(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return self._conv_forward(x, weight, bias)


class HalfConv2d(_Casting, nn.Conv2d):
    """`nn.Conv2d` on weights stored in 16 bits."""

    def _multiply(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return self._conv_forward(x, weight, bias)


_CASTING = {nn.Linear: HalfLinear, nn.Conv1d: HalfConv1d, nn.Conv2d: HalfConv2d}


def casting_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that computes what `module` does on 16-bit weights; None where its weight is
    computed, or for other layers.
    """
    if (
        not {"weight"} <= set(module._parameters) <= {"weight", "bias"}
        or "forward" in module.__dict__
    ):
        return None
    return HalfConv1D if is_transposed(module) else _CASTING.get(type(module))
