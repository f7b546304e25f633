"""Replayed passes show bit for bit what passes from the input show, and leave nothing behind."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from helpers import zoo
from replay_models import ODD, linear
from torch import nn

from quantize.calibration import Call, Pace, Walk, Watch, find_streams, trace_calls, watching
from quantize.calibration.passes import Gone, Missing

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def layers_of(model: nn.Module) -> list[str]:
    """Linears and convolutions, GPT-2's too."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) or type(module).__name__ == "Conv1D":
            names.append(name)
    return names


@torch.no_grad()
def alter(model: nn.Module, name: str) -> None:
    """Change a layer's weight, as a fit would."""
    weight = model.get_submodule(name).weight
    generator = torch.Generator().manual_seed(len(name))
    weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


@torch.no_grad()
def from_the_input(model: nn.Module, names: list[str], batch, streams: set[str]) -> list[Call]:
    with watching((), model):
        return Watch(model, names, streams).run(batch)


def equal(ours: list[Call], theirs: list[Call]) -> bool:
    if [call.name for call in ours] != [call.name for call in theirs]:
        return False
    for a, b in zip(ours, theirs, strict=True):
        if not torch.equal(a.input, b.input):
            return False
        if a.output is not None and not torch.equal(a.output, b.output):
            return False
        if (a.stream is None) != (b.stream is None):
            return False
        if a.stream is not None and not torch.equal(a.stream, b.stream):
            return False
    return True


def check(model: nn.Module, batches: list, **options) -> Walk:
    """Walk over all layers, change each after it was shown, and compare every step with whole
    passes.
    """
    names = layers_of(model)
    groups = trace_calls(model, batches[0], {n: model.get_submodule(n) for n in names}).groups
    streams = find_streams(model, batches[0], names)
    changed = copy.deepcopy(model)
    walk = Walk(model, batches, list(chain.from_iterable(groups)), **options)
    for group in groups:
        here = streams.intersection(group)
        shown = list(walk.show((model, changed), group, here))
        for batch, passes in zip(batches, shown, strict=True):
            for root, calls in zip((model, changed), passes, strict=True):
                assert equal(calls, from_the_input(root, group, batch, here))
                assert all((call.output is None) == (root is changed) for call in calls)
        for name in group:
            alter(changed, name)
        walk.finish(group)
    for root in (model, changed):
        assert not any("forward" in vars(module) for module in root.modules())
        assert not any(module._forward_pre_hooks for module in root.modules())
    return walk


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "resnet", "vit"])
def test_foreign_models(name):
    """Encoders, decoders, both, and convolutional nets are replayed, and nothing is lost by it."""
    model, inputs = zoo(name)
    assert check(model, [inputs, inputs]).replay


class Hooked(nn.Sequential):
    """A hook of somebody else changes an output inside of a block."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(linear(), nn.ReLU()), nn.Sequential(linear(), linear()))
        self[0][0].register_forward_hook(lambda _module, _inputs, output: 2 * output)


def odd(name: str) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = ODD[name]().eval()
    return model, [torch.randn(4, 8) for _ in range(3)]


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("name", ODD)
def test_odd_models(name, memory, tmp_path, monkeypatch):
    """Whatever a forward does, replays show the same, from memory or from disk; no file stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, batches = odd(name)
    before = copy.deepcopy(model.state_dict())
    walk = check(model, batches, memory=memory)
    assert walk.replay and walk.store.used <= memory
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_hooks_of_others_run():
    """A block in which somebody's hook runs is never replaced by its output."""
    torch.manual_seed(0)
    model, x = Hooked().eval(), torch.randn(4, 8)
    names = ["0.0", "1.0", "1.1"]
    walk = Walk(model, [x], names)
    for name in names:
        ((ours, theirs),) = list(walk.show((model, model), [name]))
        for calls in (ours, theirs):
            assert equal(calls, from_the_input(model, [name], x, set()))
        walk.finish([name])
    assert walk.impure == {"", "0"}


class Deep(nn.Sequential):
    """So many blocks, one after another."""

    def __init__(self, depth: int) -> None:
        super().__init__(*(nn.Sequential(linear(), nn.ReLU()) for _ in range(depth)))


class HandsOn(nn.Module):
    """Gives what it makes of the first of two tensors, and the other one as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.layer(x[0]), x[1]]


class Pairs(Deep):
    """Blocks that are given two tensors."""

    def __init__(self, depth: int) -> None:
        super(Deep, self).__init__(*(HandsOn() for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = super().forward([x, x.sin()])
        return first + second


def runs(depth: int, kind: type[nn.Module] = Deep) -> list[int]:
    """How often each layer of a deep model runs in a walk, over one batch, both models together."""
    torch.manual_seed(0)
    model, count = kind(depth).eval(), Counter()
    forward = nn.Linear.forward

    def counted(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        count[id(layer)] += 1
        return forward(layer, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", counted)
        names = layers_of(model)
        walk = Walk(model, [torch.randn(4, 8)], names)
        for name in names:
            list(walk.show((model, model), [name]))
            walk.finish([name])
    return [count[id(layer)] for layer in model.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("kind", [Deep, Pairs])
def test_each_layer_runs_a_few_times_whatever_the_depth(kind):
    """Once to look, and once in each model."""
    assert max(runs(12, kind)) == 3 and sum(runs(12, kind)) == 2 * sum(runs(6, kind)) + 1


@pytest.mark.parametrize(("reads", "more"), [(False, 0), (True, 1)])
def test_a_layer_that_only_joins_a_stream_does_not_run(reads, more):
    """What the layer that still changes is added to is known without its output; a model that reads
    that output before gets it.
    """

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.dropout = linear(), nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.dropout(self.layer(x))
            return x.sin() + y if not reads or y.sum() > 0 else y + x.sin()

    torch.manual_seed(0)
    model, batches, runs = Residual().eval(), [torch.randn(4, 8) for _ in range(3)], []
    forward = nn.Linear.forward
    walk = Walk(model, batches, ["layer"])
    with pytest.MonkeyPatch.context() as patch:
        counted = lambda layer, x: runs.append(x) or forward(layer, x)  # noqa: E731
        patch.setattr(nn.Linear, "forward", counted)
        shown = list(walk.show((model, model), ["layer"], ["layer"]))
    assert len(runs) == (1 + more) * len(batches)
    for batch, (_, (call,)) in zip(batches, shown, strict=True):
        assert torch.equal(call.stream, batch.sin()) and torch.equal(call.input, batch)


def test_outputs_that_nobody_reads_any_more_are_forgotten():
    """In a chain of blocks, memory holds the output of the last ones, not of all."""
    torch.manual_seed(0)
    model, sizes = Deep(16).eval(), []
    names = layers_of(model)
    walk = Walk(model, [torch.randn(4, 8)], names)
    for name in names:
        list(walk.show((model, model), [name]))
        sizes.append(walk.store.used)
        walk.finish([name])
    assert max(sizes) <= 2 * 4 * (4 * 8 * 4)  # two models, four outputs of [4, 8] in float32


def test_forgotten_values_are_never_read_in_silence():
    """Of a forgotten output the shape is known; anything else starts the pass again."""
    gone = Gone.of(torch.ones(2, 3))
    assert gone.shape == (2, 3) and gone.dtype == torch.float32 and gone.size(1) == 3
    for read in (lambda: gone + 1, lambda: gone[0], lambda: torch.cat([gone, gone]), gone.sum):
        with pytest.raises(Missing):
            read()


def test_a_model_that_does_not_repeat_itself_runs_from_the_input():
    """Where the first batch gives other numbers than in a whole pass, nothing is kept any more."""
    drift = [0.0]

    class Drifting(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            drift[0] += 1.0
            return super().forward(x + drift[0])

    torch.manual_seed(0)
    model = Drifting(linear(), nn.ReLU(), linear()).eval()
    walk = Walk(model, [torch.randn(4, 8)], ["0", "2"])
    list(walk.show((model, model), ["0"]))
    assert not walk.replay and not walk.store.used


class Shuffled:
    """Gives its batches in another order each time."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches, self.times = batches, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.times += 1
        shift = self.times % len(self.batches)
        return iter(self.batches[shift:] + self.batches[:shift])


def test_batches_that_come_in_another_order_are_run_as_they_come():
    """What was kept of one batch is never taken for another."""
    torch.manual_seed(0)
    model, batches = Deep(3).eval(), Shuffled([torch.randn(4, 8) for _ in range(3)])
    changed = copy.deepcopy(model)
    names = layers_of(model)
    walk = Walk(model, batches, names)
    for name in names:
        shown = list(walk.show((model, changed), [name]))
        last = batches.times % 3
        for batch, passes in zip(
            batches.batches[last:] + batches.batches[:last], shown, strict=True
        ):
            for root, calls in zip((model, changed), passes, strict=True):
                assert equal(calls, from_the_input(root, [name], batch, set()))
        alter(changed, name)
        walk.finish([name])
    assert not walk.replay


@pytest.mark.parametrize("stateful", [False, True])
def test_cancelling_leaves_nothing_behind(stateful, tmp_path, monkeypatch):
    """An interrupt inside a module, or between batches: no hook, no wrapper, no file, no state."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, batches = odd("Counting" if stateful else "Skips")
    names = layers_of(model)
    walk = Walk(model, batches, names, memory=0)
    list(walk.show((model, model), names[:1]))
    walk.finish(names[:1])
    forward, count = nn.Linear.forward, Counter()

    def interrupted(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        count["runs"] += 1
        if count["runs"] == 3:
            raise KeyboardInterrupt
        return forward(layer, x)

    monkeypatch.setattr(nn.Linear, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(walk.show((model, model), names[1:2]))
    steps = walk.show((model, model), names[1:2])
    next(steps)
    steps.close()
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not list(Path(tmp_path).iterdir())
    assert not stateful or model.second.calls == 0


def test_progress_tells_the_time_left():
    """From the second step on, a line says how long the rest takes at the pace so far."""
    pace = Pace(3)
    assert pace.next("a") == "a (1/3)"
    pace.start -= 10
    assert pace.next("b") == "b (2/3), 20 s left"
