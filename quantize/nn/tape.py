"""Calls of torch that a forward came to, made again without the Python around them.

A `Tape` is recorded while a forward runs on real inputs. Its steps are the very calls that were
made, on the same tensors, so its results have the same bits; it holds for inputs of the same
shapes, strides and dtypes. A forward that looks at the numbers of a tensor, or at anything of it
but its form, can't be recorded, nor one in which numbers decide how large a tensor is, nor one that
uses tensors of unknown origin.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

TENSORS = (Tensor, nn.Parameter)  # no subclass: its calls may do anything
CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout)
KEPT = (*CONSTANTS, complex, torch.memory_format, type(Ellipsis))
_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_meta")
_METHODS = ("size", "dim", "stride", "numel", "is_contiguous", "is_floating_point", "__len__")
# Calls whose results depend on the form of a tensor alone.
_QUESTIONS = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(getattr(Tensor, name) for name in _METHODS),
    torch.is_floating_point,
    torch.numel,
    torch.is_tensor,
}
# Calls that change nothing where they give what they got.
_PASSING = {F.dropout, torch.dropout, Tensor.contiguous, Tensor.to, Tensor.float}


class Unfit(Exception):
    """A forward that can't be recorded."""


class Step(NamedTuple):
    """One call. Values lie in numbered places.

    Args:
        call: takes the values at `reads`.
        reads: places.
        to: place of its result.
        last: places that no later step reads.
    """

    call: Callable[..., Any]
    reads: tuple[int, ...]
    to: int
    last: tuple[int, ...] = ()


# From steps, places of results, values and seen tensors to fewer steps; see Recorder.
Shorten = Callable[[Sequence[Step], Sequence[int], Sequence[Any], dict[int, Tensor]], list[Step]]


class Tape:
    """The steps of a forward.

    Args:
        steps: in their order.
        values: what lies in the places before the first step; the inputs come first.
        outputs: places of the tensors and constants in the result.
        form: of the result, as pytree has it.
    """

    def __init__(
        self, steps: Iterable[Step], values: Sequence[Any], outputs: Sequence[int], form: Any
    ) -> None:
        self.outputs, self.form = outputs, form
        self.steps = _with_last_reads(list(steps), outputs, values)
        size = max([len(values), *(step.to + 1 for step in self.steps)])
        self.values = [*values, *[None] * (size - len(values))]
        self.is_single = form.is_leaf()

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """The result for tensors of the same forms as those that it was recorded with."""
        return self._run(self.steps, inputs)

    def run_watched(self, inputs: Sequence[Tensor]) -> tuple[Any, bool]:
        """The result, and whether numbers decide how large a tensor is: then sizes may differ from
        those recorded.
        """
        sizes = _Sizes()
        steps = [s._replace(call=partial(sizes.see, s.call)) for s in self.steps]
        return self._run(steps, inputs), sizes.vary

    def _run(self, steps: Sequence[Step], inputs: Sequence[Tensor]) -> Any:
        values = self.values.copy()
        values[: len(inputs)] = inputs
        for call, reads, to, last in steps:
            values[to] = call(*[values[place] for place in reads])
            for place in last:
                values[place] = None
        leaves = [values[place] for place in self.outputs]
        return leaves[0] if self.is_single else pytree.tree_unflatten(leaves, self.form)


class _Sizes(TorchDispatchMode):
    """Sees calls whose results have sizes that numbers decide. vary: was there one?"""

    vary = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Told True, torch imports its compiler at the first call, which takes a second."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.dynamic_output_shape in func.tags and not _takes_indices(func, args):
            self.vary = True
        return func(*args, **(kwargs or {}))

    def see(self, call: Callable[..., Any], *values: Any) -> Any:
        """The result of a call. Functions of this package never let numbers decide, and compute by
        slower kernels where torch has a mode.
        """
        func = call.func if isinstance(call, Named) else call
        if str(getattr(func, "__module__", "")).startswith("quantize."):
            return call(*values)
        with self:
            return call(*values)


def _takes_indices(func: Any, args: Sequence[Any]) -> bool:
    """Does it take elements at indices, not those that a mask marks?"""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1])


def _with_last_reads(
    steps: list[Step], outputs: Sequence[int], values: Sequence[Any]
) -> list[Step]:
    """The steps, each with the places that it is the last one to read; results alone."""
    seen = {*outputs, *(place for place, value in enumerate(values) if value is not None)}
    found: list[Step] = []
    for step in reversed(steps):
        last = {*step.reads, step.to} - seen
        seen |= last
        found.append(step._replace(last=tuple(last)))
    return found[::-1]


class Replacing(TorchFunctionMode):
    """Makes other calls in the place of some of those inside of it.

    own: what is called, by the function of torch. is_whole: is what runs inside to be recorded as a
    whole, now or later?
    """

    def __init__(self, own: Mapping[Any, Callable[..., Any]], is_whole: bool = False) -> None:
        super().__init__()
        self.own, self.is_whole = own, is_whole

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.own.get(func, func)(*args, **(kwargs or {}))


class Recorder(Replacing):
    """Records the calls that are made inside of it.

    Args:
        inputs: tensors that another run has others in the place of.
        owned: tensors that every run reads.
        own: as Replacing has it; what is called is recorded.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        owned: Iterable[Tensor],
        own: Mapping[Any, Callable[..., Any]],
    ) -> None:
        super().__init__(own, is_whole=True)
        self.inputs, self.problem = inputs, ""
        self.steps: list[Step] = []
        self.values: list[Any] = []
        self.places: dict[int, int] = {}  # of tensors, by their identity
        self.seen: dict[int, Tensor] = {}  # by their places
        self.versions: list[int] = []  # of these, as they came
        self.changes = False
        for tensor in inputs:
            self._keep(tensor, self._new(None))
        unique = {id(tensor): tensor for tensor in owned}
        if unique.keys() & self.places.keys():
            self.problem, self.is_whole = "a tensor of the module as an input", False
        for tensor in unique.values():
            self._keep(tensor, self._new(tensor))
        self.memory = {*map(_memory, unique.values())}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = self.own.get(func, func)
        # as it is: a forward under `torch.no_grad` may be decorated with it
        is_set = func is torch._C._set_grad_enabled and args == (torch.is_grad_enabled(),)
        result = func(*args, **(kwargs or {}))
        # of a number, torch._assert is asked after a question
        if is_set or (func is torch._assert and not isinstance(args[0], Tensor)):
            return result
        if func not in _QUESTIONS and not self.problem:
            try:
                self._add(func, args, kwargs or {}, result)
            except Unfit as problem:
                self.problem, self.is_whole = str(problem), False
        return result

    def end(self, result: Any) -> int:
        """Note what the forward gave. Returns what tells recordings apart: their calls and the
        numbers in them. Raises Unfit.
        """
        if self.problem:
            raise Unfit(self.problem)
        leaves, self.form = pytree.tree_flatten(result)
        self.outputs = [self._place(leaf) for leaf in leaves]
        calls = [(repr(step.call), step.reads, step.to) for step in self.steps]
        values = [id(one) if isinstance(one, Tensor) else repr(one) for one in self.values]
        return hash((*calls, *values, *self.outputs))

    def tape(self, shorten: Shorten | None = None) -> Tape:
        """What was recorded, once it has ended. shorten: gives fewer steps, in another order, of
        those that change no tensor. Raises Unfit.
        """
        steps: Sequence[Step] = self.steps
        if shorten is not None and not self._has_changed():
            steps = shorten(steps, self.outputs, self.values, self.seen)
        return Tape(steps, self.values, self.outputs, self.form)

    def _has_changed(self) -> bool:
        """Did a step change a tensor, or may it have?"""
        return self.changes or self.versions != [*map(_version, self.seen.values())]

    def _new(self, value: Any) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def _keep(self, tensor: Tensor, place: int) -> None:
        self.places[id(tensor)] = place
        self.seen[place] = tensor
        self.versions.append(_version(tensor))

    def _add(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if any(result is value for value in (*args, *kwargs.values())):
            if func in _PASSING:
                return
            self.changes = True
            if isinstance(result, Tensor) and _memory(result) in self.memory:
                raise Unfit("a tensor of the module is changed")
        reads = [self._place(value) for value in (*args, *kwargs.values())]
        call = Named(func, len(args), tuple(kwargs)) if kwargs else func
        to = self._new(None)
        self.steps.append(Step(call, tuple(reads), to))
        if isinstance(result, (tuple, list)):
            for index, part in enumerate(result):
                place = self._new(None)
                self.steps.append(Step(operator.itemgetter(index), (to,), place))
                self._note(func, part, place)
        else:
            self._note(func, result, to)

    def _note(self, func: Any, result: Any, place: int) -> None:
        if type(result) not in TENSORS:
            raise Unfit(f"{getattr(func, '__name__', func)} gives a {type(result).__name__}")
        self._keep(result, place)

    def _place(self, value: Any) -> int:
        """Where a value lies."""
        if isinstance(value, Tensor):
            if id(value) not in self.places:
                raise Unfit("a tensor of unknown origin")
            return self.places[id(value)]
        if _is_constant(value):
            return self._new(value)
        if not isinstance(value, (tuple, list)):
            raise Unfit(f"an argument of type {type(value).__name__}")
        reads = tuple(self._place(part) for part in value)
        to = self._new(None)
        make = getattr(type(value), "_make", type(value))  # as named tuples are made
        self.steps.append(Step(partial(_gathered, make), reads, to))
        return to


def is_replacing() -> bool:
    """Are calls that are made now replaced, or recorded?"""
    return isinstance(_get_current_function_mode(), Replacing)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _memory(tensor: Tensor) -> int:
    """Where its numbers lie, the same for all views of a tensor; 0 for one without."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _is_constant(value: Any) -> bool:
    if isinstance(value, slice):
        return all(map(_is_constant, (value.start, value.stop, value.step)))
    if isinstance(value, (tuple, list)):
        return all(map(_is_constant, value))
    return isinstance(value, KEPT)


def _gathered(make: Callable[[Any], Any], *values: Any) -> Any:
    return make(values)


def is_gathering(step: Step) -> bool:
    """Does it put its values into a list or a tuple?"""
    return getattr(step.call, "func", None) is _gathered


def called(
    step: Step, value: Callable[[int], Any]
) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """What a step calls, and with what. value: of a place."""
    found = [*map(value, step.reads)]
    if not isinstance(step.call, Named):
        return step.call, found, {}
    count = step.call.positional
    return step.call.func, found[:count], dict(zip(step.call.names, found[count:], strict=True))


class Named(NamedTuple):
    """func, with the values after the first ones (`positional`) given by these names."""

    func: Callable[..., Any]
    positional: int
    names: tuple[str, ...]

    def __call__(self, *values: Any) -> Any:
        named = dict(zip(self.names, values[self.positional :], strict=True))
        return self.func(*values[: self.positional], **named)
