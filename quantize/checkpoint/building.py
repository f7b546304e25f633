"""A model from a record and tensors: built without data, compared with what the file holds, then
filled.

Nothing here takes time or memory beyond a small multiple of the file's own: a config or an edit
that asks for more is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantize import surgery
from quantize.checkpoint.contents import DTYPES
from quantize.checkpoint.opening import CheckpointError, require

ARCHITECTURES: dict[str, type[nn.Module]] = {}


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers themselves, under every name they have."""
    return dict(
        [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
    )


def build(record: dict[str, Any]) -> nn.Module:
    """The built-in model that the record names, without data."""
    name, config = record["architecture"]["name"], record["architecture"]["config"]
    if config is None or name not in ARCHITECTURES:
        name = name[:80]
        raise CheckpointError(
            f"holds a {name}, which quantize can't build by itself: pass model={name}(...), a "
            f"fresh instance, or --model to a command"
        )
    cls: Any = ARCHITECTURES[name]
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    with torch.device("meta"), Bounded(allowed_tensors(record)):
        return cls(cls.config_class(**config))


_FILLING = set(
    "zero_ fill_ normal_ uniform_ copy_ zeros_ ones_ constant_ kaiming_uniform_ "
    "xavier_uniform_".split()
)
_MAKING = {
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.tensor,
    torch.arange,
    torch.empty_strided,
}
# tensors that may be made whatever the file holds: a student's teacher has more blocks than are in
# the file
_FREE = 2000


class Bounded(TorchFunctionMode):
    """Stops a build that makes more tensors than the file's can account for: each takes memory even
    without data.

    Leaves out initialisation: there is no data to initialise, and the meta kernels for it take
    seconds to import (so does a TorchDispatchMode).
    """

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.tensors, self.calls = tensors, 20 * tensors

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls -= 1
        self.tensors -= func in _MAKING
        require(
            self.calls and self.tensors > 0,
            "its config describes a far larger model than the file holds",
        )
        if getattr(func, "__name__", "") in _FILLING:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def allowed_tensors(record: dict[str, Any], edits: int = 0) -> int:
    """How many tensors a build for this file may make, and so many edits of it."""
    stored = len(record["tensors"])
    return _FREE + 2 * (stored + min(stored, len(record["aliases"]))) + 20 * edits


def without_data(model: nn.Module) -> nn.Module:
    """A copy of `model` with its parameters and persistent buffers on the meta device."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            memo[id(parameter)] = nn.Parameter(
                parameter.detach().to("meta"), requires_grad=parameter.requires_grad
            )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kept = name in module._non_persistent_buffers_set and not buffer.is_meta
                memo[id(buffer)] = (
                    buffer.detach().cpu().clone() if kept else buffer.detach().to("meta")
                )
    return surgery.deepcopy(model, memo)


def contradictions(model: nn.Module, record: dict[str, Any]) -> dict[str, str]:
    """Modules named by an edit whose attributes and tensors disagree, with the reason."""
    modules = dict(model.named_modules(remove_duplicate=False))
    edited = {edit["module"] for edit in record["structure"]} & modules.keys()
    reasons = {name: surgery.contradiction(modules[name]) for name in edited}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def fit(record: dict[str, Any], model: nn.Module) -> dict[str, torch.dtype]:
    """Compare names, shapes and kinds of numbers with the file's; returns what dtype each name has
    in memory.

    That is the file's, unless `model.state_dict()` gives the file's dtype itself for a parameter
    that lives in another one.
    """
    expected, live = model.state_dict(), live_tensors(model)
    specs = record["tensors"] | {
        alias: record["tensors"][name] for alias, name in record["aliases"].items()
    }
    problems = sorted(islice(_differences(expected, specs), 1000))
    if problems:
        classes = (
            f"the file holds a {record['architecture']['name'][:80]}, the model is a "
            f"{type(model).__name__}"
        )
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        hint = _reparametrized(expected.keys() ^ specs.keys())
        raise CheckpointError(
            f"another architecture: {classes}; {'; '.join(problems[:3])}{more}{hint}"
        )
    dtypes = {}
    for name, tensor in expected.items():
        stored = DTYPES[specs[name]["dtype"]]
        computes_in_another = (
            name in live and tensor.dtype == stored and not name.endswith("_extra_state")
        )
        dtypes[name] = live[name].dtype if computes_in_another else stored
    return dtypes


def _differences(expected: Mapping[str, Tensor], specs: Mapping[str, Any]) -> Iterator[str]:
    for name, tensor in expected.items():
        if name not in specs:
            yield f"no {name!r} in the file"
            continue
        stored, shape = DTYPES[specs[name]["dtype"]], specs[name]["shape"]
        same = list(tensor.shape) == shape and _kind(tensor.dtype) == _kind(stored)
        if not same and not name.endswith("_extra_state"):
            here, there = f"{tensor.dtype} {list(tensor.shape)}", f"{stored} {shape}"
            yield f"{name!r} is {there} in the file, {here} in the model"
    for name in specs:
        if name not in expected:
            yield f"{name[:200]!r} only in the file"


def _reparametrized(names: set[str]) -> str:
    """A hint if one of two models computes its weights from others (norms of weights, masks) and
    the other doesn't.
    """
    marks = ("_orig", "_mask", "_g", "_v", "_u", ".original", ".original0", ".original1")
    if not any(name.endswith(marks) for name in names):
        return ""
    return (
        ". One of them has parametrizations, norms of weights or pruning masks that the "
        "other lacks: give it the same"
    )


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point or dtype.is_complex:
        return "complex" if dtype.is_complex else "float"
    return "bool" if dtype == torch.bool else "int"


def restride(tensor: Tensor, strides: list[int]) -> Tensor:
    """The same values with their axes in another order in memory."""
    reason = f"strides {str(strides)[:80]} don't fit shape {list(tensor.shape)}"
    good = (
        type(strides) is list
        and len(strides) == tensor.ndim
        and all(type(s) is int for s in strides)
    )
    require(good and _dense(tensor.shape, strides), reason)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def _dense(shape: torch.Size, strides: list[int]) -> bool:
    """Do these strides put every value in a place of its own, with none left over?"""
    if not shape.numel() or not strides:
        return all(0 <= stride <= 2**31 for stride in strides)
    end = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride != end:
            return False
        end *= size
    return all(0 <= stride <= end for stride in strides)


def fill(
    model: nn.Module,
    tensors: dict[str, Tensor],
    aliases: dict[str, str],
    dtypes: dict[str, torch.dtype],
) -> nn.Module:
    """Give `model`, in place, the tensors of a file and the ties they had, and take them out of
    `tensors`; returns it in eval mode.
    """
    state = model.state_dict()  # keeps the module versions that load_state_dict asks for
    places = Counter(aliases.get(name, name) for name in state)
    for name in sorted(state, key=lambda name: -state[name].numel()):  # last a little beside all
        owner = aliases.get(name, name)
        places[owner] -= 1
        stored = tensors[owner] if places[owner] else tensors.pop(owner)
        state[name] = stored.to(dtypes[name])
    assign(model, state)
    live = live_tensors(model)
    for alias, name in aliases.items():
        a, b = live.get(alias), live.get(name)
        if a is not None and b is not None and type(a) is type(b) and a.dtype == b.dtype:
            module, _, key = alias.rpartition(".")
            setattr(model.get_submodule(module), key, b)
    lost = [name for name, tensor in live.items() if tensor.is_meta]
    require(not lost, f"the file has no data for {', '.join(lost[:3])}")
    model.eval()
    surgery.recompute_weights(model)  # who reads them earlier must see the file's
    return model


def assign(model: nn.Module, state: dict[str, Tensor]) -> None:
    """`model.load_state_dict(state, assign=True)`, in linear time: torch walks over all names for
    every module of a list.
    """
    if type(model).load_state_dict is not nn.Module.load_state_dict:
        model.load_state_dict(state, assign=True)
        return
    faults: tuple[list[str], list[str], list[str]] = ([], [], [])  # missing, unexpected, other
    _assign_below(model, dict(state), "", getattr(state, "_metadata", {}), faults)
    messages = [
        *faults[2],
        *(f"no {n!r}" for n in faults[0]),
        *(f"{n!r} has no place" for n in faults[1]),
    ]
    require(not messages, "; ".join(messages[:3]))


def _assign_below(
    module: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    metadata: Mapping[str, Any],
    faults: tuple[list[str], ...],
) -> None:
    local = {**metadata.get(prefix[:-1], {}), "assign_to_params_buffers": True}
    module._load_from_state_dict(state, prefix, local, True, *faults)
    below: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        below.setdefault(name[len(prefix) :].partition(".")[0], {})[name] = tensor
    for key, child in module._modules.items():
        if child is not None:
            _assign_below(child, below.get(key, {}), f"{prefix}{key}.", metadata, faults)
    for hook in module._load_state_dict_post_hooks.values():
        hook(module, torch.nn.modules.module._IncompatibleKeys(*faults[:2]))
