"""WeightReading: the tensor that stands for a compressed layer's weight where other code reads
`layer.weight`.

It has the dtype, shape and device of the float weight, and knowing them costs nothing
(transformers' T5 asks on every call). An operation that needs the numbers gets the float weight,
computed for it. Writing is refused: it would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_PROPERTIES = (
    "dtype shape device requires_grad layout ndim is_leaf is_meta is_cpu is_cuda is_sparse "
    "is_quantized is_nested "
    "itemsize nbytes grad grad_fn names"
).split()
_METHODS = (
    "size dim stride numel nelement ndimension element_size is_floating_point is_complex "
    "is_contiguous is_inference "
    "is_signed __len__ __hash__ storage_offset get_device"
).split()
_DESCRIBES = {getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)}
_DESCRIBES |= {getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)}
_REQUIRES_GRAD: Any = Tensor.requires_grad  # at run time a descriptor
_SETS_GRADIENT = (Tensor.requires_grad_, _REQUIRES_GRAD.__set__)
_ADDRESSES = (Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage)
_WRITES = set(
    "__set__ __delete__ __setitem__ register_hook retain_grad "
    "register_post_accumulate_grad_hook".split()
)
_WRITES |= {
    f"__i{name}__"
    for name in "add sub mul div truediv floordiv mod pow matmul and or xor lshift rshift".split()
}


class WeightReading(Tensor):
    """Reads as the tensor that `read()` gives, which has these dimensions, dtype and device; can't
    be written.

    Source: `torch.Tensor._make_wrapper_subclass`.
    """

    _read: Callable[[], Tensor]

    @classmethod
    def of(cls, read: Callable[[], Tensor], like: Tensor) -> Self:
        """`like` (it may lie on the meta device) tells shape, strides and requires_grad, `read`
        gives the numbers.
        """
        return cls.described(
            read, like.shape, like.dtype, like.device, like.requires_grad, like.stride()
        )

    @classmethod
    def described(
        cls,
        read: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool = False,
        strides: tuple[int, ...] | None = None,
    ) -> Self:
        """A reading of `read()`, which isn't called before its numbers are needed."""
        new: Any = Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=strides,
            dtype=dtype,
            device=device,
            requires_grad=requires_grad,
        )
        new._read = read
        return new

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _DESCRIBES:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function in _SETS_GRADIENT:
            return _same_gradient(*args, **kwargs)
        if function in _ADDRESSES:
            raise ValueError(
                "the weight of a compressed layer has no memory of its own: clone() it first"
            )
        if _writes(function, args, kwargs):
            raise _refusal(getattr(function, "__name__", str(function)))
        if function is Tensor.__deepcopy__:
            return args[1].setdefault(id(args[0]), _plain(args[0]))
        if function is Tensor.__reduce_ex__:
            return _plain(args[0]).__reduce_ex__(args[1])
        storages: set[int] = set()
        result = function(*_numbers(args, storages), **_numbers(kwargs, storages))
        return _protected(result, storages)

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """For callers in C++, who ask no `__torch_function__`."""
        for described, value in zip(function._schema.arguments, args, strict=False):
            written = described.alias_info is not None and described.alias_info.is_write
            if written and isinstance(value, WeightReading):
                raise _refusal(str(function))
        args, kwargs = tree_map_only(
            WeightReading, lambda w: w._read().detach(), (args, kwargs or {})
        )
        return function(*args, **kwargs)


def _numbers(values: Any, storages: set[int]) -> Any:
    """`values` with the float tensor for each reading; notes in which storages those lie."""

    def read(reading: WeightReading) -> Tensor:
        dense = reading._read()
        if type(dense) in (Tensor, torch.nn.Parameter) and dense.layout == torch.strided:
            storages.add(dense.untyped_storage()._cdata)
        return dense

    return tree_map_only(WeightReading, read, values)


def _protected(result: Any, storages: set[int]) -> Any:
    """A view of the numbers that were read is a reading too: writing to it would be lost as
    well.
    """

    def protect(tensor: Tensor) -> Tensor:
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or not storages or tensor.untyped_storage()._cdata not in storages:
            return tensor
        return WeightReading.of(lambda: tensor, tensor)

    return tree_map_only(Tensor, protect, result)


def _plain(reading: WeightReading) -> Tensor:
    """An ordinary tensor with the same numbers, for copies and files."""
    return reading._read().detach().clone().requires_grad_(reading.requires_grad)


def _same_gradient(reading: WeightReading, requires_grad: bool = True) -> WeightReading:
    if requires_grad != reading.requires_grad:
        raise _refusal("requires_grad_")
    return reading


def _writes(function: Any, args: Any, kwargs: Any) -> bool:
    """Does `function` change a reading in place?"""
    if _holds(kwargs.get("out")):
        return True
    name = getattr(function, "__name__", "")
    in_place = (
        name in _WRITES
        or (name.endswith("_") and not name.endswith("__"))
        or kwargs.get("inplace") is True
    )
    target = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
    return in_place and _holds(target)


def _holds(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds(part) for part in value)
    return isinstance(value, WeightReading)


def _refusal(what: str) -> ValueError:
    return ValueError(  # a TypeError would turn `weight += 1` into `weight = weight + 1`
        f"{what}: the weight of a compressed layer is computed from what it stores, and can "
        f"only be read; "
        "change the original and compress it again, or clone() the weight first"
    )
