"""What a compressed layer is, for all techniques and for everybody who reads one.

`layer.weight` reads as the float weight that the layer stands for, in the dtype that the layer had,
whoever asks (see `reading`). `dense_weight()` is that weight in float32 as it multiplies,
`operands()` is what is stored, for native code and graphs. What is stored has names of its own, so
nobody takes packed bytes for a weight. A layer also defines `weight_shape` and `weight_kind`, and,
to be read from a file, a class method `rebuild` (registered by `surgery.builder`) and
`contradiction()`, which a `PackedLayer` has where it says its `shapes()`; `nn/int4.py` is an
example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize import surgery
from quantize.nn.reading import WeightReading
from quantize.surgery import is_transposed


@dataclass(frozen=True)
class Operands:
    """What a linear layer multiplies by, as it is stored.

    weight: float or int8 [out, in], or uint8 [out, in / 2] with two 4-bit values a byte. scale,
    zero: [out] or [out, in / group]. group: weights of a row that share a scale, 0 where a row
    does. bias: [out].
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    group: int = 0


class CompressedLayer(nn.Module):
    """A layer whose weight is stored in another form than the one in which it is read."""

    constant_buffers = True  # no forward changes them
    # does `weight` read as [in, out], as in the layer that this one replaced (GPT-2's Conv1D)?
    transposed: bool = False

    @property
    def trainable(self) -> bool:
        """Do gradients flow into what is stored?"""
        return False

    def dense_weight(self) -> Tensor:
        """What the layer multiplies by, float32 [out, in] (a convolution's kernel: [out, in, kh,
        kw]).
        """
        raise NotImplementedError

    def weight_shape(self) -> tuple[int, ...]:
        """The shape of `dense_weight()`, known without computing it."""
        raise NotImplementedError

    def weight_kind(self) -> tuple[torch.dtype, torch.device]:
        """In which dtype and on which device `weight` reads."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """Reads as the float weight of the layer that this one stands for; to write it is
        refused.
        """
        if is_traced():
            return self._weight()
        dtype, device = self.weight_kind()
        shape = self.weight_shape()
        shape = shape[::-1] if self.transposed else shape
        return WeightReading.described(self._weight, shape, dtype, device, self.trainable)

    def _weight(self) -> Tensor:
        dense = self.dense_weight().to(self.weight_kind()[0])
        return dense.t().contiguous() if self.transposed else dense


def is_traced() -> bool:
    """Is a graph being recorded or compiled from what runs now?"""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, but for what this package made of it (`int8_region`)."""
    found: type[nn.Module] = getattr(type(module), "own_class", type(module))
    return found


def standing_for(
    base: type[nn.Module],
    bases: tuple[type, ...],
    content: dict[str, Any],
    make: Callable[..., type[nn.Module]],
    *more: Any,
) -> type[nn.Module]:
    """A class of `bases` that a module of class `base` gets in place of it, and that looks like it.
    `make(base, *more)` gives it again, to copies and pickles.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        return _without_state, (make, base, *more), self.__getstate__()

    own = {"__reduce_ex__": reduce, "own_class": base}
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    made: Any = type(base.__name__, bases, {**content, **own, **names})
    return made


def _without_state(make: Callable[..., type[nn.Module]], *of: Any) -> nn.Module:
    """A module for a copy or a pickle, which brings its state."""
    kind = make(*of)
    return kind.__new__(kind)


def holds_integers(module: nn.Module) -> bool:
    """Is it a layer whose weight is stored in integers, by this package, by torch or by another
    one?
    """
    if isinstance(module, CompressedLayer):
        return isinstance(module, PackedLayer)
    origin = type(module).__module__.split(".")
    if origin[0] == "torch" and "quantized" in origin:
        return True
    weight = module._parameters.get("weight", module._buffers.get("weight"))
    return weight is not None and not (weight.is_floating_point() or weight.is_complex())


class PackedLayer(CompressedLayer):
    """A layer that stores integers; for inference.

    `like` is a parameter without elements, and in no `state_dict()`: it carries the dtype that the
    layer had, follows `.to(dtype)` and moves, and answers `next(model.parameters())`. The tensors
    named in `exact` keep their dtype in all casts.
    """

    exact: tuple[str, ...] = ("scale",)
    dtypes: Mapping[str, torch.dtype] = {"packed": torch.int8, "scale": torch.float32}

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        **stored: Tensor | None,
    ) -> None:
        super().__init__()
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        if device is None:
            packed = self.get_buffer("packed")
            device = "cpu" if packed.is_meta else packed.device
        self.like = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the stored tensors, as the layer's attributes ask for them."""
        raise NotImplementedError

    def contradiction(self) -> str | None:
        """See `surgery.contradiction`."""
        return surgery.mismatch(self, self.shapes(), self.dtypes)

    def weight_kind(self) -> tuple[torch.dtype, torch.device]:
        return self.like.dtype, self.like.device

    def _apply(self, fn, recurse=True):
        before, exact = self.like.dtype, {name: getattr(self, name) for name in self.exact}
        super()._apply(fn, recurse)
        if self.like.dtype != before:
            surgery.amend(self, type(self).__name__, dtype=dtype_name(self.like.dtype))
        for name, tensor in exact.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "like"]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, *rest
    ):
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *rest
        )
        if prefix + "like" in missing_keys:
            missing_keys.remove(prefix + "like")


class Int8Layer(PackedLayer):
    """One whose weight reads as `packed * scale`, with a scale for each row of `packed`."""

    packed: Tensor
    scale: Tensor

    def dense_weight(self) -> Tensor:
        ones = [1] * (self.packed.dim() - self.scale.dim())
        return self.packed.float() * self.scale.reshape(*self.scale.shape, *ones)

    def weight_shape(self) -> tuple[int, ...]:
        return self.shapes()["packed"]


def operands(layer: nn.Module) -> Operands | None:
    """What a linear layer of one product stores; None for other layers, and for those with a
    forward of their own.
    """
    if type(layer) is nn.Linear and "weight" in layer._parameters:
        return Operands(layer.weight.detach(), layer.bias)
    own: Callable[[], Operands] | None = getattr(layer, "operands", None)
    return None if own is None else own()


def dense_weight(layer: nn.Module) -> Tensor:
    """What a linear or convolution multiplies by, float32 [out, in, ...] (float64 for a float64
    layer).
    """
    if isinstance(layer, CompressedLayer):
        return layer.dense_weight()
    weight: Any = layer.weight
    weight = weight.t() if is_transposed(layer) else weight
    return weight if weight.dtype == torch.float64 else weight.float()


def write_weight(layer: nn.Module, matrix: Tensor, bias: Tensor | None) -> None:
    """Put other numbers, [out, K], into the parameters that a linear or convolution holds; a 16-bit
    layer's weight reads in another dtype than it has.
    """
    held: Any = layer._parameters
    weight = held["weight"].data
    weight.copy_(matrix.T if is_transposed(layer) else matrix.reshape(weight.shape))
    if bias is not None:
        held["bias"].data.copy_(bias)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32, as in files."""
    return str(dtype).removeprefix("torch.")


def dtype_of(tensor: Tensor | None) -> str | None:
    """The name of a tensor's dtype, as in files; None for none."""
    return None if tensor is None else dtype_name(tensor.dtype)


def copied(tensor: Tensor | None) -> Tensor | None:
    """A copy without a history; None for none."""
    return None if tensor is None else tensor.detach().clone()


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """A place for a file's numbers, on the meta device."""
    return torch.empty(shape, dtype=dtype, device="meta")


def empty_bias(dtype: str | None, outputs: int) -> Tensor | None:
    """A place for a bias of the dtype of that name; None for none."""
    return None if dtype is None else empty(dtype_named(dtype), outputs)


def dtype_named(name: Any) -> torch.dtype:
    """The floating dtype of that name. Raises ValueError for anything else."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name!r} is no floating dtype")
    return dtype
