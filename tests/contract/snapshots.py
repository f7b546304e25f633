"""Snapshots of models, inputs and the process, and where two of them differ.

State is compared bit for bit and object by object: a promise of "as before" is not kept by an equal
copy.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclasses.dataclass
class Bits:
    """One tensor: the object, and what was in it."""

    tensor: torch.Tensor
    about: tuple[Any, ...]
    content: bytes
    gradient: Any


def frozen(value: Any) -> Any:
    """`value` in a form that later changes don't reach and that compares by `changes`."""
    if isinstance(value, torch.Tensor):
        return _bits(value)
    if isinstance(value, Mapping):
        return {key: frozen(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype)):
        return (type(value), value)
    return value  # compared by identity


def _bits(tensor: torch.Tensor) -> Bits:
    if nn.parameter.is_lazy(tensor):
        return Bits(tensor, ("lazy", tensor.requires_grad), b"", None)
    # a kernel's own layout
    dense = tensor if tensor.layout == torch.strided else tensor.detach().to_dense()
    plain = dense.detach().cpu().contiguous().reshape(-1)
    about = (
        type(tensor),
        tensor.dtype,
        tuple(tensor.shape),
        dense.stride(),
        tensor.requires_grad,
        str(tensor.device),
    )
    content = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    gradient = frozen(tensor.grad) if tensor.is_leaf else None
    return Bits(tensor, about, content, gradient)


def changes(before: Any, after: Any, path: str = "", *, objects: bool = True) -> Iterator[str]:
    """Where two frozen values differ. With `objects`, tensors and unknown objects must be the same
    ones.
    """
    if isinstance(before, Bits) and isinstance(after, Bits):
        if before.about != after.about:
            yield f"{path}: {before.about[1:]} became {after.about[1:]}"
        elif before.content != after.content:
            yield f"{path}: other numbers"
        elif objects and before.tensor is not after.tensor:
            yield f"{path}: another tensor object"
        yield from changes(before.gradient, after.gradient, f"{path}.grad", objects=objects)
    elif isinstance(before, dict) and isinstance(after, dict):
        if list(before) != list(after):
            yield f"{path}: keys {list(before)} became {list(after)}"
        for key in before.keys() & after.keys():
            yield from changes(before[key], after[key], f"{path}.{key}", objects=objects)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{path}: {len(before)} entries became {len(after)}"
        for i, (old, new) in enumerate(zip(before, after, strict=False)):
            yield from changes(old, new, f"{path}[{i}]", objects=objects)
    elif isinstance(before, tuple) or isinstance(after, tuple):
        if type(before) is not type(after) or before != after:
            yield f"{path}: {before} became {after}"
    elif objects and before is not after:
        yield f"{path}: another {type(after).__name__}"


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that hangs on a model: each module's class and `__dict__`, with parameters, buffers,
    hooks, flags, attributes.
    """
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = {"class": (type, type(module)), **frozen(vars(module))}
    return found


def world() -> dict[str, Any]:
    """What belongs to the process: random states, defaults, modes, threads."""
    return {
        "torch random state": (bytes, torch.get_rng_state().numpy().tobytes()),
        "python random state": (tuple, random.getstate()),
        "numpy random state": (bytes, np.random.get_state()[1].tobytes()),
        "default dtype": (type, torch.get_default_dtype()),
        "threads": (int, torch.get_num_threads()),
        "gradients": (bool, torch.is_grad_enabled()),
        "inference mode": (bool, torch.is_inference_mode_enabled()),
        "deterministic": (bool, torch.are_deterministic_algorithms_enabled()),
        "autocast": (bool, torch.is_autocast_enabled("cpu")),
        "anomaly mode": (bool, torch.is_anomaly_enabled()),
        "mkldnn": (bool, torch.backends.mkldnn.enabled),
        "matmul precision": (str, torch.get_float32_matmul_precision()),
        "function modes": (int, torch._C._len_torch_function_stack()),
        "fast path of attention": (bool, torch.backends.mha.get_fastpath_enabled()),
        "default device": (str, str(torch.get_default_device())),
    }
