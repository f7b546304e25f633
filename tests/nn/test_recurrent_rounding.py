"""How the weights of int8 LSTMs and GRUs are rounded: in 16 bits where they multiply few features,
for the inputs of calibration where there are some.
"""

from __future__ import annotations

from typing import Any

import torch
from helpers import randn
from torch import Tensor, nn

import quantize
from quantize import surgery
from quantize.nn import int8_kernels as kernels


def recurrent(kind: type[nn.RNNBase], inputs: int, units: int = 48, layers: int = 2) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(kind(inputs, units, num_layers=layers)).eval()


def in_int8(model: nn.Module, **options: Any) -> Any:
    return quantize.quantize_dynamic(model, prefer="size", **options)


@torch.no_grad()
def error(model: nn.Module, expected: nn.Module, x: Tensor) -> float:
    wanted = expected(x)[0]
    return float((model(x)[0] - wanted).norm() / wanted.norm())


def features() -> tuple[nn.Module, Tensor]:
    """A model of 8 features whose common part is large and cancels in its gates, and such features
    [steps, rows, 8].
    """
    model = recurrent(nn.LSTM, 8)
    common = 30 * (1 + randn(8, seed=3).abs())
    with torch.no_grad():
        weight = model[0].weight_ih_l0
        weight -= torch.outer(weight @ common, common) / common.square().sum()
    loudness = 1 + randn(20, 6, 1, seed=4).abs()
    return model, loudness * common + randn(20, 6, 8, seed=5)


def test_few_features_keep_16_bits():
    """Their weights take a small part of the file, and in 8 bits nothing is left of what the gates
    get.
    """
    model, x = features()
    new = in_int8(model)
    assert new[0].packed_ih_l0.dtype == torch.float16
    assert new[0].packed_hh_l0.dtype == new[0].packed_ih_l1.dtype == torch.int8
    assert error(new, model, x) <= 0.02
    coarse = surgery.clone(model)
    with torch.no_grad():
        packed, scale = kernels.quantize_weight(model[0].weight_ih_l0)
        coarse[0].weight_ih_l0.copy_(packed * scale[:, None])
    assert error(coarse, model, x) > 0.1
    largest = model[0].weight_ih_l0.abs().max()
    assert (new[0].weight_ih_l0 - model[0].weight_ih_l0).abs().max() <= 2**-11 * largest
    for cast in (new.half(), new.double()):
        assert cast[0].packed_ih_l0.dtype == torch.float16


def test_many_features_take_8_bits():
    assert in_int8(recurrent(nn.GRU, 64))[0].packed_ih_l0.dtype == torch.int8


def test_older_files_have_none_in_16_bits():
    model, _ = features()
    edits = surgery.structure(in_int8(model))
    for edit in edits:
        edit["arguments"].pop("halves")
    assert surgery.rebuild(model, edits)[0].packed_ih_l0.dtype == torch.int8


def test_calibration_rounds_for_what_is_multiplied():
    """Inputs and states that go together leave less of the rounding errors on others like them."""
    mixed = randn(2, 64, seed=6)
    for kind in (nn.LSTM, nn.GRU):
        model = recurrent(kind, 64)
        batches = [0.3 * randn(24, 8, 2, seed=seed).cumsum(0) @ mixed for seed in range(4)]
        plain, rounded = in_int8(model), in_int8(model, calibration=batches[:3])
        assert quantize.summary(rounded).steps[-1].settings["rounded"] == ["0"]
        assert error(rounded, model, batches[3]) < 0.7 * error(plain, model, batches[3])
