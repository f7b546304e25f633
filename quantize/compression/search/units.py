"""What can be done to each part of a model, what it would lose and what it would take.

A unit is a group of channels with the layers that give and read them, or a layer alone. Its options
are ways to store its layers (float, bfloat16, int8, int4), each at some widths or ranks. Losses are
squared changes of the model's output in closed form, from the second moments of inputs and
gradients (K-FAC, as in `low_rank.maths`); times are those of layers of that size.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from quantize import calibration as calibrating
from quantize import surgery
from quantize.compression.low_rank import maths
from quantize.compression.low_rank.budget import rank_for_ratio
from quantize.compression.low_rank.candidates import find_layers
from quantize.compression.low_rank.spectra import usable
from quantize.compression.pruning.costs import Removable, removable
from quantize.compression.recipe import Given
from quantize.compression.search.options import Option, Unit
from quantize.compression.search.strategy import FIRST_SHARE
from quantize.compression.search.times import FLOAT, INT4, INT8, Stopwatch, made
from quantize.nn import dense_weight
from quantize.nn import low_rank as pairs
from quantize.nn.int4 import GROUP_SIZES, Int4Linear
from quantize.saying import Say

AMOUNTS = (0.125, FIRST_SHARE, 0.5, 0.625, 0.75, 0.875)
RATIOS = (0.6, 0.45, 0.3, 0.2, 0.1)
MEMORY = 1 << 29  # bytes of second moments held at once
_RANGE = 4.0  # of a row's numbers, in root mean squares: what int8 inputs are rounded by
_LEVELS = 255
_LINE = 120  # characters of a line for people


@dataclass(frozen=True)
class Facts:
    """What is known of one layer.

    Args:
        layer: the float layer.
        shape: of its input in a call on the example inputs.
        calls: of it in such a call.
        spectrum: whitened singular values; None where it can't be a pair.
        rounding: loss by kind.
        bytes: in a file, by kind.
        four_bits: whether it can have them.
    """

    layer: Any
    shape: tuple[int, ...]
    calls: int
    spectrum: Tensor | None
    rounding: dict[str, float]
    bytes: dict[str, float]
    four_bits: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """Input and output channels."""
        if isinstance(self.layer, (nn.Conv1d, nn.Conv2d)):
            return self.layer.in_channels, self.layer.out_channels
        m, k = pairs.matrix(self.layer).shape
        return k, m


def survey(
    model: nn.Module, given: Given, kinds: Sequence[str], say: Say, call_s: float
) -> list[Unit]:
    """The units of a model with their options.

    Layers are timed alone, and told to take as much of `call_s` as they take of a call of the
    model: a machine is up to twice as slow from one minute to the next.

    Args:
        model: the original, in eval mode.
        given: with example_inputs and calibration.
        kinds: "float", and any of "int8", "bf16" and "int4".
        say: called with a line for people.
        call_s: seconds that a call of the model took when it was measured.

    Raises:
        ValueError: no layer that anything can be done to.
    """
    facts = _facts(model, given, kinds, say)
    say(f"timing {len(facts)} layers")
    watch = Stopwatch(kinds)
    groups = _groups(model, given, say)
    _units(groups, facts, watch)
    watch.settle()
    units = _units(groups, facts, watch)
    share = watch.share(model, given.example_inputs, [fact.layer for fact in facts.values()])
    slower = share * call_s / sum(unit.seconds for unit in units)
    return [unit.slower(slower) for unit in units]


def _units(groups: Sequence[Removable], facts: Mapping[str, Facts], watch: Stopwatch) -> list[Unit]:
    made: set[str] = set()
    for group in groups:
        made.update(group.outputs)
    units, taken = [], set()
    for group in groups:
        readers = [name for name in group.inputs if name not in made]
        own = [name for name in (*group.outputs, *readers) if name in facts and name not in taken]
        if group.name not in own:
            continue
        taken.update(own)
        units.append(_unit(group.name, own, facts, watch, group))
    for name in facts:
        if name not in taken:
            units.append(_unit(name, [name], facts, watch, None))
    return units


def _groups(model: nn.Module, given: Given, say: Say) -> list[Removable]:
    try:
        return removable(model, given.example_inputs, given.calibration or (), _shortened(say))
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        say(f"no channels can go: {' '.join(str(error).split())[:150]}")
        return []


# Losses of single layers.


def _facts(model: nn.Module, given: Given, kinds: Sequence[str], say: Say) -> dict[str, Facts]:
    """Of every linear layer and dense convolution that may be replaced and that inputs reach."""
    layers = find_layers(surgery.clone(model), ())[0]
    own = {name: model.get_submodule(name) for name in layers}
    calls = calibrating.trace_calls(model, given.example_inputs, own)
    shapes = {name: pairs.matrix(layers[name]).shape for name in calls.shapes}
    widths = {name: (k, m) for name, (m, k) in shapes.items()}
    batches = given.calibration or ()
    survey = calibrating.Survey(model, batches, widths, memory=MEMORY, say=_shortened(say))
    found: dict[str, Facts] = {}
    for name in widths:
        gradient = usable(survey.gradient(name)) if name in survey.reached else None
        if gradient is not None:
            layer = model.get_submodule(name)
            losses = _losses(layer, survey.inputs(name), gradient, kinds)
            found[name] = Facts(layer, calls.shapes[name], calls.counts[name], *losses)
    if not found:
        raise ValueError("the output depends on no layer that can be replaced")
    return found


def _shortened(say: Say) -> Say:
    """Without most of the names of layers that a line lists."""
    return lambda line: say(textwrap.shorten(line, _LINE, placeholder=" ..."))


def _losses(
    layer: Any, seen: calibrating.InputStatistics, gradient: Tensor, kinds: Sequence[str]
) -> tuple[Tensor, dict[str, float], dict[str, float], bool]:
    """The spectrum, and by kind the loss of rounding and the bytes; whether int4 is possible.
    Losses are summed over the rows seen.
    """
    weight = pairs.matrix(layer).double()
    moment = seen.covariance if layer.bias is not None else seen.second_moment
    moment = maths.with_unseen(moment, seen.count)
    spectrum = maths.whitened_spectrum(weight, moment, gradient) * math.sqrt(seen.count)
    rounding, sizes, four_bits = {}, {}, False
    for kind in kinds:
        small = made(layer, kind)
        four_bits = four_bits or isinstance(small, Int4Linear)
        error = weight - dense_weight(small).double().reshape(weight.shape)
        by_weight = maths.weighted_error(error, seen.second_moment, gradient)
        by_input = _input_loss(weight, seen, gradient) if kind == INT8 else 0.0
        rounding[kind] = seen.count * (by_weight + by_input)
        sizes[kind] = float(sum(tensor.nbytes for tensor in small.state_dict().values()))
    return spectrum, rounding, sizes, four_bits


def _input_loss(weight: Tensor, seen: calibrating.InputStatistics, gradient: Tensor) -> float:
    """Of a row: by inputs rounded to 255 steps of their range."""
    power = seen.power.clamp(min=0)
    reach = max(_RANGE * power.mean().sqrt().item(), power.max().sqrt().item())
    step = 2 * reach / _LEVELS
    return step**2 / 12 * (weight.T @ gradient.double() * weight.T).sum().item()


# Options.


def _unit(
    name: str,
    own: Sequence[str],
    facts: Mapping[str, Facts],
    watch: Stopwatch,
    group: Removable | None,
) -> Unit:
    """A unit of these layers; `group` has the channels that can go."""
    full = {layer: _whole(facts[layer], watch, 0, 0) for layer in own}
    seconds = sum(times[FLOAT] for times in full.values())
    options = []
    for kind in watch.kinds:
        saved = seconds - sum(times[kind] for times in full.values())
        if kind == INT4 and not all(facts[layer].four_bits for layer in own):
            continue
        rounding = sum(facts[layer].rounding[kind] for layer in own)
        sizes = {layer: facts[layer].bytes[kind] for layer in own}
        start = Option(kind, kind_s=saved, rounding=rounding, bytes=sizes)
        options.append(start)
        if group is not None:
            options += _narrower(start, group, facts, watch)
        options += _factorized(start, facts, watch)
    return Unit(name, tuple(own), tuple(options), seconds)


def _whole(fact: Facts, watch: Stopwatch, fewer_in: int, fewer_out: int) -> dict[str, float]:
    """Seconds in a call of the model, by kind."""
    inputs, outputs = fact.sizes
    times = watch.whole(fact.layer, fact.shape, inputs - fewer_in, outputs - fewer_out)
    return {kind: fact.calls * taken for kind, taken in times.items()}


def _narrower(
    start: Option, group: Removable, facts: Mapping[str, Facts], watch: Stopwatch
) -> list[Option]:
    """The unit with fewer channels. Readers that belong to another unit get faster too: in whatever
    kind that unit has them, so what counts is the least that this saves.
    """
    found: dict[int, Option] = {}
    for amount in AMOUNTS:
        gone = group.units - group.kept(amount)
        if not 0 < gone < len(group.costs) or gone in found:
            continue
        if start.kind == INT4 and not _in_groups(group, gone, start, facts):
            continue
        own_s, sizes = 0.0, dict(start.bytes)
        reader_s: dict[str, float] = {}
        left: dict[str, float] = {}
        for layer in {**group.outputs, **group.inputs}:
            if layer not in facts:
                continue
            fewer_in = gone * group.inputs.get(layer, 0)
            fewer_out = gone * group.outputs.get(layer, 0)
            inputs, outputs = facts[layer].sizes
            if not (fewer_in < inputs and fewer_out < outputs):
                continue
            after = _whole(facts[layer], watch, fewer_in, fewer_out)
            before = _whole(facts[layer], watch, 0, 0).items()
            saved = {kind: seconds - after[kind] for kind, seconds in before}
            share = (1 - fewer_in / inputs) * (1 - fewer_out / outputs)
            if layer in sizes:
                own_s += saved[start.kind]
                sizes[layer] *= share
            else:
                reader_s[layer], left[layer] = min(saved.values()), share
        spared = [(1 - share) * min(facts[name].bytes.values()) for name, share in left.items()]
        found[gone] = replace(
            start,
            amount=amount,
            size_s=own_s + sum(reader_s.values()),
            reader_s=reader_s,
            rounding=start.rounding * group.kept(amount) / group.units,
            removal=float(group.costs[gone]),
            bytes=sizes,
            reader_left=left,
            reader_bytes=sum(spared),
        )
    return list(found.values())


def _in_groups(group: Removable, gone: int, unit: Option, facts: Mapping[str, Facts]) -> bool:
    """Whether layers of the unit with fewer channels still have inputs for whole groups of int4."""
    left = [facts[layer].sizes[0] - gone * group.inputs.get(layer, 0) for layer in unit.bytes]
    return not any(inputs % GROUP_SIZES[0] for inputs in left)


def _factorized(start: Option, facts: Mapping[str, Facts], watch: Stopwatch) -> list[Option]:
    """The unit with each of its layers as a pair."""
    found = []
    for ratio in RATIOS:
        ranks = {layer: _rank(facts[layer], ratio) for layer in start.bytes}
        if not all(ranks.values()):
            continue
        if start.kind == INT4 and any(rank % GROUP_SIZES[0] for rank in ranks.values() if rank):
            continue
        saved, removal, sizes = 0.0, 0.0, dict(start.bytes)
        for layer, rank in ranks.items():
            fact = facts[layer]
            if rank is None or fact.spectrum is None:
                continue
            times = watch.pair(fact.layer, fact.shape, rank)
            before = _whole(fact, watch, 0, 0)[start.kind]
            saved += before - fact.calls * times[start.kind]
            removal += fact.spectrum[rank:].double().square().sum().item()
            m, k = pairs.matrix(fact.layer).shape
            sizes[layer] *= rank * (m + k) / (m * k)
        changed = {"ratio": ratio, "size_s": saved, "removal": removal, "bytes": sizes}
        found.append(replace(start, **changed))
    return found


def _rank(fact: Facts, ratio: float) -> int | None:
    """The rank that `factorize_low_rank` gives a layer at this ratio; None where it stays whole."""
    m, k = pairs.matrix(fact.layer).shape
    rank = rank_for_ratio(ratio, (m, k))
    return rank if 0 < rank and rank * (m + k) < m * k else None
