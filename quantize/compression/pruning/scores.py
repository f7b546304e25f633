"""How much a unit matters: by the norm of its weights, what it feeds forward, the loss, what can't
be rebuilt without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantize.calibration import InputStatistics, copied, watching, without_cache
from quantize.compression.pruning.groups import Group


def channel_norms(weight: torch.Tensor, n: float, dim: int = 0) -> torch.Tensor:
    """Ln norm of every slice of `weight` along `dim`, [size of dim] (as
    `torch.nn.utils.prune.ln_structured`).
    """
    return torch.linalg.vector_norm(weight.detach().movedim(dim, 0).flatten(1).double(), n, dim=1)


def magnitude(model: nn.Module, group: Group, n: float) -> torch.Tensor:
    """Ln norm over all weights that make a unit's channels, [units]."""
    parts = []
    for name, dim in group.outputs:
        weight = _weight(model, name).detach().movedim(dim, 0).double()
        parts.append(weight[group.places[name, dim].to(weight.device)].flatten(1))
    return torch.linalg.vector_norm(torch.cat(parts, 1), n, dim=1)


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter as it is stored, or a buffer that is used as a weight (a fixed filter)."""
    place, _, key = name.rpartition(".")
    module = model.get_submodule(place)
    parameter = module._parameters.get(key)  # a 16-bit layer's weight reads in another dtype
    return getattr(module, key) if parameter is None else parameter


@dataclass
class Reader:
    """A layer that sums over a group's channels: what scoring needs of it."""

    weight: torch.Tensor  # [out, K]
    places: torch.Tensor  # the columns that belong to each unit, [units, S]
    seen: InputStatistics  # of its inputs
    metric: torch.Tensor | None = None  # E[g g^T] of the model's output by its outputs, [out, out]


def activation_aware(readers: list[Reader], n: float) -> torch.Tensor:
    """Root mean square of a unit's inputs to the layers that read it, times the Ln norm of their
    weights, [units].

    The weight x activation score of Wanda (Sun et al., arXiv 2306.11695), summed over a channel as
    in FLAP (arXiv 2312.11983).
    """
    total: torch.Tensor | float = 0.0
    for reader in readers:
        power = reader.seen.second_moment.diagonal().double().clamp(min=0)
        strength = power * channel_norms(reader.weight, n, 1) ** 2  # [K]
        total = total + strength[reader.places].sum(1) / strength.sum().clamp(min=1e-30)
    return torch.sqrt(torch.as_tensor(total))


def reconstruction(
    readers: list[Reader], remove: int, ridge: float = 1e-3, rounds: int = 48
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order in which to remove up to `remove` units, each time those whose loss costs least after a
    refit; and those costs.

    With H the second moment of a layer's inputs and W its weight, removing the inputs S and
    refitting the rest by least squares costs tr(W_S inv(inv(H)_SS) W_S^T) (optimal brain surgeon;
    for structures: ZipLM, Kurtic et al., arXiv 2302.04089). Errors of the layer's outputs count by
    the layer's `metric` where all readers have one (then costs can be compared between groups: they
    are squared changes of the model's output, summed over the rows seen), else relative to what the
    layer gives.

    Returns scores [units], less for what goes earlier, and the costs of removing 0, 1, ... `remove`
    units, [remove + 1].
    """
    known = all(reader.metric is not None for reader in readers)
    state = []
    for reader in readers:
        moment, weight = reader.seen.second_moment.double(), reader.weight.double()
        moment = moment + torch.eye(len(moment), dtype=moment.dtype) * (
            ridge * moment.diagonal().mean() + 1e-12
        )
        if known:
            weight = root(reader.metric) @ weight * reader.seen.count**0.5  # type: ignore[arg-type]
        else:
            weight = weight / ((weight @ moment) * weight).sum().clamp(min=1e-30).sqrt()
        state.append([weight, torch.cholesky_inverse(torch.linalg.cholesky(moment)), reader.places])
    units = len(readers[0].places)
    score = torch.full((units,), math.inf, dtype=torch.float64)
    alive = torch.ones(units, dtype=torch.bool)
    step = max(1, -(-remove // rounds))
    cost = torch.zeros(units, dtype=torch.float64)
    costs = [torch.zeros(1, dtype=torch.float64)]
    for done in range(0, remove, step):
        cost = torch.zeros(units, dtype=torch.float64)
        candidates = alive.nonzero().flatten()
        for weight, inverse, places in state:
            rows = places[candidates]  # [U, S]
            block = inverse[rows[:, :, None], rows[:, None, :]]  # [U, S, S]
            columns = weight[:, rows].permute(1, 2, 0)  # [U, S, out]
            cost[candidates] += (columns * torch.linalg.solve(block, columns)).sum((1, 2))
        cost[~alive] = math.inf
        gone = cost.argsort()[: min(step, remove - done)]
        score[gone] = torch.arange(done, done + len(gone), dtype=torch.float64)
        alive[gone] = False
        paid = 0.0
        for entry in state:
            weight, inverse, places = entry
            rows = places[gone].flatten()
            block = inverse[rows][:, rows]
            paid += float((weight[:, rows].T * torch.linalg.solve(block, weight[:, rows].T)).sum())
            solved = torch.linalg.solve(block, inverse[rows])  # [R, K]
            entry[0] = weight - weight[:, rows] @ solved
            entry[1] = inverse - inverse[:, rows] @ solved
            entry[1][rows] = 0
            entry[1][:, rows] = 0
            entry[1][rows, rows] = 1
            entry[0][:, rows] = 0
        costs.append(
            costs[-1][-1]
            + max(paid, 0.0) * torch.arange(1, len(gone) + 1, dtype=torch.float64) / len(gone)
        )
    score[alive] = remove + torch.where(cost.isfinite(), cost, 0.0)[alive]
    return score, torch.cat(costs)


def root(metric: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(metric.double())
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def taylor(
    model: nn.Module,
    groups: list[Group],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
) -> list[torch.Tensor]:
    """Squared first-order change of the loss when a unit goes (Molchanov et al., arXiv 1906.10771),
    [units] per group.
    """
    totals = [torch.zeros(g.units, dtype=torch.float64) for g in groups]
    weights = {name: _weight(model, name) for g in groups for name, _ in g.outputs}
    trained = {name: weight.requires_grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        with watching((), model), without_cache(model), torch.enable_grad():
            value = loss(model, copied(batch, {}))
            if not torch.isfinite(value):
                raise ValueError(f"loss gives {value.item()} on a calibration batch")
            gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        given = dict(zip(weights, gradients, strict=True))
        for total, group in zip(totals, groups, strict=True):
            change = torch.zeros(group.units, dtype=torch.float64)
            for name, dim in group.outputs:
                if given[name] is not None:
                    gradient = given[name].to_dense() if given[name].is_sparse else given[name]
                    moved = (weights[name] * gradient).detach().movedim(dim, 0).double()
                    change += moved[group.places[name, dim]].flatten(1).sum(1)
            total += change**2
    for name, weight in weights.items():
        weight.requires_grad_(trained[name])
    return totals
