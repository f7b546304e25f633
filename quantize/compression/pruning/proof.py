"""Cut channels and prove it: a cut is believed only after the pruned model gave the same outputs as
its masked twin. Groups for which it doesn't (a size is written into the model's code) stay.

Outputs may be as large as the model (the logits of a vocabulary): those of one model are kept, of
the other one call's at a time, and they are compared in blocks.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from quantize import surgery
from quantize.calibration import (
    call,
    changed,
    keeps_cache,
    largest_difference,
    main_output,
    output_tensors,
    snapshot,
    watching,
    without_cache,
)
from quantize.compression.pruning.choose import reasons
from quantize.compression.pruning.cut import (
    cut,
    kept_indices,
    layers_of,
    mask,
    owners,
    stale_attributes,
    stored,
)
from quantize.compression.pruning.groups import Group
from quantize.compression.pruning.labels import Key
from quantize.compression.pruning.trace import Trace
from quantize.saying import Say
from quantize.seeding import seed_devices

TOLERANCE = 1e-3  # relative to the largest output, in float32
COARSE = 3e-2  # in 16 bits


def verified(
    trace: Trace,
    model: nn.Module,
    wanted: list[Group],
    inputs: Any,
    left: dict[str, str],
    *,
    explicit: bool,
    say: Say,
) -> tuple[nn.Module, list[Group]]:
    """A pruned copy and its groups; those that can't be cut are noted in `left` (or raise, if asked
    for by name).
    """
    if not wanted:
        return surgery.clone(model), []
    say(f"cutting {len(wanted)} groups of layers")
    done = _attempt(trace, model, wanted, inputs)
    if done is not None:
        return surgery.clone(done), wanted
    good: list[Group] = []
    holders = owners(model)
    for group in wanted:
        layers = layers_of(holders, group)
        say(f"cutting {', '.join(layers)}")
        small = _attempt(trace, model, [*good, group], inputs)
        if small is not None:
            good.append(group)
            done = small
        else:
            why = (
                "the smaller model fails: its code has a size written in, or computes otherwise "
                "on fewer channels"
            )
            left.update(dict.fromkeys(layers, why))
    if done is None or (explicit and len(good) < len(wanted)):
        raise ValueError(
            f"nothing in {type(model).__name__} can be pruned as asked: {reasons(left)}"
        )
    return surgery.clone(done), good


def _attempt(trace: Trace, model: nn.Module, groups: list[Group], inputs: Any) -> nn.Module | None:
    """A pruned copy, if it computes what its masked twin computes. It holds the model's own
    parameters where these aren't cut.
    """
    kept = kept_indices(trace, groups)
    whole = _uncut(model, kept)
    sure, might = stale_attributes(trace, groups, model)
    expected = None
    exact = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    tolerance = TOLERANCE if exact else COARSE
    for i, edits in enumerate((sure, might, {})):
        if i and edits == (sure, might)[i - 1]:
            continue
        small = cut(surgery.clone(model, sharing=whole), kept, edits)
        try:
            if expected is None:
                twin = mask(surgery.clone(model, sharing=whole), small, kept)
                expected = Answers(twin, inputs)
                del twin
            if expected.given_by(small, tolerance):
                return small
        except Exception:  # whatever the model's code raises: these channels can't go
            continue
    return None


def _uncut(model: nn.Module, kept: dict[Key, Tensor]) -> list[Tensor]:
    """The parameters that lose nothing."""
    changed = set()
    holders = owners(model)
    for name, _ in kept:
        changed |= {id(stored(module, local)) for _, module, local in holders(name)}
    return [parameter for parameter in model.parameters() if id(parameter) not in changed]


class Answers:
    """The outputs of a model in one call, or in two, one after the other, where a call changes its
    state.

    Where a model of transformers keeps a cache for generation, also its answer with that: its sizes
    may come from the config.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.inputs = inputs
        self.outputs = list(_answers(model, inputs))

    def given_by(self, model: nn.Module, tolerance: float) -> bool:
        """Does a model answer so, up to a share of the largest value of each tensor?"""
        answers = _answers(model, self.inputs)
        try:
            for expected in self.outputs:
                answer = next(answers, None)
                if answer is None or not same_outputs(answer, expected, tolerance):
                    return False
            return next(answers, None) is None
        finally:
            answers.close()


@torch.no_grad()
def _answers(model: nn.Module, inputs: Any) -> Generator[list[Tensor], None, None]:
    """The outputs of each call, from the model's state, which is as before afterwards."""
    first: list[Tensor] = []

    def run() -> list[Tensor]:
        return [snapshot(t) for t in output_tensors(call(model, inputs))]

    with watching((), model), without_cache(model):
        seed_devices(0)
        stateful = changed(model, lambda: first.extend(run()))
        yield first
        if stateful:
            seed_devices(0)
            run()
            yield run()
    if keeps_cache(model):
        with watching((), model):
            seed_devices(0)
            yield [snapshot(main_output(call(model, inputs)))]


def same_outputs(a: list[Tensor], b: list[Tensor], tolerance: float) -> bool:
    """Are tensors the same, relative to the largest value of each? None at all: no."""
    if not a or len(a) != len(b):
        return False
    return all(_same(x, y, tolerance) for x, y in zip(a, b, strict=True))


def _same(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Alike in shape and type; floating values close, infinities and NaN at the same places.
    Integers may follow roundings.
    """
    if x.is_floating_point() or x.is_complex():
        return largest_difference(x, y) <= tolerance
    return x.shape == y.shape and x.dtype == y.dtype
