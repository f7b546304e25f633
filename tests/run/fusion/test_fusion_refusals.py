"""What `fuse` and `fold` refuse by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion_models import Image, randomized
from helpers import assert_close, randn
from torch import nn

from quantize.run.fusion import compare, fold, fuse, torchscript
from quantize.run.fusion.folded import Folded

pytestmark = [
    pytest.mark.usefixtures("no_clock"),
    pytest.mark.filterwarnings(
        "error:.*torch.jit.*:FutureWarning", "error:.*torch.jit.*:DeprecationWarning"
    ),
]


# What is refused.
class Deciding(nn.Module):
    def forward(self, x: torch.Tensor, **unused: Any) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x - 1


class Choosing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x - 1


class Caching(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:
        return x, type("SomeCache", (), {})()


class Counting(nn.Linear):
    """Reads and changes something that isn't in the model."""

    calls = 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counting.calls += 1
        return super().forward(x) * Counting.calls


@pytest.mark.parametrize("transform", [fuse, fold])
def test_models_that_read_more_than_themselves_are_refused(transform: Any) -> None:
    """A global counter in the code is no rounding error, however small a share of it the next step
    is.
    """
    with pytest.raises(ValueError, match="reads something that isn't in the model"):
        transform(Counting(8, 8).eval(), randn(2, 8))


def test_control_flow_on_data_is_refused_or_compiled() -> None:
    """Python deciding on a tensor's value is refused; what TorchScript can compile follows the
    data.
    """
    with pytest.raises(ValueError, match=r"Deciding.*data-dependent control flow"):
        fuse(Deciding().eval(), randn(3))
    fused = fuse(Choosing().eval(), torch.ones(3))
    assert torch.equal(fused(-torch.ones(3)), -torch.ones(3) - 1)


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (nn.Linear(2, 2), randn(1, 2), ValueError, r"training mode.*model\.eval"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.Dropout().train()),
            randn(1, 2),
            ValueError,
            "'1' .Dropout. is in training mode",
        ),
        (
            nn.Linear(2, 2).eval(),
            torch.empty(1, 2, device="meta"),
            ValueError,
            "tensor 0 .* on meta and the model on cpu",
        ),
        (nn.Linear(2, 2).eval(), (), ValueError, "no tensor"),
        (nn.Linear(2, 2).eval(), object(), TypeError, "example_inputs.* object"),
        (Caching().eval(), randn(2), (TypeError, ValueError), "SomeCache.*use_cache=False"),
        ("model", randn(2), TypeError, "nn.Module"),
    ],
)
def test_bad_input_is_named(model: Any, inputs: Any, error: Any, message: str) -> None:
    """What can't be fused says what and why."""
    if message.startswith("'1'"):
        model.train(False)[1].train()
    with pytest.raises(error, match=message):
        fuse(model, inputs)


def test_unknown_and_absent_back_ends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt back end, and one whose package isn't there."""
    model, x = randomized(Image()), randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="'tensorrt'; allowed: 'auto', 'torchscript'"):
        fuse(model, x, backend="tensorrt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs openvino"):
        fuse(model, x, backend="openvino")


@pytest.mark.slow
def test_a_torch_without_torchscript_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` goes on with the other back ends and says why TorchScript is out."""
    monkeypatch.setattr(torchscript, "available", lambda: False)
    model, x = randomized(Image()), randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="no TorchScript: use backend='auto'"):
        fuse(model, x)
    monkeypatch.setattr(
        "quantize.run.fusion.backends.build", lambda program, name, tensors: Folded(program)
    )
    rows = {r.backend: r for r in compare(model, x, names=("torchscript", "inductor"))}
    assert (
        "no TorchScript" in rows["torchscript"].reason and rows["inductor"].latency_ms is not None
    )
    assert_close(fuse(model, x, backend="auto")(x), model(x))


def test_a_size_that_decides_in_steps_of_many_samples() -> None:
    """A count of frames that changes with a hundred samples, and leads another way where it is
    odd.
    """

    class Pairs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            frames = nn.functional.avg_pool1d(x, 100)
            pairs = frames[..., : frames.shape[2] // 2 * 2]
            if pairs.shape[2] < frames.shape[2]:
                pairs = nn.functional.pad(pairs, (0, 1))
            return pairs

    x = torch.randn(2, 1, 1220)
    fused = fuse(Pairs().eval(), x)
    assert fused(x[..., :830]).shape == (2, 1, 8)
    with pytest.raises(torch.jit.Error, match="sizes must be so that"):
        fused(x[..., :930])


@pytest.mark.parametrize("rounded", [math.floor, math.ceil, round, int])
def test_a_choice_by_a_rounded_size(rounded: Callable[[float], int]) -> None:
    """Sizes for which Python would have chosen otherwise, far from the example's, are refused."""

    class Long(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if rounded(x.shape[1] * 0.3) > 10 else x

    x = randn(2, 200)
    fused = fuse(Long().eval(), x)
    assert torch.equal(fused(x), 2 * x)
    with pytest.raises(torch.jit.Error, match="sizes must be so that"):
        fused(x[:, :20])


@pytest.mark.parametrize(
    "chosen", [lambda x: x.shape[0] * x.shape[1] > 300, lambda x: x.shape[1] != 1]
)
def test_a_choice_by_a_product_or_a_length_of_one(chosen: Callable[[torch.Tensor], bool]) -> None:
    """The file gives what the model gives, or refuses, at every size."""

    class Chooses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if chosen(x) else x

    x = randn(8, 64)
    fused = fuse(Chooses().eval(), x)
    assert torch.equal(fused(x), 2 * x)
    for part in (x[:, :1], x[:, :8], x[:2]):
        try:
            given = fused(part)
        except torch.jit.Error as error:
            assert "sizes must be so that" in str(error)
        else:
            assert torch.equal(given, Chooses()(part))
    with pytest.raises(torch.jit.Error, match="sizes must be so that"):
        fused(x[:, :1])


def test_a_number_among_the_outputs_says_so() -> None:
    """What neither way of fusing can return is said, not only that the last way differs."""

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor, **unused: Any) -> Any:
            return x * 1.5, x.shape[1]

    with pytest.raises(ValueError, match=r"output\[1\] is a number that depends on the inputs"):
        fuse(Counting().eval(), randn(2, 5))
