"""Rewrites beside the layers: norms, projections, activations, constants, reused memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from fusion_models import Image, randomized
from helpers import assert_close, randn
from torch import nn

from quantize.run.fusion import fuse, kernels, plan
from quantize.run.fusion.equality import difference, outputs

pytestmark = pytest.mark.usefixtures("no_clock")


class Branch(nn.Module):
    """The convolution's own output is used as well: the norm after it must not change it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) * torch.relu_(y)


def test_shared_intermediate_results_stay_what_they_were() -> None:
    """A convolution with two readers, one of them in place, isn't changed for one of them."""
    model, x = randomized(Branch()), randn(2, 3, 4, 4)
    assert_close(fuse(model, x)(x), model(x))


class Normed(nn.Module):
    """RMSNorm by torch, and as Llama's authors spell it, each before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.weight = nn.RMSNorm(16), nn.Parameter(torch.ones(16))
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.a(self.norm(x))
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.b(self.weight * y)


def test_rms_norms_take_one_reduction() -> None:
    """RMSNorm, built in or spelt out, becomes one reduction; extremes agree."""
    model = randomized(Normed())
    made = plan(model, randn(3, 5, 16))
    assert made.after["aten.linalg_vector_norm"] == 2 and not any(
        "rms_norm" in op or "pow" in op for op in made.after
    )
    for scale in (0.0, 1e-30, 1e-4, 1.0, 1e6, 1e30):
        x = randn(2, 7, 16) * scale
        assert difference(outputs(made.fused, x), outputs(model, x)) <= 1e-5


def test_small_linear_layers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is computed faster than a packed kernel starts keeps its operator."""
    monkeypatch.setattr(kernels, "SMALL", 1 << 19)
    model, x = (
        randomized(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4096))),
        randn(4, 64),
    )
    after = plan(model, x).after
    assert after["aten.linear"] == 1 and after["mkldnn._linear_pointwise"] == 1


def test_written_out_activations_are_recognised() -> None:
    """GPT-2's GELU and x * sigmoid(x), spelt in operators, run inside the linear kernel."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            x = (
                0.5
                * x
                * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))
            )
            x = self.b(x)
            return x * torch.sigmoid(x)

    model, x = randomized(Net()), randn(3, 8)
    made = plan(model, x)
    assert_close(made.fused(x), model(x))
    assert set(made.after) == {"mkldnn._linear_pointwise"}


def test_constants_are_computed_once_and_small() -> None:
    """What depends on weights only (here a weight norm) is computed at fusing time."""
    model = randomized(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))))
    x = randn(3, 6)
    made = plan(model, x)
    assert_close(made.fused(x), model(x))
    assert set(made.after) == {"mkldnn._linear_pointwise"}


def test_without_packed_kernels_the_passes_still_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build without oneDNN gets the simplified graph."""
    monkeypatch.setattr(kernels, "available", lambda: False)
    model, x = randomized(Image()), randn(2, 3, 16, 16)
    made = plan(model, x)
    assert made.way == "simplified" and "aten.batch_norm" not in made.after
    assert_close(made.fused(x), model(x))


class Reuse(nn.Module):
    """Sums and products of a convolution's result, of which each reads one more time what the last
    one could overwrite.
    """

    def __init__(self, which: str) -> None:
        super().__init__()
        self.a, self.b, self.which = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), which

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if self.which == "input":
            return self.b(x) + x
        y = self.a(x)
        if self.which == "dies":
            return self.b(y) + y
        if self.which == "returned":
            return y, self.b(x) + y
        if self.which == "view":
            flat = y.flatten(2)
            return (self.b(x) + y).sum((2, 3)) + flat.amax(2)
        if self.which == "view returned":
            return y.flatten(2), self.b(x) * y
        if self.which == "twice":
            return (self.b(x) + y) * y
        return y * y.mean((2, 3), keepdim=True)  # "gate"


@pytest.mark.parametrize(
    ("which", "reused"),
    [
        ("input", 0),
        ("dies", 0),
        ("returned", 0),
        ("view", 0),
        ("view returned", 1),
        ("twice", 1),
        ("gate", 1),
    ],
)
def test_only_dead_values_are_overwritten(which: str, reused: int) -> None:
    """Results go into memory that nothing reads later: not an input's, not one that a view of it or
    the output still shows.
    """
    model, x = randomized(Reuse(which)), randn(2, 4, 5, 5)
    made, before = plan(model, x), x.clone()
    for _ in range(2):
        for y, expected in zip(
            *[r if isinstance(r, tuple) else (r,) for r in (made.fused(x), model(x))], strict=True
        ):
            assert_close(y, expected)
    assert torch.equal(x, before)
    assert (
        sum(n for op, n in made.after.items() if "_." in op and not op.endswith("_.default"))
        == reused
    )


def test_a_size_that_is_chosen_by_another_size() -> None:
    """What the export keeps of Python's choice between two sizes is chosen in the file too."""

    class Chosen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, : torch.sym_ite(x.shape[0] > 2, 3, 4)]

    model, x = Chosen().eval(), randn(4, 8)
    fused = fuse(model, x)
    for batch in (4, 3, 2):
        assert torch.equal(fused(x[:batch]), model(x[:batch]))


@pytest.mark.parametrize("rounded", [math.floor, math.ceil])
def test_a_size_that_is_a_rounded_quotient(rounded: Callable[[float], int]) -> None:
    """TorchScript has no math of Python's; the file rounds sizes all the same."""

    class Third(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, : rounded(x.shape[1] / 3)]

    x = randn(2, 12)
    fused = fuse(Third().eval(), x)
    for length in (12, 11, 10):
        assert torch.equal(fused(x[:, :length]), x[:, : rounded(length / 3)])
