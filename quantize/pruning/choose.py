"""Check the arguments, choose the groups and the units that go.

`amount` and `skip` name layers by their output channels; scores say which units of a group matter least.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from quantize import surgery
from quantize.calibration import InputStatistics, collect
from quantize.pruning import scores
from quantize.pruning.cut import owners
from quantize.pruning.groups import Group
from quantize.pruning.labels import Key
from quantize.pruning.repair import as_matrix, matrix_rows

SCORES = ("magnitude", "activation", "reconstruction", "taylor")
MOMENTS = 2**27  # entries of second moments held at once while scoring (0.5 GB)


# Arguments.


def check_amount(amount: Any) -> dict[str, float]:
    given = dict(amount) if isinstance(amount, Mapping) else {"*": amount}
    if not given:
        raise ValueError("amount is an empty dict: name at least one layer")
    for name, value in given.items():
        where = "amount" if not isinstance(amount, Mapping) else f"amount[{name!r}]"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{where} must be a number in [0, 1), got {value!r}")
        if not 0 <= value < 1:
            raise ValueError(f"{where} is {value}; allowed: [0, 1), the fraction of channels removed")
        if not isinstance(name, str):
            raise TypeError(f"amount takes layer names, got {name!r}")
    return given


def check_options(n: Any, score: Any, scope: Any, round_to: Any, loss: Any, calibration: Any, skip: Any) -> None:
    if isinstance(n, bool) or not isinstance(n, (int, float)):
        raise TypeError(f"n must be a number > 0, got {n!r}")
    if not n > 0:
        raise ValueError(f"n is {n}; allowed: > 0, math.inf included")
    if score is not None and score not in SCORES:
        raise ValueError(f"score is {score!r}; allowed: {SCORES}")
    if score not in (None, "magnitude") and calibration is None:
        raise ValueError(f"score={score!r} needs calibration batches")
    if (score == "taylor") != (loss is not None):
        raise ValueError("score='taylor' and loss go together: give loss=function(model, batch) -> scalar, or another score")
    if scope not in ("layer", "global"):
        raise ValueError(f"scope is {scope!r}; allowed: 'layer', 'global'")
    if scope == "global" and score == "reconstruction":
        raise ValueError("score='reconstruction' ranks within a layer; with scope='global' use 'activation'")
    if round_to is not None and (isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1):
        raise ValueError(f"round_to is {round_to!r}; allowed: an integer >= 1, or None")


def refuse_quantized(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if (
                tensor is not None
                and (tensor.dtype in (torch.int8, torch.uint8, torch.qint8, torch.quint8))
                and tensor.ndim == 2
            ):
                raise ValueError(f"module {name!r} ({type(module).__name__}) holds int8 weights: prune before quantizing")
        if type(module).__name__ == "Int8Linear" or "quantized" in type(module).__module__.split("."):
            raise ValueError(f"module {name!r} ({type(module).__name__}) is quantized: prune before quantizing")


# Which groups, and how much of each.


def layers_of(model: nn.Module, group: Group) -> list[str]:
    return [place for name, _ in group.outputs for place, _, _ in owners(model, name)[:1]]


def choose(
    model: nn.Module, groups: list[Group], stuck: dict[Key, str], amounts: dict[str, float], skip: surgery.Skip
) -> tuple[list[Group], dict[str, str]]:
    """Groups to prune (with their `amount` set), and the layers left whole with the reason."""
    skipped = surgery.skip_filter(model, skip)
    left = {place: why for (name, _), why in stuck.items() for place, _, _ in owners(model, name)}
    layers = {i: [p for name, _ in g.outputs for p, _, _ in owners(model, name)] for i, g in enumerate(groups)}
    free: dict[int, Group] = {}
    for i, group in enumerate(groups):
        if any(skipped(p, model.get_submodule(p)) for p in layers[i]):
            left.update(dict.fromkeys(layers[i], "it or a layer tied to it is in skip"))
        elif any(_is_rank(model, p) for p in layers[i]):
            left.update(dict.fromkeys(layers[i], "its outputs are the rank of a low-rank pair"))
        else:
            free[i] = group
    chosen: dict[int, float] = {}
    names = {n for n, _ in model.named_modules()}
    for pattern, value in amounts.items():
        if pattern == "*":
            chosen.update({i: value for i in free if i not in chosen})
            continue
        matched = {n for n in names if n and _around(n, pattern)}
        if not matched:
            raise ValueError(f"amount names {pattern!r}, which is not a module of {type(model).__name__}")
        hit = [i for i in free if matched & set(layers[i])]
        if not hit:
            whys = {left[n] for n in sorted(matched) if n in left}
            raise ValueError(
                f"amount names {pattern!r}, which can't be pruned: {'; '.join(whys) or 'it has no output channels'}"
            )
        for i in hit:
            if chosen.setdefault(i, value) != value and set(amounts) - {"*"}:
                raise ValueError(f"amount gives {chosen[i]} and {value} to {layers[i]}, whose channels go together")
    if not chosen:
        raise ValueError(f"nothing in {type(model).__name__} can be pruned: {reasons(left)}")
    for i, value in chosen.items():
        free[i].amount = value
    return [free[i] for i in sorted(chosen)], left


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
        or "no layer has output channels that another layer reads (looked for linears, convolutions, embeddings)"
    )


def _keep(group: Group, amount: float, round_to: int | None) -> int:
    """How many units stay: near (1 - amount) of them, a multiple of the rounding, never none."""
    width = group.units * group.unit_size()
    if round_to is None:
        round_to = max((r for r in (16, 8, 4, 2, 1) if r * 8 <= width), default=1)
    step = -(-round_to // math.gcd(round_to, group.unit_size())) if group.unit_size() < round_to else 1
    target = group.units * (1 - amount)
    keep = max(step, round(target / step + 1e-9) * step) if amount else group.units
    return min(group.units, max(1, keep))


def remove(
    model: nn.Module,
    wanted: list[Group],
    rule: str,
    scope: str,
    n: float,
    round_to: int | None,
    calibration: Iterable[Any] | None,
    loss: Any,
    left: dict[str, str],
) -> None:
    """Fill in `removed` of every group."""
    keeps = [_keep(g, g.amount, round_to) for g in wanted]
    values = _scores(model, wanted, rule, n, calibration, loss, [g.units - k for g, k in zip(wanted, keeps, strict=True)])
    if scope == "global":
        keeps = _global(wanted, values, round_to)
    for group, value, keep in zip(wanted, values, keeps, strict=True):
        if not torch.isfinite(value[value != math.inf]).all():
            raise ValueError(f"layer {layers_of(model, group)[0]!r} has weights that are not finite")
        order = value.argsort(stable=True)
        group.removed = order[: group.units - keep].sort().values
        if group.amount and not len(group.removed):
            size = f"{group.units} units of {group.unit_size()} channels"
            left.update(dict.fromkeys(layers_of(model, group), f"removing {group.amount:g} of {size} rounds to none"))


def _global(wanted: list[Group], values: list[torch.Tensor], round_to: int | None) -> list[int]:
    """Units kept per group when the least important of all groups go first; a tenth of every group stays at least."""
    relative = [v / (v[v.isfinite()] ** 2).mean().sqrt().clamp(min=1e-30) for v in values]
    everything = torch.cat(relative)
    total = sum(g.units * g.amount for g in wanted)
    limit = everything.sort().values[min(len(everything) - 1, int(total))]
    keeps = []
    for group, value in zip(wanted, relative, strict=True):
        lost = min(int((value < limit).sum()) / group.units, 0.9) if group.amount else 0.0
        keeps.append(_keep(group, lost, round_to))
    return keeps


def _scores(
    model: nn.Module,
    groups: list[Group],
    rule: str,
    n: float,
    calibration: Iterable[Any] | None,
    loss: Any,
    removes: list[int],
) -> list[torch.Tensor]:
    if rule == "magnitude":
        return [scores.magnitude(model, g, n) for g in groups]
    if rule == "taylor":
        return scores.taylor(surgery.clone(model), groups, calibration, loss)  # type: ignore[arg-type]
    values: list[torch.Tensor] = []
    for chunk in _chunks(model, list(zip(groups, removes, strict=True))):
        layers = {place: module for g, _ in chunk for place, module, _ in _readers(model, g)}
        seen = calibrated(lambda layers=layers: collect(model, calibration, layers)) if layers else {}
        for group, remove in chunk:
            values.append(_score(model, group, rule, n, remove, seen))
    return values


def _score(model: nn.Module, group: Group, rule: str, n: float, remove: int, seen: dict[str, InputStatistics]) -> torch.Tensor:
    readers = [
        (as_matrix(module), matrix_rows(module, group.places[key]).flatten(1), seen[place])
        for place, module, key in _readers(model, group)
    ]
    if not readers:  # nothing that mixes channels reads them where we can look
        return scores.magnitude(model, group, n)
    if rule == "activation":
        return scores.activation_aware(readers, n)  # type: ignore[arg-type]
    return scores.reconstruction(readers, remove)  # type: ignore[arg-type]


def _readers(model: nn.Module, group: Group) -> list[tuple[str, nn.Module, Key]]:
    """Layers that sum over the group's channels and can be refitted."""
    found = []
    for key in group.inputs:
        for place, module, local in owners(model, key[0]):
            if local == "weight" and as_matrix(module) is not None and place == group.inputs[key]:
                found.append((place, module, key))
    return found


def _chunks(model: nn.Module, items: list[tuple[Group, int]]) -> Iterable[list[tuple[Group, int]]]:
    """Runs of groups whose second moments fit in memory together."""
    run: list[tuple[Group, int]] = []
    held = 0
    for item in items:
        size = sum(as_matrix(m).shape[1] ** 2 for _, m, _ in _readers(model, item[0]))  # type: ignore[union-attr]
        if run and held + size > MOMENTS:
            yield run
            run, held = [], 0
        run.append(item)
        held += size
    if run:
        yield run


def calibrated(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except (RuntimeError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(f"the model doesn't run on calibration: {type(error).__name__}: {error}") from error
