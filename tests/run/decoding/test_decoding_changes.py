"""Decoding by itself sees every change of the model, and leaves what it doesn't know to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from decoding_models import PROMPT, check, decoder, hooked
from helpers import in_int8
from torch import nn
from torch.nn.utils import parametrize

import quantize
from quantize.models import DecoderLM
from quantize.native import build
from quantize.run.generate import generate, generate_stream

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("compiled"),
]


def _new_head(model: DecoderLM) -> None:
    model.head = decoder(7).head


def _new_weight(model: DecoderLM) -> None:
    model.blocks[0].ffn.up.weight = nn.Parameter(0.3 * torch.randn(48, 32))


def _in_place(model: DecoderLM) -> None:
    with torch.no_grad():
        model.blocks[1].attention.q.weight.mul_(-1.5)


def _data(model: DecoderLM) -> None:
    model.blocks[1].ffn_norm.weight.data.mul_(-1)


def _other_data(model: DecoderLM) -> None:
    model.norm.weight.data = torch.randn(32)


def _other_config(model: DecoderLM) -> None:
    model.config = replace(model.config, rope_theta=3.0)


class _Tripled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def _other_class(model: DecoderLM) -> None:
    model.blocks[0].ffn.down.__class__ = _Tripled


CHANGES: dict[str, Callable[[DecoderLM], None]] = {
    "in place": _in_place,
    ".data in place": _data,
    ".data replaced": _other_data,
    "weight replaced": _new_weight,
    "module replaced": _new_head,
    "class replaced": _other_class,
    "config replaced": _other_config,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_change_between_two_calls_is_seen(change, tied):
    """Of float weights and of those that are converted on the way (16-bit norms), by every road
    that torch has.
    """
    for kind in (lambda m: m, lambda m: m.bfloat16().float(), in_int8):
        model = kind(decoder(tied_head=tied and change != "module replaced"))
        if change == "weight replaced" and not isinstance(model.blocks[0].ffn.up, nn.Linear):
            continue
        if change in ("in place", "class replaced") and not isinstance(
            model.blocks[1].attention.q, nn.Linear
        ):
            continue
        before = generate(model, PROMPT, max_new_tokens=8)
        CHANGES[change](model)
        check(model, "_Tripled" if change == "class replaced" else None, max_new_tokens=8)
        assert not torch.equal(generate(model, PROMPT, max_new_tokens=8), before)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_under_way_is_seen(change):
    """Between two tokens of a stream, as the model's own forward sees it; `for_decoding` follows
    too.
    """
    ready = decoder()
    models = [decoder(), hooked(decoder()), quantize.for_decoding(ready, backend="native")]
    streams = [generate_stream(model, PROMPT, max_new_tokens=20) for model in models]
    for stream in streams:
        for _ in range(6):
            next(stream)
    for model in (*models[:2], ready):
        torch.manual_seed(1)
        CHANGES[change](model)
    for stream in streams:
        list(stream)
    assert (streams[0].reason is None) == (change != "class replaced") and streams[
        1
    ].reason is not None
    assert torch.equal(streams[0].ids, streams[1].ids) and torch.equal(
        streams[2].ids, streams[1].ids
    )


def test_a_hook_under_way_is_called():
    """A hook that is registered between two tokens is called from the next one on, and native code
    comes back after it.
    """
    model, calls = decoder(), []
    stream = generate_stream(model, PROMPT, max_new_tokens=20)
    next(stream), next(stream)
    assert stream.reason is None
    handle = model.blocks[1].ffn.register_forward_pre_hook(lambda *_: calls.append(1))
    next(stream), next(stream)
    assert len(calls) == 2 and "blocks.1.ffn has hooks" in stream.reason
    handle.remove()
    next(stream)
    assert len(calls) == 2 and stream.reason is None


def _parametrized(model: DecoderLM) -> None:
    parametrize.register_parametrization(model.blocks[0].ffn.up, "weight", nn.Tanh())


def _own_forward(model: DecoderLM) -> None:
    layer = model.blocks[0].ffn.up
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)


class _Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _subclass(model: DecoderLM) -> None:
    model.blocks[0].ffn.up.__class__ = _Doubled


class _Shown(torch.Tensor):
    """A tensor class of somebody else's: its memory needn't hold its numbers."""


def _tensor_class(model: DecoderLM) -> None:
    layer = model.blocks[0].ffn.up
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(_Shown))


def _eps(model: DecoderLM) -> None:
    model.blocks[0].ffn_norm.eps = 0.5


class _Wrapped(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *arguments: object) -> torch.Tensor:
        return 0.5 * self.block(*arguments)


def _wrapped(model: DecoderLM) -> None:
    model.blocks[1] = _Wrapped(model.blocks[1])


def _query_norm(model: DecoderLM) -> None:
    model.blocks[1].attention.q_norm = nn.LayerNorm(8)


STRANGE = {
    "a norm of queries": (_query_norm, "a LayerNorm stands where a Identity should"),
    "a wrapped block": (_wrapped, "it isn't made as a DecoderLM is"),
    "parametrized": (_parametrized, "ParametrizedLinear"),
    "a forward of its own": (_own_forward, "forward of its own"),
    "a subclass": (_subclass, "_Doubled"),
    "another tensor class": (_tensor_class, "another layout or class"),
    "float64": (lambda m: m.double(), "float64"),
    "another eps": (_eps, "eps"),
    "a layer in training mode": (lambda m: m.blocks[0].train(), "training mode"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_native_code_does_not_know_runs_by_itself(kind):
    """The model's own forward runs, whatever was done to a module, and the reason is given."""
    change, reason = STRANGE[kind]
    model = decoder()
    generate(model, PROMPT, max_new_tokens=3)
    change(model)
    if reason != "training mode":
        model.eval()
    run = generate_stream(model, PROMPT, max_new_tokens=20)
    list(run)
    assert reason in run.reason
    assert torch.equal(run.ids, generate(model, PROMPT, max_new_tokens=20, cache=False))


def test_replaced_methods_are_called(monkeypatch):
    """A method that somebody puts into a class of this package is what runs."""
    model, calls = decoder(), []
    forward = type(model.blocks[0].ffn).forward
    monkeypatch.setattr(
        type(model.blocks[0].ffn), "forward", lambda self, x: calls.append(1) or forward(self, x)
    )
    generate(model, PROMPT, max_new_tokens=5)
    assert len(calls) == 2 * 5
