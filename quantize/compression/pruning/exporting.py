"""The graph of a model and its inputs, by `torch.export`.

Export is used because it traces what models really do (data-dependent Python control flow
excepted). Composite operations are kept whole: a linear, a convolution, an attention or a norm is
easier to follow than its decomposition.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from quantize import surgery
from quantize.calibration import (
    arguments,
    call,
    copied,
    exporting,
    untouched,
    without_cache,
)


@dataclasses.dataclass
class _Once:
    """A model, inputs, and its graph on them as soon as somebody has asked for it."""

    model: nn.Module
    inputs: Any
    program: torch.export.ExportedProgram | None = None


_once: ContextVar[_Once | None] = ContextVar("_once", default=None)


@contextlib.contextmanager
def traced_once(model: nn.Module, example_inputs: Any) -> Iterator[None]:
    """Inside, where nobody changes `model`, it is traced on these inputs for the first who prunes
    it, and not for the next ones.
    """
    token = _once.set(_Once(model, example_inputs))
    try:
        yield
    finally:
        _once.reset(token)


def graph_of(
    model: nn.Module, work: nn.Module, example_inputs: Any
) -> torch.export.ExportedProgram:
    """Graph of `work`, a copy of `model` in eval mode, on the inputs. Raises as `export` does."""
    once = _once.get()
    if once is None or once.model is not model or once.inputs is not example_inputs:
        return export(surgery.shell(work), example_inputs)
    if once.program is None:
        once.program = export(surgery.shell(work), example_inputs)
    return once.program


def export(model: nn.Module, example_inputs: Any) -> torch.export.ExportedProgram:
    """Graph of `model` (in eval mode; it may be changed) on the inputs.

    Raises ValueError when the model doesn't run on them or can't be exported.
    """
    check_inputs(example_inputs)
    with untouched(model), without_cache(model), torch.no_grad():
        try:
            call(model, example_inputs)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} doesn't run on example_inputs: {_first_line(error)}"
            ) from error
    _return_plain_containers(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # or a whole encoder layer becomes one opaque operation
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return _exported(model, example_inputs)
        except Exception:
            # what a first call makes and keeps, as anchors of a detector, can't always be traced
            return _exported(model, example_inputs, called=True)
    except Exception as error:
        message = (
            f"{type(model).__name__} can't be exported, so its channels can't be followed: "
            f"{_first_line(error)}"
        )
        raise ValueError(message) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _exported(
    model: nn.Module, inputs: Any, *, called: bool = False
) -> torch.export.ExportedProgram:
    """The graph. called: of the call after a first one."""
    args, kwargs = arguments(copied(inputs, {}))
    with untouched(model), without_cache(model), torch.no_grad():
        if called:
            call(model, inputs)
        with exporting():
            return torch.export.export(model, args, kwargs, strict=False)


def check_inputs(inputs: Any) -> None:
    """Raise TypeError for inputs that are no tensor, tuple or dict."""
    if not isinstance(inputs, (torch.Tensor, tuple, list, Mapping)):
        raise TypeError(
            f"example_inputs must be a tensor, a tuple or a dict, got {type(inputs).__name__}"
        )


def _return_plain_containers(model: nn.Module) -> None:
    """Make `model` return dicts where it returns dataclasses, which export doesn't know."""
    forward = model.forward

    @functools.wraps(forward)
    def returning_dicts(*args: Any, **kwargs: Any) -> Any:
        return _plain(forward(*args, **kwargs))

    model.forward = returning_dicts


def _plain(output: Any) -> Any:
    kind: Any = type(output)
    if dataclasses.is_dataclass(kind) and not isinstance(output, Mapping):
        names = [field.name for field in dataclasses.fields(kind)]
        return {name: _plain(getattr(output, name)) for name in names}
    if kind is type:
        return output
    if type(output) in (tuple, list):
        parts = [_plain(part) for part in output]
        return parts if type(output) is list else tuple(parts)
    if type(output) is dict:
        return {key: _plain(part) for key, part in output.items()}
    return output


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
