"""Int8LSTM and Int8GRU: recurrent layers that store int8 and compute their products in int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from quantize import surgery
from quantize.native.recurrent import Weights
from quantize.nn import int8_kernels as kernels
from quantize.nn import int8_steps as stepping
from quantize.nn.int8_recurrent_weights import RecurrentWeights
from quantize.nn.straight import straight


class _Int8Recurrent(RecurrentWeights):
    """How Int8LSTM and Int8GRU run."""

    # told of each weight's name, without what it begins with, and the rows that it multiplies
    observer: Callable[[str, Tensor], None] | None = None
    not_fused = (
        "its loop over time is a call of this package's own code, which a TorchScript file can't "
        "hold: fuse the float model, or quantize.save the int8 one"
    )

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
        if packed.dtype == torch.int8:
            gates = kernels.linear(x, packed, scale, bias)
        else:
            gates = F.linear(x, packed.float() * scale.unsqueeze(1))
            gates = gates if bias is None else gates + bias.float()
        weights = Weights(self.gates, *held["hh"], *held["hr"][:2])
        cells = states[1] if len(states) > 1 else None
        reverse = suffix.endswith("_reverse")
        found = stepping.steps(gates, states[0], cells, weights, batches, reverse=reverse)
        if self.observer is not None:
            self.observer("ih" + suffix, x)
            self.observer("hh" + suffix, found[0])
        return [tensor for tensor in found if tensor is not None]

    def _tensors(self, name: str) -> tuple[Any, Any, Tensor | None]:
        buffers: Any = self._buffers
        return tuple(buffers.get(f"{kind}_{name}") for kind in ("packed", "scale", "bias"))

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"]
        flags = ("batch_first", "bidirectional", "proj_size")
        parts += [f"{name}={getattr(self, name)}" for name in flags if getattr(self, name)]
        return ", ".join(parts)


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
