"""Fused and folded random models answer as eager does, call after call, or are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import Sample, random_model
from torch import nn

import quantize
from quantize.calibration import call
from quantize.run.fusion import torchscript
from quantize.run.fusion.equality import TOLERANCE, difference
from quantize.run.fusion.nested import duplicate, flatten, plain, unflatten

pytestmark = [pytest.mark.usefixtures("no_clock"), pytest.mark.filterwarnings("ignore")]


def answer(
    model: Callable[..., Any], inputs: Any, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output tensors, not copied, in the order of a file, and the inputs afterwards."""
    tensors, spec = flatten(inputs, "inputs")
    given = duplicate(tensors)
    torch.manual_seed(seed)
    with torch.no_grad():
        outputs, form = flatten(call(model, unflatten(spec, given), copy=False), "output")
    return flatten(unflatten(plain(form), outputs), "output")[0], given


def assert_same_calls(sample: Sample, fused: dict[str, Callable[..., Any]]) -> None:
    """Several calls with other values and other sizes between them; earlier results keep their
    values.
    """
    eager = copy.deepcopy(sample.model)
    kept = []
    sizes = [len(flatten(sample.inputs, "inputs")[0][0]), 4, 7, 4, 1, 4]
    for i, batch in enumerate(sizes):
        inputs = sample.inputs if i == 0 else sample.fresh(i, batch)
        try:
            expected, after = answer(eager, inputs, i)
        except RuntimeError:  # eager refuses the size
            break
        expected = [t.clone() for t in expected]
        for name, model in list(fused.items()):
            try:
                actual, written = answer(model, inputs, i)
            except (ValueError, torch.jit.Error) as error:
                assert any(
                    word in str(error)
                    for word in ("must be", "must equal", "at most", "folded for")
                )
                del fused[name]  # its state stands where it stood
                continue
            kept.append((actual, expected))
            assert_alike(written, after)
    for actual, expected in kept:
        assert_alike(actual, expected)


def assert_alike(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    allowed = max([20 * TOLERANCE[t.dtype] for t in expected if t.dtype in TOLERANCE] or [0.0])
    assert difference(actual, expected) <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_models_answer_like_eager_at_every_call(
    seed: int, odd: bool, tmp_path: Path
) -> None:
    """In memory, from the file and folded: the same outputs, inputs and state; the model itself is
    as it was.
    """
    sample = random_model(100 + seed, odd=odd, steps=5)
    tensors, _ = flatten(sample.inputs, "inputs")
    before, inputs = copy.deepcopy(sample.model.state_dict()), [t.clone() for t in tensors]
    fused: dict[str, Callable[..., Any]] = {}
    for transform in (quantize.fuse, quantize.fold):
        try:
            fused[transform.__name__] = transform(sample.model, sample.inputs)
        except (ValueError, TypeError):  # refused
            assert odd
    if "fuse" in fused:
        fused["fuse"].save(tmp_path / "fused.pt")
        fused["file"] = torchscript.load(str(tmp_path / "fused.pt"))
    assert all(torch.equal(t, before[n]) for n, t in sample.model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(tensors, inputs, strict=True))
    assert_same_calls(sample, fused)


class Keeping(nn.Module):
    """State that a forward changes, in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(8, 8)
        self.register_buffer("h", torch.zeros(4, 8))
        self.register_buffer("calls", torch.zeros(()))
        self.loose, self.count, self.cache = torch.zeros(4, 8), 0, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.kind)(x)

    def assigned(self, x: torch.Tensor) -> torch.Tensor:
        self.h = torch.tanh(self.layer(x) + self.h)
        return self.h

    def old_returned(self, x: torch.Tensor) -> torch.Tensor:
        old, self.h = self.h, self.layer(x)
        return old[:, :4]

    def swapped(self, x: torch.Tensor) -> torch.Tensor:
        self.h, self.loose = self.loose, self.h
        self.h.add_(self.layer(x))
        return self.h - 2 * self.loose

    def written(self, x: torch.Tensor) -> torch.Tensor:
        self.h.mul_(0.5).add_(self.layer(x))
        return self.h

    def attribute(self, x: torch.Tensor) -> torch.Tensor:
        self.loose = 0.9 * self.loose + 0.1 * x
        return self.layer(x) - self.loose

    def counted_in_a_buffer(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x) * self.calls

    def counted(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.layer(x) if self.count < 5 else x

    def lazy(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = x.mean(0) if self.cache is None else self.cache
        return self.layer(x - self.cache)


@pytest.mark.parametrize(
    "kind", ["assigned", "old_returned", "written", "swapped", "attribute", "counted_in_a_buffer"]
)
def test_state_in_tensors_is_carried_from_call_to_call(kind: str, tmp_path: Path) -> None:
    """From the model's present state on; the model itself stays where it is."""
    model = Keeping(kind).eval()
    model(torch.randn(4, 8))  # not the first state
    xs = [torch.randn(4, 8) for _ in range(5)]
    h, calls = model.h.clone(), model.calls.clone()
    fused, folded = quantize.fuse(model, xs[0]), quantize.fold(model, xs[0])
    fused.save(tmp_path / "fused.pt")
    made = [
        fused,
        folded,
        torchscript.load(str(tmp_path / "fused.pt")),
        copy.deepcopy(fused),
        copy.deepcopy(folded),
    ]
    assert torch.equal(model.h, h) and torch.equal(model.calls, calls)
    expected = [model(x).clone() for x in xs]
    for each in made:
        actual = [each(x) for x in xs]
        assert difference(actual, expected) <= 1e-5


@pytest.mark.parametrize(("kind", "name"), [("counted", "count"), ("lazy", "cache")])
def test_state_that_a_graph_cannot_carry_is_refused_by_name(kind: str, name: str) -> None:
    """Counters, even those that matter later, and values made at the first call."""
    for transform in (quantize.fuse, quantize.fold):
        with pytest.raises(ValueError, match=rf"changes.*({name})"):
            transform(Keeping(kind).eval(), torch.randn(4, 8))


def test_what_a_coarse_dtype_would_hide_is_refused() -> None:
    """In bfloat16 a small part of the answer that comes from the first call is within the
    tolerance: refused all the same.
    """

    class Slightly(Keeping):
        def lazy(self, x: torch.Tensor) -> torch.Tensor:
            self.cache = x.mean(0) if self.cache is None else self.cache
            return x + 0.02 * self.cache

    with pytest.raises(ValueError, match="cache and reads it later"):
        quantize.fuse(Slightly("lazy").bfloat16().eval(), torch.randn(4, 8, dtype=torch.bfloat16))


def test_kept_activations_do_not_stand_in_the_way() -> None:
    """What a forward writes down and never reads is no state: the model is fused without it."""

    class Kept(Keeping):
        def lazy(self, x: torch.Tensor) -> torch.Tensor:
            self.cache = self.layer(x)
            self.calls += 1
            return torch.relu(self.cache)

    model, x = Kept("lazy").eval(), torch.randn(4, 8)
    assert difference([quantize.fuse(model, x)(x)], [model(x)]) <= 1e-5
