"""Models to and from checkpoints: what is stored of a model. How one is made of that again is in
building.py.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quantize import surgery
from quantize.checkpoint.building import (
    ARCHITECTURES,
    Bounded,
    allowed_tensors,
    build,
    contradictions,
    fill,
    fit,
    live_tensors,
    restride,
    without_data,
)
from quantize.checkpoint.container import read_header, read_tensor, write
from quantize.checkpoint.opening import SUFFIXES, opened, require
from quantize.nn import own_class

IN_FOLDER = "quantize.safetensors"  # the file in a folder that save_folder wrote

Architecture = TypeVar("Architecture", bound=type[nn.Module])


def architecture(cls: Architecture) -> Architecture:
    """Decorator for a built-in model class, so that `load(path)` can rebuild it from the file
    alone.

    `cls(config)` takes an instance of the frozen dataclass `cls.config_class`, keeps it as
    `.config`, builds on the meta device, and computes no non-persistent buffers.
    """
    if not dataclasses.is_dataclass(getattr(cls, "config_class", None)):
        raise TypeError(f"{cls.__name__}.config_class must be a dataclass")
    ARCHITECTURES[cls.__name__] = cls
    return cls


def save(model: nn.Module, path: str | Path, *, metadata: dict[str, Any] | None = None) -> None:
    """Write `model` to `path` (`.pth` or `.safetensors`), atomically; the same model gives the same
    bytes.

    Stores what `state_dict()` gives, as CPU tensors; parameters (or buffers) that are one tensor
    under several names once.

    Args:
        model: any nn.Module whose state is plain tensors.
        path: the file to write or replace; its suffix chooses the container.
        metadata: a dict of JSON values (metrics, the recipe), at most about 8 MB, which
            `read_metadata` gives back as JSON does (tuples as lists).

    Raises:
        ValueError: another suffix, a tensor that the container can't hold, metadata of more bytes.
        TypeError: state that isn't a plain tensor, metadata that isn't JSON.
        OSError: the file can't be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a checkpoint's name ends in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    if not surgery.is_eager(model):
        kind = type(model).__name__
        raise TypeError(f"model must be an nn.Module and no TorchScript, got {kind}")
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError(f"metadata must be a dict, got {type(metadata).__name__}")
    for module in model.modules():
        if reason := getattr(type(module), "not_saved", None):
            raise TypeError(reason)
    tensors, aliases, strides = _tensors(model)
    record = {
        "architecture": _describe(model),
        "structure": _structure(model),
        "aliases": aliases,
        "strides": strides,
        "notes": surgery.notes(model),
        "metadata": metadata or {},
        "versions": {
            "quantize": _version(),
            "torch": torch.__version__,
        },
    }
    write(path, record, tensors)


@functools.cache
def _version() -> str:
    """Of this package; looking it up takes longer than writing a small model."""
    return importlib.metadata.version("quantize")


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model in the file, on the CPU and in eval mode.

    A built-in model is rebuilt from the file; any other is rebuilt on a copy of `model`.

    Args:
        path: a file that `save` wrote.
        model: a fresh instance of the class that was saved, for a class that isn't built in. It
            stays as it is; a copy gets the file's structure and tensors.

    Returns:
        The model that was saved.

    Raises:
        CheckpointError: with the path and the reason, for a file that is missing, truncated,
            altered, foreign, newer, unsafe, or of another architecture.
        TypeError: `model` is no nn.Module.
    """
    if model is not None and not surgery.is_eager(model):
        raise TypeError(
            f"model must be an nn.Module and no TorchScript, got {model!r}; to load Net's file, "
            f"pass model=Net()"
        )
    with opened(path) as file:
        record, places = read_header(file, Path(path).suffix)
        notes = _notes(record)
        empty = build(record) if model is None else without_data(surgery.uncompiled(model))
        known = contradictions(empty, record)
        empty = _restructured(empty, record)
        dtypes = fit(record, empty)
        filled = fill(empty, _read(file, record, places), record["aliases"], dtypes)
        for name, reason in contradictions(filled, record).items():
            require(name in known, f"module {name!r} contradicts itself: {reason}")
    _give_notes(filled, notes)
    return filled


def _restructured(empty: nn.Module, record: dict[str, Any]) -> nn.Module:
    """The model without data after the edits of the file, which make no more than it may hold."""
    edits = record["structure"]
    with torch.device("meta"), Bounded(allowed_tensors(record, edits=len(edits))):
        return surgery.rebuild(empty, edits)


def _read(file: BinaryIO, record: dict[str, Any], places: list[Any]) -> dict[str, Tensor]:
    """The file's tensors by name, in the order of memory in which they were saved."""
    tensors: dict[str, Tensor] = {}
    strides = record["strides"]
    for (name, spec), place in zip(record["tensors"].items(), places, strict=True):
        tensor = read_tensor(file, *place, **spec)
        tensors[name] = restride(tensor, strides[name]) if name in strides else tensor
    return tensors


def read_record(path: str | Path) -> dict[str, Any]:
    """Everything in the file but the tensors' data, checked: architecture, structure, tensors,
    aliases, metadata, versions.

    `record["tensors"]` maps each stored name to its dtype, shape and SHA-256. Of a folder, its file
    is read. Raises CheckpointError as `load` does.
    """
    path = Path(path)
    path = path / IN_FOLDER if (path / IN_FOLDER).is_file() else path
    with opened(path) as file:
        return read_header(file, path.suffix)[0]


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The `metadata` that the file was saved with; reads the header only.

    Args:
        path: a file that `save` wrote, or a folder that `save_folder` wrote.

    Returns:
        The dict given to `save`, as JSON gives it back; {} if there was none.

    Raises:
        CheckpointError: as `load` does.
    """
    return read_record(path)["metadata"]


def summary(model_or_path: nn.Module | str | Path) -> surgery.Summary:
    """What every technique did to a model and what it left, with the reasons; of a file, read from
    its header only.

    Args:
        model_or_path: a model that a technique returned, a file that `save` wrote, or a folder that
            `save_folder` wrote.

    Returns:
        The steps in their order, with the layers that each changed and left; printing it gives a
        line a layer.

    Raises:
        CheckpointError: as `load` does.
        TypeError: something that is neither a module nor a path.
    """
    if isinstance(model_or_path, nn.Module):
        return surgery.Summary.of(surgery.notes(model_or_path))
    if not isinstance(model_or_path, (str, Path)):
        raise TypeError(f"summary takes a model or a path, got {type(model_or_path).__name__}")
    return surgery.Summary.of(_notes(read_record(model_or_path)))


_STEP = {
    "technique": str,
    "done": dict,
    "left": dict,
    "distance": (float, int, type(None)),
    "settings": dict,
}


def _notes(record: dict[str, Any]) -> list[dict[str, Any]]:
    steps = record.get("notes", [])  # files of earlier versions have none
    for step in steps:
        require(isinstance(step, dict) and step.keys() == _STEP.keys(), "its notes are damaged")
        require(
            all(isinstance(step[key], kind) for key, kind in _STEP.items()), "its notes are damaged"
        )
        texts = [*step["done"].values(), *step["left"].values()]
        require(all(isinstance(text, str) for text in texts), "its notes are damaged")
    return steps


def _give_notes(model: nn.Module, steps: list[dict[str, Any]]) -> None:
    for module in model.modules():
        module.__dict__.pop("_notes", None)
    if steps:
        model.__dict__["_notes"] = steps


def _describe(model: nn.Module) -> dict[str, Any]:
    name = type(model).__name__
    if ARCHITECTURES.get(name) is not own_class(model):
        return {"name": name, "config": None}
    lost: list[str] = []
    for module in model.modules():
        unsaved = module._non_persistent_buffers_set
        lost += [key for key in unsaved if module._buffers.get(key) is not None]
    if lost:
        raise TypeError(
            f"{name} is registered as built-in but has non-persistent buffers, which a file "
            f"can't restore: {lost}"
        )
    config: Any = model.config
    return {"name": name, "config": dataclasses.asdict(config)}


def _structure(model: nn.Module) -> list[dict[str, Any]]:
    edits = surgery.structure(model)
    surgery.check_count(edits)
    modules = dict(model.named_modules(remove_duplicate=False))
    for edit in edits:
        module = modules.get(edit["module"])
        if module is None:  # inside of what another edit replaced
            continue
        resized = edit["arguments"].get("shapes", {}).keys()
        if lost := module._non_persistent_buffers_set & resized:
            raise TypeError(
                f"{edit['module']!r} has resized non-persistent buffers, which a file can't "
                f"restore: {sorted(lost)}"
            )
    return edits


class _Stored(NamedTuple):
    """What a file holds of a model's state: each tensor once, the other names of each, and the
    strides of those in another order.
    """

    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    strides: dict[str, list[int]]


def _tensors(model: nn.Module) -> _Stored:
    live = live_tensors(model)
    stored = _Stored({}, {}, {})
    owners: dict[Any, str] = {}
    storages: set[int] = set()
    for name, value in model.state_dict().items():
        _check_plain(name, value)
        owner = name
        if name in live:
            owner = owners.setdefault(_identity(live[name], value), name)
        if owner != name:
            stored.aliases[name] = owner
            continue
        stored.tensors[name] = _alone(value, storages)
        strides = torch.empty_like(value, device="meta").stride()
        if strides != torch.empty(value.shape, device="meta").stride():
            stored.strides[name] = list(strides)
    return stored


def _identity(live: Tensor, value: Tensor) -> tuple:
    """The same for two names of one tensor. A parameter and a buffer are two."""
    start = live.data_ptr() if live.numel() else id(live)
    place = live.device, start, live.dtype, live.shape, live.stride()
    return isinstance(live, nn.Parameter), value.dtype, *place


def _alone(value: Tensor, storages: set[int]) -> Tensor:
    """The values, contiguous on the CPU, in a storage that none of `storages` is; it joins them."""
    plain = value.detach().as_subclass(Tensor).cpu()
    tensor = plain.resolve_conj().resolve_neg().contiguous()
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes or storage._cdata in storages:
        tensor = tensor.clone()
    storages.add(tensor.untyped_storage()._cdata)
    return tensor


def _check_plain(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"state_dict() has {name!r} of type {type(value).__name__}; only tensors can be saved"
        )
    if nn.parameter.is_lazy(value):
        raise TypeError(f"{name!r} has no shape yet: run the model once before saving")
    if (
        value.is_meta
        or value.layout != torch.strided
        or value.is_quantized
        or is_traceable_wrapper_subclass(value)
    ):
        kind = f"{type(value).__name__}, {value.layout}, {value.dtype}, on {value.device}"
        raise TypeError(f"{name!r} ({kind}) can't be saved: only plain dense tensors with data")
