"""Recurrent cells, which a loop calls once a step: their two products as layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import in_int8, randn
from torch import Tensor, nn

import quantize
from quantize.nn.cells import ProjectedCell

CELLS = {
    "lstm": nn.LSTMCell(12, 20),
    "gru": nn.GRUCell(12, 20),
    "gru without biases": nn.GRUCell(12, 20, bias=False),
    "tanh": nn.RNNCell(12, 20),
    "relu": nn.RNNCell(12, 20, nonlinearity="relu"),
}


class Steps(nn.Module):
    """A voice detector's loop over steps: an LSTM cell, and a GRU cell on its state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(24, 64), nn.GRUCell(64, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 24]
        hidden, state = None, None
        for step in x.unbind(1):
            hidden = self.lstm(step, hidden)
            state = self.gru(hidden[0], state)
        return self.head(state)


class Asking(Steps):
    """One whose forward asks for the class of its cells."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.lstm, nn.LSTMCell)
        return super().forward(x)


def steps(kind: type[Steps] = Steps) -> Steps:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def tensors(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("shape", [(5,), ()], ids=["batch", "one"])
def test_a_cell_of_two_layers_is_the_cell(cell, shape):
    """With and without a state, in a batch and alone; weights and biases read as the cell's."""
    new = ProjectedCell.from_module(cell)
    x, h, c = randn(*shape, 12), randn(*shape, 20, seed=1), randn(*shape, 20, seed=2)
    state = (h, c) if isinstance(cell, nn.LSTMCell) else h
    for hx in (None, state):
        torch.testing.assert_close(tensors(new(x, hx)), tensors(cell(x, hx)))
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        expected = getattr(cell, name)
        assert expected is getattr(new, name) is None or torch.equal(getattr(new, name), expected)
    wrong = (randn(4, 20), randn(4, 20)) if isinstance(cell, nn.LSTMCell) else randn(4, 20)
    with pytest.raises(ValueError, match="a state"):
        new(randn(3, 12), wrong)


def test_cells_become_int8_and_load_as_the_same_bits(tmp_path: Path):
    """Both products of both cells, a third of the bytes at most; a fresh model takes the file."""
    model, x = steps(), randn(4, 6, 24)
    small = in_int8(model)
    done = quantize.summary(small).done
    assert {"lstm.ih", "lstm.hh", "gru.ih", "gru.hh"} <= done.keys()
    with torch.no_grad():
        y, expected = small(x), model(x)
    assert float((y - expected).norm() / expected.norm()) < 0.02
    path = tmp_path / "small.safetensors"
    quantize.save(small, path)
    again = quantize.load(path, model=steps())
    with torch.no_grad():
        assert torch.equal(again(x), y)
    numbers = sum(p.numel() for p in model.parameters())
    assert sum(t.nbytes for t in small.state_dict().values()) < numbers * 4 / 3


@pytest.mark.slow
@pytest.mark.usefixtures("no_clock")
def test_a_fused_model_with_int8_cells_is_the_model():
    small, x = in_int8(steps()), randn(4, 2, 24)
    with torch.no_grad():
        torch.testing.assert_close(quantize.fuse(small, x)(x), small(x), rtol=0, atol=0.02)


@pytest.mark.filterwarnings("ignore:int8")
@pytest.mark.parametrize("options", [{}, {"skip": (nn.LSTMCell,)}], ids=["asking", "skipped"])
def test_a_cell_that_must_stay_stays(options):
    """Where a forward asks for its class, or it is named by skip; the other becomes int8."""
    small = in_int8(steps(Steps if options else Asking), **options)
    assert type(small.lstm) is nn.LSTMCell
    assert "lstm" in quantize.summary(small).left
    assert isinstance(small.gru, ProjectedCell)
    small(randn(2, 3, 24))
