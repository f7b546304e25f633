"""What a transform promises, as checks: each gives the list of broken promises, in words, and
changes nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers import call
from torch import nn
from torch.nn.utils import parametrize

import quantize
from contract.snapshots import changes as changes
from contract.snapshots import frozen as frozen
from contract.snapshots import state_of as state_of
from contract.snapshots import world as world
from quantize import surgery
from quantize.checkpoint import CheckpointError

SUFFIXES = (".pth", ".safetensors")

# ----------------------------------------------------------------------------------------------
# outputs


def tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of an output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    found = []
    for part in _parts(output):
        found += tensors(part)
    return found


def _parts(output: Any) -> Sequence[Any]:
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, (list, tuple)):
        return output
    if dataclasses.is_dataclass(output):
        return [getattr(output, field.name) for field in dataclasses.fields(output)]
    return []


def form(output: Any) -> Any:
    """Containers, dtypes and shapes of an output, without the numbers."""
    if isinstance(output, torch.Tensor):
        return (output.dtype, tuple(output.shape))
    if isinstance(output, Mapping):
        return (type(output), {key: form(part) for key, part in output.items()})
    return (type(output), [form(part) for part in _parts(output)])


def probabilities(output: Any) -> list[torch.Tensor]:
    """The floating tensors as distributions over their last axis, which is what a match of logits
    compares.
    """
    return [t.float().softmax(-1) for t in tensors(output) if t.is_floating_point() and t.ndim]


@torch.no_grad()
def answers(model: nn.Module, batches: Sequence[Any]) -> list[Any]:
    """The outputs of one call after another; each call gets inputs of its own and the same random
    state.
    """
    found = []
    with torch.random.fork_rng(devices=[]):
        for i, batch in enumerate(batches):
            torch.manual_seed(i)
            output = call(model, copy.deepcopy(batch))
            found.append(copy.deepcopy(output))  # a model may answer with its own state
    return found


def distance(actual: Any, expected: Any) -> float:
    """Norm of the difference over the norm, of all floating tensors together; inf where whole
    numbers or shapes differ.
    """
    off, size = 0.0, 0.0
    pairs = zip(tensors(actual), tensors(expected), strict=True)
    for a, e in pairs:
        if a.shape != e.shape or not (a.is_floating_point() or torch.equal(a, e)):
            return float("inf")
        if a.is_floating_point():
            off += (a.double() - e.double()).square().sum().item()
            size += e.double().square().sum().item()
    return (off / max(size, 1e-30)) ** 0.5


def same_answers(actual: Sequence[Any], expected: Sequence[Any], what: str) -> Iterator[str]:
    """Bit for bit, call for call."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if form(a) != form(e):
            yield f"{what}: call {i + 1} answers in another form: {form(a)} for {form(e)}"
        elif not all(map(_equal, tensors(a), tensors(e))):
            yield f"{what}: call {i + 1} differs by {distance(a, e):.2g}"


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def close_answers(
    actual: Sequence[Any], expected: Sequence[Any], bound: float | None, *, forms: bool
) -> Iterator[str]:
    """Finite, of the same form (with `forms`) and within `bound` of what is expected, call for
    call.
    """
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if forms and form(a) != form(e):
            yield f"call {i + 1} answers in another form: {form(a)} for {form(e)}"
            return
        if len(tensors(a)) != len(tensors(e)):
            yield f"call {i + 1} answers with {len(tensors(a))} tensors for {len(tensors(e))}"
            return
        if not all(bool(t.isfinite().all()) for t in tensors(a)):
            yield f"call {i + 1} is not finite"
        off = distance(a, e)
        if bound is not None and not off <= bound:
            yield f"call {i + 1} is {off:.2g} from the original; promised is {bound:g}"


# -----------------------------------------------------------------------------------------------
# copies


def through_pickle(model: nn.Module) -> nn.Module:
    """A copy by way of a pickle."""
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    return pickle.load(buffer)


def through_file(model: nn.Module, fresh: nn.Module, path: Path) -> nn.Module:
    """A copy by way of a file, loaded into a fresh instance of the original's class."""
    quantize.save(model, path)
    return quantize.load(path, model=fresh)


# ----------------------------------------------------------------------------------------------
# refusals


SUBJECTS = (
    "calibration",
    "batches",
    "example_inputs",
    "student",
    "teacher",
    "amount",
    "ratio",
    "nn.Module",
)


def honest(error: Exception, model: Any = None) -> Iterator[str]:
    """A refusal is a ValueError or TypeError of this package: short, no stack of somebody else's,
    and it says who.
    """
    ours = (ValueError, TypeError, CheckpointError)
    if not isinstance(error, ours) or not (
        type(error) in ours or type(error).__module__.startswith("quantize")
    ):
        yield f"raises {type(error).__name__}: {str(error)[:200]}"
        return
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    file = place.tb_frame.f_code.co_filename if place is not None else ""
    if f"{Path(quantize.__file__).parent}" not in file:
        yield f"the {type(error).__name__} comes from {Path(file).name}: {str(error)[:200]}"
    message = str(error)
    if isinstance(model, nn.Module):
        classes = {type(module).__name__ for module in model.modules()}
        subjects = {*SUBJECTS, *classes, *(repr(name) for name, _ in model.named_modules())}
        if not any(subject in message for subject in subjects):
            yield f"a refusal that names neither a module nor an argument: {message[:200]}"
    if len(message) > 600 or message.count("\n") > 1:
        yield f"a refusal of {len(message)} characters: {message[:200]}..."


# ------------------------------------------------------------------------------------------------
# policy


def layers_of(model: nn.Module) -> list[str]:
    """Modules with a weight of their own that has two dimensions or more: each must be in a
    summary.
    """
    found = []
    for name, module in model.named_modules():
        computed = parametrize.is_parametrized(module)
        if (
            isinstance(module, parametrize.ParametrizationList)
            or ".parametrizations." in f".{name}."
        ):
            continue
        own = [
            p for p in module._parameters.values() if p is not None and not nn.parameter.is_lazy(p)
        ]
        if computed or any(p.ndim >= 2 and p.is_floating_point() for p in own):
            found.append(name)
    return found


def unnamed(model: nn.Module, named: set[str]) -> list[str]:
    """Layers of `model` that `named` doesn't name: neither themselves nor a module around or inside
    them.
    """

    def covered(name: str) -> bool:
        attention = name.rpartition(".")[0]
        if attention in attentions:
            return covered(attention)  # it is converted as a whole
        return any(k == name or name.startswith(f"{k}.") or k.startswith(f"{name}.") for k in named)

    attentions = {
        name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }
    return [name for name in layers_of(model) if not covered(name)]


def flags_kept(result: nn.Module, original: nn.Module) -> Iterator[str]:
    """Modules that are still there are in the mode that they were in."""
    modes = {
        name: module.training for name, module in original.named_modules(remove_duplicate=False)
    }
    for name, module in result.named_modules(remove_duplicate=False):
        around = name
        while around not in modes:
            around = around.rpartition(".")[0]
        if module.training != modes[around]:
            yield f"{name or 'the model'}: training={module.training}, was {modes[around]}"


def in_eval_mode(result: nn.Module) -> Iterator[str]:
    """Every module is in eval mode."""
    for name, module in result.named_modules():
        if module.training:
            yield f"{name or 'the model'} is in training mode"


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hooks_kept(result: nn.Module, original: nn.Module) -> Iterator[str]:
    """The hooks of every module that is still there under its name are the same functions, in the
    same order. One that computes a weight goes with the layer that had it.
    """
    places = dict(result.named_modules(remove_duplicate=False))
    for name, module in original.named_modules():
        stays = type(places.get(name)) is type(module)
        gone = {} if stays else surgery.computing_hooks(module)
        for kind in HOOKS:
            held = [
                getattr(hook, "__qualname__", str(type(hook)))
                for key, hook in getattr(module, kind).items()
                if key not in gone
            ]
            if held and name not in places:
                yield f"{name}: gone, with its {kind}"
                continue
            if not held:
                continue
            kept = [
                getattr(hook, "__qualname__", str(type(hook)))
                for hook in getattr(places[name], kind).values()
            ]
            if kept != held:
                yield f"{name}: {kind} {held} became {kept}"


def trainable_kept(result: nn.Module, original: nn.Module) -> Iterator[str]:
    """A parameter that is still there under its name and dtype requires a gradient as before."""
    before = dict(original.named_parameters())
    for name, parameter in result.named_parameters():
        same = name in before and before[name].dtype == parameter.dtype
        if same and before[name].requires_grad != parameter.requires_grad:
            yield f"{name}: requires_grad={parameter.requires_grad}"


def apart(result: nn.Module, original: nn.Module) -> Iterator[str]:
    """No tensor of the result lies in memory of the original's."""
    held = {t.untyped_storage().data_ptr() for _, t in _all_tensors(original)} - {0}
    for name, tensor in _all_tensors(result):
        if tensor.untyped_storage().data_ptr() in held:
            yield f"{name} shares memory with the original"


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        groups = [module._parameters, module._buffers, vars(module)]
        for group in groups:
            for key, value in group.items():
                if (
                    isinstance(value, torch.Tensor)
                    and not nn.parameter.is_lazy(value)
                    and not value.is_meta
                ):
                    yield f"{name}.{key}".strip("."), value
