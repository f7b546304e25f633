"""`prune_ln_structured`: remove channels, neurons and heads from a copy of any model.

Export (exporting.py), follow channels through the graph (labels.py, follow.py), group (groups.py),
score (scores.py), cut (cut.py) with proof (proof.py), repair (repair.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from quantize import surgery
from quantize.calibration import (
    Beside,
    check_batches,
    distance,
    first_alone,
    warn_if_far,
    without_cache,
)
from quantize.collector import looking_at_new_objects
from quantize.compression.pruning.choose import (
    check_amount,
    check_options,
    choose,
    reasons,
    refuse_infinite,
    refuse_unfit,
    remove,
    savable,
)
from quantize.compression.pruning.config import follow_config
from quantize.compression.pruning.cut import kept_indices, mask, owners
from quantize.compression.pruning.exporting import graph_of
from quantize.compression.pruning.follow import follow
from quantize.compression.pruning.groups import Group, find_groups
from quantize.compression.pruning.labels import Key
from quantize.compression.pruning.plan import repair_steps
from quantize.compression.pruning.proof import Answers, verified
from quantize.compression.pruning.readers import find_readers, reached_groups, survey_readers
from quantize.compression.pruning.repair import repair_layers
from quantize.compression.pruning.trace import Trace
from quantize.saying import Say, silent


def prune_ln_structured(
    model: nn.Module,
    example_inputs: Any,
    *,
    amount: float | Mapping[str, float] = 0.5,
    n: float = 2,
    calibration: Iterable[Any] | None = None,
    skip: surgery.Skip = (),
    masked: bool = False,
    round_to: int | None = None,
    progress: Say | None = None,
) -> nn.Module:
    """Smaller dense copy of a model: channels, neurons and attention heads removed, in eval mode.

    Channels that are tied go together (residual adds, norms, gates, grouped convolutions, heads
    with their queries, keys and values), and whoever reads them follows. Inputs and outputs of the
    model keep their shapes. Layers stay what they are, with fewer channels. What can't be followed
    or can't go (channels that a LayerNorm averages over) stays whole: `quantize.summary(model)`
    names it with the reason. Warns where the outputs moved by more than half on the first inputs.

    Args:
        model: any module; it stays as it is.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; the model is
            traced on them.
        amount: fraction of channels removed, in [0, 1); or a dict to it from the name of a layer
            whose output channels are removed (or a glob, or a module around layers): then only
            those are pruned.
        n: order of the norm by which channels are scored without calibration, > 0 (1, 2, math.inf).
        calibration: re-iterable batches, each like `example_inputs`. With them channels are scored
            by what they feed forward; groups of one shape (the feed-forward layers of a
            transformer, say) that `amount` doesn't name one by one lose more where it costs less,
            together as much; and the layers that read pruned channels are refitted by least squares
            to give what they gave before, and the statistics of BatchNorms estimated anew.
        skip: names, globs or types of layers whose output channels stay.
        masked: return the full-sized twin with zeros in the removed places; it computes the same.
        round_to: kept widths are multiples of this (default: 16, or less for layers narrower than
            128).
        progress: called with a line for people before each piece of work, with the layer's name.

    Returns:
        The smaller copy, or with `masked` its full-sized twin.

    Raises:
        ValueError: for values out of range, names that match nothing or can't be pruned, inputs
            that don't run, a model that can't be exported, calibration that doesn't run or isn't
            finite, and when nothing in the model can be pruned.
        TypeError: for arguments of the wrong type.

    Source:
        Norm criterion: Li et al., arXiv 1608.08710, as in `torch.nn.utils.prune.ln_structured`.
    """
    amounts = check_amount(amount)
    check_options(n, round_to)
    if calibration is not None:
        check_batches(calibration)
    say = progress or silent
    with looking_at_new_objects():
        work = surgery.shell(model).eval()
        refuse_unfit(work)
        say(f"tracing {type(work).__name__}")
        trace = follow(graph_of(model, work, example_inputs), work)
        groups, stuck = find_groups(trace.labels)
        left = dict(trace.computed)
        wanted = choose(work, groups, stuck, amounts, skip, left)
        wanted = savable(work, wanted, left)
        refuse_infinite(work, wanted)
        survey = None
        if calibration is not None:
            survey = survey_readers(work, find_readers(work, wanted), calibration, say)
            wanted = reached_groups(work, wanted, survey.reached, left)
        remove(work, wanted, n, round_to, survey, left)
        wanted = [g for g in wanted if len(g.removed)]
        if amounts and not wanted and any(a > 0 for a in amounts.values()):
            raise ValueError(f"nothing was removed from {type(work).__name__}: {reasons(left)}")
        explicit = "*" not in amounts
        small, wanted = verified(
            trace, work, wanted, example_inputs, left, explicit=explicit, say=say
        )
        kept = kept_indices(trace, wanted)
        if survey is not None:
            survey.forget(survey.layers)
        if survey is not None and wanted:
            repair_layers(work, small, repair_steps(trace, work, kept), survey, say)
            survey.warn_if_few_rows("pruning")
        follow_config(small, _sizes(trace, wanted, kept), lambda: Answers(small, example_inputs))
        result = mask(surgery.clone(work), small, kept) if masked else small
        surgery.round_stored(result)
        shown = first_alone(calibration) if isinstance(calibration, Beside) else [example_inputs]
        _write_down(result, small, work, trace, wanted, left, shown)
        return result


# What was done.


def _write_down(
    result: nn.Module,
    small: nn.Module,
    model: nn.Module,
    trace: Trace,
    groups: list[Group],
    left: dict[str, str],
    batches: list[Any],
) -> None:
    """Run the result once, and note what was done, what was left, and how far its outputs are from
    the original's.
    """
    kept = kept_indices(trace, groups)
    count = surgery.parameter_count
    sizes = {"parameters_before": count(model), "parameters_after": count(small)}
    done = _done(trace, model, kept)
    left = _left(trace, model, done, left)
    try:
        with without_cache(result, model):
            away = distance(result, model, batches)
    except ValueError as error:
        raise ValueError(f"the pruned {type(model).__name__} can't be used: {error}") from error
    warn_if_far("pruning", model, away, "train it on (quantize.recover), or remove less")
    surgery.note(result, "pruned", done=done, left=left, distance=away, **sizes)


def _sizes(
    trace: Trace, groups: list[Group], kept: dict[Key, torch.Tensor]
) -> set[tuple[int, int]]:
    """Sizes before and after: of dimensions that were cut, and of how many units (heads) they
    hold.
    """
    sizes = {
        (trace.labels.shapes[name][dim], len(indices)) for (name, dim), indices in kept.items()
    }
    for group in groups:
        after = group.units - len(group.removed)
        for places in group.places.values():
            times = max(1, places.shape[1] // group.unit_size())  # several queries go with a key
            sizes.add((group.units * times, after * times))
    return sizes


def _done(trace: Trace, model: nn.Module, kept: dict[Key, torch.Tensor]) -> dict[str, str]:
    """What became of each layer that gives fewer channels."""
    done = {}
    holders = owners(model)
    for name, dim in trace.labels.outputs:
        if (name, dim) in kept:
            place = holders(name)[0][0]
            done[place] = f"{trace.labels.shapes[name][dim]} -> {len(kept[name, dim])} channels"
    return done


def _left(
    trace: Trace, model: nn.Module, done: dict[str, str], left: dict[str, str]
) -> dict[str, str]:
    """Every layer that gives as many channels as before, and the reason."""
    ran = {trace.place(node) for node in trace.values if node.op == "call_function"}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if name in done or not _has_channels(name, module):
            continue
        why = left.get(name)
        if why is None and name not in ran:
            why = "example_inputs never reach it"
        reasons[name] = why or "its channels weren't asked for, or can't be followed"
    return reasons


def _has_channels(name: str, module: nn.Module) -> bool:
    if ".parametrizations." in f".{name}.":
        return False
    if isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)):
        return True
    return surgery.holds_matrix(module)
