"""The layers that read a group's channels: which they are, and what scoring needs of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from quantize.calibration import collect, reached
from quantize.compression.pruning.cut import layers_of, owners
from quantize.compression.pruning.groups import Group
from quantize.compression.pruning.labels import Key
from quantize.compression.pruning.repair import as_matrix, matrix_rows
from quantize.compression.pruning.scores import Reader

MOMENTS = 2**27  # entries of second moments held at once while scoring (0.5 GB)
# Columns up to which a convolution's taps are told apart: a factorization takes the cube of them.
# Beyond, channels stand in for one another as they are, tap by tap, which ranks a little worse
# (a ResNet on digits, half removed: 0.031 nats against 0.023, the original 0.019).
WIDEST = 4096


def find_readers(
    model: nn.Module, groups: list[Group], calibration: Iterable[Any], left: dict[str, str]
) -> list[Group]:
    """Fill in `readers` of every group, and return the groups without those whose readers
    calibration never reaches.
    """
    every: dict[str, nn.Module] = {}
    for group in groups:
        group.readers = _readers(model, group)
        every.update({place: module for place, module, _ in group.readers})
    run = reached(model, calibration, every)
    used = []
    for group in groups:
        known = [reader for reader in group.readers if reader[0] in run]
        if group.readers and not known:
            why = f"calibration never reaches layer {group.readers[0][0]!r}, which reads it"
            left.update(dict.fromkeys(layers_of(model, group), why))
        else:
            group.readers = known
            used.append(group)
    return used


def by_readers(
    model: nn.Module,
    groups: list[Group],
    calibration: Iterable[Any] | None,
    score: Callable[[Group, list[Reader]], Any],
    say: Callable[[str], None],
    metrics: dict[str, torch.Tensor] | None = None,
) -> list[Any]:
    """What `score` says of each group from the layers that read it; None for a group that none
    reads.
    """
    values: list[Any] = []
    for chunk in _chunks(groups):
        layers = {place: module for group in chunk for place, module, _ in group.readers}
        coarse = [place for place, module in layers.items() if _by_channel(module)]
        if coarse:
            say(f"scoring by whole channels, for the size of its patches: {', '.join(coarse)}")
        if layers:
            say(f"inputs of {', '.join(layers)}")
        seen = {}
        if layers:
            seen = collect(model, calibration or (), layers, by_channel=coarse)
        for group in chunk:
            readers = []
            for place, module, key in group.readers:
                weight, columns = _columns(module, group.places[key])
                metric = (metrics or {}).get(place)
                readers.append(Reader(weight, columns, seen[place], metric))
            values.append(score(group, readers) if readers else None)
    return values


def _columns(module: Any, channels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's weight as `Reader` takes it, and the columns of each unit [units, S], from the
    unit's input channels.
    """
    matrix: torch.Tensor = as_matrix(module)  # type: ignore[assignment]
    if not _by_channel(module):
        return matrix, matrix_rows(module, channels).flatten(1)
    taps = matrix.view(len(matrix), module.in_channels, -1)  # [out, C, taps]
    return taps.transpose(1, 2).reshape(-1, module.in_channels), channels


def _by_channel(module: nn.Module) -> bool:
    """Has it too many columns to be looked at one by one?"""
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.weight[0].numel() > WIDEST


def _width(module: nn.Module) -> int:
    """Of the second moment that scoring takes of its inputs."""
    return module.in_channels if _by_channel(module) else as_matrix(module).shape[1]  # type: ignore[union-attr]


def _readers(model: nn.Module, group: Group) -> list[tuple[str, nn.Module, Key]]:
    """Layers that sum over the group's channels and can be refitted."""
    found = []
    for key, reading in group.inputs.items():
        for place, module, local in owners(model, key[0]):
            if local == "weight" and place == reading and as_matrix(module) is not None:
                found.append((place, module, key))
    return found


def _chunks(groups: list[Group]) -> Iterator[list[Group]]:
    """Runs of groups whose second moments fit in memory together."""
    run: list[Group] = []
    held = 0
    for group in groups:
        size = sum(_width(module) ** 2 for _, module, _ in group.readers)
        if run and held + size > MOMENTS:
            yield run
            run, held = [], 0
        run.append(group)
        held += size
    if run:
        yield run
