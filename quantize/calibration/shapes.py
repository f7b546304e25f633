"""What layers give in an export, by the shapes of what they take.

`torch.export` asks every operation for the shape, the type and the strides of its result. For the
usual layers torch finds these in Python, by a dozen smaller operations that are each asked in the
same way: that took half of the time of an export. Inside `by_shapes` their result is a new tensor,
where all is of one floating type and it is known that the strides follow from the shape. Others
take torch's way, and the graph is the same.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, _TorchDispatchModeKey
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch._prims_common import is_contiguous_or_false
from torch._subclasses.fake_tensor import FakeTensor

_PRIVATE = ("py_kernels", "_dispatch_cache", "_op_dk")
_COMPOSITE = DispatchKey.CompositeImplicitAutograd
_aten = torch.ops.aten


class _ByShapes:
    """Inside, exports take less time. What runs on numbers, and what others trace, is as outside; a
    torch without the private names that this needs finds shapes in its own way.

    Patches of torch are made for the first thread that is inside, and taken back after the last.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.undo = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                _patch(self.undo)
            self.inside += 1

    def __exit__(self, *_: Any) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.undo.close()


by_shapes = _ByShapes()


def _patch(undo: contextlib.ExitStack) -> None:
    for operation, shaped in _LAYERS.items():
        if not all(hasattr(operation, name) for name in _PRIVATE):
            continue
        if _COMPOSITE in operation.py_kernels:
            continue
        undo.callback(operation._dispatch_cache.clear)
        undo.callback(operation.py_kernels.pop, _COMPOSITE)
        operation.py_kernels[_COMPOSITE] = functools.partial(_layer, operation, shaped)
        operation._dispatch_cache.clear()
    for operation in _ACTIVATIONS & decomposition_table.keys():
        original = decomposition_table[operation]
        undo.callback(decomposition_table.__setitem__, operation, original)
        decomposition_table[operation] = _activation(operation, original)


def _layer(
    operation: OpOverload, shaped: Callable[..., Tensor | None], *args: Any, **kwargs: Any
) -> Any:
    made = shaped(*args, **kwargs)
    return operation._op_dk(_COMPOSITE, *args, **kwargs) if made is None else made


def _activation(operation: OpOverload, original: Callable[..., Any]) -> Callable[..., Any]:
    in_place = operation._schema.name.endswith("_")

    @functools.wraps(original)
    def activation(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if in_place and _are_known(x):
            return x
        made = _alike(x)
        return original(x, *args, **kwargs) if made is None else made

    return activation


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if not _are_known(x, weight, bias) or weight.dim() != 2 or x.dim() < 2:
        return None
    outputs, inputs = weight.shape
    _check(x.shape[-1:], (inputs,))
    _check_parts([bias], (outputs,))
    return x.new_empty((*x.shape[:-1], outputs))


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    *_: Any,
) -> Tensor | None:
    parts = weight, bias, mean, variance
    if training or mean is None or not _are_known(x, *parts) or x.dim() < 2:
        return None
    _check_parts(parts, x.shape[1:2])
    return _alike(x)


def _layer_norm(
    x: Tensor,
    sizes: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
) -> Tensor | None:
    if not _are_known(x, weight, bias) or x.dim() < len(sizes):
        return None
    _check(x.shape[-len(sizes) :], sizes)
    _check_parts([weight, bias], sizes)
    return x.new_empty(x.shape)  # whatever the strides of x


def _rms_norm(
    x: Tensor, sizes: Sequence[int], weight: Tensor | None = None, *_: Any
) -> Tensor | None:
    return None if _layer_norm(x, sizes, weight) is None else _alike(x)


def _alike(x: Tensor) -> Tensor | None:
    """A result of this shape, where it is known to lie in memory row by row."""
    if not _are_known(x) or not is_contiguous_or_false(x):
        return None
    return x.new_empty(x.shape)


def _are_known(x: Tensor, *others: Tensor | None) -> bool:
    """Do all stand for tensors of one floating type, whose numbers nobody knows? Not where what is
    computed of them is recorded.
    """
    if torch._C._get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None:
        return False
    for one in (x, *others):
        if one is None:
            continue
        if type(one) is not FakeTensor or one.constant is not None or one.dtype != x.dtype:
            return False
    return x.is_floating_point()


def _check_parts(parts: Sequence[Tensor | None], expected: Sequence[Any]) -> None:
    for part in parts:
        if part is not None:
            _check(part.shape, expected)


def _check(shape: Sequence[Any], expected: Sequence[Any]) -> None:
    """Another shape is refused; a size that was free is fixed by this."""
    torch._check(tuple(shape) == tuple(expected), lambda: f"{shape} where {expected} is taken")


_LAYERS: dict[OpOverload, Callable[..., Tensor | None]] = {
    _aten.batch_norm.default: _batch_norm,
    _aten.layer_norm.default: _layer_norm,
    _aten.linear.default: _linear,
    _aten.rms_norm.default: _rms_norm,
}
_ACTIVATIONS: set[OpOverload] = {
    getattr(_aten, name).default
    for name in (
        *("abs", "clamp", "clamp_", "clamp_max", "clamp_min", "cos", "elu", "erf", "exp", "gelu"),
        *("hardsigmoid", "hardswish", "hardtanh", "hardtanh_", "leaky_relu", "mish", "neg"),
        *("reciprocal", "relu", "relu_", "round", "round_", "rsqrt", "sigmoid", "silu", "sin"),
        *("softplus", "sqrt", "tanh"),
    )
}
