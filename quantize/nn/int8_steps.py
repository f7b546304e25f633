"""The arithmetic of one direction of an int8 LSTM or GRU layer, on tensors.

    x[t] = W_ih input[t] + b_ih      for all steps at once, as `int8_kernels` says
    r[t] = W_hh h[t - 1] + b_hh      the same, with the state in 8 bits, a step and zero point a row

    LSTM  i, f, g, o = x + r         c = s(f) c + s(i) tanh(g)      h = s(o) tanh(c), projected
    GRU   s(x_r + r_r), s(x_z + r_z), tanh(x_n + s(x_r + r_r) r_n)  h = n + z (h - n)

Sums are exact integers. Everything else is one float32 operation at a time in the order of the
functions below, exp too (see `elementary`). So each way of computing it gives the same bits:
compiled C++ (`quantize.native.recurrent`), which runs all steps in one call, and the stock
operations here, which run where there is no compiler.
"""

from __future__ import annotations

import functools
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from quantize.native import int8 as native_int8
from quantize.native import recurrent
from quantize.native.recurrent import Weights
from quantize.nn import int8_kernels as kernels
from quantize.nn.elementary import sigmoid, tanh

States = tuple[Tensor, Tensor, "Tensor | None"]  # outputs, state, cells

# ------------------------------------------------------------------------------------------------
# gates


def lstm_cell(x: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Gates [rows, 4 units] of inputs and state, and cells [rows, units], to outputs and cells."""
    i, f, g, o = (x + r).chunk(4, -1)
    kept = sigmoid(f) * c
    c = kept + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def gru_cell(x: Tensor, r: Tensor, h: Tensor) -> Tensor:
    """Gates [rows, 3 units] of inputs and state, and the state [rows, units], to the next one."""
    reset, update, fresh = x.chunk(3, -1)
    of_reset, of_update, of_fresh = r.chunk(3, -1)
    reset = sigmoid(reset + of_reset)
    update = sigmoid(update + of_update)
    n = tanh(fresh + reset * of_fresh)
    return n + update * (h - n)


# ------------------------------------------------------------------------------------------------
# a whole layer


def in_float(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """What an int8 LSTM or GRU computes, but for the rounding of inputs and states, by torch's own
    function.

    Args:
        x: [rows of all steps, inputs].
        rest: the states, numbers of rows at each step of packed sequences or None, and the layer.

    Returns: outputs and states.
    """
    *states, batches, layer = rest
    if layer.training and layer.dropout and layer.num_layers > 1:
        raise ValueError(f"{type(layer).__name__} has no gradient under dropout: call eval()")
    weights = [weight.float() for weight in chain.from_iterable(layer.all_weights)]
    settings = layer.bias, layer.num_layers, 0.0, False, layer.bidirectional
    before = [state.float() for state in states]
    call: Any = torch.lstm if len(before) > 1 else torch.gru
    hx: Any = before if len(before) > 1 else before[0]
    if batches is not None:
        found = call(x.float(), batches, hx, weights, *settings)
    else:
        steps = x.float().unflatten(0, (-1, states[0].shape[1]))
        y, *after = call(steps, hx, weights, *settings, False)
        found = y.flatten(0, 1), *after
    return tuple(tensor.to(x.dtype) for tensor in found)


# ------------------------------------------------------------------------------------------------
# steps


def stock(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Weights,
    batches: Tensor | None = None,
    *,
    reverse: bool = False,
) -> States:
    """All steps in stock operations. Arguments and result: as for `recurrent.steps`."""
    counts = [h.shape[0]] * (x.shape[0] // max(h.shape[0], 1))
    counts = counts if batches is None else batches.tolist()
    parts = list(x.split(counts))
    if not parts:
        return x.new_empty(0, weights.width), h, c
    outputs: list[Tensor] = [x] * len(parts)
    for at in range(len(parts) - 1, -1, -1) if reverse else range(len(parts)):
        rows = counts[at]
        y, cells = _step(parts[at], h[:rows], None if c is None else c[:rows], weights)
        outputs[at] = y
        h = torch.cat([y, h[rows:]])
        c = None if c is None or cells is None else torch.cat([cells, c[rows:]])
    return torch.cat(outputs), h, c


def _step(x: Tensor, h: Tensor, c: Tensor | None, weights: Weights) -> tuple[Tensor, Tensor | None]:
    r = kernels.linear(h, weights.weight, weights.scale, weights.bias)
    if c is None:
        return gru_cell(x, r, h), None
    y, c = lstm_cell(x, r, c)
    if weights.projection is not None and weights.projection_scale is not None:
        y = kernels.linear(y, weights.projection, weights.projection_scale, None)
    return y, c


def steps(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Weights,
    batches: Tensor | None = None,
    *,
    reverse: bool = False,
) -> States:
    """All steps of one direction: arguments and result as for `recurrent.steps`, in one native call
    where there is one that was found exact.
    """
    if torch.compiler.is_compiling():
        found = torch.ops.quantize.int8_steps(
            x, h, c, weights.gates, weights.weight, weights.scale, weights.bias,
            weights.projection, weights.projection_scale, batches, reverse,
        )  # fmt: skip
        return found[0], found[1], None if c is None else found[2]
    return _eager(x, h, c, weights, batches, reverse)


def _eager(
    x: Tensor, h: Tensor, c: Tensor | None, weights: Weights, batches: Tensor | None, reverse: bool
) -> States:
    held = [t for t in (weights.weight, weights.projection) if t is not None]
    fits = max(weights.width, weights.units) <= native_int8.MOST_INPUTS
    plain = fits and all(map(native_int8.takes, (x, h))) and not any(t.is_inference() for t in held)
    if plain and x.numel() and kernels.native_allowed() and is_exact(weights.gates):
        return recurrent.steps(x, h, c, weights, batches, reverse=reverse)
    return stock(x, h, c, weights, batches, reverse=reverse)


@functools.cache
def is_exact(gates: int) -> bool:
    """Does this process have native code, and does it give the bits of stock operations on the
    largest sums?
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        units, width = 40, 70 if gates == 4 else 40
        weight = torch.randint(-127, 128, (gates * units, width), generator=generator)
        weight[0], weight[1] = 127, -127
        packed = weight.to(torch.int8)
        scale = torch.rand(gates * units, generator=generator, dtype=torch.float32) / 1000
        bias = torch.randn(gates * units, generator=generator, dtype=torch.float32)
        x = torch.randn(3 * 9, gates * units, generator=generator, dtype=torch.float32)
        h = torch.ones(9, width, dtype=torch.float32)
        weights = Weights(gates, packed, scale, bias)
        c = None
        if gates == 4:
            projection = packed[:width, :units].contiguous()
            weights = Weights(gates, packed, scale, bias, projection, scale[:width])
            c = torch.ones(9, units, dtype=torch.float32)
        try:
            native = recurrent.steps(x, h, c, weights)
        except OSError:
            return False
        with kernels.kernel("reference"):
            expected = stock(x, h, c, weights)
    pairs = zip(native, expected, strict=True)
    return all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)


# ------------------------------------------------------------------------------------------------
# an operator for graphs that torch.compile makes

_library = torch.library.Library("quantize", "FRAGMENT")
_library.define(
    "int8_steps(Tensor x, Tensor h, Tensor? c, int gates, Tensor weight, Tensor scale, "
    "Tensor? bias, Tensor? projection, Tensor? projection_scale, Tensor? batches, bool reverse) "
    "-> (Tensor, Tensor, Tensor)"
)


def _operator(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    gates: int,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    projection: Tensor | None,
    projection_scale: Tensor | None,
    batches: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = Weights(gates, weight, scale, bias, projection, projection_scale)
    y, h, cells = _eager(x, h, c, weights, batches, reverse)
    return y, h, x.new_empty(0) if cells is None else cells


_library.impl("int8_steps", _operator, "CPU")


@torch.library.register_fake("quantize::int8_steps")
def _fake_steps(x, h, c, gates, weight, *rest):
    cells = x.new_empty(0) if c is None else torch.empty_like(c)
    return x.new_empty(x.shape[0], weight.shape[1]), torch.empty_like(h), cells
