"""The integers of a decoder lie in memory once, and are there for whoever asks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from itertools import chain

import pytest
import torch
from decoding_models import PROMPT, decoder
from helpers import assert_close, randn, tensor_bytes
from torch import Tensor, nn

import quantize
from quantize.models import DecoderLM
from quantize.native import build
from quantize.nn.half import HalfLinear
from quantize.nn.int4 import Int4Linear
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_outliers import Int8OutlierLinear
from quantize.run.decoding import lazy
from quantize.run.decoding.packing import panels_of
from quantize.run.generate import generate

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("compiled"),
]
KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "int8": partial(quantize.quantize_dynamic, prefer="size"),
    "int4": quantize.quantize_weights,
}
write = partial(generate, prompt=PROMPT, max_new_tokens=8)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    sizes = {"width": 128, "ffn_width": 192, "head_dim": 16, "heads": 8, "kv_heads": 2}
    return KINDS[request.param](decoder(**sizes))


def integer_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, Int8Linear | Int4Linear)]


def held_bytes(model: nn.Module) -> int:
    """Of a model's tensors and of the panels of its layers."""
    tensors = [*chain.from_iterable(map(lazy.held, model.modules()))]
    for layer in integer_layers(model):
        panels = panels_of(layer)
        tensors += [t for t in (panels.weight, panels.sums, panels.source) if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_integers_lie_in_memory_once(model, tmp_path):
    """A model that was loaded and has decoded holds hardly more than its file."""
    path = tmp_path / "model.safetensors"
    quantize.save(model, path)
    loaded = quantize.load(path)
    write(loaded)
    assert held_bytes(loaded) < 1.1 * tensor_bytes(path)
    assert all(lazy.panels_of(layer) is not None for layer in integer_layers(loaded))


WAYS: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "state dict": numbers,
    "buffers": lambda m: {**dict(m.named_parameters()), **dict(m.named_buffers())},
    "copy": lambda m: numbers(copy.deepcopy(m)),
    "pickle": lambda m: numbers(pickle.loads(pickle.dumps(m))),
    "move": lambda m: numbers(m.to("cpu").half().float()),
}


@pytest.mark.parametrize("way", WAYS)
def test_whoever_asks_finds_the_integers(model, way):
    """Bit for bit as they were, by every road that torch has; the next text is the same, and they
    are given up again.
    """
    before = WAYS[way](model)
    before = {name: tensor.detach().clone() for name, tensor in before.items()}
    text = write(model)
    assert same(WAYS[way](model), before)
    assert torch.equal(write(model), text)
    assert all(lazy.panels_of(layer) is not None for layer in integer_layers(model))


def test_a_file_has_the_integers(model, tmp_path):
    """The file of a model that has decoded is that of one that hasn't."""
    quantize.save(model, tmp_path / "before.pth")
    write(model)
    quantize.save(model, tmp_path / "after.pth")
    assert (tmp_path / "before.pth").read_bytes() == (tmp_path / "after.pth").read_bytes()


def test_forward_and_changes(model):
    """The model's own forward gives the same bits after decoding, and a change in place is seen."""
    with torch.no_grad():
        logits = model(PROMPT)
        text = write(model)
        assert torch.equal(model(PROMPT), logits)
        write(model)
        model.blocks[0].ffn.up.packed.zero_()
        assert not torch.equal(model(PROMPT), logits)
    twin = copy.deepcopy(model)
    assert torch.equal(write(model), write(twin)) and not torch.equal(write(model), text)


SCALED: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "in place": lambda layer, _: layer.scale.mul_(-2),
    "assigned": lambda layer, scale: setattr(layer, "scale", scale),
    "data": lambda layer, scale: setattr(layer.scale, "data", scale),
    "buffers": lambda layer, scale: layer._buffers.update(scale=scale),
}


@pytest.mark.parametrize("change", SCALED)
def test_a_change_of_scales_is_seen(model, change):
    """By every road to them, also where only panels hold them."""
    ready = quantize.for_decoding(model)
    layer, twin = model.blocks[0].ffn.up, copy.deepcopy(model)
    text, scale = write(ready), -2 * twin.blocks[0].ffn.up.scale
    assert lazy.panels_of(layer) is not None
    with torch.no_grad():
        SCALED[change](layer, scale)
    twin.blocks[0].ffn.up.scale = scale
    assert torch.equal(write(ready), write(twin)) and not torch.equal(write(ready), text)


def test_integers_that_others_hold_stay(model):
    """By name or as a view: what is changed there is changed in the model."""
    layer = model.blocks[0].ffn.up
    for ask in (lambda: layer.packed, lambda: layer.packed[:4], model.state_dict):
        others = ask()
        write(model)
        assert lazy.panels_of(layer) is None
        del others
        write(model)
        assert lazy.panels_of(layer) is not None


@pytest.mark.parametrize("sizes", [(16, 64), (40, 96), (33, 160), (7, 32)])
def test_panels_give_the_integers_back(sizes):
    """Of outputs and inputs that fill panels, and that don't."""
    outputs, inputs = sizes
    weight = randn(outputs, inputs)
    factor, channels = torch.ones(inputs), torch.tensor([3])
    layers: list[nn.Module] = [
        Int8Linear.from_weight(weight),
        Int8OutlierLinear.from_outliers(weight, None, factor, channels),
        Int4Linear.from_linear(nn.Linear(inputs, outputs), 32),
    ]
    for layer in layers:
        before = {name: copy.deepcopy(tensor) for name, tensor in layer.named_buffers()}
        panels_of(layer)
        assert lazy.panels_of(layer) is not None
        assert same(dict(layer.named_buffers()), before) and layer.packed.is_contiguous()
        assert lazy.panels_of(layer) is None


def test_for_decoding_says_what_it_does(model: DecoderLM):
    """Before each piece of work, and packs at once."""
    lines: list[str] = []
    ready = quantize.for_decoding(model, progress=lines.append)
    assert lines[0] == "checking 2 blocks" and lines[-1] == "packing the weights of 2 blocks"
    assert all(lazy.panels_of(layer) is not None for layer in integer_layers(model))
    assert torch.equal(write(ready), write(model))


def narrow(model: nn.Module) -> list[bool]:
    """Which float16 layers hold their weight in 16 bits."""
    layers = [m for m in model.modules() if isinstance(m, HalfLinear)]
    return [layer._parameters["weight"].dtype is torch.float16 for layer in layers]


def test_float16_weights_lie_in_memory_once(tmp_path):
    """In 16 bits, as native code reads them; the file and the model's own forward stay what they
    were, whoever asks for a weight finds float32, and what is changed there is seen.
    """
    path = tmp_path / "model.safetensors"
    quantize.save(quantize.to_half(decoder(width=128, ffn_width=4096)), path)
    model = quantize.load(path)
    with torch.no_grad():
        before, logits, text = numbers(model), model(PROMPT), write(model)
    ready = quantize.for_decoding(model, progress=lambda line: None)
    assert all(narrow(model))
    assert held_bytes(model) < 1.2 * tensor_bytes(path) + model.embedding.weight.nbytes // 2
    assert torch.equal(write(ready), text)
    assert all(narrow(model)) and same(numbers(model), before)
    with torch.no_grad():
        assert_close(model(PROMPT), logits)
        assert_close(copy.deepcopy(model)(PROMPT), logits)
    model(PROMPT).sum().backward()
    assert not any(narrow(model)) and model.head._parameters["weight"].grad.dtype is torch.float32
    assert torch.equal(model(PROMPT), logits)
    model.zero_grad()
    assert torch.equal(write(ready), text) and all(narrow(model))
    with torch.no_grad():
        model.head.weight.mul_(-1)
    assert not all(narrow(model))
    assert torch.equal(write(ready), write(copy.deepcopy(model)))
    assert all(narrow(model)) and not torch.equal(write(ready), text)


def test_float16_weights_that_others_hold_stay():
    """A list of parameters, and an optimizer with it, keeps float32; so does a weight that lost its
    16 bits.
    """
    model = quantize.to_half(decoder(width=128))
    text = write(model)
    parameters = list(model.parameters())
    ready = quantize.for_decoding(model)
    assert torch.equal(write(ready), text) and not any(narrow(model))
    del parameters
    with torch.no_grad():
        model.head.weight.mul_(1 + 2**-12)
    assert torch.equal(write(ready), write(model))
    assert [not is_narrow for is_narrow in narrow(model)].count(True) == 1
