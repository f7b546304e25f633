"""Int8LSTM and Int8GRU against the float layers, and against the same arithmetic in stock
operations, bit for bit.
"""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from helpers import in_int8, randn
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import quantize
from quantize.nn import int8_kernels as kernels
from quantize.nn import int8_steps as stepping
from quantize.nn.int8_recurrent import Int8GRU, Int8LSTM

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "deep, both ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
CASES = list(product((nn.LSTM, nn.GRU), OPTIONS))
each_layer = pytest.mark.parametrize(("kind", "options"), CASES, ids=str)


def layer(kind: type[nn.RNNBase], inputs: int = 33, units: int = 40, **options: Any) -> nn.RNNBase:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(inputs, units, **options).eval()


def small(plain: nn.RNNBase) -> Any:
    return (Int8LSTM if isinstance(plain, nn.LSTM) else Int8GRU).from_layer(plain)


def flat(answer: Any) -> list[Tensor]:
    """Outputs and states."""
    outputs, states = answer
    outputs = outputs.data if isinstance(outputs, PackedSequence) else outputs
    return [outputs, *(states if isinstance(states, tuple) else (states,))]


@torch.no_grad()
def compare(plain: nn.RNNBase, *inputs: Any) -> None:
    """Close to the float layer in outputs and states, and the bits of stock operations."""
    new = small(plain)
    expected, actual = flat(plain(*inputs)), flat(new(*inputs))
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        assert (a - e).norm() <= 0.02 * e.norm()
    with kernels.kernel("reference"):
        assert all(map(torch.equal, actual, flat(new(*inputs))))


@each_layer
@pytest.mark.parametrize("batch", [1, 9, 40])
def test_close_to_the_float_layer(kind: type[nn.RNNBase], options: str, batch: int):
    plain = layer(kind, **OPTIONS[options])
    compare(plain, randn(*((batch, 5) if plain.batch_first else (5, batch)), 33))


@each_layer
def test_packed_sequences(kind: type[nn.RNNBase], options: str):
    """Sequences of several lengths in any order, with given states too."""
    plain = layer(kind, **OPTIONS[options])
    x = pack_padded_sequence(randn(4, 6, 33), [3, 6, 1, 3], batch_first=True, enforce_sorted=False)
    count = plain.num_layers * (2 if plain.bidirectional else 1)
    states = randn(count, 4, 40, seed=2), randn(count, 4, 40, seed=3)
    compare(plain, x)
    compare(plain, x, states if kind is nn.LSTM else states[0])


def test_projections():
    compare(layer(nn.LSTM, proj_size=20, num_layers=2), randn(5, 9, 33))


def test_given_states_and_one_sequence():
    """An input without a batch, and states as the last call gave them."""
    for kind in (nn.LSTM, nn.GRU):
        plain = layer(kind, num_layers=2)
        with torch.no_grad():
            states = plain(randn(4, 33))[1]
        compare(plain, randn(6, 33, seed=1), states)


def test_no_sequence_and_no_step():
    """An empty batch gives empty outputs; an input without steps is refused."""
    new = small(layer(nn.LSTM))
    outputs, (h, c) = new(torch.empty(5, 0, 33))
    assert outputs.shape == (5, 0, 40) and h.shape == c.shape == (1, 0, 40)
    with pytest.raises(ValueError, match="has no steps"):
        new(torch.empty(0, 3, 33))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype):
    """Outputs and states are of the input's dtype."""
    plain = layer(nn.GRU)
    with torch.no_grad():
        expected = plain(randn(5, 3, 33))[0]
        actual = small(plain.to(dtype))(randn(5, 3, 33).to(dtype))
    assert actual[0].dtype == actual[1].dtype == dtype
    assert (actual[0].float() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("x", "hx", "message"),
    [
        (randn(5, 3, 32), None, "the layer takes 33 features"),
        (randn(33), None, "must be 2-dimensional"),
        (randn(5, 3, 33), (randn(1, 2, 40), randn(1, 2, 40)), r"must be \[1, 3, 40\]"),
        (randn(5, 3, 33), randn(1, 3, 40), "must hold 2 tensors"),
    ],
)
def test_refusals(x: Tensor, hx: Any, message: str):
    with pytest.raises(ValueError, match=message):
        small(layer(nn.LSTM))(x, hx)


def test_weights_read_as_the_float_weights():
    """`weight_ih_l0` is what the layer multiplies by, within half a step; writing is refused."""
    plain = layer(nn.LSTM, num_layers=2, proj_size=20)
    new = small(plain)
    for name in plain._flat_weights_names:
        weight = getattr(plain, name)
        assert getattr(new, name).shape == weight.shape
        assert (getattr(new, name) - weight).abs().max() <= weight.abs().max() / 253
    assert [len(parts) for parts in new.all_weights] == [5, 5]
    with pytest.raises(AttributeError, match="can only be read"):
        new.weight_hh_l0 = torch.zeros(160, 40)
    with pytest.raises(ValueError, match="only be read"):
        new.weight_hh_l0.zero_()
    assert not hasattr(new, "weight") and not hasattr(new, "weight_hh_l7")


# ------------------------------------------------------------------------------------------------
# in models


class Tagger(nn.Module):
    """An LSTM and a GRU behind each other."""

    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(24, 32, bidirectional=True, batch_first=True)
        self.second = nn.GRU(64, 32, batch_first=True)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.first.flatten_parameters()
        return self.head(self.second(self.first(x)[0])[0])


@pytest.fixture(scope="module")
def tagger() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tagger().eval()


def test_copies_and_files(tagger: nn.Module, tmp_path):
    """A deep copy, a pickle and both files answer with the same bits; a file is below 0.3 of the
    float one.
    """
    model, x = in_int8(tagger), randn(2, 5, 24)
    assert set(quantize.summary(model).done) == {"first", "second", "head"}
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"model{suffix}"
        quantize.save(model, path)
        copies.append(quantize.load(path, model=Tagger()))
    with torch.no_grad():
        expected = model(x)
        assert all(torch.equal(one(x), expected) for one in copies)
        assert (expected - tagger(x)).norm() <= 0.02 * tagger(x).norm()
    assert (expected - model.bfloat16()(x.bfloat16())).norm() <= 0.05 * expected.norm()


def test_size():
    """The file of a deep LSTM is below 0.3 of the float one."""
    plain = layer(nn.LSTM, 128, 128, num_layers=2)
    sizes = [sum(t.nbytes for t in m.state_dict().values()) for m in (plain, small(plain))]
    assert sizes[1] <= 0.3 * sizes[0]


@pytest.mark.slow
def test_compiled(tagger: nn.Module):
    """torch.compile keeps the layer as one operator in its graph, with the same bits."""
    model, x = in_int8(tagger), randn(2, 5, 24)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))


def test_a_trace_is_refused(tagger: nn.Module):
    with pytest.raises(ValueError, match="a loop over time"):
        torch.jit.trace(in_int8(tagger), randn(2, 5, 24))


def test_layers_that_stay(tagger: nn.Module):
    """A computed weight, and a weight of two layers, with the reason."""
    model = copy.deepcopy(tagger)
    parametrizations.weight_norm(model.first, "weight_hh_l0")
    left = quantize.summary(in_int8(model)).left
    assert "is computed" in left["first"]
    model = copy.deepcopy(tagger)
    model.third = nn.GRU(64, 32)
    model.third.weight_hh_l0 = model.second.weight_hh_l0
    left = quantize.summary(in_int8(model)).left
    assert "shares its weight with third" in left["second"] and "third" in left


# ------------------------------------------------------------------------------------------------
# native code


@pytest.mark.parametrize("gates", [4, 3])
def test_every_instruction_set_and_thread_count(level: str, gates: int, monkeypatch):
    """The bits of stock operations on the largest sums, on one thread and on three."""
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert stepping.is_exact.__wrapped__(gates)


def test_states_that_are_not_finite():
    """A NaN in one sequence reaches no other one."""
    new = small(layer(nn.LSTM))
    x = randn(4, 3, 33)
    with torch.no_grad():
        clean = new(x)[0]
        x[1, 2] = float("nan")
        found = new(x)[0]
    assert torch.equal(found[:, :2], clean[:, :2])
    assert found[1:, 2].isnan().all()
