"""`prune_ln_structured`: remove channels, neurons and heads from a copy of any model.

Trace (labels.py, trace.py), group (groups.py), score (scores.py), cut (cut.py), repair (repair.py). A cut is believed only
after the pruned model gave the same outputs as its masked twin; groups for which it doesn't (a size is written into the
model's code) stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantize import surgery
from quantize.calibration import check_batches
from quantize.pruning.choose import (
    calibrated,
    check_amount,
    check_options,
    choose,
    layers_of,
    reasons,
    refuse_quantized,
    remove,
)
from quantize.pruning.cut import cut, kept_indices, mask, owners, same_outputs, stale_attributes
from quantize.pruning.groups import Group, find_groups
from quantize.pruning.labels import Key
from quantize.pruning.repair import Step, as_matrix, repair_layers
from quantize.pruning.trace import Trace, arguments, export, module_of, operation


@dataclass
class Pruned:
    """One group: the layers whose outputs shrank, and units before and after (a unit is `size` channels)."""

    layers: list[str]
    before: int
    after: int
    size: int


@dataclass
class Summary:
    """What pruning did: groups cut, and layers left whole with the reason."""

    pruned: list[Pruned] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0

    def __str__(self) -> str:
        lines = [f"parameters {self.parameters_before} -> {self.parameters_after}"]
        lines += [f"{', '.join(p.layers)}: {p.before * p.size} -> {p.after * p.size} channels" for p in self.pruned]
        return "\n".join(lines + [f"{name}: left whole, {why}" for name, why in self.left.items()])


def summary(model: nn.Module) -> Summary:
    """What `prune_ln_structured` did to make `model`; ValueError for a model it didn't make."""
    found = model.__dict__.get("_pruning")
    if found is None:
        raise ValueError(f"{type(model).__name__} was not made by prune_ln_structured in this process")
    return found


def prune_ln_structured(
    model: nn.Module,
    example_inputs: Any,
    *,
    amount: float | Mapping[str, float] = 0.5,
    n: float = 2,
    calibration: Iterable[Any] | None = None,
    skip: surgery.Skip = (),
    masked: bool = False,
    score: str | None = None,
    scope: str | None = None,
    round_to: int | None = None,
    repair: bool = True,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
) -> nn.Module:
    """Smaller dense copy of `model`: output channels, hidden neurons and attention heads removed, in eval mode.

    Channels that are tied go together (residual adds, norms, gates, grouped convolutions, heads with their queries, keys and
    values), and whoever reads them follows. Inputs and outputs of the model keep their shapes. Layers stay what they are, with
    fewer channels. What can't be followed or can't go (channels that a LayerNorm averages over) stays whole: `summary(model)`
    names it with the reason.

    Args:
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; the model is traced on them.
        amount: fraction of channels removed, in [0, 1); or a dict to it from the name of a layer whose output channels are
            removed (or a glob, or a module around layers): then only those are pruned.
        n: order of the norm, > 0 (1, 2, math.inf, ...).
        calibration: re-iterable batches, each like `example_inputs`. With them channels are scored by what they feed forward,
            and the layers that read them are refitted by least squares to give what they gave before.
        skip: names, globs or types of layers whose output channels stay.
        masked: return the full-sized twin with zeros in the removed places; it computes the same.
        score: "magnitude" (default without calibration), "activation", "reconstruction" (default with it), or "taylor"
            (needs `loss`).
        scope: "layer" removes `amount` of every group (default without calibration). "alike" (default with it) removes that
            share of all groups of one shape together (the feed-forward layers of a transformer, say), more where it costs
            less, so the model gets just as small; layers that `amount` names one by one lose what it says of them. "global"
            removes that share of all units, the least important first.
        round_to: kept widths are multiples of this (default: 16, or less for layers narrower than 128).
        repair: with calibration, refit the readers of pruned channels and re-estimate BatchNorm statistics.
        loss: for "taylor", a function (model, batch) -> scalar.

    Raises:
        ValueError: for values out of range, names that match nothing or can't be pruned, inputs that don't run, a model that
            can't be exported, calibration that doesn't run or isn't finite, and when nothing in the model can be pruned.
        TypeError: for arguments of the wrong type.

    Norm criterion: Li et al., arXiv 1608.08710, as in `torch.nn.utils.prune.ln_structured`.
    """
    amounts = check_amount(amount)
    check_options(n, score, scope, round_to, loss, calibration, skip)
    if calibration is not None:
        check_batches(calibration)
    work = surgery.clone(model).eval()
    refuse_quantized(work)
    trace = Trace(export(surgery.clone(work), example_inputs), work)
    groups, stuck = find_groups(trace.labels)
    wanted, left = choose(work, groups, stuck, amounts, skip)
    by_calibration = "activation" if scope == "global" else "reconstruction"
    rule = score or ("magnitude" if calibration is None else by_calibration)
    scope = scope or ("alike" if rule == "reconstruction" else "layer")
    remove(work, wanted, rule, scope, n, round_to, calibration, loss, left)
    wanted = [g for g in wanted if len(g.removed)]
    if amounts and not wanted and any(a > 0 for a in amounts.values()):
        raise ValueError(f"nothing was removed from {type(model).__name__}: {reasons(left)}")
    small, wanted = _verified(trace, work, wanted, example_inputs, left, explicit="*" not in amounts)
    kept = kept_indices(trace, wanted)
    if calibration is not None and repair and wanted:
        steps = _repair_steps(trace, work, kept)
        calibrated(lambda: repair_layers(work, small, steps, calibration))
    result = mask(trace, work, small, kept) if masked else small
    result.__dict__["_pruning"] = Summary(
        [Pruned(layers_of(work, g), g.units, g.units - len(g.removed), g.unit_size()) for g in wanted],
        left,
        sum(p.numel() for p in work.parameters()),
        sum(p.numel() for p in small.parameters()),
    )
    return result


# Cutting, with proof.


def _attempt(trace: Trace, model: nn.Module, groups: list[Group], inputs: Any) -> nn.Module | None:
    """A pruned copy, if it computes what its masked twin computes."""
    kept = kept_indices(trace, groups)
    sure, might = stale_attributes(trace, groups, model)
    twin = None
    args, kwargs = arguments(inputs)
    tolerance = 1e-3 if all(p.dtype in (torch.float32, torch.float64) for p in model.parameters()) else 3e-2
    for i, edits in enumerate((sure, might, {})):
        if i and edits == (sure, might)[i - 1]:
            continue
        small = cut(surgery.clone(model), kept, edits)
        twin = mask(trace, model, small, kept) if twin is None else twin
        try:
            with torch.no_grad():
                if same_outputs(small(*args, **kwargs), twin(*args, **kwargs), tolerance):
                    return small
        except Exception:
            continue
    return None


def _verified(
    trace: Trace, model: nn.Module, wanted: list[Group], inputs: Any, left: dict[str, str], *, explicit: bool
) -> tuple[nn.Module, list[Group]]:
    """A pruned copy and its groups; those that can't be cut are noted in `left` (or raise, if asked for by name)."""
    if not wanted:
        return surgery.clone(model), []
    done = _attempt(trace, model, wanted, inputs)
    if done is None:
        good = [g for g in wanted if _attempt(trace, model, [g], inputs) is not None]
        for group in wanted:
            if not any(group is g for g in good):
                why = "the smaller model fails: its code has a size written in, or computes otherwise on fewer channels"
                left.update(dict.fromkeys(layers_of(model, group), why))
        done = _attempt(trace, model, good, inputs) if good else None
        if done is None or (explicit and len(good) < len(wanted)):
            raise ValueError(f"nothing in {type(model).__name__} can be pruned as asked: {reasons(left)}")
        wanted = good
    return done, wanted


def _repair_steps(trace: Trace, model: nn.Module, kept: dict[Key, torch.Tensor]) -> list[Step]:
    """What to repair, in the order of the graph: the first layer whose inputs shrank and all layers after it that can be
    refitted, and BatchNorms. Layers that read the same tensor one after another are one step."""
    shrunk: set[str] = set()
    for name, dim in kept:
        places = owners(model, name)
        if len(places) == 1 and places[0][0] == trace.labels.inputs.get((name, dim)) and as_matrix(places[0][1]) is not None:
            shrunk.add(places[0][0])
    outputs = {name: kept.get((name, dim)) for name, dim in trace.labels.outputs}
    steps: dict[str, Step] = {}  # by the name of the layer
    sources: dict[str, Any] = {}  # what it reads, if that may be shared
    for node in trace.values:
        place = module_of(node)
        if node.op != "call_function" or not place:
            continue
        base, module = operation(node), model.get_submodule(place)
        if place in steps:
            steps[place].calls += base in (*LAYERS, "batch_norm")
        elif base in LAYERS and (place in shrunk or (steps and _alone(model, place))):
            steps[place] = Step({place: outputs.get(f"{place}.weight")}, stream=_adds(node))
            if module._parameters["weight"].ndim == 2:
                sources[place] = node.args[1 if base == "addmm" else 0]
        elif base == "batch_norm" and steps and isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.track_running_stats:
                steps[place] = Step({place: kept.get((f"{place}.running_mean", 0))})
    joined: list[Step] = []
    last: tuple[Any, bool] | None = None  # what the last step reads, and whether it has a bias
    for place, step in steps.items():
        step.stream = step.stream and step.calls == 1
        shared = step.calls == 1 and not step.stream and place in sources
        this = (sources[place], model.get_submodule(place)._parameters.get("bias") is not None) if shared else None
        if this is not None and this == last:
            joined[-1].layers.update(step.layers)
        else:
            joined.append(step)
        last = this
    return joined


LAYERS = ("linear", "addmm", "conv1d", "conv2d", "matmul")
WIDE = 8  # a whole layer with more than so many outputs per input (a vocabulary's) is not refitted: it has too little to gain


def _adds(node: torch.fx.Node) -> bool:
    """Is the output, as it is, added to something of its shape?"""
    users = list(node.users)
    while len(users) == 1 and operation(users[0]) in ("dropout", "dropout_", "contiguous", "alias", "view"):
        users = list(users[0].users)
    if len(users) != 1 or operation(users[0]) not in ("add", "add_"):
        return False
    operands = [a for a in users[0].args if isinstance(a, torch.fx.Node)]
    return len(operands) == 2 and operands[0].meta["val"].shape == operands[1].meta["val"].shape


def _alone(model: nn.Module, place: str) -> bool:
    """Can this layer be refitted, does nobody else hold its weight, and is it no vocabulary?"""
    matrix = as_matrix(model.get_submodule(place))
    return matrix is not None and len(owners(model, f"{place}.weight")) == 1 and matrix.shape[0] <= WIDE * matrix.shape[1]
