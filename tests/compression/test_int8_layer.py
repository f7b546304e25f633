"""An int8 layer as a module: plain tensors, copies, threads, traces."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading

import torch
from helpers import in_int8, linear, randn
from int8_models import KERNELS, layer_of
from torch import nn

import quantize
from quantize.nn import int8_kernels as kernels
from quantize.nn.int8 import Int8Linear


# The layer as a module.
def test_state_is_plain_tensors():
    """int8 weight, float32 scale, bias: nothing else, no tensor subclass."""
    state = layer_of(8, 4).state_dict()
    assert {k: (v.dtype, type(v)) for k, v in state.items()} == {
        "packed": (torch.int8, torch.Tensor),
        "scale": (torch.float32, torch.Tensor),
        "bias": (torch.float32, torch.Tensor),
    }


def test_layer_survives_what_happens_to_modules():
    """Same outputs after deepcopy, pickling, dtype moves and state dicts, and new outputs after a
    change in place.
    """
    layer, x = layer_of(32, 16), randn(4, 32)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    other = Int8Linear.from_weight(linear(32, 16, seed=5).weight, linear(32, 16, seed=5).bias)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    other.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True)
    assert torch.equal(other(x), y)
    assert copy.deepcopy(layer).to(torch.bfloat16).scale.dtype == torch.float32
    for name in KERNELS:
        with kernels.kernel(name):
            assert torch.equal(layer(x), y), name
            for sign in (-1, 1):
                layer.packed.neg_()
                layer.bias.neg_()
                assert torch.equal(layer(x), sign * y), name


def test_threads_may_share_a_layer():
    """Eight threads at once get what one gets alone."""
    layer = layer_of(64, 64)
    inputs = [randn(i + 1, 64, seed=i) for i in range(8)]
    expected, results = [layer(x) for x in inputs], [None] * 8
    threads = [
        threading.Thread(target=lambda i=i: results.__setitem__(i, layer(inputs[i])))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


def test_traced_and_exported_layers_stay_int8():
    """torch.jit.trace and torch.export give the same bits at another batch size, with the int8
    product inside.
    """
    model, x = in_int8(nn.Sequential(linear(24, 40), linear(40, 8)).eval()), randn(5, 24)
    traced = torch.jit.trace(model, randn(3, 24, seed=1))
    assert "_int_mm" in str(traced.inlined_graph)
    assert torch.equal(traced(x), model(x))
    exported = torch.export.export(
        model, (randn(3, 24),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    assert "_int_mm" in str(exported.graph)
    assert torch.equal(exported.module()(x), model(x))


def test_layers_name_their_arguments_as_torch_does():
    """A forward may give the input of a layer by its name."""
    layers = [nn.Conv1d(32, 32, 3), nn.ConvTranspose1d(32, 32, 3), nn.LSTM(32, 32)]
    layers += [nn.Embedding(8, 32), nn.Linear(32, 32)]
    small = in_int8(nn.ModuleList(layers).eval(), embeddings=True)
    pair = quantize.factorize_low_rank(nn.Sequential(nn.Linear(32, 32)))[0]
    packed = quantize.quantize_weights(nn.Sequential(nn.Linear(32, 32)))[0]
    for new in (*small, pair, packed):
        assert not type(new).__module__.startswith("torch.")
        assert next(iter(inspect.signature(new.forward).parameters)) == "input"
