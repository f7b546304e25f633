"""Of which layers a forward asks of what class they are, and to whose weights it writes.

`isinstance(self.rnn, nn.LSTM)` decides what a forward does with the layer's outputs, and a layer of
another class would get the other branch. `block.output.weight.div_(2)` changes the layer as it
runs, and a compressed layer's weight can only be read. Left out: code that compares names of
classes, and weights that are written through another variable.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator
from itertools import chain
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from quantize.surgery.codes import codes_of

_ASKING = {"isinstance", "type", "__class__"}


def bound_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Why no layer of another kind can take the place of a layer of `model`, by layer: for what
    forwards around it do with it.
    """
    return written_layers(model) | asked_classes(model)


def asked_classes(model: nn.Module) -> dict[nn.Module, str]:
    """Why a layer of `model` must stay of its class, by layer: the forward of a module around it
    asks for that class.
    """
    found: dict[nn.Module, str] = {}
    known: dict[type, tuple[type[nn.Module], ...]] = {}
    for owner in model.modules():
        cls = type(owner)
        if cls not in known:
            known[cls] = tuple(_classes_in(cls))
        kinds = known[cls]
        layers = [module for module in owner.modules() if kinds and isinstance(module, kinds)]
        for layer in layers:
            asker, kind = type(owner).__name__, type(layer).__name__
            found[layer] = f"the forward of {asker} asks whether a layer is an nn.{kind}"
    return found


def written_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Why a layer of `model` must stay as it is, by layer: the forward of a module around it writes
    to its weight.
    """
    found: dict[nn.Module, str] = {}
    for owner in model.modules():
        paths = _written_by(type(owner))
        for name, layer in owner.named_modules() if paths else ():
            if any(f".{name}".endswith(f".{path}") for path in paths):
                found[layer] = f"the forward of {type(owner).__name__} writes to its weight"
    return found


@functools.lru_cache(maxsize=1024)
def _written_by(owner: type[nn.Module]) -> set[str]:
    """Names of the layers to whose weights the forward of `owner` writes."""
    return set(chain.from_iterable(_written(code) for code, _ in _reached(owner)))


def _written(code: CodeType) -> Iterator[str]:
    """The layers to whose weights the code writes in place, as it names them, from its variable
    on: `attention.output`.
    """
    path: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            path = []
            continue
        if instruction.argval != "data":
            path.append(instruction.argval)
        *layer, kind, method = ["", "", *path]
        in_place = method.endswith("_") and not method.endswith("__")
        if in_place and kind == "weight" and path[:-2]:
            yield ".".join(layer[2:])


def _classes_in(owner: type[nn.Module]) -> Iterator[type[nn.Module]]:
    """Classes of torch's layers that the forward of `owner` asks for, and the methods that it
    calls.
    """
    for code, names in _reached(owner):
        if _ASKING & set(code.co_names):
            yield from _loaded(code, names)


def _reached(owner: type[nn.Module]) -> Iterator[tuple[CodeType, dict[str, Any]]]:
    """The code of the forward of `owner`, and of the methods that it calls, with its globals."""
    waiting, known = ["forward"], {"forward"}
    while waiting:
        for function in _functions(owner, waiting.pop()):
            for code in codes_of(function.__code__):
                yield code, function.__globals__
                called = [name for name in code.co_names if name not in known]
                known.update(called)
                waiting += called


def _functions(owner: type[nn.Module], name: str) -> Iterator[FunctionType]:
    """Methods of this name that `owner` and its bases define, but for those of torch and of this
    package.
    """
    for base in owner.__mro__:
        method = vars(base).get(name)
        function = getattr(method, "__wrapped__", method)
        foreign = base.__module__.split(".")[0] not in ("torch", "quantize")
        if foreign and isinstance(function, FunctionType):
            yield function


def _loaded(code: CodeType, names: dict[str, Any]) -> Iterator[type[nn.Module]]:
    """Classes of torch's layers that the code names."""
    value: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            value = names.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, ModuleType):
            value = getattr(value, instruction.argval, None)
        else:
            value = None
        if isinstance(value, type) and issubclass(value, nn.Module) and value is not nn.Module:
            if value.__module__.startswith("torch.nn.modules"):
                yield value
