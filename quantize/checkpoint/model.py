"""Models to and from checkpoints: what is stored of a model, and how one is rebuilt from a record and tensors."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quantize import surgery
from quantize.checkpoint.container import DTYPES, read_header, read_tensor, write
from quantize.checkpoint.opening import SUFFIXES, CheckpointError, opened, require

_ARCHITECTURES: dict[str, type[nn.Module]] = {}


def architecture(cls: type[nn.Module]) -> type[nn.Module]:
    """Decorator for a built-in model class, so that `load(path)` can rebuild it from the file alone.

    `cls(config)` takes an instance of the frozen dataclass `cls.config_class`, keeps it as `.config`, builds on the meta
    device, and computes no non-persistent buffers.
    """
    if not dataclasses.is_dataclass(getattr(cls, "config_class", None)):
        raise TypeError(f"{cls.__name__}.config_class must be a dataclass")
    _ARCHITECTURES[cls.__name__] = cls
    return cls


def save(model: nn.Module, path: str | Path, *, metadata: dict[str, Any] | None = None) -> None:
    """Write `model` to `path` (`.pth` or `.safetensors`), atomically; the same model gives the same bytes.

    Stores what `state_dict()` gives, as CPU tensors; parameters (or buffers) that are one tensor under several names once.
    `metadata` is a dict of JSON values (metrics, the recipe), which `read_metadata` gives back as JSON does (tuples as lists).

    Raises ValueError for another suffix, a tensor that the container can't hold or metadata of more than about 8 MB; TypeError
    for state that isn't a plain tensor and for metadata that isn't JSON; OSError when the file can't be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a checkpoint's name ends in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be an nn.Module and no TorchScript, got {type(model).__name__}")
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError(f"metadata must be a dict, got {type(metadata).__name__}")
    tensors, aliases, strides = _tensors(model)
    record = {
        "architecture": _describe(model),
        "structure": _structure(model),
        "aliases": aliases,
        "strides": strides,
        "notes": surgery.notes(model),
        "metadata": metadata or {},
        "versions": {"quantize": importlib.metadata.version("quantize"), "torch": torch.__version__},
    }
    write(path, record, tensors)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model in the file, on the CPU and in eval mode.

    A built-in model is rebuilt from the file. For any other, pass `model`, a fresh instance of the class that was saved: a copy
    of it gets the file's structure and tensors and is returned, the instance itself stays as it is.

    Raises CheckpointError, with the path and the reason, for a file that is missing, truncated, altered, foreign, newer,
    unsafe, or of another architecture; TypeError when `model` is no nn.Module.
    """
    if model is not None and (not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule)):
        raise TypeError(f"model must be an nn.Module and no TorchScript, got {model!r}; to load Net's file, pass model=Net()")
    with opened(path) as file:
        record, places = read_header(file, Path(path).suffix)
        empty = _build(record) if model is None else _without_data(model)
        with torch.device("meta"), _Bounded(record):
            empty = surgery.rebuild(empty, record["structure"])
        dtypes = _fit(record, empty)
        tensors = {}
        for (name, spec), place in zip(record["tensors"].items(), places, strict=True):
            tensor = read_tensor(file, *place, **spec)
            tensors[name] = _restride(tensor, record["strides"][name]) if name in record["strides"] else tensor
        filled = _fill(empty, tensors, record["aliases"], dtypes)
    _give_notes(filled, record)
    return filled


def read_record(path: str | Path) -> dict[str, Any]:
    """Everything in the file but the tensors' data, checked: architecture, structure, tensors, aliases, metadata, versions.

    `record["tensors"]` maps each stored name to its dtype, shape and SHA-256. Raises CheckpointError as `load` does.
    """
    with opened(path) as file:
        return read_header(file, Path(path).suffix)[0]


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The `metadata` that the file was saved with; reads the header only. Raises CheckpointError as `load` does."""
    return read_record(path)["metadata"]


def summary(model_or_path: nn.Module | str | Path) -> surgery.Summary:
    """What every technique did to a model and what it left, with the reasons; of a file, read from its header only.

    Raises CheckpointError as `load` does, TypeError for something that is neither a module nor a path.
    """
    if isinstance(model_or_path, nn.Module):
        return surgery.Summary.of(surgery.notes(model_or_path))
    if not isinstance(model_or_path, (str, Path)):
        raise TypeError(f"summary takes a model or a path, got {type(model_or_path).__name__}")
    with opened(model_or_path) as file:
        record, _ = read_header(file, Path(model_or_path).suffix)
        return surgery.Summary.of(_notes(record))


_STEP = {"technique": str, "done": dict, "left": dict, "distance": (float, int, type(None)), "settings": dict}


def _notes(record: dict[str, Any]) -> list[dict[str, Any]]:
    steps = record.get("notes", [])  # files of earlier versions have none
    for step in steps:
        require(isinstance(step, dict) and step.keys() == _STEP.keys(), "its notes are damaged")
        require(all(isinstance(step[key], kind) for key, kind in _STEP.items()), "its notes are damaged")
        texts = [*step["done"].values(), *step["left"].values()]
        require(all(isinstance(text, str) for text in texts), "its notes are damaged")
    return steps


def _give_notes(model: nn.Module, record: dict[str, Any]) -> None:
    for module in model.modules():
        module.__dict__.pop("_notes", None)
    if steps := _notes(record):
        model.__dict__["_notes"] = steps


def _describe(model: nn.Module) -> dict[str, Any]:
    name = type(model).__name__
    if _ARCHITECTURES.get(name) is not type(model):
        return {"name": name, "config": None}
    lost = [n for m in model.modules() for n in m._non_persistent_buffers_set if m._buffers.get(n) is not None]
    if lost:
        raise TypeError(f"{name} is registered as built-in but has non-persistent buffers, which a file can't restore: {lost}")
    return {"name": name, "config": dataclasses.asdict(model.config)}


def _structure(model: nn.Module) -> list[dict[str, Any]]:
    edits = surgery.structure(model)
    for edit in edits:
        lost = model.get_submodule(edit["module"])._non_persistent_buffers_set & edit["arguments"].get("shapes", {}).keys()
        if lost:
            raise TypeError(
                f"{edit['module']!r} has resized non-persistent buffers, which a file can't restore: {sorted(lost)}"
            )
    return edits


def _live(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers themselves, under every name they have."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, list[int]]]:
    """What to store: each tensor once, contiguous on the CPU with storage of its own; other names of each; their strides.

    Strides are noted for dense tensors in another order (channels last, a transposed weight): kernels are chosen by them.
    """
    live = _live(model)
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[Any, str] = {}
    strides: dict[str, list[int]] = {}
    storages: set[int] = set()
    for name, value in model.state_dict().items():
        _check_plain(name, value)
        origin = live.get(name)
        if origin is not None:
            start = origin.data_ptr() if origin.numel() else id(origin)
            place = (origin.device, start, origin.dtype, origin.shape, origin.stride())
            owner = owners.setdefault((isinstance(origin, nn.Parameter), value.dtype, *place), name)
            if owner != name:
                aliases[name] = owner
                continue
        tensor = value.detach().as_subclass(torch.Tensor).cpu().resolve_conj().resolve_neg().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.untyped_storage()._cdata in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage()._cdata)
        tensors[name] = tensor
        order = torch.empty_like(value, device="meta").stride()
        if order != torch.empty(value.shape, device="meta").stride():
            strides[name] = list(order)
    return tensors, aliases, strides


def _check_plain(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"state_dict() has {name!r} of type {type(value).__name__}; only tensors can be saved")
    if nn.parameter.is_lazy(value):
        raise TypeError(f"{name!r} has no shape yet: run the model once before saving")
    if value.is_meta or value.layout != torch.strided or value.is_quantized or is_traceable_wrapper_subclass(value):
        kind = f"{type(value).__name__}, {value.layout}, {value.dtype}, on {value.device}"
        raise TypeError(f"{name!r} ({kind}) can't be saved: only plain dense tensors with data")


def _build(record: dict[str, Any]) -> nn.Module:
    name, config = record["architecture"]["name"], record["architecture"]["config"]
    if config is None or name not in _ARCHITECTURES:
        raise CheckpointError(f"holds a {name}, which quantize can't build by itself: pass model={name}(...), a fresh instance")
    cls = _ARCHITECTURES[name]
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    with torch.device("meta"), _Bounded(record):
        return cls(cls.config_class(**config))


_FILLING = set("zero_ fill_ normal_ uniform_ copy_ zeros_ ones_ constant_ kaiming_uniform_ xavier_uniform_".split())


class _Bounded(TorchFunctionMode):
    """Stops a build that takes more tensor operations than the file's tensors can account for (about 5 each).

    Leaves out initialisation: there is no data to initialise, and the meta kernels for it take seconds to import (so does a
    TorchDispatchMode).
    """

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__()
        self.left = 1000 + 50 * (len(record["tensors"]) + len(record["aliases"]) + len(record["structure"]))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        require(self.left, "its config describes a far larger model than the file holds")
        if getattr(func, "__name__", "") in _FILLING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _without_data(model: nn.Module) -> nn.Module:
    """A copy of `model` with its parameters and persistent buffers on the meta device."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kept = name in module._non_persistent_buffers_set and not buffer.is_meta
                memo[id(buffer)] = buffer.detach().cpu().clone() if kept else buffer.detach().to("meta")
    return surgery.deepcopy(model, memo)


def _fit(record: dict[str, Any], model: nn.Module) -> dict[str, torch.dtype]:
    """Compare names, shapes and kinds of numbers with the file's; returns what dtype each name has in memory.

    That is the file's, unless `model.state_dict()` gives the file's dtype itself for a parameter that lives in another one.
    """
    expected, live = model.state_dict(), _live(model)
    specs = record["tensors"] | {alias: record["tensors"][name] for alias, name in record["aliases"].items()}
    problems = [f"no {n!r} in the file" for n in expected if n not in specs]
    problems += [f"{n!r} only in the file" for n in specs if n not in expected]
    dtypes = {}
    for name in expected.keys() & specs.keys():
        stored, tensor = DTYPES[specs[name]["dtype"]], expected[name]
        if name.endswith("_extra_state"):
            dtypes[name] = stored
            continue
        if list(tensor.shape) != specs[name]["shape"] or _kind(tensor.dtype) != _kind(stored):
            here, there = f"{tensor.dtype} {list(tensor.shape)}", f"torch.{specs[name]['dtype']} {specs[name]['shape']}"
            problems.append(f"{name!r} is {there} in the file, {here} in the model")
        dtypes[name] = live[name].dtype if name in live and tensor.dtype == stored else stored
    if problems:
        classes = f"the file holds a {record['architecture']['name']}, the model is a {type(model).__name__}"
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"another architecture: {classes}; {'; '.join(sorted(problems)[:3])}{more}")
    return dtypes


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point or dtype.is_complex:
        return "complex" if dtype.is_complex else "float"
    return "bool" if dtype == torch.bool else "int"


def _restride(tensor: torch.Tensor, strides: list[int]) -> torch.Tensor:
    needed = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="meta").untyped_storage().nbytes()
    require(needed == tensor.nbytes, f"strides {strides} don't fit shape {list(tensor.shape)}")
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def _fill(
    model: nn.Module, tensors: dict[str, torch.Tensor], aliases: dict[str, str], dtypes: dict[str, torch.dtype]
) -> nn.Module:
    state = model.state_dict()  # keeps the module versions that load_state_dict asks for
    for name in list(state):
        state[name] = tensors[aliases.get(name, name)].to(dtypes[name])
    model.load_state_dict(state, assign=True)
    live = _live(model)
    for alias, name in aliases.items():
        a, b = live.get(alias), live.get(name)
        if a is not None and b is not None and type(a) is type(b) and a.dtype == b.dtype:
            module, _, key = alias.rpartition(".")
            setattr(model.get_submodule(module), key, b)
    lost = [name for name, tensor in live.items() if tensor.is_meta]
    require(not lost, f"the file has no data for {', '.join(lost[:3])}")
    return model.eval()
