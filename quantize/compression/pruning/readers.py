"""The layers that read a group's channels: which they are, and what scoring needs of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from quantize.calibration import CONVOLUTIONS, Survey
from quantize.compression.pruning.cut import Owners, layers_of, owners
from quantize.compression.pruning.groups import Group
from quantize.compression.pruning.labels import Key
from quantize.compression.pruning.repair import as_matrix, is_repairable, matrix_rows
from quantize.compression.pruning.scores import Reader
from quantize.saying import Say

MEMORY = 1 << 29  # bytes of second moments held at once while scoring
# Columns up to which a convolution's taps are told apart: a factorization takes the cube of them.
# Beyond, channels stand in for one another as they are, tap by tap, which ranks a little worse
# (a ResNet on digits, half removed: 0.031 nats against 0.023, the original 0.019).
WIDEST = 4096


def find_readers(model: nn.Module, groups: list[Group]) -> dict[str, nn.Module]:
    """Fill in `readers` of every group, and return all of them by name."""
    every: dict[str, nn.Module] = {}
    holders = owners(model)
    for group in groups:
        group.readers = _readers(holders, group)
        every.update({place: module for place, module, _ in group.readers})
    return every


def survey_readers(
    model: nn.Module,
    readers: Mapping[str, nn.Module],
    calibration: Iterable[Any],
    say: Say,
) -> Survey:
    """What scoring needs to see of the layers that read channels, and the look at all layers that
    may be repaired later.
    """
    widths = {place: (_width(m), len(_matrix(m))) for place, m in readers.items()}
    coarse = [place for place, module in readers.items() if _by_channel(module)]
    if coarse:
        say(f"scoring by whole channels, for the size of its patches: {', '.join(coarse)}")
    watched = {n: m for n, m in model.named_modules() if is_repairable(m)}
    return Survey(
        model,
        calibration,
        widths,
        watched=watched,
        by_channel=coarse,
        memory=MEMORY,
        say=say,
    )


def reached_groups(
    model: nn.Module, groups: list[Group], run: Collection[str], left: dict[str, str]
) -> list[Group]:
    """The groups without those whose readers, by name, aren't among those that calibration ran."""
    used = []
    holders = owners(model)
    for group in groups:
        known = [reader for reader in group.readers if reader[0] in run]
        if group.readers and not known:
            why = f"calibration never reaches layer {group.readers[0][0]!r}, which reads it"
            left.update(dict.fromkeys(layers_of(holders, group), why))
        else:
            group.readers = known
            used.append(group)
    return used


def by_readers(
    groups: list[Group], survey: Survey, score: Callable[[Group, list[Reader]], Any]
) -> list[Any]:
    """What `score` says of each group from the layers that read it; None for a group that none
    reads.
    """
    values: list[Any] = []
    for group in groups:
        readers = []
        for place, module, key in group.readers:
            weight, columns = _columns(module, group.places[key])
            reader = Reader(weight, columns, survey.inputs(place), survey.gradient(place))
            readers.append(reader)
        values.append(score(group, readers) if readers else None)
    return values


def _columns(module: Any, channels: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's weight as `Reader` takes it, and the columns of each unit [units, S], from the
    unit's input channels.
    """
    matrix = _matrix(module)
    if not _by_channel(module):
        return matrix, matrix_rows(module, channels).flatten(1)
    taps = matrix.view(len(matrix), module.in_channels, -1)  # [out, C, taps]
    return taps.transpose(1, 2).reshape(-1, module.in_channels), channels


def _by_channel(module: nn.Module) -> bool:
    """Has it too many columns to be looked at one by one?"""
    return isinstance(module, CONVOLUTIONS) and module.weight[0].numel() > WIDEST


def _width(module: Any) -> int:
    """Of the second moment that scoring takes of its inputs."""
    return module.in_channels if _by_channel(module) else _matrix(module).shape[1]


def _matrix(module: nn.Module) -> Tensor:
    matrix = as_matrix(module)
    assert matrix is not None  # it was found as a reader
    return matrix


def _readers(holders: Owners, group: Group) -> list[tuple[str, nn.Module, Key]]:
    """Layers that sum over the group's channels and can be refitted."""
    found = []
    for key, reading in group.inputs.items():
        for place, module, local in holders(key[0]):
            if local == "weight" and place == reading and as_matrix(module) is not None:
                found.append((place, module, key))
    return found
