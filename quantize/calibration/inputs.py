"""Batches and outputs: run a model on what the user gave, without changing it, and find the tensors
in what comes out.

A batch is what `torch.export.export` takes as example inputs: a tensor, a tuple of positional
arguments, or a dict of keyword arguments.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from quantize.calibration.state import untouched


def call(model: Callable[..., Any], batch: Any, *, copy: bool = True) -> Any:
    """Run `model` on a batch: a tensor, a tuple of positional arguments or a dict of keyword
    arguments.

    The model gets copies of the tensors, so that a forward that works in place doesn't change the
    caller's; `copy=False` is for timing. Raises TypeError, with a hint, where the batch doesn't fit
    the arguments of the model's forward.
    """
    given = copied(batch, {}) if copy else batch
    args, kwargs = arguments(given)
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        _check_arguments(model, args, kwargs, error)
        raise


def on_cpu(value: Any) -> Any:
    """`value` with every tensor in it on the CPU."""
    return on_tensors(value, torch.Tensor.cpu)


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    return (batch,), {}


def copied(value: Any, memo: dict[int, torch.Tensor]) -> Any:
    """`value` with every tensor in it (in tuples, lists and mappings) cloned; one that occurs twice
    stays one tensor.
    """

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.clone()
        return memo[id(tensor)]

    return on_tensors(value, copy)


def on_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `change(tensor)` in the place of every tensor in it: in tuples, named ones too,
    lists and mappings.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: on_tensors(part, change) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [on_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _check_arguments(model: Any, args: tuple, kwargs: dict[str, Any], error: TypeError) -> None:
    """Raise a TypeError that helps if `args` and `kwargs` don't fit the signature of the model's
    forward.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as misfit:
        names = ", ".join([type(a).__name__ for a in args] + list(kwargs))
        hint = ""
        if len(args) > 1:
            hint = (
                "; for a loader of (inputs, labels) give the inputs alone: [inputs for inputs, _ "
                "in loader]"
            )
        raise TypeError(
            f"{type(model).__name__}.forward{signature} doesn't take a batch of ({names}): "
            f"{misfit}{hint}"
        ) from error


def first_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer is called with first: its input."""
    return args[0] if args else next(iter(kwargs.values()))


_FAILURES = (TypeError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)


def run_batch(model: nn.Module, batch: Any, number: int) -> Any:
    """`call`; ValueError where the model doesn't run on this batch of calibration."""
    try:
        return call(model, batch)
    except _FAILURES as error:
        which = "the first batch" if number == 0 else f"batch {number}"
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{type(model).__name__} doesn't run on {which} of calibration: {reason}"
        ) from error


def check_batches(batches: Iterable[Any], name: str = "calibration") -> Iterable[Any]:
    """Return `batches`; TypeError for an iterator (it could be read only once), ValueError when
    there is no batch in it.
    """
    if isinstance(batches, (torch.Tensor, Mapping, str, nn.Module)) or not isinstance(
        batches, Iterable
    ):
        raise TypeError(
            f"{name} must be a sequence of batches, got {type(batches).__name__}; for one batch "
            f"write [batch]"
        )
    if iter(batches) is batches:
        raise TypeError(
            f"{name} must be re-iterable, got an iterator ({type(batches).__name__}); write "
            f"list(...)"
        )
    if next(iter(batches), None) is None:
        raise ValueError(f"{name} is empty: at least one batch is needed")
    return batches


class Beside(list):
    """Batches of a model that is being changed, and what the original is given in place of each:
    what lies before the two has changed already. To whoever doesn't ask, batches like others.
    """

    def __init__(self, batches: Iterable[Any], original: Iterable[Any]) -> None:
        super().__init__(batches)
        self.original = list(original)


def of_original(batches: Iterable[Any]) -> Iterable[Any]:
    """What the original is given."""
    return batches.original if isinstance(batches, Beside) else batches


def first_alone(batches: Iterable[Any]) -> list[Any]:
    """The first batch, with the original's where that is another one."""
    if isinstance(batches, Beside):
        return Beside(batches[:1], batches.original[:1])
    return [next(iter(batches))]


def of_both(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """What the original is given, and what the changed model is."""
    if isinstance(batches, Beside):
        yield from zip(batches.original, batches, strict=True)
    else:
        for batch in batches:
            yield batch, batch


@contextmanager
def watching(hooks: Sequence[Any], *models: nn.Module) -> Iterator[None]:
    """Models in eval mode and run as written inside, since `torch.compile` would trace the hooks;
    afterwards their state and training flags are as before and the hooks gone.
    """
    try:
        with untouched(*models), as_written(*models):
            for model in models:
                model.eval()
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaced(objects: Iterable[Any], attribute: str, value: Any) -> Iterator[None]:
    """Inside, an attribute of these objects has another value."""
    before = [(one, getattr(one, attribute)) for one in objects]
    try:
        for one, _ in before:
            setattr(one, attribute, value)
        yield
    finally:
        for one, kept in before:
            setattr(one, attribute, kept)


def as_written(*models: nn.Module) -> AbstractContextManager[None]:
    """Inside, modules that were compiled in place (`module.compile()`) run their own Python."""
    modules = itertools.chain.from_iterable(model.modules() for model in models)
    compiled = [module for module in modules if module._compiled_call_impl is not None]
    return replaced(compiled, "_compiled_call_impl", None)


def in_eval_mode(*models: nn.Module) -> AbstractContextManager[None]:
    """Inside, every module is in eval mode; afterwards each is in the mode in which it was."""
    modules = itertools.chain.from_iterable(model.modules() for model in models)
    return replaced([module for module in modules if module.training], "training", False)


def without_cache(*models: nn.Module) -> AbstractContextManager[None]:
    """Inside, models of transformers return no keys and values: these serve generation, and no
    tracer follows them.
    """
    caching = itertools.chain.from_iterable(map(_caching, models))
    return replaced(caching, "use_cache", False)


def keeps_cache(model: nn.Module) -> bool:
    """Is it a model of transformers that returns keys and values unless it is told not to?"""
    return bool(_caching(model))


def _caching(model: nn.Module) -> list[Any]:
    configs = [module.__dict__.get("config") for module in model.modules()]
    return [config for config in configs if getattr(config, "use_cache", None)]


def output_tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's output in order: in tuples, lists, mappings (ModelOutput too) and
    dataclasses, nested.
    """
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        parts: Iterable[Any] = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = vars(output).values()
    else:
        parts = ()
    found = []
    for part in parts:
        found.extend(output_tensors(part))
    return found


def main_output(output: Any) -> torch.Tensor:
    """The tensor that a model's output is about: `logits` if it has them, else the first floating
    tensor in it.
    """
    if isinstance(output, torch.Tensor):
        return output
    logits = (
        output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    )
    if isinstance(logits, torch.Tensor):
        return logits
    for part in output_tensors(output):
        if part.is_floating_point():
            return part
    raise TypeError(
        f"the model returns {type(output).__name__}, in which no floating tensor is found"
    )
