"""Check the arguments, choose the groups and the units that go.

`amount` and `skip` name layers by their output channels; scores say which units of a group matter
least.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from quantize import check, surgery
from quantize.calibration import Survey
from quantize.compression.pruning import budget, scores
from quantize.compression.pruning.cut import Owners, layers_of, owners
from quantize.compression.pruning.groups import Group
from quantize.compression.pruning.labels import Key
from quantize.compression.pruning.readers import by_readers
from quantize.nn import holds_integers

# Arguments.


def check_amount(amount: Any) -> dict[str, float]:
    """The fraction of channels removed, by name or glob; "*" are all others."""
    given = check.shares("amount", amount, "[0, 1)")
    return given if isinstance(given, dict) else {"*": given}


def check_options(n: Any, round_to: Any) -> None:
    check.as_float("n", n, "(0, inf]")
    if round_to is not None:
        check.count("round_to", round_to)


def refuse_unfit(model: nn.Module) -> None:
    """Raise ValueError naming a module that is quantized, or whose tensors have no shape yet."""
    surgery.check_initialised(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            raise ValueError(
                f"module {name!r} of {type(model).__name__} is a graph: prune the model that it "
                f"was made of"
            )
        if holds_integers(module):
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) holds integers: prune before quantizing"
            )


# Which groups, and how much of each.


def choose(
    model: nn.Module,
    groups: list[Group],
    stuck: dict[Key, str],
    amounts: dict[str, float],
    skip: surgery.Skip,
    left: dict[str, str],
) -> list[Group]:
    """Groups to prune (with their `amount` set). Layers that stay whole are noted in `left`."""
    skipped = surgery.skip_filter(model, skip)
    holders = owners(model)
    for (name, _), why in stuck.items():
        left |= dict.fromkeys(_places(holders, name), why)
    layers = {i: _layers(holders, group) for i, group in enumerate(groups)}
    free: dict[int, Group] = {}
    for i, group in enumerate(groups):
        if any(skipped(p, model.get_submodule(p)) for p in layers[i]):
            left.update(dict.fromkeys(layers[i], "it or a layer tied to it is in skip"))
        elif any(_is_rank(model, p) for p in layers[i]):
            left.update(dict.fromkeys(layers[i], "its outputs are the rank of a low-rank pair"))
        else:
            free[i] = group
    chosen: dict[int, float] = {}
    asked: dict[int, str] = {}
    names = {n for n, _ in model.named_modules()}
    for pattern, value in amounts.items():
        if pattern == "*":
            rest = [i for i in free if i not in chosen]
            chosen.update(dict.fromkeys(rest, value))
            asked.update(dict.fromkeys(rest, pattern))
            continue
        matched = {n for n in names if n and _around(n, pattern)}
        if not matched:
            raise ValueError(
                f"amount names {pattern!r}, which is not a module of {type(model).__name__}"
            )
        hit = [i for i in free if matched & set(layers[i])]
        if not hit:
            whys = {left[n] for n in sorted(matched) if n in left}
            raise ValueError(
                f"amount names {pattern!r}, which can't be pruned: "
                f"{'; '.join(whys) or 'it has no output channels'}"
            )
        for i in hit:
            asked.setdefault(i, pattern)
            if chosen.setdefault(i, value) != value and set(amounts) - {"*"}:
                raise ValueError(
                    f"amount gives {chosen[i]} and {value} to {layers[i]}, whose channels go "
                    f"together"
                )
    if not chosen:
        raise ValueError(f"nothing in {type(model).__name__} can be pruned: {reasons(left)}")
    for i, value in chosen.items():
        free[i].amount, free[i].asked = value, asked[i]
    return [free[i] for i in sorted(chosen)]


def _around(name: str, pattern: str) -> bool:
    """Does the pattern name this module or one around it?"""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def _is_rank(model: nn.Module, place: str) -> bool:
    parent, _, local = place.rpartition(".")
    return local == "first" and type(model.get_submodule(parent)).__name__.startswith("LowRank")


def reasons(left: dict[str, str]) -> str:
    shown = [f"{name!r}: {why}" for name, why in left.items()][:4]
    return (
        "; ".join(shown)
        or "no layer has output channels that another layer reads (looked for linears, "
        "convolutions, embeddings)"
    )


def refuse_infinite(model: nn.Module, groups: Iterable[Group]) -> None:
    """Raise ValueError naming a layer whose weights are to be scored or cut and are not finite."""
    holders = owners(model)
    for group in groups:
        for name, _ in group.places:
            place, module, _ = holders(name)[0]
            value = getattr(module, name.rpartition(".")[2])
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(f"layer {place!r} has weights that are not finite")


def savable(model: nn.Module, groups: list[Group], left: dict[str, str]) -> list[Group]:
    """The groups without those that go through a buffer that no file holds: it would come back at
    its old size.
    """
    unsaved = set()
    for place, module in model.named_modules():
        unsaved.update(f"{place}.{key}".strip(".") for key in module._non_persistent_buffers_set)
    kept = []
    holders = owners(model)
    for group in groups:
        through = sorted({name for name, _ in group.places} & unsaved)
        if through:
            why = f"its channels go through the buffer {through[0]!r}, which no file holds"
            left.update(dict.fromkeys(layers_of(holders, group), why))
        else:
            kept.append(group)
    return kept


def remove(
    model: nn.Module,
    wanted: list[Group],
    n: float,
    round_to: int | None,
    survey: Survey | None,
    left: dict[str, str],
) -> None:
    """Fill in `removed` of every group.

    survey: of the layers that read the groups; None where there is no calibration.
    """
    keeps = [budget.units_kept(g, g.amount, round_to) for g in wanted]
    values: list[Any] = [None] * len(wanted)
    if survey is not None:
        values, keeps = _reconstruction(wanted, keeps, round_to, survey)
    for i, group in enumerate(wanted):
        if values[i] is None:  # nothing that mixes channels reads them where we can look
            values[i] = scores.magnitude(model, group, n)
    holders = owners(model)
    for group, value, keep in zip(wanted, values, keeps, strict=True):
        if not torch.isfinite(value[value != math.inf]).all():
            raise ValueError(f"the scores of layer {layers_of(holders, group)[0]!r} are not finite")
        order = value.argsort(stable=True)
        group.removed = order[: group.units - keep].sort().values
        if group.amount and not len(group.removed):
            size = f"{group.units} units of {group.unit_size()} channels"
            left.update(
                dict.fromkeys(
                    layers_of(holders, group), f"removing {group.amount:g} of {size} rounds to none"
                )
            )


def _reconstruction(
    groups: list[Group], keeps: list[int], round_to: int | None, survey: Survey
) -> tuple[list[Any], list[int]]:
    """Scores of each group (None where no layer reads it), and the units kept: groups of one shape
    that were asked for together give by what it costs, as many as they would give one by one.
    """
    families = [f for f in budget.alike(groups) if len(f) > 1 and groups[f[0]].amount]
    depths = [g.units - k for g, k in zip(groups, keeps, strict=True)]
    for i in itertools.chain.from_iterable(families):
        depths[i] = max(depths[i], budget.deepest(groups[i], round_to))
    depth = {id(g): d for g, d in zip(groups, depths, strict=True)}
    measured: dict[int, bool] = {}

    def score(group: Group, readers: list[scores.Reader]) -> Any:
        measured[id(group)] = all(reader.metric is not None for reader in readers)
        return scores.reconstruction(readers, depth[id(group)])

    ranked = by_readers(groups, survey, score)
    for family in families:
        if not all(measured.get(id(groups[i])) for i in family):
            continue
        total = sum(groups[i].units - keeps[i] for i in family)
        step = budget.round_step(groups[family[0]], round_to)
        given = budget.share_out([ranked[i][1] for i in family], total, step)
        if sum(given) == total:
            for i, removed in zip(family, given, strict=True):
                keeps[i] = groups[i].units - removed
    return [None if r is None else r[0] for r in ranked], keeps


def _places(holders: Owners, name: str) -> list[str]:
    """The modules that hold a parameter."""
    return [place for place, _, _ in holders(name)]


def _layers(holders: Owners, group: Group) -> list[str]:
    """The modules whose output channels a group has."""
    names = (name for name, _ in group.outputs)
    return list(itertools.chain.from_iterable(_places(holders, name) for name in names))
