"""Random inputs that a model runs on: what they say of sizes, and of how far int8 moves outputs."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from helpers import in_int8, seeded
from int8_models import races, timings
from torch import nn

import quantize
from quantize import quantize_dynamic
from quantize.compression.int8 import regions
from quantize.compression.int8.samples import find_samples


class Squeezes(nn.Module):
    """A convolution, and two that see one pixel whatever the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 16, 3, 2, 1)
        self.reduce, self.expand = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.deep = nn.Conv2d(16, 16, 3, 2, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.called = True
        y = self.wide(pixels)
        share = self.expand(self.reduce(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.deep(y * share).flatten(1)


def test_sizes_come_from_a_run_on_random_images(monkeypatch: pytest.MonkeyPatch):
    """Each convolution is timed at the sizes that it gets in images of 112 and of 224 pixels a
    side, and then the whole model on one of each; both leave no trace. Where no image runs, sizes
    are guessed.
    """
    shapes = timings(monkeypatch)
    monkeypatch.setattr(regions, "is_slower", lambda *_: True)
    lost = [0.1, 0.11]
    options = races(monkeypatch, [0.1, 0.05], [0.1, 0.09], lost, lost, lost)
    model = Squeezes().eval()
    with pytest.warns(UserWarning, match="Squeezes as a whole is slower in int8 .* 150528 numbers"):
        quantize_dynamic(model)
    sides = {(3, 112), (3, 224), (16, 1), (4, 1), (16, 56), (16, 112)}
    assert {shape[1:3] for shape in shapes} == sides and {shape[0] for shape in shapes} == {1}
    assert len(options) == 5 and not hasattr(model, "called")
    shapes.clear()
    unknown = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, 3, 9, 9)), nn.Conv2d(3, 16, 3))
    quantize_dynamic(unknown.eval())
    assert shapes == [(1, 3, 14, 14), (1, 3, 56, 56)]


class Cancels(nn.Module):
    """An image network in which two large weights cancel out on channels that are the same."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
        with torch.no_grad():
            self.body[0].weight[1] = self.body[0].weight[0]
            self.body[0].bias[1] = self.body[0].bias[0]
            self.body[2].weight[:, 0] += large
            self.body[2].weight[:, 1] -= large

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.called = True
        return self.body(pixels)


def test_random_images_tell_what_int8_does_to_image_networks():
    """Far off without calibration: a warning with the share, and the summary has it. Neither a
    network that int8 suits, nor one with calibration says anything, and one that takes no images
    says that nothing was compared; no run of it leaves a trace.
    """
    far, near = seeded(lambda: Cancels(4.0)).eval(), seeded(lambda: Cancels(0.0)).eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"Cancels moved by \d+% on random images of 112 x 112"):
        small = in_int8(far)
    assert "on_random_inputs" in quantize.summary(small).steps[0].settings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = in_int8(near)
    with pytest.warns(
        UserWarning, match=r"Sequential moved isn't known, .* wasn't timed, .* no random"
    ):
        other = in_int8(nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, 3, 9, 9)), *near.body))
    said = [quantize.summary(one).steps[0].settings["on_random_inputs"] for one in (small, other)]
    assert re.fullmatch(r"moved by \d\.\d% on images of 112 x 112", said[0])
    assert said[1] == "not compared or timed, since it runs on none"
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(far, "called") and not hasattr(near, "called")


class CancelsBehind(nn.Module):
    """Large weights of the last layer cancel out on what a first layer gives, which it is given
    twice.
    """

    def __init__(self, first: nn.Module, large: float) -> None:
        super().__init__()
        self.first, self.last = first, nn.Linear(128, 16)
        with torch.no_grad():
            self.last.weight[:, :64] += large
            self.last.weight[:, 64:] -= large

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.last(torch.cat([hidden, hidden], -1))


@pytest.mark.parametrize(
    ("first", "given"),
    [
        (lambda: nn.Embedding(50, 64), r"ids of shape \(2, 64\)"),
        (lambda: nn.Linear(24, 64), r"inputs of shape \(16, 24\)"),
        (lambda: nn.LSTM(24, 64, batch_first=True), r"inputs of shape \(2, 64, 24\)"),
    ],
)
def test_random_inputs_tell_what_int8_does(first, given):
    """Texts, rows and sequences of random numbers, as the first layer reads them."""
    far, near = (seeded(lambda large=x: CancelsBehind(first(), large)).eval() for x in (9.0, 0.0))
    with pytest.warns(UserWarning, match=rf"CancelsBehind moved by \d+% on random {given}"):
        small = in_int8(far, embeddings=True)
    assert "on_random_inputs" in quantize.summary(small).steps[0].settings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_int8(near, embeddings=True)


class Rearranges(nn.Module):
    """Brings images into another form before the first layer reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.fold, self.conv = nn.PixelUnshuffle(4), nn.Conv2d(48, 16, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.conv(self.fold(pixels))


class Compares(nn.Module):
    """Reads two images; the first of them may be moved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, one: torch.Tensor, other: torch.Tensor, by: float = 0.0) -> torch.Tensor:
        return self.conv(one + by) - self.conv(other)


@pytest.mark.parametrize(
    ("make", "whats", "shapes"),
    [
        (Rearranges, "images of 112 x 112", {(1, 3, 112, 112)}),
        (Compares, "images of 112 x 112", {(1, 3, 112, 112)}),
        (lambda: nn.Conv3d(3, 8, 3), "clips of 16 x 112 x 112", {(1, 3, 16, 112, 112)}),
    ],
    ids=["space to depth", "two images", "clips"],
)
def test_images_that_the_first_layer_reads_in_another_form(make, whats, shapes):
    """All are found: by the channels of images, one for each argument, and clips."""
    (sample,) = find_samples(make().eval(), most=1)
    assert sample.what == whats and {tuple(x.shape) for x in sample.first} == shapes
    first, *others = sample.inputs
    assert all(not torch.equal(first, other) for other in others)
    assert len(others) == (make is Compares)
