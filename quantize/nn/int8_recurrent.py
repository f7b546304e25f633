"""Int8LSTM and Int8GRU: recurrent layers that store int8 and compute their products in int8."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from quantize import surgery
from quantize.native.recurrent import Weights
from quantize.nn import PackedLayer, WeightReading, dtype_name, dtype_named, is_traced
from quantize.nn import int8_kernels as kernels
from quantize.nn import int8_steps as stepping
from quantize.nn.protocol import copied, empty, empty_bias
from quantize.nn.straight import straight

_WEIGHTS = ("weight_ih", "weight_hh", "weight_hr")


class _Int8Recurrent(PackedLayer):
    """What Int8LSTM and Int8GRU have in common.

    The state is plain tensors, for each weight of the layer: `packed_ih_l0` int8 `[out, in]`,
    `scale_ih_l0` float32 `[out]`; biases keep their names. `weight_ih_l0` reads as
    `packed * scale`, in the dtype of the layer that was quantized.
    """

    gates: int
    not_fused = (
        "its loop over time is a call of this package's own code, which a TorchScript file can't "
        "hold: fuse the float model, or quantize.save the int8 one"
    )

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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(dtype, device)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        self.proj_size, self.bias = proj_size, False
        self.exact = ()

    @classmethod
    def from_layer(cls, layer: nn.RNNBase) -> _Int8Recurrent:
        """Quantize a float layer's weights; biases are kept as they are."""
        first: Any = layer.weight_ih_l0
        settings = {name: getattr(layer, name) for name in _SETTINGS}
        new = cls(**settings, dtype=first.dtype, device=first.device)
        for name in new._suffixes():
            for kind in ("ih", "hh", "hr"):
                weight = getattr(layer, f"weight_{kind}{name}", None)
                if weight is not None:
                    new._hold(f"{kind}{name}", *kernels.quantize_weight(weight))
            for kind in ("ih", "hh"):
                new._hold_bias(f"{kind}{name}", copied(getattr(layer, f"bias_{kind}{name}", None)))
        bias = dtype_name(first.dtype) if layer.bias else None
        arguments = {**settings, "bias": bias, "dtype": dtype_name(first.dtype)}
        surgery.record(new, cls.__name__, **arguments)
        return new

    @classmethod
    def rebuild(
        cls, module: nn.Module, bias: str | None, dtype: str = "float32", **settings: Any
    ) -> _Int8Recurrent:
        """An empty layer (on the meta device) in place of `module`, for a file's tensors."""
        if settings.keys() != {*_SETTINGS}:
            raise ValueError(f"{sorted(settings)} make no {cls.__name__}")
        new = cls(**settings, dtype=dtype_named(dtype))
        for name, (outputs, inputs) in new._shapes():
            new._hold(name, empty(torch.int8, outputs, inputs), empty(torch.float32, outputs))
            if not name.startswith("hr"):
                new._hold_bias(name, empty_bias(bias, outputs))
        return new.train(module.training)

    def _hold(self, name: str, packed: Tensor, scale: Tensor) -> None:
        self.register_buffer(f"packed_{name}", packed)
        self.register_buffer(f"scale_{name}", scale)
        self.exact = (*self.exact, f"scale_{name}")

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
        kinds = PackedLayer.dtypes.items()
        names = [name for name, _ in self._shapes()]
        return {f"{kind}_{name}": dtype for (kind, dtype), name in product(kinds, names)}

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

    # ------------------------------------------------------------------------------- running

    def forward(self, input: Any, hx: Any = None) -> Any:
        if torch.jit.is_tracing():
            raise ValueError(
                f"{type(self).__name__} has a loop over time, which a trace can't hold: use "
                f"quantize.save, or trace the float model"
            )
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(
                f"the input must be 2-dimensional (one sequence) or 3-dimensional (a batch), got "
                f"{list(input.shape)}"
            )
        batched = input.dim() == 3
        batch = 0 if self.batch_first else 1
        x = input if batched else input.unsqueeze(batch)
        x = x.transpose(0, 1) if self.batch_first else x  # [T, B, inputs]
        states = self._states(hx, x, x.shape[1], batched)
        self._check(x)
        y, states = self._layers(x.reshape(-1, x.shape[-1]), states, None)
        y = y.reshape(x.shape[0], x.shape[1], y.shape[-1])
        y = y.transpose(0, 1) if self.batch_first else y
        if not batched:
            y = y.squeeze(batch)
            states = [state.squeeze(1) for state in states]
        return y, self._hidden(states)

    def _packed(self, input: PackedSequence, hx: Any) -> Any:
        data, batches, order, back = input
        states = self._states(hx, data, int(batches[0]), True)
        if hx is not None and order is not None:
            states = [state.index_select(1, order) for state in states]
        self._check(data)
        y, states = self._layers(data, states, batches)
        if back is not None:
            states = [state.index_select(1, back) for state in states]
        return PackedSequence(y, batches, order, back), self._hidden(states)

    def _hidden(self, states: list[Tensor]) -> Any:
        return tuple(states) if len(states) > 1 else states[0]

    def _widths(self) -> tuple[int, ...]:
        """Of the states that the layer carries."""
        return (self.hidden_size,)

    def _states(self, hx: Any, x: Tensor, rows: int, batched: bool) -> list[Tensor]:
        """The given states, or zeros: [layers and directions, rows, width] each."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        if hx is None:
            return [x.new_zeros(count, rows, width) for width in self._widths()]
        given = list(hx) if isinstance(hx, (tuple, list)) else [hx]
        if len(given) != len(self._widths()):
            raise ValueError(f"hx must hold {len(self._widths())} tensors, got {len(given)}")
        states = []
        for state, width in zip(given, self._widths(), strict=True):
            expected = (count, rows, width) if batched else (count, width)
            if tuple(state.shape) != expected:
                raise ValueError(f"a state must be {list(expected)}, got {list(state.shape)}")
            states.append(state if batched else state.unsqueeze(1))
        return states

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.input_size:
            raise ValueError(
                f"the last axis of the input is {x.shape[-1]}, but the layer takes "
                f"{self.input_size} features"
            )
        if not x.is_floating_point():
            raise TypeError(f"the input must be a floating point tensor, got {x.dtype}")
        if x.dim() == 3 and x.shape[0] == 0:
            raise ValueError("the input has no steps: its length must be at least 1")

    def _layers(
        self, x: Tensor, states: list[Tensor], batches: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """x `[rows of all steps, inputs]` through all layers; outputs and states in x's dtype."""
        y, *states = straight(self._in_int8, stepping.in_float, [x, *states], batches, self)
        return y, states

    def _in_int8(self, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *states, batches, _ = rest
        dtype, sides = x.dtype, 2 if self.bidirectional else 1
        x = x.detach().float()
        before = [state.detach().float() for state in states]
        after: list[list[Tensor]] = [[] for _ in states]
        outputs: list[Tensor] = []
        for at, suffix in enumerate(self._suffixes()):
            y, *last = self._direction(x, suffix, [state[at] for state in before], batches)
            outputs.append(y)
            for kept, state in zip(after, last, strict=True):
                kept.append(state)
            if len(outputs) == sides:
                x = outputs[0] if sides == 1 else torch.cat(outputs, -1)
                outputs = []
                if self.training and self.dropout and at + 1 < self.num_layers * sides:
                    x = F.dropout(x, self.dropout)
        return x.to(dtype), *(torch.stack(kept).to(dtype) for kept in after)

    def _direction(
        self, x: Tensor, suffix: str, states: list[Tensor], batches: Tensor | None
    ) -> list[Tensor]:
        """Outputs and last states of one layer in one direction."""
        held = {name: self._tensors(name + suffix) for name in ("ih", "hh", "hr")}
        packed, scale, bias = held["ih"]
        assert packed is not None and scale is not None
        gates = kernels.linear(x, packed, scale, bias)
        weights = Weights(self.gates, *held["hh"], *held["hr"][:2])
        cells = states[1] if len(states) > 1 else None
        reverse = suffix.endswith("_reverse")
        found = stepping.steps(gates, states[0], cells, weights, batches, reverse=reverse)
        return [tensor for tensor in found if tensor is not None]

    def _tensors(self, name: str) -> tuple[Any, Any, Tensor | None]:
        buffers: Any = self._buffers
        return tuple(buffers.get(f"{kind}_{name}") for kind in ("packed", "scale", "bias"))

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"]
        flags = ("batch_first", "bidirectional", "proj_size")
        parts += [f"{name}={getattr(self, name)}" for name in flags if getattr(self, name)]
        return ", ".join(parts)


_SETTINGS = ("input_size", "hidden_size", "num_layers", "batch_first", "dropout")
_SETTINGS += ("bidirectional", "proj_size")


@surgery.builder
class Int8LSTM(_Int8Recurrent):
    """`nn.LSTM` with int8 weights, for inference, with packed sequences and given states too.

    The inputs of all steps are multiplied at once, the state at each step, both quantized row by
    row when they arrive; gates and cells are float32 (see `int8_steps`).

    Source: `torch.nn.LSTM`.
    """

    gates = 4

    def _widths(self) -> tuple[int, ...]:
        return self.proj_size or self.hidden_size, self.hidden_size


@surgery.builder
class Int8GRU(_Int8Recurrent):
    """`nn.GRU` with int8 weights, for inference; otherwise as Int8LSTM.

    Source: `torch.nn.GRU`.
    """

    gates = 3
