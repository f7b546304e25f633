"""Modules whose calls of torch are made without their forward: the same results, and the forward
wherever it may do anything else.
"""

import copy
import itertools
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close, randn
from recorded_blocks import RUNS, int8, is_replayed, own, tapes
from torch import Tensor, nn
from torch.nn import functional as F

import quantize
from quantize.native import program
from quantize.nn import int8_kernels as kernels
from quantize.nn.stretches import Stretch

HIDDEN = itertools.repeat(torch.ones(32))  # where nobody finds the tensor
CALLS = itertools.count(1)


@pytest.mark.parametrize("inference", [False, True])
def test_the_bits_of_the_forward(inference: bool):
    """For several forms of inputs and results, with and without gradients."""
    block = int8()
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    x = randn(2, 5, 32)
    with torch.inference_mode(inference):
        assert is_replayed(block, x) and is_replayed(block, x, mask, names=True)
        assert is_replayed(block, randn(2, 5, 64)[..., ::2]) and is_replayed(block, x=x)
        assert torch.equal(block(2 * x), own(block, 2 * x))  # other numbers of the same form
        with kernels.kernel("reference"):
            assert torch.equal(block(x), own(block, x))
    with torch.no_grad():
        assert is_replayed(block, x) and not block(x).requires_grad
    assert block(x).requires_grad  # by the norm
    block(x).sum().backward()
    assert block.norm.weight.grad.any()


def _gated(block: Any, x: Tensor) -> Tensor:
    return block.down(F.silu(block.up(x)) * block.up(x)) + x


def _cut_off(block: Any, x: Tensor) -> Tensor:
    torch._assert(x.ndim == 3, "as models of timm say it")
    return block.down(F.relu(block.up(x))) + x


def _changes_what_was_read(block: Any, x: Tensor) -> Tensor:
    y = block.q(x)
    return y + x.mul_(2)


@pytest.mark.parametrize(
    ("change", "layers"), [(None, 6), (_gated, 9), (_cut_off, 8), (_changes_what_was_read, 0)]
)
@torch.no_grad()
def test_layers_that_do_more(level: str, monkeypatch: pytest.MonkeyPatch, change: Any, layers: int):
    """Sums, products, activations and layers of one input, in one native call each: the bits of the
    steps, on every instruction set, for many rows and few, on one thread and on two, without native
    code.
    """
    monkeypatch.setattr(kernels, "_fastest", lambda *_: kernels.native)
    monkeypatch.setattr(kernels, "_chosen", {})
    block = int8(lambda block: setattr(block, "more", change))
    for shape in ((1, 1, 32), (2, 5, 32), (3, 40, 32)):
        x = randn(*shape)
        for threads in (1, 2):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            assert is_replayed(block, x)
        (tape,) = (t for key, t in tapes(block) if key[0][1][1][0] == x.shape)
        stretches = [step.call for step in tape.steps if isinstance(step.call, Stretch)]
        works = itertools.chain.from_iterable(stretch.program.works for stretch in stretches)
        found = [work.what for work in works if work.kind == program.LINEARS]
        shortened = layers > 0
        assert bool(stretches) == shortened
        assert sum(one.count for one in found) == layers
        assert [one.count for one in found].count(3) == shortened
        assert not any(step.call is F.relu for step in tape.steps)
        sums = [one.how for one in found]
        assert sums.count(program.SUM) == shortened * (1 + (change in (_gated, _cut_off)))
        assert sums.count(program.PRODUCT) == (change is _gated)
        with kernels.kernel("reference"):
            assert torch.equal(block(x), own(block, x))


def _turned(block: Any, x: Tensor) -> Tensor:
    with torch.no_grad():  # as rotary positions of transformers
        turns = x.cos()
    return x * turns


def test_a_part_without_gradients():
    """Is recorded where none are asked for; elsewhere the forward runs, and they end there."""
    block, x = int8(lambda block: setattr(block, "more", _turned)), randn(2, 5, 32)
    with torch.no_grad():
        assert is_replayed(block, x)
    assert not is_replayed(block, x)
    given = x.clone().requires_grad_()
    assert not is_replayed(block, given)
    (actual,) = torch.autograd.grad(block(given).sum(), given)
    (expected,) = torch.autograd.grad(own(block, given).sum(), given)
    assert torch.equal(actual, expected)


def _counts(block: Any, x: Tensor) -> Tensor:
    block.count.add_(1)
    return x + block.count


def _keeps(block: Any, x: Tensor) -> Tensor:
    block.last = x
    return x


def _keeps_in_a_list(block: Any, x: Tensor) -> Tensor:
    block.kept.append(x)
    return x


def _counts_calls(block: Any, x: Tensor) -> Tensor:
    block.calls += 1
    return x * block.calls


def _counts_calls_elsewhere(block: Any, x: Tensor) -> Tensor:
    block.config.inner.factor += 1
    return block.config.inner(x)


def _queues(block: Any, x: Tensor) -> Tensor:
    last = block.config.inner.last
    last.append(last[-1] + 1)
    return x * last[0]


def _counts_unseen(block: Any, x: Tensor) -> Tensor:
    block.count.data.add_(1)
    return x + block.count


def _added(x: Tensor, rows: Tensor) -> Tensor:
    """With a mean in which the number of rows is one of Python's."""
    return x.index_add(1, rows, x[:, rows] / max(1, rows.shape[0]))


UNFIT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "asks for a number": lambda block, x: x if x.sum() > 0 else -x,
    "asserts a number": lambda block, x: torch._assert(x.abs().sum() > 0, "zeros") or x,
    "reads a number": lambda block, x: x * x.max().item(),
    "leaves torch": lambda block, x: torch.from_numpy(x.detach().numpy()) * 2,
    "a tensor of its own": lambda block, x: x * next(HIDDEN),
    "random": lambda block, x: x * torch.rand(1),
    "changes a buffer": _counts,
    "keeps a result": _keeps,
    "keeps results in a list": _keeps_in_a_list,
    "counts its calls": _counts_calls,
    "counts them in an object": _counts_calls_elsewhere,
    "counts them in a queue": _queues,
    "counts them outside": lambda block, x: x * next(CALLS),
    "changes a buffer's numbers": _counts_unseen,
    "random numbers of Python": lambda block, x: x * random.random(),
    "its own random numbers": lambda block, x: x * (block.last or random.Random(0)).random(),
    "another kind of tensors": lambda block, x: torch.inference_mode()(block.norm)(x),
    "sizes by numbers": lambda block, x: _added(x, (x[0, :, 0] > 0).nonzero(as_tuple=True)[0]),
    "rows of a mask": lambda block, x: x + x[x[..., 0] > 0].mean(0),
    "writes": lambda block, x: x.index_fill_(0, torch.tensor([0]), 1).__setitem__(0, 2) or x,
}


@pytest.mark.parametrize("name", UNFIT)
@torch.no_grad()
def test_other_forwards_run_as_they_are(name: str):
    """Those that depend on numbers, on what is outside of the module, or that change something:
    each call runs the forward, once.
    """
    block = int8(lambda block: setattr(block, "more", UNFIT[name]))
    block.last = random.Random(0) if name == "its own random numbers" else None
    RUNS.value = 0
    for _ in range(5):
        block(randn(1, 4, 32))
    assert RUNS.value == 5
    assert block.count == (5 if name.startswith("changes a buffer") else 0)
    assert block.calls == (5 if name == "counts its calls" else 0)
    assert len(block.kept) == (5 if name == "keeps results in a list" else 0)


@torch.no_grad()
def test_a_forward_that_was_put_in_runs():
    """It may do more than give a result; here it keeps results where nobody looks."""
    block, x = int8(), randn(2, 5, 32)
    assert is_replayed(block, x)
    results: list[Tensor] = []
    inner = block.out.forward
    block.out.forward = lambda x: results.append(inner(x)) or results[-1]
    for _ in range(4):
        block(x)
    assert len(results) == 4


@torch.no_grad()
def test_random_numbers_go_on_as_without():
    """Also from the call that is recorded on."""
    blocks = [int8(lambda block: setattr(block, "more", UNFIT["random"])) for _ in range(2)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        actual = [blocks[0](randn(1, 4, 32)) for _ in range(4)]
        torch.manual_seed(0)
        expected = [own(blocks[1], randn(1, 4, 32)) for _ in range(4)]
    assert all(map(torch.equal, actual, expected))


@torch.no_grad()
def test_imports_elsewhere_do_not_count(monkeypatch: pytest.MonkeyPatch):
    """Also where the forward looks a module up among all that are imported."""
    known = lambda block, x: x * (sys.modules[__name__].HIDDEN is HIDDEN)  # noqa: E731
    block, x = int8(lambda block: setattr(block, "more", known)), randn(2, 5, 32)
    assert is_replayed(block, x)
    monkeypatch.setitem(sys.modules, "imported", sys)
    RUNS.value = 0
    block(x)
    assert not RUNS.value


class _Named(Tensor):
    pass


@torch.no_grad()
def test_other_calls_run_the_forward():
    """With the same tensor twice, a subclass, in autocast, in training."""
    block, x = int8(), randn(1, 32, 32)
    assert is_replayed(block, x) and is_replayed(block, x, randn(1, 32, 32))
    assert not is_replayed(block, x, x)
    assert not is_replayed(block, x.as_subclass(_Named))
    with torch.autocast("cpu"):
        assert not is_replayed(block, x)
    block.train()
    RUNS.value = 0
    for _ in range(4):
        block(x)
    assert RUNS.value == 4


@torch.no_grad()
def test_copies_are_recorded_anew():
    block, x = int8(), randn(2, 5, 32)
    assert is_replayed(block, x)
    other = copy.deepcopy(block)
    other.norm.weight.mul_(2)
    assert is_replayed(other, x) and not torch.equal(other(x), block(x))


def _upsampled(block: Any, x: Tensor) -> Tensor:
    image = x.transpose(1, 2)
    return block.wide(image, output_size=[2 * image.shape[-1]]) + block.touching(image)


@torch.no_grad()
def test_transposed_convolutions_are_recorded():
    """Those that compute in int8 and those that compute in float, for an asked size too."""

    def change(block: Any) -> None:
        block.touching = nn.ConvTranspose1d(32, 16, 2, 2).eval()
        block.wide = nn.ConvTranspose1d(32, 16, 3, 2, 1).eval()
        block.more = _upsampled

    block = int8(change)
    assert block.wide.floats and not block.touching.floats
    for x in (randn(2, 5, 32), randn(1, 7, 32)):
        assert is_replayed(block, x)
        with kernels.kernel("reference"):
            assert torch.equal(block(x), own(block, x))


class Graph(nn.Module):
    """Multiplies by the matrix of a graph, given or its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.register_buffer("own", torch.eye(6).to_sparse())

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.second(edges @ self.first(x) + self.own @ x)


@torch.no_grad()
def test_sparse_inputs_and_buffers():
    """Those without strides, too, give what dense ones give."""
    small, x = quantize.quantize_dynamic(Graph().eval(), prefer="size"), randn(6, 32)
    edges = (randn(6, 6) > 0).float()
    expected = small(x, edges)
    for given in (edges, edges.to_sparse(), edges.to_sparse_csr()):
        for _ in range(4):
            assert_close(small(x, given), expected)
