"""Activations that int8 linear layers do the work of: their bits, and when nobody else may read
what lies before them.
"""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from helpers import randn, zoo
from int8_models import assert_kernels_give, by_reference_and_level, layer_of
from torch import Tensor, nn
from torch.nn import functional as F

import quantize
from quantize import calibration
from quantize.compression.int8 import transform
from quantize.native import isa
from quantize.nn import elementary
from quantize.nn.activations import activation_of
from quantize.nn.elementary import ACTIVATIONS
from quantize.nn.int8 import Int8Linear

in_int8 = partial(quantize.quantize_dynamic, prefer="size")
TORCH = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}
each = pytest.mark.parametrize("name", ACTIVATIONS)


def active_layer(k: int, n: int, name: str) -> Int8Linear:
    layer = layer_of(k, n)
    layer.activate(name)
    return layer


@each
def test_as_exact_as_torch(name: str):
    """Both are rounded in float32; the truth is torch's own in float64."""
    x = torch.linspace(-30, 30, 100_001)
    exact = TORCH[name](x.double())
    errors = [(f(x) - exact).abs().max().item() for f in (ACTIVATIONS[name], TORCH[name])]
    assert errors[0] <= 1.2 * errors[1]
    low, high = ACTIVATIONS[name](torch.tensor([-30.0, math.inf]))
    assert abs(low) < 1e-9 and high == TORCH[name](torch.tensor(math.inf))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kernels_agree_to_the_bit(name: str, dtype: torch.dtype):
    """Rows above and below a tile, outputs that fill no panel."""
    layer, x = active_layer(100, 37, name), 8 * randn(70, 100).to(dtype)
    y = layer(x)
    assert torch.equal(layer(x), y) and torch.equal(layer(x[:3]), y[:3])
    assert_kernels_give(layer, x, y)
    layer.activation = None
    assert torch.allclose(TORCH[name](layer(x.float())), y.float(), rtol=0.01, atol=1e-5)


@each
@pytest.mark.parametrize("level", isa.levels())
def test_instruction_sets_agree_to_the_bit(name: str, level: str, monkeypatch):
    """A row that isn't finite is finite nowhere, and spoils no other."""
    layer, x = active_layer(100, 37, name), 8 * randn(40, 100)
    x[3, 1], x[5, 7] = math.inf, math.nan
    expected, y = by_reference_and_level(layer, x, level, monkeypatch)
    assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))
    assert y.isnan().all(1).nonzero().flatten().tolist() == [3, 5]


@each
def test_graphs(name: str):
    """A compiled graph gives the same bits; one that leaves the process has torch's activation."""
    layer, x = active_layer(64, 48, name), randn(9, 64)
    y = layer(x)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), y)
    program = torch.export.export(nn.Sequential(layer), (x,))
    assert "quantize." not in str(program.graph)
    for graph in (program.module(), torch.jit.trace(layer, x)):
        assert torch.allclose(graph(x), y, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# which layers


def joined(model: nn.Module) -> dict[str, str]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    return {name: layer.activation for name, layer in layers.items() if layer.activation}


@pytest.mark.parametrize(
    ("name", "layer", "activation"),
    [
        ("bert", "intermediate.dense", "gelu"),
        ("vit", "mlp.fc1", "gelu"),
        ("gpt2", "mlp.c_fc", "gelu_tanh"),
        ("llama", "mlp.gate_proj", "silu"),
    ],
)
def test_architectures_that_others_wrote(name: str, layer: str, activation: str, monkeypatch):
    """Every block of theirs; the outputs are what they were without."""
    model, inputs = zoo(name)
    small = in_int8(model)
    found = joined(small)
    assert len(found) == 2 and set(found.values()) == {activation}
    assert all(inner.endswith(layer) for inner in found)
    monkeypatch.setattr(transform, "following", lambda *_: {})
    apart = in_int8(model)
    with torch.no_grad():
        one, other, exact = (calibration.main_output(m(**inputs)) for m in (small, apart, model))
    assert joined(apart) == {}
    error = calibration.relative_error([one], [exact])  # of rounding to 8 bits
    assert calibration.relative_error([one], [other]) < 0.5 * error < 0.02


class Feeds(nn.Module):
    """A feed-forward block that leaves open who reads what lies inside."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(24, 40), nn.Linear(40, 24)
        self.act = activation or nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.act(self.wide(x)))


class Keeps(Feeds):
    """Keeps what lies before the activation."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.wide(x)
        return self.narrow(self.act(self.kept))


class Adds(Feeds):
    """Reads it twice."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.wide(x)
        return self.narrow(self.act(h) + h)


class Decides(nn.Module):
    """Can't be followed as a whole."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


class Wraps(nn.Module):
    """Can be."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Past(Decides):
    """Calls a layer past its owner."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner.narrow(self.inner.wide(x))


class Steps(Decides):
    """Goes through a container by itself."""

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for part in self.inner:
            x = part(x)
            found.append(x)
        return found[0] if x.sum() > 0 else x


def hooked() -> nn.Module:
    model = Feeds()
    model.act.register_forward_hook(lambda *_: None)
    return model


ROW = nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)
SHARED = nn.GELU()


@pytest.mark.parametrize(
    "model",
    [
        Keeps(),
        Adds(),
        Decides(Keeps()),
        Past(Feeds()),
        Steps(nn.Sequential(*ROW)),
        Decides(nn.Sequential(*ROW)),  # who goes through it can't be followed
        hooked(),
        nn.Sequential(Feeds(SHARED), Feeds(SHARED)),
        Feeds(nn.Tanh()),
    ],
    ids=lambda model: type(model).__name__,
)
def test_outputs_that_others_may_read(model: nn.Module):
    """The layer gives its own output then."""
    assert joined(in_int8(model.eval())) == {}


@pytest.mark.parametrize(
    "model", [Feeds(), Decides(Feeds()), nn.Sequential(*ROW), Decides(Wraps(nn.Sequential(*ROW)))]
)
def test_same_bits_as_side_by_side(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    """A model that does the activation in its layer gives what the two give one after the other,
    in this package's arithmetic.
    """
    model.eval()
    small, x = in_int8(model), randn(9, 24)
    assert list(joined(small).values()) == ["gelu"]
    monkeypatch.setattr(transform, "following", lambda *_: {})
    apart = in_int8(model)
    assert joined(apart) == {}
    monkeypatch.setattr(F, "gelu", lambda x, approximate: elementary.gelu(x))
    assert torch.equal(small(x), apart(x))


@pytest.mark.slow
def test_what_calibration_shows():
    """A forward that can't be followed is watched."""
    model, inputs = zoo("t5")
    assert joined(in_int8(model)) == {}
    small = in_int8(model, calibration=[inputs])
    assert len(joined(small)) == 4 and set(joined(small).values()) == {"relu"}
    models = Decides(nn.Sequential(*ROW)), Decides(Keeps())
    found = [joined(in_int8(m.eval(), calibration=[randn(3, 24)])) for m in models]
    assert found == [{"inner.0": "gelu"}, {}]


def test_a_file_keeps_it(tmp_path):
    """The same bits; a record of an activation that there isn't is refused."""
    model, x = Feeds().eval(), randn(5, 24)
    small = in_int8(model)
    assert quantize.summary(small).done["act"] == "folded into wide"
    quantize.save(small, tmp_path / "small.pth")
    again = quantize.load(tmp_path / "small.pth", model=Feeds())
    assert torch.equal(again(x), small(x))
    assert torch.equal(copy.deepcopy(small)(x), small(x))
    small.wide.activate("cosine")
    quantize.save(small, tmp_path / "wrong.pth")
    with pytest.raises(quantize.CheckpointError, match="activation='cosine'"):
        quantize.load(tmp_path / "wrong.pth", model=Feeds())


def test_what_a_module_is(monkeypatch: pytest.MonkeyPatch):
    """Told by what it computes; a class of another home isn't asked."""
    assert activation_of(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_of(nn.Hardtanh()) is None
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: x)
    assert activation_of(nn.SiLU()) is None
    assert activation_of(type("GELU", (nn.Module,), {"forward": lambda self, x: x})()) is None
