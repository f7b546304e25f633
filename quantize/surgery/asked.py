"""Of which layers a forward asks of what class they are.

`isinstance(self.rnn, nn.LSTM)` decides what a forward does with the layer's outputs, and a layer of
another class would get the other branch. Left out: code that compares names of classes.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

_ASKING = {"isinstance", "type", "__class__"}


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


def _classes_in(owner: type[nn.Module]) -> Iterator[type[nn.Module]]:
    """Classes of torch's layers that the forward of `owner` asks for, and the methods that it
    calls.
    """
    waiting, known = ["forward"], {"forward"}
    while waiting:
        for function in _functions(owner, waiting.pop()):
            for code in _codes(function.__code__):
                if _ASKING & set(code.co_names):
                    yield from _loaded(code, function.__globals__)
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


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those inside it."""
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _codes(part)


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
