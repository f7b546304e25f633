"""Weights of experts in int8: the three-dimensional parameters of a module that keeps its forward.

Such a forward indexes a parameter `[E, out, in]` or `[E, in, out]`, or gives all of it to a product
of groups. `Int8Experts` stores it, and an attribute of the same name reads as it (`WeightReading`).
A reading that is given to a linear layer, to a product of matrices or of groups multiplies in int8,
as `Int8Linear` does. Whatever else is done to it gets the float numbers, of one expert where one
was taken.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import surgery
from quantize.nn import int8_kernels as kernels
from quantize.nn.protocol import (
    Int8Layer,
    dtype_name,
    dtype_named,
    empty,
    is_traced,
    standing_for,
)
from quantize.nn.reading import WeightReading

_STORED = "{}_int8"  # the name of what stores a parameter of this name
Pair = tuple[Tensor, Tensor]


@surgery.builder
class Int8Experts(Int8Layer):
    """A parameter of a module of experts: `packed` int8 `[E, out, in]`, `scale` float32 `[E, out]`.

    `weight` reads as the parameter, `[E, in, out]` where `inputs_first`.
    """

    def __init__(
        self, packed: Tensor, scale: Tensor, *, inputs_first: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(dtype, packed=packed, scale=scale)
        self.inputs_first = inputs_first
        self.shape = tuple(packed.shape)

    @classmethod
    def from_weight(cls, weight: Tensor, inputs_first: bool) -> Int8Experts:
        """Quantize a float parameter `[E, out, in]`, or `[E, in, out]` where `inputs_first`."""
        matrices = weight.mT if inputs_first else weight
        pairs = [kernels.quantize_weight(matrix) for matrix in matrices]
        packed = torch.stack([packed for packed, _ in pairs])
        scale = torch.stack([scale for _, scale in pairs])
        new = cls(packed, scale, inputs_first=inputs_first, dtype=weight.dtype)
        form = {"shape": list(new.shape), "inputs_first": inputs_first}
        surgery.record(new, cls.__name__, **form, dtype=dtype_name(weight.dtype))
        return new

    @classmethod
    def rebuild(
        cls, module: nn.Module, shape: Sequence[int], inputs_first: bool, dtype: str = "float32"
    ) -> Int8Experts:
        """An empty layer (on the meta device) in place of `module`, for a file's tensors."""
        experts, outputs, inputs = shape
        packed = empty(torch.int8, experts, outputs, inputs)
        scale = empty(torch.float32, experts, outputs)
        return cls(packed, scale, inputs_first=bool(inputs_first), dtype=dtype_named(dtype))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"packed": self.shape, "scale": self.shape[:2]}

    @property
    def weight(self) -> Tensor:
        stored = Stored(self.packed, self.scale, self.weight_kind()[0], self.inputs_first)
        if is_traced():
            return stored.dense()
        return replace(stored, each=_each(self)).reading()

    def extra_repr(self) -> str:
        experts, outputs, inputs = self.shape
        return f"experts={experts}, in_features={inputs}, out_features={outputs}"


_views: weakref.WeakKeyDictionary[Int8Experts, tuple[Pair, list[Pair]]] = (
    weakref.WeakKeyDictionary()
)


def _each(layer: Int8Experts) -> list[Pair]:
    """`packed` and `scale` of each expert: the same views at each call, as kernels keep packed
    copies by the identity of a weight.
    """
    known = _views.get(layer)
    if known is None or known[0][0] is not layer.packed or known[0][1] is not layer.scale:
        views = list(zip(layer.packed.unbind(), layer.scale.unbind(), strict=True))
        known = _views[layer] = (layer.packed, layer.scale), views
    return known[1]


# What a forward reads.


@dataclass(frozen=True, eq=False)
class Stored:
    """One matrix, or one for each expert.

    Args:
        packed: int8 [(E,) out, in].
        scale: float32 [(E,) out].
        dtype: in which it is read.
        inputs_first: is it read as [..., in, out]?
        each: `packed` and `scale` of each expert.
    """

    packed: Tensor
    scale: Tensor
    dtype: torch.dtype
    inputs_first: bool
    each: Sequence[Pair] = ()

    def dense(self) -> Tensor:
        """The float numbers."""
        dense = (self.packed.float() * self.scale.unsqueeze(-1)).to(self.dtype)
        return dense.mT.contiguous() if self.inputs_first else dense

    def reading(self) -> Int8Reading:
        """What stands for them."""
        *experts, outputs, inputs = self.packed.shape
        matrix = (inputs, outputs) if self.inputs_first else (outputs, inputs)
        shape, device = (*experts, *matrix), self.packed.device
        new: Any = Int8Reading.described(self.dense, shape, self.dtype, device)
        new._stored = self
        return new


class Int8Reading(WeightReading):
    """A reading that multiplies in int8."""

    _stored: Stored

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        call = _CALLS.get(function)
        result = NotImplemented if call is None else call(*args, **(kwargs or {}))
        if result is NotImplemented:
            return super().__torch_function__(function, types, args, kwargs)
        return result


def _item(weight: Any, index: Any) -> Any:
    """One expert, or those that a tensor names."""
    stored = weight._stored
    if not stored.each or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, Tensor):
        if index.is_floating_point() or index.dtype is torch.bool or index.ndim > 1:
            return NotImplemented
        if index.ndim == 1:
            packed, scale = stored.packed[index], stored.scale[index]
            return replace(stored, packed=packed, scale=scale, each=()).dense()
    elif not isinstance(index, int):
        return NotImplemented
    packed, scale = stored.each[operator.index(index)]
    return replace(stored, packed=packed, scale=scale, each=()).reading()


def _flipped(weight: Any, first: int = -2, second: int = -1) -> Any:
    """With its last two axes exchanged."""
    count = weight._stored.packed.ndim
    if {first % count, second % count} != {count - 2, count - 1}:
        return NotImplemented
    return replace(weight._stored, inputs_first=not weight._stored.inputs_first).reading()


def _flipped_matrix(weight: Any) -> Any:
    return _flipped(weight) if weight._stored.packed.ndim == 2 else NotImplemented


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, Int8Reading) or weight._stored.packed.ndim != 2:
        return NotImplemented
    stored = weight._stored
    if stored.inputs_first or isinstance(input, WeightReading):
        return NotImplemented
    return kernels.linear(input, stored.packed, stored.scale, bias)


def _product(input: Any, other: Any) -> Any:
    """A product of an input with one matrix, or of one input for each expert."""
    if isinstance(input, WeightReading) or not other._stored.inputs_first:
        return NotImplemented
    stored = other._stored
    if not stored.each:
        return kernels.linear(input, stored.packed, stored.scale, None)
    if input.ndim != 3 or len(input) != len(stored.each):
        return NotImplemented
    pairs = zip(input, stored.each, strict=True)
    return torch.stack([kernels.linear(x, packed, scale, None) for x, (packed, scale) in pairs])


def _grouped(input: Any, weight: Any, offs: Tensor | None = None, **options: Any) -> Any:
    """A product of each group of rows, which ends at `offs`, with the matrix of its expert."""
    given = any(value is not None for value in options.values())
    if offs is None or given or input.ndim != 2 or isinstance(input, WeightReading):
        return NotImplemented
    stored = weight._stored
    if not stored.inputs_first or not stored.each:
        return NotImplemented
    result = input.new_zeros(len(input), stored.packed.shape[1])
    start = 0
    for end, (packed, scale) in zip(offs.tolist(), stored.each, strict=True):
        if end > start:
            result[start:end] = kernels.linear(input[start:end], packed, scale, None)
        start = max(start, end)
    return result


_T: Any = Tensor.T
_mT: Any = Tensor.mT
_CALLS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _item,
    **dict.fromkeys((Tensor.transpose, torch.transpose, Tensor.swapaxes), _flipped),
    _mT.__get__: _flipped,
    **dict.fromkeys((_T.__get__, Tensor.t, torch.t), _flipped_matrix),
    F.linear: _linear,
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__, torch.matmul), _product),
    **dict.fromkeys((Tensor.mm, torch.mm, Tensor.bmm, torch.bmm), _product),
    getattr(torch, "_grouped_mm", None): _grouped,  # what F.grouped_mm calls
}


# The module around them.


def pack_experts(module: nn.Module) -> None:
    """Store the weights of the experts of `module` in int8, in place."""
    names = surgery.expert_weights(module)
    inputs_first = bool(surgery.has_inputs_first(module))
    weights: Any = {name: module._parameters[name] for name in names}
    layers = {n: Int8Experts.from_weight(w.detach(), inputs_first) for n, w in weights.items()}
    _hold(module, layers)
    surgery.record(module, "int8_experts", names=list(names))


@surgery.builder
def int8_experts(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """Make room for the stored weights of experts, which later edits of a file bring.

    Raises: ValueError: for a module without such parameters.
    """
    missing = set(names) - set(surgery.expert_weights(module))
    if missing or not names:
        raise ValueError(f"it has no experts in {sorted(missing)[:4]}")
    _hold(module, {name: nn.Module() for name in names})
    return module


def _hold(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        del module._parameters[name]
        module.add_module(_STORED.format(name), layer.train(module.training))
    module.__class__ = _experts_class(type(module), tuple(layers))


def _experts_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of a module's class whose attributes of these names read what is stored."""
    content = {name: property(partial(_read, name)) for name in names}
    return standing_for(base, (base,), content, _experts_class, names)


def _read(name: str, module: nn.Module) -> Tensor:
    layer: Any = module._modules[_STORED.format(name)]
    return layer.weight
