"""Gradients of layers in integers are those of the float layers that they stand for."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import in_int8, linear, randn, seeded
from image_blocks import Mobile
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from quantize.nn.int4 import Int4Linear
from quantize.nn.int8_region import Region


class Gated(nn.Module):
    """A block with a shortcut, a norm, and layers whose results meet in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.gate, self.down = (linear(32, 32, seed=seed) for seed in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def image(*layers: nn.Module) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*layers), randn(2, 32, 8, 8)


def sequence(kind: Callable[..., nn.Module], **options: Any) -> tuple[nn.Module, Tensor]:
    return seeded(lambda: kind(32, 40, **options)), randn(5, 3, 32)


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Sequential(linear(32, 24), nn.Identity()), randn(2, 5, 32)),
    "activation": lambda: (nn.Sequential(linear(32, 24), nn.GELU()), randn(5, 32)),
    "block": lambda: (Gated(), randn(5, 32)),
    "convolution": lambda: image(nn.Conv2d(32, 24, 3, padding=1), nn.SiLU()),
    "reflected": lambda: image(nn.Conv2d(32, 24, 3, padding=1, padding_mode="reflect")),
    "depthwise": lambda: image(nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 8, 1)),
    "mobile": lambda: image(Mobile()),
    "touching": lambda: image(nn.ConvTranspose2d(32, 8, 2, 2)),
    "overlapping": lambda: image(nn.ConvTranspose2d(32, 8, 3, 2)),
    "LSTM": lambda: sequence(nn.LSTM, num_layers=2, bidirectional=True),
    "projected": lambda: sequence(nn.LSTM, proj_size=8, batch_first=True),
    "GRU": lambda: sequence(nn.GRU),
}


def twin(model: nn.Module, small: nn.Module) -> nn.Module:
    """The float model with the weights that the small one stands for."""
    new = copy.deepcopy(model)
    read = dict(small.named_modules())
    with torch.no_grad():
        for name, module in new.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                value = getattr(read[name], own, None)
                if value is not None and value.shape == parameter.shape:
                    parameter.copy_(value + 0)
    return new


def gradient(model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    return torch.autograd.grad((y * randn(*y.shape)).sum(), x)[0]


def assert_near(actual: Tensor, expected: Tensor, most: float = 0.03) -> None:
    """What rounding of later layers' inputs changes is small."""
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= most * expected.norm()


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_float_layer(name: str):
    """At each call, those that are recorded too; results are what they are without gradients."""
    model, x = CASES[name]()
    small = in_int8(model.eval())
    expected = gradient(twin(model, small), x)
    for _ in range(4):
        assert_near(gradient(small, x), expected)
    y, plain = small(x.clone().requires_grad_()), small(x.clone())
    y, plain = (one[0] if isinstance(one, tuple) else one for one in (y, plain))
    assert torch.equal(y, plain)


def test_gradients_of_4_bit_layers():
    layer, x = Int4Linear.from_linear(linear(64, 32), 32), randn(3, 64)
    dense = layer.dense_weight()
    assert_near(gradient(layer, x), gradient(lambda x: F.linear(x, dense), x), 1e-6)


def test_parameters_before_a_layer_learn():
    """The norm of a block gets the gradient that the float block would give it."""
    model, x = Gated().eval(), randn(5, 32)
    small: Any = in_int8(model)
    assert isinstance(small, Region)
    float_twin: Any = twin(model, small)
    for each, _ in itertools.product((small, float_twin), range(3)):
        each.norm.zero_grad()
        each(x).pow(2).sum().backward()
    assert_near(small.norm.weight.grad, float_twin.norm.weight.grad)


@pytest.mark.parametrize("name", ["block", "mobile"])
@torch.no_grad()
def test_derivatives_that_go_forward(name: str):
    """Also where a program or recorded calls were at work before."""
    model, x = CASES[name]()
    small, way = in_int8(model.eval()), randn(*x.shape, seed=1)
    plain = twin(model, small)
    for _ in range(4):
        small(x)
    with forward_ad.dual_level():
        found, expected = (
            forward_ad.unpack_dual(each(forward_ad.make_dual(x, way))).tangent
            for each in (small, plain)
        )
        assert_near(found, expected)


def test_other_derivatives():
    """Those of `torch.func`, and of compiled code; second ones in a backward pass are refused."""
    model, x = Gated().eval(), randn(32)
    small = in_int8(model)
    plain = twin(model, small)
    expected: Any = torch.func.jacrev(plain)(x)
    assert_near(torch.func.jacrev(small)(x), expected)  # type: ignore[arg-type]
    rows = torch.func.jacrev(torch.func.vmap(small))(x[None])
    assert_near(rows[0, :, 0], expected)  # type: ignore[index]
    way = randn(32, seed=1)
    assert_near(torch.func.jvp(small, (x,), (way,))[1], expected @ way)
    compiled = torch.compile(small, backend="eager")
    assert_near(gradient(compiled, x), gradient(plain, x))
    x.requires_grad_()
    (first,) = torch.autograd.grad(small(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_inputs(layout: torch.layout):
    """Each part as by itself, with its gradient; sums with the input fit."""
    small = in_int8(nn.Sequential(linear(32, 32), nn.Identity()).eval())
    parts = [randn(3, 32), randn(5, 32, seed=1)]
    x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    y = small(x) + x
    for part, alone in zip(y.unbind(), parts, strict=True):
        assert torch.equal(part, small(alone) + alone)
    torch.cat([*y.unbind()]).sum().backward()
    dense = small[0].weight + torch.eye(32)
    for found in x.grad.unbind():
        assert_near(found, dense.sum(0).expand_as(found), 1e-5)
