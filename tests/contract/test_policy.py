"""What all transforms say to the same mistakes, and what they leave alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantize
from contract import invariants as promise
from contract.models import batches, build
from contract.odd_layers import Perceptron
from contract.transforms import TRANSFORMS

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
NAMES = tuple(TRANSFORMS)
CALIBRATED = tuple(name for name in NAMES if "calibrated" in name or "smooth" in name)


@pytest.fixture(autouse=True)
def _quick(no_clock: None) -> None:
    """Candidates of a fusion don't race."""


def refusal(transform: str, model: Any, inputs: Any = X, calibration: Any = (X,)) -> str:
    """The message with which a transform refuses, checked to be an honest one."""
    with pytest.raises((ValueError, TypeError)) as caught:
        TRANSFORMS[transform].apply(model, inputs, calibration)
    assert list(promise.honest(caught.value)) == []
    return str(caught.value)


@pytest.mark.parametrize("transform", [name for name in NAMES if name != "recovered"])
@pytest.mark.parametrize(
    "thing",
    [None, {"weight": X}, lambda x: x, Perceptron],
    ids=["None", "dict", "function", "class"],
)
def test_what_is_no_module_is_refused(transform: str, thing: Any):
    """A state dict, a function, a class and nothing at all are refused by the type that they
    have.
    """
    assert "nn.Module" in refusal(transform, thing)


@pytest.mark.parametrize(
    "transform", [name for name in NAMES if name not in ("fused", "folded", "recovered")]
)
def test_model_without_layers_is_refused(transform: str):
    """A model in which there is nothing to do is refused by its class and what was looked for."""
    assert "Sequential" in refusal(transform, nn.Sequential(nn.ReLU(), nn.Flatten()))


@pytest.mark.parametrize("transform", CALIBRATED)
@pytest.mark.parametrize(
    ("calibration", "said"),
    [([], "empty"), (iter([X]), "re-iterable"), (X, "[batch]")],
    ids=["empty", "iterator", "tensor"],
)
def test_calibration_of_the_wrong_kind_is_refused(transform: str, calibration: Any, said: str):
    """Empty calibration, an iterator and a bare batch are refused, saying what to give."""
    assert said in refusal(transform, Perceptron().eval(), calibration=calibration)


@pytest.mark.parametrize("transform", [name for name in NAMES if TRANSFORMS[name].runs])
def test_inputs_that_do_not_fit_are_refused(transform: str):
    """Inputs of another width are refused by name of the model or the argument, not by torch's
    message alone.
    """
    model, wrong = Perceptron().eval(), torch.randn(4, 31)
    said = refusal(transform, model, wrong, [wrong])
    assert "Perceptron" in said or "example_inputs" in said


@pytest.mark.parametrize("transform", NAMES)
def test_weights_without_data_are_refused(transform: str):
    """A model on the meta device has nothing to transform."""
    model = Perceptron().to("meta").eval()
    refusal(transform, model)


@pytest.mark.parametrize(
    "transform", [name for name in NAMES if name.startswith(("int", "low", "pruned", "student"))]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(transform: str, value: float):
    """The layer that holds NaN or Inf is named."""
    model = Perceptron().eval()
    with torch.no_grad():
        model.mid.weight[3, 4] = value
    assert "mid" in refusal(transform, model)


@pytest.mark.parametrize("transform", CALIBRATED)
def test_calibration_that_is_not_finite_is_refused(transform: str):
    """NaN in a batch is refused; it would decide about every weight."""
    refusal(transform, Perceptron().eval(), calibration=[X, torch.full_like(X, float("nan"))])


@pytest.mark.parametrize("transform", [name for name in NAMES if name not in ("fused", "folded")])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_grad_mode_of_the_caller_does_not_matter(transform: str, mode: Callable[[], Any]):
    """The result is the same under no_grad and enable_grad."""
    model, inputs = build("mlp")
    plain = TRANSFORMS[transform].apply(model, inputs, batches(inputs))
    with mode():
        result = TRANSFORMS[transform].apply(model, inputs, batches(inputs))
    assert (
        list(
            promise.same_answers(
                promise.answers(result, [inputs]), promise.answers(plain, [inputs]), "result"
            )
        )
        == []
    )


@pytest.mark.parametrize("transform", NAMES)
def test_default_dtype_of_the_caller_does_not_matter(transform: str):
    """Under another default dtype the result is the same."""
    model, inputs = build("mlp")
    plain = TRANSFORMS[transform].apply(model, inputs, batches(inputs))
    torch.set_default_dtype(torch.float64)
    try:
        result = TRANSFORMS[transform].apply(model, inputs, batches(inputs))
        actual = promise.answers(result, [inputs])
    finally:
        torch.set_default_dtype(torch.float32)
    assert [t.dtype for t in promise.tensors(actual)] == [torch.float32]
    assert promise.distance(actual, promise.answers(plain, [inputs])) < 1e-5


@pytest.mark.parametrize("transform", [name for name in NAMES if not TRANSFORMS[name].saved])
def test_what_is_fused_is_not_saved(transform: str, tmp_path: Path):
    """A fused or folded model is no checkpoint: `save` says what to do instead and writes
    nothing.
    """
    model, inputs = build("mlp")
    result = TRANSFORMS[transform].apply(model, inputs, batches(inputs))
    with pytest.raises(TypeError, match=r"TorchScript|quantize\.fuse"):
        quantize.save(result, tmp_path / "model.pth")
    with pytest.raises((TypeError, RuntimeError), match=r"serialize|quantize\.fuse"):
        pickle.dumps(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("transform", [name for name in NAMES if TRANSFORMS[name].saved])
def test_summary_is_the_same_in_a_copy_and_in_a_file(transform: str, tmp_path: Path):
    """The summary follows pickling and saving, and can be read off a file without the model."""
    model, inputs = build("mlp")
    result = TRANSFORMS[transform].apply(model, inputs, batches(inputs))
    told = quantize.summary(result)
    quantize.save(result, tmp_path / "model.pth")
    for other in (
        pickle.loads(pickle.dumps(result)),
        tmp_path / "model.pth",
        quantize.load(tmp_path / "model.pth", model=model),
    ):
        assert quantize.summary(other) == told
    assert str(told).startswith(told.steps[-1].technique)


def test_summary_of_an_untouched_model_is_empty():
    """Nothing was done, nothing was left."""
    told = quantize.summary(Perceptron())
    assert (told.steps, told.done, told.left, told.distance) == ((), {}, {}, None)


@pytest.mark.parametrize(
    "transform", [name for name in NAMES if name not in ("fused", "folded", "recovered")]
)
def test_gradients_are_not_copied(transform: str):
    """A model that was trained gives a result without its gradients."""
    model, inputs = build("gradients")
    result = TRANSFORMS[transform].apply(model, inputs, batches(inputs))
    assert [n for n, p in result.named_parameters() if p.grad is not None] == []


def test_recover_leaves_a_student_with_state_as_it_is():
    """The student's buffers, counters and weights are as before; so are the teacher's."""
    for name in ("running mean", "counts calls", "partly training"):
        student, inputs = build(name)
        teacher, _ = build(name, seed=1)
        before = [promise.state_of(m) for m in (student, teacher)]
        quantize.recover(student, teacher, batches(inputs), steps=2)
        assert list(promise.changes(before[0], promise.state_of(student))) == []
        assert list(promise.changes(before[1], promise.state_of(teacher))) == []
