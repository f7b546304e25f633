"""Folding and joining around linear and convolutional layers: the graph computes what it did."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from fusion_models import Image, randomized
from helpers import assert_close, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from quantize.run.fusion import folding, plan

pytestmark = pytest.mark.usefixtures("no_clock")


@pytest.mark.parametrize(
    "activation",
    [F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, torch.tanh, torch.sigmoid],
)
def test_activation_joins_the_convolution(
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Each activation runs inside the kernel of the convolution before it; after the residual add,
    only ReLU has one.
    """
    model, x = randomized(Image(activation)), randn(2, 3, 16, 16)
    made = plan(model, x)
    assert_close(made.fused(x), model(x), factor=4)
    assert (
        made.after["mkldnn._convolution_pointwise"]
        == made.after["mkldnn._convolution_pointwise.binary"]
        == 1
    )
    assert made.after.total() == 4 + (activation is not F.relu)


SMALL = st.integers(1, 3)


@settings(max_examples=30)
@given(
    groups=st.integers(1, 3),
    per_in=st.integers(1, 3),
    per_out=st.integers(1, 3),
    bias=st.booleans(),
    transposed=st.booleans(),
)
def test_scaled_output_is_the_layer_then_the_affine_map(
    groups: int, per_in: int, per_out: int, bias: bool, transposed: bool
) -> None:
    """`scaled_output` equals running the convolution and then scaling and shifting its channels."""
    inputs, out = groups * per_in, groups * per_out
    weight = randn(*((inputs, per_out) if transposed else (out, per_in)), 2, 2).double()
    b = randn(out, seed=2).double() if bias else None
    scale, shift, x = (
        randn(out, seed=3).double(),
        randn(out, seed=4).double(),
        randn(2, inputs, 4, 4, seed=5).double(),
    )
    conv = F.conv_transpose2d if transposed else F.conv2d
    expected = conv(x, weight, b, groups=groups) * scale[:, None, None] + shift[:, None, None]
    assert_close(
        conv(
            x,
            *folding.scaled_output(weight, b, scale, shift, transposed=transposed, groups=groups),
            groups=groups,
        ),
        expected,
    )


@settings(max_examples=30)
@given(groups=SMALL, per_in=SMALL, per_out=SMALL, bias=st.booleans())
def test_scaled_input_is_the_affine_map_then_the_layer(
    groups: int, per_in: int, per_out: int, bias: bool
) -> None:
    """`scaled_input` equals scaling and shifting the channels of the input first."""
    weight = randn(groups * per_out, per_in, 2, 2).double()
    b = randn(groups * per_out, seed=2).double() if bias else None
    scale, shift = randn(groups * per_in, seed=3).double(), randn(groups * per_in, seed=4).double()
    x = randn(2, groups * per_in, 4, 4, seed=5).double()
    expected = F.conv2d(x * scale[:, None, None] + shift[:, None, None], weight, b, groups=groups)
    assert_close(
        F.conv2d(x, *folding.scaled_input(weight, b, scale, shift, groups=groups), groups=groups),
        expected,
    )


NORMED = {
    "conv then norm": (
        nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)),
        (2, 4, 5, 5),
    ),
    "grouped conv then norm": (
        nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        (2, 4, 5, 5),
    ),
    "conv1d then norm": (nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
    "conv3d then norm": (nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 2, 4, 4, 4)),
    "linear then norm": (nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6)), (3, 5)),
    "transposed conv then norm": (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6)),
        (2, 4, 5, 5),
    ),
    "norm then conv without padding": (
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)),
        (2, 4, 5, 5),
    ),
    "norm then linear": (nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 6)), (3, 5)),
    "norm without weights": (
        nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)),
        (2, 4, 5, 5),
    ),
}


@pytest.mark.parametrize("name", NORMED)
def test_batch_norm_disappears(name: str) -> None:
    """BatchNorm folds into the layer before it, or after it, with equal results."""
    model, size = NORMED[name]
    model, x = randomized(copy.deepcopy(model)), randn(*size)
    made = plan(model, x)
    assert_close(made.fused(x), model(x))
    assert not any("norm" in op for op in made.after)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(
            nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        ),  # the padding is zeros after the norm, not before
        nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        ),  # uses the batch's statistics
    ],
)
def test_batch_norm_stays_where_folding_would_be_wrong(model: nn.Module) -> None:
    """Norm before a padded convolution, and norm by the batch's own statistics, are kept and
    equal.
    """
    model, x = randomized(copy.deepcopy(model)), randn(2, 4, 5, 5)
    made = plan(model, x)
    assert_close(made.fused(x), model(x))
    assert any("norm" in op for op in made.after)


@pytest.mark.parametrize("pad", [(1, 1, 1, 1), (0, 1, 0, 1), (2, 0, 1, 3), (0, 0, 0, 0)])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_moves_into_the_convolution(pad: tuple[int, ...], stride: int) -> None:
    """Explicit zero padding, even or uneven, becomes part of the convolution after it."""
    model = randomized(
        nn.Sequential(nn.ZeroPad2d(pad), nn.Conv2d(3, 4, 3, stride=stride, padding=1))
    )
    made = plan(model, randn(2, 3, 8, 8))
    for size in (8, 9):
        x = randn(2, 3, size, size)
        assert_close(made.fused(x), model(x))
    assert not any("pad" in op.split(".")[1] for op in made.after)


@pytest.mark.parametrize(
    ("word", "kernel", "dilation"),
    [("same", 1, 1), ("same", 2, 1), ("same", 3, 2), ("same", 4, 1), ("valid", 3, 2)],
)
@pytest.mark.parametrize(
    ("conv", "norm", "size"),
    [
        (nn.Conv1d, nn.BatchNorm1d, (2, 4, 9)),
        (nn.Conv2d, nn.BatchNorm2d, (2, 4, 8, 9)),
        (nn.Conv3d, nn.BatchNorm3d, (1, 4, 5, 6, 7)),
    ],
)
def test_padding_by_name_becomes_numbers(
    word: str, kernel: int, dilation: int, conv: type, norm: type, size: tuple[int, ...]
) -> None:
    """`padding="same"`, also where it is uneven, and `"valid"`: the norm folds all the same."""
    model = randomized(
        nn.Sequential(conv(4, 6, kernel, dilation=dilation, padding=word, groups=2), norm(6))
    )
    made = plan(model, randn(*size))
    assert_close(made.fused(randn(*size, seed=2)), model(randn(*size, seed=2)))
    assert not any("norm" in op or "pad" in op.split(".")[1] for op in made.after)


class Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.squeeze, self.excite, self.gate = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.expand(x))
        weights = self.gate(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return self.project(y * weights) + x


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Hardsigmoid()])
def test_layers_on_one_pixel_become_linear(gate: nn.Module) -> None:
    """Squeeze and excitation runs as two linear layers with their activations inside, without
    copies between them.
    """
    model, x = randomized(Gated(gate)), randn(2, 4, 6, 6)
    made = plan(model, x)
    assert_close(made.fused(randn(5, 4, 7, 3)), model(randn(5, 4, 7, 3)))
    assert (
        made.after["mkldnn._linear_pointwise"] == 2
        and made.after["mkldnn._convolution_pointwise"] == 1
    )
    assert made.after["aten.reshape"] == 2 and made.after.total() == 8
