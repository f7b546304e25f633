"""Norms, attention and activations in native steps: their own arithmetic, the same bits everywhere,
torch's results but for rounding.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randn
from torch import Tensor
from torch.nn import functional as F

from quantize.native import program
from quantize.nn.elementary import ACTIVATIONS
from quantize.nn.floats import OWN

ATTEND, LAYER_NORM, RMS_NORM = (
    OWN[like] for like in (F.scaled_dot_product_attention, F.layer_norm, F.rms_norm)
)


@pytest.fixture(autouse=True)
def _forgetful():
    """Programs are made anew, for the instruction set of the test."""
    for own in OWN.values():
        own.known.clear()


def _sum(x: Tensor) -> Tensor:
    """Over the last dimension, in the order of floats.h."""
    padded = F.pad(x, [0, -x.shape[-1] % 64]).unflatten(-1, (-1, 4, 16))
    part = torch.zeros_like(padded[..., 0, :, :])
    for line in padded.unbind(-3):
        part = part + line
    lanes = (part[..., 0, :] + part[..., 1, :]) + (part[..., 2, :] + part[..., 3, :])
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """By single operations; without a bias, by the root mean square alone."""
    width = torch.full((*x.shape[:-1], 1), float(x.shape[-1]))  # by a number, torch multiplies
    distance = x if bias is None else x - _sum(x) / width
    square = (_sum(distance * distance) / width).numpy() + np.float32(eps)
    inverse = torch.from_numpy(np.float32(1) / np.sqrt(square))
    y = distance * inverse * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("width", [1, 7, 16, 100, 384, 1000])
@torch.no_grad()
def test_norms_equal_single_operations(level: str, width: int):
    """Bit for bit, and torch's within 4e-6 of the largest result of a row."""
    x, weight, bias = randn(5, 3, width) * 3 + 1, randn(width, seed=1), randn(width, seed=2)
    actual = LAYER_NORM(x, (width,), weight, bias, 1e-5)
    assert torch.equal(actual, _norm(x, weight, bias, 1e-5))
    _assert_near(actual, F.layer_norm(x.double(), (width,), weight.double(), bias.double()))
    actual = RMS_NORM(x, (width,), weight=weight, eps=1e-5)
    assert torch.equal(actual, _norm(x, weight, None, 1e-5))
    _assert_near(actual, F.rms_norm(x.double(), (width,), weight.double(), 1e-5))


def _assert_near(actual: Tensor, exact: Tensor) -> None:
    bound = 4e-6 * exact.abs().amax(-1, keepdim=True).clamp_min(1)
    assert ((actual - exact).abs() <= bound).all()


@torch.no_grad()
def test_a_tensor_given_twice_is_told_from_two_of_its_form():
    """Attention of a tensor to itself, and a norm whose weight is its bias, come first."""
    x, other, third = randn(1, 2, 5, 8), randn(1, 2, 5, 8, seed=1), randn(1, 2, 5, 8, seed=2)
    for q, k, v in ((x, x, x), (x, other, other), (x, x, other), (x, other, x), (x, other, third)):
        _assert_near(ATTEND(q, k, v), F.scaled_dot_product_attention(q, k, v))
    weight = randn(8)
    for bias in (weight, randn(8, seed=1)):
        _assert_near(LAYER_NORM(x, (8,), weight, bias), F.layer_norm(x, (8,), weight, bias))


# batches, query heads, heads of keys, queries, keys, widths of keys and values
SHAPES = [(1, 6, 6, 32, 32, 64, 64), (2, 4, 2, 37, 300, 24, 20), (3, 2, 1, 5, 17, 7, 9)]
MASKS: dict[str, Callable[[int, int, int], dict[str, Any]]] = {
    "none": lambda b, t, s: {},
    "causal": lambda b, t, s: {"is_causal": True},
    "seen": lambda b, t, s: {"attn_mask": (randn(b, 1, t, s, seed=5) > 0).index_fill(3, Z, True)},
    "added": lambda b, t, s: {"attn_mask": randn(t, s, seed=6), "scale": 0.3},
}
Z = torch.tensor([0])


def _inputs(b: int, h: int, k: int, t: int, s: int, d: int, e: int) -> tuple[Tensor, ...]:
    q, keys = randn(b, t, h, d).transpose(1, 2), randn(b, s, k, d, seed=1).transpose(1, 2)
    return q, keys, randn(b, k, s, e, seed=2)


_seen: dict[Any, Tensor] = {}  # results at other instruction sets


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_attention(level: str, shape: Any, mask: str, monkeypatch: pytest.MonkeyPatch):
    """Within 4e-6 of the largest value; the same bits at every instruction set, on one thread and
    on two, for a sample alone, in torch's order of dimensions.
    """
    q, k, v = _inputs(*shape)
    options = MASKS[mask](shape[0], *shape[3:5])
    monkeypatch.setattr(program, "_WORTH_ALL_THREADS", 0)
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(ATTEND(q, k, v, **options, enable_gqa=True))
    assert torch.equal(*found) and found[0].transpose(1, 2).is_contiguous()
    if mask != "seen":
        alone = ATTEND(q[-1:], k[-1:], v[-1:], **options, enable_gqa=True)
        assert torch.equal(alone, found[0][-1:])
    assert torch.equal(found[0], _seen.setdefault((shape, mask), found[0]))
    wide = {
        name: one.double() if mask == "added" and name == "attn_mask" else one
        for name, one in options.items()
    }
    exact = ATTEND.like(q.double(), k.double(), v.double(), **wide, enable_gqa=True)
    assert ((found[0] - exact).abs() <= 4e-6 * v.abs().max()).all()


@torch.no_grad()
def test_numbers_that_are_not_finite(level: str):
    """Spoil the rows that see them and no others; a query that sees nothing gives zeros."""
    q, k, v = _inputs(1, 2, 2, 6, 300, 16, 16)
    expected = ATTEND(q, k, v)
    q[0, 0, 1, 3], q[0, 1, 2, 0] = math.nan, math.inf
    actual = ATTEND(q, k, v)
    bad = actual.isfinite().logical_not().all(-1)
    assert bad.nonzero().tolist() == [[0, 0, 1], [0, 1, 2]]
    assert torch.equal(actual[~bad], expected[~bad])
    hidden = torch.ones(6, 300, dtype=torch.bool).index_fill_(0, torch.tensor([2]), False)
    assert ATTEND(v[:, :, :6], k, v, hidden)[:, :, 2].eq(0).all()
    x = randn(3, 40)
    x[1, 7] = math.nan
    assert LAYER_NORM(x, (40,)).isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
@torch.no_grad()
def test_activations_equal_those_of_layers(level: str, name: str):
    x = randn(3, 37) * 4
    if name == "silu":
        assert torch.equal(OWN[F.silu](x), ACTIVATIONS[name](x))
    else:
        kind = "tanh" if name == "gelu_tanh" else "none"
        assert torch.equal(OWN[F.gelu](x, approximate=kind), ACTIVATIONS[name](x))


def test_torch_computes_the_rest():
    """Gradients, other dtypes, autocast, few queries, transposed rows, wrong arguments."""
    x = randn(2, 8).requires_grad_()
    assert LAYER_NORM(x, (8,)).grad_fn is not None
    assert torch.equal(LAYER_NORM(x.detach(), (8,)), F.layer_norm(x.detach(), (8,)))
    with torch.no_grad():
        assert torch.equal(LAYER_NORM(x.double(), (8,)), F.layer_norm(x.double(), (8,)))
        assert torch.equal(LAYER_NORM(x.t(), (2,)), F.layer_norm(x.t(), (2,)))
        q = randn(1, 1, 3, 8)
        assert torch.equal(ATTEND(q, q, q), ATTEND.like(q, q, q))
        q = randn(1, 1, 5, 8)
        with torch.autocast("cpu"):
            assert ATTEND(q, q, q).dtype is torch.bfloat16
        with pytest.raises(RuntimeError):
            LAYER_NORM(x, (7,))
        with pytest.raises(RuntimeError):
            ATTEND(q, q[..., :4], q)
