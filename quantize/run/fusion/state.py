"""What a forward pass changes in a model: buffers, plain attributes, counters, the caller's inputs.

`answers` runs the model several times, one call after another from its present state, and leaves no
trace. A fused model must give the same answers in the same order; state that a fused model can't
carry is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from quantize import surgery
from quantize.calibration import call, untouched
from quantize.run.fusion.nested import Spec, duplicate, flatten, plain, unflatten

_STRUCTURE = frozenset(nn.Module().__dict__) | {"_structure", "_notes"}
_NUMBERS = (bool, int, float, str, type(None))
_CLOSED = (type, nn.Module, torch.dtype, torch.device, torch.Generator)


@dataclass
class Call:
    """One call of a model: what went in, what came out, and what the inputs were afterwards."""

    inputs: list[Tensor]
    outputs: list[Tensor]  # in the order a fused file gives them
    after: list[Tensor]  # the inputs again: a forward may write into them
    constants: list[Any]  # what in the output is no tensor


@dataclass
class Answers:
    """Calls of a model one after another, and the state that changed on the way."""

    spec: Spec  # of the inputs
    calls: list[Call] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # names of buffers and attributes
    # those that were tensors before the first call
    written: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)  # the others, if the answers depend on them
    counted: list[str] = field(default_factory=list)  # of plain values that went on changing


def answers(model: nn.Module, example_inputs: Any) -> Answers:
    """The model's answers to the example inputs and then to two fresh ones of the same sizes; no
    trace is left.

    A model that can't take the fresh ones gets the example inputs three times.
    """
    tensors, spec = flatten(example_inputs, "example_inputs")
    with untouched(model):
        try:
            found = _record(model, spec, [tensors, fresh(tensors, 1), fresh(tensors, 2)])
        except Exception:  # a model may refuse values in any way it likes
            found = None
    if found is None:
        try:
            with untouched(model):
                found = _record(model, spec, [tensors] * 3)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{type(model).__name__} doesn't run on example_inputs: {reason}"
            ) from error
    others = [name for name in found.changed if name not in found.written]
    with untouched(model):
        if others and _depends_on_others(model, found):
            found.read = others
    return found


def _depends_on_others(model: nn.Module, found: Answers) -> bool:
    """After a call on fresh values, with all tensors put back that can be carried: is the first
    answer another one?
    """
    first, second = found.calls[:2]
    kept = []
    for name, module in model.named_modules():
        places: tuple[dict[str, Any], ...] = (module._buffers, module.__dict__)
        for values in places:
            for key, value in values.items():
                if value is not None and f"{name}.{key}".strip(".") in found.written:
                    kept.append((values, key, value, value.clone()))
    one_call(model, found.spec, second.inputs)
    with torch.no_grad():
        for values, key, tensor, before in kept:
            values[key] = tensor.copy_(before)
    again = one_call(model, found.spec, first.inputs)
    pairs = zip(again.outputs, first.outputs, strict=True)
    return not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def refuse_values(model: nn.Module, seen: Answers) -> None:
    """Raise ValueError for a model that reads what an earlier call left in a plain value, a list,
    or where nothing was.
    """
    kind = type(model).__name__
    advice = "a fused model carries tensors only: keep it in a buffer"
    if seen.counted:
        names = ", ".join(seen.counted[:3])
        raise ValueError(
            f"{kind} can't be fused: its forward changes the attribute {names} at every call; "
            f"{advice}"
        )
    if seen.read:
        names = ", ".join(seen.read[:3])
        raise ValueError(
            f"{kind} can't be fused: its forward changes the attribute {names} and reads it "
            f"later; {advice}"
        )


def _record(model: nn.Module, spec: Spec, inputs: list[list[Tensor]]) -> Answers:
    found = Answers(spec)
    states = [_state(model)]
    for tensors in inputs:
        found.calls.append(one_call(model, spec, tensors))
        states.append(_state(model))
    found.changed = _changes(states[0], states[-1])
    found.written = [name for name in found.changed if isinstance(states[0].get(name), tuple)]
    numbers = [
        {name: leaf for name, leaf in state.items() if isinstance(leaf, _NUMBERS)}
        for state in states
    ]
    found.counted = _changes(numbers[1], numbers[-1])
    return found


@torch.no_grad()
def one_call(
    model: Callable[..., Any], spec: Spec, tensors: list[Tensor], *, copy: bool = True
) -> Call:
    """Call `model` on copies of the tensors, which share memory as the tensors do; random state
    stays as it is.

    copy: copy the outputs too, which a later call might change (a buffer may be the output).
    """
    given = duplicate(tensors)
    with torch.random.fork_rng(devices=[]):
        result = call(model, unflatten(spec, given), copy=False)
    outputs, form = flatten(result, "the model's output")
    ordered, _ = flatten(unflatten(plain(form), outputs), "the model's output")
    ordered = [t.clone() for t in ordered] if copy else ordered
    return Call(tensors, ordered, given, _constants(form))


def _constants(spec: Spec) -> list[Any]:
    if spec.kind == "constant":
        return [] if spec.value is None else [spec.value]
    return list(chain.from_iterable(map(_constants, spec.children)))


def fresh(tensors: list[Tensor], seed: int) -> list[Tensor]:
    """Other values of the same kind in the same layout: elements in another order, floating ones
    with noise on them.
    """
    generator = torch.Generator().manual_seed(seed)
    copies = duplicate(tensors)
    for copy in copies:
        if copy.numel() < 2 and not copy.is_floating_point():
            continue
        order = torch.randperm(copy.numel(), generator=generator)
        values = copy.flatten()[order.to(copy.device)].reshape(copy.shape)
        if copy.is_floating_point():
            spread = copy.double().std().nan_to_num().item() if copy.numel() > 1 else 0.0
            noise = torch.randn(copy.shape, generator=generator) * (0.1 * spread or 1.0)
            values = values + noise.to(values)
        _overwrite(copy, values)
    return copies


def _overwrite(tensor: Tensor, values: Tensor) -> None:
    """Write values into a tensor whose elements may share memory (`expand`): one value for all that
    do.
    """
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


# State.


def settled(model: nn.Module) -> nn.Module:
    """Weights that hooks compute before every call (weight and spectral norm, pruning masks) as
    parameters, in place.
    """
    surgery.recompute_weights(model)
    for module in model.modules():
        for key, name in surgery.computing_hooks(module).items():
            value = module.__dict__.pop(name).detach()
            setattr(module, name, nn.Parameter(value, requires_grad=False))
            del module._forward_pre_hooks[key]
    return model


def _state(model: nn.Module) -> dict[str, Any]:
    """Every tensor (with its version) and plain value in buffers and attributes, by name."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        left_out = _STRUCTURE | set(surgery.computing_hooks(module).values())
        own = {key: value for key, value in module.__dict__.items() if key not in left_out}
        for key, value in {**module._parameters, **module._buffers, **own}.items():
            for path, leaf in _leaves(value, f"{name}.{key}".strip("."), seen, 0):
                found[path] = leaf
    return found


def _leaves(value: Any, name: str, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield name, (value, 0 if value.is_inference() else value._version)
    elif isinstance(value, _NUMBERS):
        yield name, value
    elif depth < 4 and id(value) not in seen and not isinstance(value, _CLOSED):
        seen.add(id(value))
        parts: Any = ()
        if isinstance(value, Mapping):
            parts = list(value.items())
        elif isinstance(value, (list, tuple, set, frozenset)) or type(value).__name__ == "deque":
            parts = list(enumerate(value))
        elif hasattr(value, "__dict__") and not callable(value):
            parts = list(vars(value).items())
        for key, part in parts:
            yield from _leaves(part, f"{name}[{key}]", seen, depth + 1)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys([*before, *after])
    return [
        name
        for name in names
        if not _same(before.get(name, _STRUCTURE), after.get(name, _STRUCTURE))
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return a[0] is b[0] and a[1] == b[1]
    return type(a) is type(b) and (a is b or a == b or a != a)
