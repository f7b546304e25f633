"""Modules of which the calls of torch alone are made, where an earlier call was recorded.

The Python of a model costs as much as its int8 layers where inputs are small. A module that is made
a region (`int8_region`) is recorded (`tape`) when inputs of a form come for the second time; until
the first tape is there, for the third time too, since both recordings have to be the same. A tape
that gives what the forward gave is used as long as nothing of the modules has changed (`watched`):
neither an attribute, nor a tensor, nor a hook. Where a forward can't be recorded, the modules
inside of it are, in the same call. Inputs of ever other forms, as texts of all lengths, don't cost
more than they may gain: beyond the first forms, recordings take a SHARE of the time at most. Left
out: training, autocast, inputs that aren't tensors, numbers or strings.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode, _pop_mode_temporarily
from torch.utils import _pytree as pytree

from quantize.clock import timed
from quantize.native import int8 as native_int8
from quantize.native.packs import versions_of
from quantize.nn import PackedLayer
from quantize.nn.floats import REPLACED
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_chain import joined
from quantize.nn.int8_conv import Int8Conv
from quantize.nn.int8_embedding import Int8Embedding
from quantize.nn.int8_transposed import Int8ConvTranspose
from quantize.nn.stretches import stretched
from quantize.nn.tape import CONSTANTS, TENSORS, Recorder, Replacing, Step, Tape, Unfit
from quantize.nn.watched import State, state_of

# Layers in integers that can be recorded.
KINDS = (Int8Linear, Int8Conv, Int8ConvTranspose, Int8Embedding)
_MOST_FORMS = 128  # of inputs that are remembered
_FIRST = 9  # recordings that are made whatever they take: of eight forms, the first one twice
_SHARE = 0.25  # of the time of calls without a tape, that others' recordings may take
_MOST_FAILURES = 8  # until a module is left alone


class Region:
    """What is recorded of a module.

    Attributes: is_known: are all layers inside of kinds that can be recorded? fits: and did it fail
        seldom? seen: forms of inputs, each with the mark of a first recording. tapes: by these.
        is_proven: has it a tape, for whose form two recordings were the same? recordings: how many
        were made since it changed. plain_s, recorded_s: time of calls without a tape, and of these.
    """

    def __init__(self, module: nn.Module) -> None:
        packed = [inside for inside in module.modules() if isinstance(inside, PackedLayer)]
        self.is_known = self.fits = all(isinstance(inside, KINDS) for inside in packed)
        self.state: State | None = None
        self.seen: dict[Hashable, int | None] = {}
        self.tapes: dict[Hashable, Tape | None] = {}
        self.failures = self.recordings = 0
        self.is_proven = False
        self.plain_s = self.recorded_s = 0.0

    def tape(self, key: Hashable) -> Tape | None:
        """What was recorded for inputs of this form, if it still holds."""
        found = self.tapes.get(key)
        if found is None or self.state is None or self.state.holds():
            return found
        self.state, self.is_proven, self.recordings = None, False, 0
        self.tapes.clear()
        self.seen.clear()
        self._fail()
        return None

    def is_due(self, key: Hashable, is_usual: bool = False) -> bool:
        """Are inputs of this form to be recorded now? is_usual: they came before."""
        if key in self.tapes or not self.fits:
            return False
        is_new = key not in self.seen
        self.see(key)
        if is_new and not is_usual:
            return False
        return self.recordings < _FIRST or self.recorded_s < _SHARE * self.plain_s

    def see(self, key: Hashable | None) -> None:
        """Inputs of this form come."""
        if key is None or key in self.seen:
            return
        if len(self.seen) >= _MOST_FORMS:
            oldest = next(iter(self.seen))
            self.seen.pop(oldest, None)
            self.tapes.pop(oldest, None)
        self.seen[key] = None

    def record(
        self, key: Hashable, module: nn.Module, call: partial[Any], inputs: list[Tensor]
    ) -> Any:
        """The result of a call. Notes the calls of torch in it, and makes a tape of them where
        enough is known of such calls.
        """
        state = self.state
        if state is None or not state.holds():
            state = state_of(module)
            if state is None or not state.is_plain or not state.holds():
                self.fits = self.fits and state is not None
                self.tapes[key] = None
                return plainly(call)
            self.tapes.clear()
            self.seen = {**dict.fromkeys(self.seen), key: None}
            self.state, self.is_proven = state, False
        self.recordings += 1
        before, given = [tensor.clone() for tensor in inputs], _form_of(call)
        versions = versions_of(state.tensors)
        recorder = Recorder(inputs, state.tensors, {} if torch.is_grad_enabled() else REPLACED)
        with recorder:
            result = call()
        kept = versions == versions_of(state.tensors) and state.holds()
        kept = kept and given == _form_of(call) and all(map(_are_equal, inputs, before))
        if not kept or not self._keep(key, recorder, inputs, result):
            self.tapes[key] = None
            self._fail()
        return result

    def _keep(self, key: Hashable, recorder: Recorder, inputs: list[Tensor], result: Any) -> bool:
        """Keep a recording for later, if it may be used."""
        try:
            mark = recorder.end(result)
            first, self.seen[key] = self.seen.get(key), mark
            if first is None and not self.is_proven:
                return True
            tape = recorder.tape(None if torch.is_grad_enabled() else _shorter)
            if first not in (None, mark) or not _gives(tape, inputs, result):
                return False
        except (Unfit, RuntimeError):  # another run of its calls may fail where inputs changed
            return False
        self.tapes[key], self.is_proven = tape, True
        return True

    def _fail(self) -> None:
        self.failures += 1
        self.fits = self.fits and self.failures < _MOST_FAILURES


def _shorter(steps: Sequence[Step], *known: Any) -> list[Step]:
    """The steps, with what native programs can do in as few of them as can be."""
    return stretched(joined(steps, *known), *known)


def _form_of(call: partial[Any]) -> tuple[Hashable, list[int]]:
    """Of its arguments, and which tensors are among them."""
    inputs: list[Tensor] = []
    return _form((call.args[1:], call.keywords), inputs), [*map(id, inputs)]


def _gives(tape: Tape, inputs: Sequence[Tensor], expected: Any) -> bool:
    """Does a tape give this result, and results of the same sizes for other numbers? Whether it
    does leaves no trace in the random numbers.
    """
    with torch.random.fork_rng(devices=[]):
        found, varies = tape.run_watched(inputs)
    if varies:
        return False
    leaves, form = pytree.tree_flatten(found)
    known, known_form = pytree.tree_flatten(expected)
    return form == known_form and all(map(_are_alike, leaves, known))


def _are_alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return type(a) is type(b) and a == b
    kept = a.requires_grad == b.requires_grad and a.is_inference() == b.is_inference()
    return kept and a.dtype == b.dtype and a.stride() == b.stride() and _are_equal(a, b)


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


_regions: weakref.WeakKeyDictionary[nn.Module, Region] = weakref.WeakKeyDictionary()


def plainly(call: Callable[[], Any], is_whole: bool = False) -> Any:
    """The result of a module's own forward, with functions of torch as `floats` computes them where
    no gradient may be asked for. is_whole: modules inside of it aren't recorded.
    """
    own = {} if torch.is_grad_enabled() else REPLACED
    if not own and not is_whole:
        return call()
    with Replacing(own, is_whole):
        return call()


def replayed(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The result of a module's `forward`: by a tape, if there is one for such inputs. It has the
    bits of `plainly`.
    """
    region = _regions.get(module)
    if region is None:
        region = _regions[module] = Region(module)
    mode = _get_current_function_mode()
    if not region.is_known:
        return forward(module, *args, **kwargs)
    if not isinstance(mode, Replacing):
        return _replayed(region, module, forward, args, kwargs)
    is_recorder = isinstance(mode, Recorder)
    if not mode.is_whole:
        with _pop_mode_temporarily():
            return _replayed(region, module, forward, args, kwargs, is_recorder)
    if is_recorder:  # which may find that it can't be recorded as a whole
        with _pop_mode_temporarily():
            region.see(_key(args, kwargs, []))
    return forward(module, *args, **kwargs)


def _replayed(
    region: Region,
    module: nn.Module,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
    is_usual: bool = False,
) -> Any:
    """is_usual: inputs of this form came before."""
    inputs: list[Tensor] = []
    call = partial(forward, module, *args, **kwargs)
    key = _key(args, kwargs, inputs) if region.fits else None
    if key is None:
        return plainly(call)
    tape = region.tape(key)
    if tape is not None:
        return tape.run(inputs)
    if region.is_due(key, is_usual):
        result, seconds = timed(partial(region.record, key, module, call, inputs))
        region.recorded_s += seconds
        return result
    waits = region.fits and key not in region.tapes
    result, seconds = timed(partial(plainly, call, waits))
    region.plain_s += seconds
    return result


def _key(args: Any, kwargs: Any, inputs: list[Tensor]) -> Hashable | None:
    """What tells calls of one form from others, None for those that can't be recorded. Adds the
    tensors among the arguments to `inputs`.
    """
    form = _form((args, kwargs), inputs)
    if form is None or not _are_fit(inputs):
        return None
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return form, grad, inference, torch.get_default_dtype()


def _form(value: Any, inputs: list[Tensor]) -> Hashable | None:
    """What tells one form of arguments from another, None for those without one. Adds the tensors
    among them to `inputs`.
    """
    kind = type(value)
    if kind in TENSORS:
        if not native_int8.takes(value):  # sparse ones have no strides, nested ones no shape
            return None
        if kind is Tensor and value.__dict__:  # attributes that somebody put on it
            return None
        inputs.append(value)
        return value.shape, value.stride(), value.dtype, value.requires_grad
    if kind is tuple or kind is list:
        parts = [_form(part, inputs) for part in value]
        return None if None in parts else (kind, *parts)
    if kind is dict:
        form = _form([*value.values()], inputs)
        return None if form is None else (tuple(value), form)
    return (kind, value) if kind in CONSTANTS else None


def _are_fit(inputs: list[Tensor]) -> bool:
    """Are these different tensors, outside of autocast?"""
    different = len({id(tensor) for tensor in inputs}) == len(inputs)
    return bool(inputs) and different and not torch.is_autocast_enabled("cpu")
