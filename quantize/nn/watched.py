"""What a forward may depend on besides its inputs, as far as that can be seen: attributes of the
modules and of their classes, and all that can be reached from these through lists, dictionaries and
objects, as configs are, and their classes; and the variables that its code names, see `code`. Not
seen: what the object in such a variable holds otherwise than as attributes (a state in C); with an
array in one, or an object with slots, nothing is recorded.
"""

from __future__ import annotations

import array
import gc
import operator
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from enum import Enum
from functools import cache, partial
from itertools import chain
from types import (
    BuiltinMethodType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from quantize.native.held import Entry, Held
from quantize.nn.code import is_open, variables_of
from quantize.nn.protocol import CompressedLayer
from quantize.nn.tape import KEPT, TENSORS, Unfit
from quantize.surgery.codes import CALLABLES, functions_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MOST = 20_000  # values that are compared before each call
_CONTAINERS = (list, set, dict, deque, MappingProxyType)
_FIXED = (*KEPT, *TENSORS, bytes, range, ModuleType, Enum, np.generic)  # as long as they live
_OPAQUE = (np.ndarray, array.array, bytearray)
_DTYPE = operator.attrgetter("dtype")


class State:
    """What the forward of a module may depend on besides its inputs. Raises Unfit where a part of
    it can't be seen.
    """

    def __init__(self, module: nn.Module) -> None:
        inside = [*module.modules()]
        # a forward that somebody put in may do more than give a result
        self.is_plain = not any(m.training or "forward" in vars(m) for m in inside)
        self.hooks = [*chain.from_iterable(map(_hooks, inside))]
        classes = [*dict.fromkeys(chain.from_iterable(type(m).__mro__ for m in inside))]
        classes = [*filter(_is_own, classes)]
        starts = [*chain.from_iterable(map(_sources_of, inside)), *map(_vars, classes)]
        self.sources = _reachable(starts, _content)
        reached = [one for one in self.sources if isinstance(one, MappingProxyType)]
        variables = variables_of(reached, _functions_in(self.sources))
        read = [tuple(_reader(*variable)(variable[0])) for variable in variables]
        seen = {*map(id, self.sources)}
        more = _reachable(read, _content_if_seen)
        self.sources += [source for source in more if id(source) not in seen]
        contexts = [one for one in chain.from_iterable(read) if isinstance(one, ContextVar)]
        self.others: list[Any] = contexts  # what is no dictionary
        self.readers: list[Any] = [_in_context] * len(contexts)
        entries = list[Entry]()
        for holder, names in (*((source, _names(source)) for source in self.sources), *variables):
            if type(dictionary := _dictionary(holder)) is dict:
                entries += [(dictionary, name, dictionary[name]) for name in names]
            elif names:
                self.others.append(holder)
                self.readers.append(_reader(holder, names))
        self.held, self.values = Held(entries, self.sources), [*self._read()]
        values = [*(value for _, _, value in entries), *self.values]
        if len(values) > _MOST:
            raise Unfit(f"{len(values)} values to compare")
        self.tensors = [value for value in values if isinstance(value, Tensor)]
        self.parameters = [one for one in self.tensors if isinstance(one, nn.Parameter)]
        self.dtypes = [*map(_DTYPE, self.parameters)]

    def _read(self) -> Iterator[Any]:
        return chain.from_iterable(map(_call, self.readers, self.others))

    def is_watched(self) -> bool:
        """Does somebody see the calls of the modules?"""
        everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        return bool(everywhere) or any(self.hooks)

    def holds(self) -> bool:
        """Is everything as it was? And does nobody watch the modules?"""
        if self.is_watched() or not self.held.are_there():
            return False
        if self.dtypes != [*map(_DTYPE, self.parameters)]:  # by `.to()`, in place
            return False
        try:
            return all(map(operator.is_, self._read(), self.values))
        except (KeyError, ValueError, RuntimeError):  # one is gone, or a thread is adding one
            return False


def state_of(module: nn.Module) -> State | None:
    """None where a part of it can't be seen."""
    try:
        return State(module)
    except Unfit:
        return None
    finally:
        _vars.cache_clear()


_call: Any = operator.call
_hooks: Any = operator.attrgetter(*_HOOKS)
# Attributes of every module, and what this package notes on it.
_SKIPPED = (vars(nn.Module()).keys() - {"training"}) | {"_structure", "_abc_impl"}


def _sources_of(module: nn.Module) -> Iterator[Collection[Any]]:
    own = vars(module)
    return iter((own, own["_parameters"], own["_buffers"], own["_modules"]))


def _reachable(
    starts: Iterable[Collection[Any]], content: Callable[[Any], Collection[Any]]
) -> list[Collection[Any]]:
    """What holds the values that can be read from some holders of values on; each once."""
    waiting = deque(starts)
    found: dict[int, Collection[Any]] = {}
    while waiting:
        source = waiting.popleft()
        if id(source) not in found:
            found[id(source)] = source
            if isinstance(own := getattr(source, "__dict__", None), dict):  # of a subclass
                waiting += [own, *map(_vars, filter(is_open, type(source).__mro__))]
            look = _content_if_seen if isinstance(source, MappingProxyType) else content
            values = _reader(source, _names(source))(source)
            waiting += filter(_is_source, map(look, values))
    return [source for source in found.values() if not isinstance(source, tuple)]


def _is_source(content: Collection[Any]) -> bool:
    """Does it hold values, or may it hold some later?"""
    return len(content) > 0 or not isinstance(content, tuple)


def _functions_in(sources: Iterable[Collection[Any]]) -> Iterator[FunctionType]:
    """Those that modules hold; of the methods of their classes few are ever called."""
    for source in sources:
        if not isinstance(source, MappingProxyType):
            values = _reader(source, _names(source))(source)
            held = [one for one in values if isinstance(one, CALLABLES)]
            yield from chain.from_iterable(map(functions_of, held))


def _is_own(kind: type) -> bool:
    """Is it a class of modules that neither torch nor this package brings?"""
    if not issubclass(kind, nn.Module) or issubclass(kind, CompressedLayer):
        return False
    return kind.__module__.partition(".")[0] != "torch"


def _names(source: Collection[Any]) -> list[Any]:
    """Keys of what a source holds, less what all modules and classes have; places in a list."""
    if not isinstance(source, Mapping):
        return [*range(len(source))]
    names = [name for name in source if name not in _SKIPPED]
    if isinstance(source, MappingProxyType):
        names = [name for name in names if not name.startswith("__")]
    return names


def _reader(holder: Any, names: list[Any]) -> Callable[[Any], Iterable[Any]]:
    """Reads what stands there under these names."""
    if isinstance(holder, Collection) and not isinstance(holder, Mapping):
        return iter
    if not names:
        return _nothing
    getter = operator.itemgetter if isinstance(holder, Mapping) else operator.attrgetter
    return getter(*(names * 2 if len(names) == 1 else names))  # of several it gives a tuple


def _dictionary(holder: Any) -> Any:
    """What a class keeps its attributes in; others as they are."""
    return gc.get_referents(holder)[0] if isinstance(holder, MappingProxyType) else holder


def _in_context(variable: ContextVar[Any]) -> tuple[Any]:
    """What it stands for now."""
    return (variable.get(None),)


def _nothing(source: Any) -> tuple[()]:
    return ()


def _content(value: Any) -> Collection[Any]:
    """What can change in a value while it stays the same object. Raises Unfit where that can't be
    seen.
    """
    if isinstance(value, _CONTAINERS):
        return value
    if isinstance(value, type):
        others = not issubclass(value, nn.Module)
        return tuple(map(_vars, filter(is_open, value.__mro__))) if others else ()
    if isinstance(value, (tuple, frozenset)):
        return tuple(value)
    if isinstance(value, (MethodType, BuiltinMethodType)):
        return (value.__self__,)
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values()
    kind = type(value)
    if isinstance(value, _FIXED):
        return ()
    if hasattr(kind, "__get__") and not is_open(kind):  # functions, properties
        return ()
    own = getattr(value, "__dict__", None)
    if own is None and callable(value):  # written in C
        return ()
    # what is pickled otherwise has more to it than attributes
    plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    plain = plain or isinstance(value, (nn.Module, SimpleNamespace))
    if own is None or not plain or _has_slots(kind):
        raise Unfit(f"an attribute of type {kind.__name__}")
    return (own, kind, *_hooks(value)) if isinstance(value, nn.Module) else (own, kind)


@cache
def _vars(kind: type) -> Mapping[str, Any]:
    """The same object for the same class while a state is made."""
    return vars(kind)


def _content_if_seen(value: Any) -> Collection[Any]:
    """What can change in the value of a variable, or of a class's attribute. A logger, say, has
    more to it than can be seen, and hardly decides what a forward gives. Raises Unfit for numbers
    that can't be watched, and for slots.
    """
    try:
        return _content(value)
    except Unfit:
        kind = type(value)
        if isinstance(value, _OPAQUE) or (_has_slots(kind) and is_open(kind)):
            raise
        return ()


def _has_slots(kind: type) -> bool:
    return any(vars(base).get("__slots__") for base in kind.__mro__)
