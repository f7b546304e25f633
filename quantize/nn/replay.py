"""Modules of which the calls of torch alone are made, where an earlier call was recorded.

The Python of a model costs as much as its int8 layers where inputs are small. A module that is made
a region (`int8_region`) is recorded (`tape`) when inputs of a form come for the second time, and
compared with its own forward. The tape is used as long as nothing of the modules has changed:
neither an attribute, nor a tensor, nor a hook. Left out: training, autocast, inputs that aren't
tensors, numbers or strings.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode, _pop_mode_temporarily
from torch.utils import _pytree as pytree

from quantize.native import int8 as native_int8
from quantize.native.packs import versions_of
from quantize.nn import PackedLayer
from quantize.nn.floats import OWN
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_embedding import Int8Embedding
from quantize.nn.stretches import stretched
from quantize.nn.tape import CONSTANTS, TENSORS, Recorder, Replacing, Tape, Unfit

KINDS = (Int8Linear, Int8Embedding)  # layers in integers that can be recorded
_MOST_FORMS = 64  # of inputs that are remembered
_MOST_FAILURES = 8  # until a module is left alone
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class State:
    """What the forward of a module may depend on besides its inputs: attributes of the modules
    inside and of objects that these hold, as configs are.
    """

    def __init__(self, module: nn.Module) -> None:
        # a forward that somebody put in may do more than give a result
        self.is_plain = not any(m.training or "forward" in vars(m) for m in module.modules())
        self.hooks: list[dict[int, Any]] = []
        self.sources: list[Collection[Any]] = []
        for inside in module.modules():
            own = vars(inside)
            self.hooks += [own[name] for name in _HOOKS]
            parts = own["_parameters"], own["_buffers"], own["_modules"]
            more = [_content(value) for name, value in own.items() if name not in _STANDARD]
            self.sources += own, *parts, *more
        unique = {id(source): source for source in self.sources}
        self.sources = [source for source in unique.values() if len(source) or source != ()]
        self.full = [source for source in self.sources if len(source)]
        self.readers = [*map(_reader, self.full)]
        self.values = [*self._read()]
        self.size = sum(map(len, self.sources))
        self.tensors = [value for value in self.values if isinstance(value, Tensor)]

    def _read(self) -> Iterator[Any]:
        return chain.from_iterable(map(_call, self.readers, self.full))

    def holds(self) -> bool:
        """Is everything as it was? And does nobody watch the modules?"""
        if any(self.hooks) or self.size != sum(map(len, self.sources)):
            return False
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return False
        try:
            return all(map(operator.is_, self._read(), self.values))
        except KeyError:  # an attribute is gone
            return False


_call: Any = operator.call
_STANDARD = vars(nn.Module()).keys() - {"training"}  # attributes of every module


def _reader(source: Collection[Any]) -> Callable[[Any], Iterable[Any]]:
    """Reads what a source holds, less what all modules have."""
    if not isinstance(source, dict):
        return iter
    names = [name for name in source if name not in _STANDARD]
    if not names:
        return _nothing
    return operator.itemgetter(names[0], *names)  # of two names and more: a tuple


def _nothing(source: Any) -> tuple[()]:
    return ()


def _content(value: Any) -> Collection[Any]:
    """What can change in an attribute of a module while the attribute stays."""
    if isinstance(value, (list, set, dict)):
        return value
    opaque = isinstance(value, (nn.Module, *TENSORS, *CONSTANTS)) or callable(value)
    return () if opaque else getattr(value, "__dict__", ())


class Region:
    """What is recorded of a module.

    Attributes: is_known: are all layers inside of kinds that can be recorded? fits: and did it fail
        seldom? tapes: by the form of the inputs.
    """

    def __init__(self, module: nn.Module) -> None:
        packed = [inside for inside in module.modules() if isinstance(inside, PackedLayer)]
        self.is_known = self.fits = all(isinstance(inside, KINDS) for inside in packed)
        self.state: State | None = None
        self.seen: set[Hashable] = set()
        self.tapes: dict[Hashable, Tape | None] = {}
        self.failures = 0

    def tape(self, key: Hashable) -> Tape | None:
        """What was recorded for inputs of this form, if it still holds."""
        found = self.tapes.get(key)
        if found is None or self.state is None or self.state.holds():
            return found
        self.state = None
        self.tapes.clear()
        self.seen.clear()
        self._fail()
        return None

    def is_due(self, key: Hashable) -> bool:
        """Are inputs of this form to be recorded now?"""
        if key in self.tapes or not self.fits:
            return False
        if key in self.seen:
            return True
        if len(self.seen) >= _MOST_FORMS:
            self.seen.clear()
            self.tapes.clear()
        self.seen.add(key)
        return False

    def record(self, module: nn.Module, call: Callable[[], Any], inputs: list[Tensor]) -> Any:
        """The result of a call, and its tape, or None where there can't be one."""
        state = State(module)
        if self.state is None or not self.state.holds():
            self.tapes.clear()
            self.state = state
        if not state.is_plain or not state.holds():
            return plainly(call), None
        before = [tensor.clone() for tensor in inputs]
        versions = versions_of(state.tensors)
        grad = torch.is_grad_enabled()
        recorder = Recorder(inputs, state.tensors, {} if grad else OWN)
        with recorder:
            result = call()
        kept = versions == versions_of(state.tensors) and state.holds()
        try:
            tape = recorder.tape(result, None if grad else stretched)
            if kept and all(map(_are_equal, inputs, before)) and _gives(tape, inputs, result):
                return result, tape
        except (Unfit, RuntimeError):  # another run of its calls may fail where inputs changed
            pass
        self._fail()
        return result, None

    def _fail(self) -> None:
        self.failures += 1
        self.fits = self.fits and self.failures < _MOST_FAILURES


def _gives(tape: Tape, inputs: Sequence[Tensor], expected: Any) -> bool:
    """Does a tape give this result, and results of the same sizes for other numbers? Whether it
    does leaves no trace in the random numbers.
    """
    with torch.random.fork_rng(devices=[]):
        leaves, form = pytree.tree_flatten(tape.run(inputs))
        if tape.is_sized_by_numbers(inputs):
            return False
    known, known_form = pytree.tree_flatten(expected)
    return form == known_form and all(map(_are_alike, leaves, known))


def _are_alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return type(a) is type(b) and a == b
    return a.dtype == b.dtype and a.stride() == b.stride() and _are_equal(a, b)


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


_regions: weakref.WeakKeyDictionary[nn.Module, Region] = weakref.WeakKeyDictionary()


def plainly(call: Callable[[], Any]) -> Any:
    """The result of a module's own forward, with functions of torch as `floats` computes them where
    no gradient may be asked for.
    """
    if torch.is_grad_enabled():
        return call()
    with Replacing(OWN):
        return call()


def replayed(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The result of a module's `forward`: by a tape, if there is one for such inputs. It has the
    bits of `plainly`.
    """
    region = _regions.get(module)
    if region is None:
        region = _regions[module] = Region(module)
    mode = _get_current_function_mode()
    if not region.is_known or isinstance(mode, Recorder):
        return forward(module, *args, **kwargs)
    if isinstance(mode, Replacing):  # of a module around this one that isn't recorded
        with _pop_mode_temporarily():
            return _replayed(region, module, forward, args, kwargs)
    return _replayed(region, module, forward, args, kwargs)


def _replayed(
    region: Region, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    inputs: list[Tensor] = []
    call = partial(forward, module, *args, **kwargs)
    key = _form((args, kwargs), inputs) if region.fits else None
    if key is None or not _are_plain(inputs):
        return plainly(call)
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    key = key, grad, inference, torch.get_default_dtype()
    tape = region.tape(key)
    if tape is not None:
        return tape.run(inputs)
    if not region.is_due(key):
        return plainly(call)
    result, region.tapes[key] = region.record(module, call, inputs)
    return result


def _form(value: Any, inputs: list[Tensor]) -> Hashable | None:
    """What tells one form of arguments from another, None for those without one. Adds the tensors
    among them to `inputs`.
    """
    kind = type(value)
    if kind in TENSORS:
        inputs.append(value)
        return value.shape, value.stride(), value.dtype, value.requires_grad
    if kind is tuple or kind is list:
        parts = [_form(part, inputs) for part in value]
        return None if None in parts else (kind, *parts)
    if kind is dict:
        form = _form([*value.values()], inputs)
        return None if form is None else (tuple(value), form)
    return (kind, value) if kind in CONSTANTS else None


def _are_plain(inputs: list[Tensor]) -> bool:
    """Are these different tensors on the CPU, in a call that nobody watches?"""
    different = len({id(tensor) for tensor in inputs}) == len(inputs)
    plain = all(map(native_int8.takes, inputs)) and not torch.is_autocast_enabled("cpu")
    return bool(inputs) and different and plain
