"""What an int8 LSTM or GRU stores: the weights of its layers and directions, and how they read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Self

import torch
from torch import Tensor, nn

from quantize import surgery
from quantize.nn import PackedLayer, WeightReading, dtype_name, dtype_named, is_traced
from quantize.nn import int8_kernels as kernels
from quantize.nn.protocol import copied, empty, empty_bias

_WEIGHTS = ("weight_ih", "weight_hh", "weight_hr")
_NARROW = 1 / 6  # share of the weights up to which those of the first inputs take 16 bits
_SETTINGS = ("input_size", "hidden_size", "num_layers", "batch_first", "dropout")
_SETTINGS += ("bidirectional", "proj_size")


class RecurrentWeights(PackedLayer):
    """An int8 LSTM or GRU as it is stored.

    The state is plain tensors, for each weight of the layer: `packed_ih_l0` int8 `[out, in]`,
    `scale_ih_l0` float32 `[out]`; biases keep their names. `weight_ih_l0` reads as
    `packed * scale`, in the dtype of the layer that was quantized.

    What a first layer gets are features, a few of which are often many times as large as the
    others (the mel bands of a spectrum), and gates multiply them by weights that cancel. So where
    they hold a small share of all, `packed_ih_l0` is float16 (`halves`), and these products are
    float32.
    """

    gates: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        halves: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(dtype, device)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        self.proj_size, self.bias, self.halves = proj_size, False, halves
        self.exact = ()

    @classmethod
    def from_layer(
        cls, layer: nn.RNNBase, rounded: Mapping[str, tuple[Tensor, Tensor]] | None = None
    ) -> Self:
        """Quantize a float layer's weights, but for those that were `rounded` already, to int8 and
        scale by their names without what they begin with; biases are kept as they are.
        """
        first: Any = layer.weight_ih_l0
        settings = {name: getattr(layer, name) for name in _SETTINGS}
        new = cls(**settings, dtype=first.dtype, device=first.device)
        sizes = {name: math.prod(shape) for name, shape in new._shapes()}
        outer = sum(size for name, size in sizes.items() if name.startswith("ih_l0"))
        settings["halves"] = new.halves = outer <= _NARROW * sum(sizes.values())
        for name in sizes:
            weight = getattr(layer, f"weight_{name}").detach()
            is_int8 = new._stored_in(name) == torch.int8
            stored = (kernels.quantize_weight if is_int8 else _halved)(weight)
            new._hold(name, *(rounded or {}).get(name, stored))
        for name in new._suffixes():
            for kind in ("ih", "hh"):
                new._hold_bias(f"{kind}{name}", copied(getattr(layer, f"bias_{kind}{name}", None)))
        bias = dtype_name(first.dtype) if layer.bias else None
        arguments = {**settings, "bias": bias, "dtype": dtype_name(first.dtype)}
        surgery.record(new, cls.__name__, **arguments)
        return new

    @classmethod
    def rebuild(
        cls, module: nn.Module, bias: str | None, dtype: str = "float32", **settings: Any
    ) -> Self:
        """An empty layer (on the meta device) in place of `module`, for a file's tensors."""
        if settings.keys() - {"halves"} != {*_SETTINGS}:  # older files have none
            raise ValueError(f"{sorted(settings)} make no {cls.__name__}")
        new = cls(**settings, dtype=dtype_named(dtype))
        for name, (outputs, inputs) in new._shapes():
            packed = empty(new._stored_in(name), outputs, inputs)
            new._hold(name, packed, empty(torch.float32, outputs))
            if not name.startswith("hr"):
                new._hold_bias(name, empty_bias(bias, outputs))
        return new.train(module.training)

    def _hold(self, name: str, packed: Tensor, scale: Tensor) -> None:
        self.register_buffer(f"packed_{name}", packed)
        self.register_buffer(f"scale_{name}", scale)
        self.exact = (*self.exact, f"packed_{name}", f"scale_{name}")

    def _stored_in(self, name: str) -> torch.dtype:
        return torch.float16 if self.halves and name.startswith("ih_l0") else torch.int8

    def _hold_bias(self, name: str, bias: Tensor | None) -> None:
        if bias is not None:
            self.register_buffer(f"bias_{name}", bias)
            self.bias = True

    def _suffixes(self) -> Iterator[str]:
        """What the names of a layer's and a direction's tensors end in, in the order in which they
        run.
        """
        sides = ("", "_reverse") if self.bidirectional else ("",)
        for layer, side in product(range(self.num_layers), sides):
            yield f"_l{layer}{side}"

    def _shapes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names of all weights, without what they begin with, and their shapes."""
        sides = 2 if self.bidirectional else 1
        outputs = self.gates * self.hidden_size
        width = self.proj_size or self.hidden_size
        for suffix in self._suffixes():
            first = suffix.startswith("_l0")
            yield f"ih{suffix}", (outputs, self.input_size if first else width * sides)
            yield f"hh{suffix}", (outputs, width)
            if self.proj_size:
                yield f"hr{suffix}", (self.proj_size, self.hidden_size)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self._shapes():
            found |= {
                f"packed_{name}": shape,
                f"scale_{name}": shape[:1],
                f"bias_{name}": shape[:1],
            }
        return found

    @property
    def dtypes(self) -> dict[str, torch.dtype]:  # type: ignore[override]  # by kind and layer
        found: dict[str, torch.dtype] = {}
        for name, _ in self._shapes():
            found |= {f"packed_{name}": self._stored_in(name), f"scale_{name}": torch.float32}
        return found

    # ------------------------------------------------------------------------------- weights read

    def __getattr__(self, name: str) -> Any:
        if name.startswith(_WEIGHTS):
            packed = self.__dict__["_buffers"].get(name.replace("weight", "packed", 1))
            if packed is not None:
                return self._read(name, packed)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith(_WEIGHTS):
            raise AttributeError(
                f"{name}: the weight of a compressed layer is computed from what it stores, and "
                f"can only be read"
            )
        super().__setattr__(name, value)

    def _read(self, name: str, packed: Tensor) -> Tensor:
        dtype, device = self.weight_kind()
        scale = name.replace("weight", "scale", 1)

        def dense() -> Tensor:
            buffers: Any = self._buffers
            return (packed.float() * buffers[scale].unsqueeze(-1)).to(dtype)

        if is_traced():
            return dense()
        return WeightReading.described(dense, tuple(packed.shape), dtype, device)

    @property
    def weight(self) -> Tensor:
        """There is none of this name, as in the layer that this one replaced."""
        raise AttributeError(f"{type(self).__name__} has no weight: it has weight_ih_l0 and others")

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """Weights and biases of each layer and direction, as `nn.RNNBase.all_weights`."""
        biases = ("bias_ih", "bias_hh") if self.bias else ()
        last = ("weight_hr",) if self.proj_size else ()
        names = ("weight_ih", "weight_hh", *biases, *last)
        return [[getattr(self, n + suffix) for n in names] for suffix in self._suffixes()]

    def flatten_parameters(self) -> None:
        """Nothing to do: models call it before a forward, for CUDA."""


def _halved(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as float16 numbers up to 1, and the scale [out] of its rows."""
    scale = weight.float().abs().amax(1)
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight.float() / scale.unsqueeze(1)).half(), scale
