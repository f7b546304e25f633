"""The state of a training run in a file: written whole or not at all, checked before any of it is
used.

A checksum finds damage, not malice or another program's content: what is in a state is compared
with the run that goes on, so that loading either works or says in one line why not.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.checkpoint import CheckpointError, atomic_write
from quantize.checkpoint.opening import open_regular
from quantize.checkpoint.pth import scan_pickle, zip_entries

_OPCODES = {"BUILD"}  # of an OrderedDict with attributes, beside what is in a checkpoint
_GLOBALS = {"_codecs encode"}  # of bytes
_MAGIC = b"quantize training state 1\n"


class TrainingError(ValueError):
    """Training that cannot start or go on; the message is one line."""


def describe(model: nn.Module) -> dict:
    return {
        "class": type(model).__name__,
        "tensors": {name: [str(t.dtype), *t.shape] for name, t in model.state_dict().items()},
    }


def write_state(
    path: Path, model: nn.Module, optimizers: list, judge: Any, run: dict, step: int
) -> None:
    """Replace the file by a complete new one, or leave it as it is: there is no moment with half a
    file.
    """
    buffer = io.BytesIO()
    state = {
        "run": run,
        "step": step,
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
    }
    if judge is not None:
        state["judge"] = judge.state_dict()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(_MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n")
            file.write(content)
    except OSError as error:
        raise TrainingError(
            f"cannot write the training state {path}: {error.strerror or error}"
        ) from None


def restore(path: Path, model: nn.Module, optimizers: list, judge: Any, run: dict) -> int:
    """Give model, optimizers and judge (a `training.Judge` or None) what the file holds; returns
    the steps done.

    Raises TrainingError, before the model or an optimizer was changed, for a file that this run
    can't have written.
    """
    state = read_state(path)
    for key, value in run.items():
        if state["run"].get(key) != value:
            raise TrainingError(
                f"training state {path} is of another run: "
                f"{_difference(key, state['run'].get(key), value)}"
            )
    try:
        _check_state(state, model, optimizers, run["config"]["steps"])
        if judge is not None:
            judge.load_state_dict(state["judge"])
    except Exception as error:  # a file with the right checksum may hold anything
        raise _unusable(path, error) from None
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def _unusable(path: Path, error: Exception) -> TrainingError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return TrainingError(
        f"training state {path} holds what no run writes ({reason}); delete it to start over"
    )


def _check_state(state: dict, model: nn.Module, optimizers: list, steps: int) -> None:
    """Raises ValueError (or what the wrong kind of a value raises) unless loading the state can't
    fail.
    """
    if type(state["step"]) is not int or not 0 <= state["step"] <= steps:
        raise ValueError(f"step {state['step']!r} of {steps}")
    expected = model.state_dict()
    if state["model"].keys() != expected.keys():
        raise ValueError("tensors of another model")
    for name, tensor in state["model"].items():
        if isinstance(expected[name], Tensor):  # not extra state
            _check_tensor(name, tensor, expected[name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        _check_optimizer(optimizer, saved)


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    now = optimizer.state_dict()["param_groups"]
    for group, before in zip(now, saved["param_groups"], strict=True):
        if {**before, "lr": None} != {**group, "lr": None}:
            raise ValueError("an optimizer of other settings")
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    for index, tensors in saved["state"].items():
        known = type(index) is int and 0 <= index < len(parameters)
        for name, tensor in tensors.items():
            like = parameters[index] if known else None
            like = torch.zeros(()) if name == "step" else like
            _check_tensor(f"{name} of parameter {index!r}", tensor, like)


def _check_tensor(name: str, tensor: Any, like: Tensor | None) -> None:
    plain = type(tensor) is Tensor and tensor.layout is torch.strided
    if like is None or not plain or tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(f"{name} isn't a tensor like the run's own")


def read_state(path: Path) -> dict:
    try:
        with open_regular(path) as file:
            content = file.read()
    except (OSError, CheckpointError) as error:
        raise TrainingError(
            f"cannot read the training state {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    header = len(_MAGIC) + 65
    if not content.startswith(_MAGIC):
        raise TrainingError(f"{path} is not a training state of this version")
    if (
        content[len(_MAGIC) : header]
        != hashlib.sha256(content[header:]).hexdigest().encode() + b"\n"
    ):
        raise TrainingError(
            f"training state {path} is damaged (its checksum does not match); delete it to "
            f"start over"
        )
    try:
        file = io.BytesIO(content[header:])
        # stored, not compressed: no tensor is larger than the file
        start, stop = zip_entries(file)["data.pkl"]
        file.seek(start)
        scan_pickle(file.read(stop - start), more_opcodes=_OPCODES, more_globals=_GLOBALS)
        file.seek(0)
        state = torch.load(file, weights_only=True, map_location="cpu")
        if not isinstance(state, dict) or state.keys() - {"judge"} != {
            "run",
            "step",
            "model",
            "optimizers",
        }:
            raise ValueError("not the parts of a state")
        if not isinstance(state["run"], dict) or not isinstance(state["model"], dict):
            raise ValueError("parts of other kinds")
        return state
    except Exception as error:  # torch.load raises nearly anything
        raise _unusable(path, error) from None


def _difference(key: str, old: Any, new: Any) -> str:
    """The first entry in which two nested dicts differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for inner in [*new, *old]:
            if old.get(inner) != new.get(inner):
                return _difference(f"{key}.{inner}", old.get(inner), new.get(inner))
    return f"{key} was {old!r}, now {new!r}"
