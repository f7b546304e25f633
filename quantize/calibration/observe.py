"""The calls of some layers in a forward pass: the input and output of each, and the residual stream
that its output joins.

A layer joins a stream where its output, as it is, is added to a tensor of its shape that doesn't
come from it. Layers whose output is first normed or scaled join none: what went wrong in the stream
can't be undone before that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quantize.calibration.gradients import without_weight_gradients
from quantize.calibration.inputs import call, first_given, watching
from quantize.calibration.passes import Gone
from quantize.calibration.patches import snapshot, storage_of
from quantize.calibration.stored import saved_in_files

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass(eq=False)
class Call:
    """One call of a layer. The tensors are copies: what runs later may write into the model's own.
    Layers that were given one tensor, one after another, share the copy of it.

    output: None where it isn't asked for.
    stream: what the output was then added to, of the output's shape; None where nothing is known
        of that.
    """

    name: str
    input: torch.Tensor
    output: torch.Tensor | None
    stream: torch.Tensor | None = None


class _Seen(BaseException):
    """Ends a forward pass whose remaining layers nobody watches."""


@dataclass(eq=False)
class _Waiting:
    """A call whose output may yet be added to something.

    output: the tensor that the model goes on with. leaf: in a strict watch, a number that what
        depends on the output has a gradient with respect to.
    """

    call: Call
    output: torch.Tensor
    leaf: torch.Tensor | None


class Watch(TorchFunctionMode):
    """Notes the calls of layers in passes over a model.

    Args:
        model: what `run` runs, in the mode that it is in, with no module compiled.
        names: modules of it; each takes its input first and gives one tensor.
        streams: those of `names` whose streams are noted too.
        calls: number of calls after which a pass may end; None for whole passes.
        outputs: False notes inputs and streams alone, and a pass may end before the last layer.
        skip: where outputs aren't asked for, the last call of a linear doesn't run: its output is
            only looked for in the addition. Raises `Missing` where it is read before that.
        strict: what was computed from the output itself is no stream (GELU's x + 0.04 x^3). To
            know, passes run with gradients. Of inputs and streams only shapes are noted, and no
            outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        streams: Collection[str] = (),
        *,
        calls: int | None = None,
        outputs: bool = True,
        skip: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.names = list(names)
        self.streams = set(streams)
        self.expected = calls
        self.outputs = outputs
        self.skip = skip and not outputs
        self.strict = strict
        self.calls: list[Call] = []
        self.waiting: list[_Waiting] = []
        self.latest: tuple[Any, ...] = (None,)  # an input, its version, and the copy of it

    def run(self, batch: Any, run: Callable[[nn.Module, Any], Any] = call) -> list[Call]:
        """The calls in the order in which they ended, in one pass over `batch`."""
        self.calls, self.waiting = [], []
        with ExitStack() as stack:
            for name in self.names:
                layer = self.model.get_submodule(name)
                if self.outputs or name in self.streams:
                    handle = layer.register_forward_hook(self._hook(name), with_kwargs=True)
                else:
                    handle = layer.register_forward_pre_hook(self._early(name), with_kwargs=True)
                stack.callback(handle.remove)
                if self.skip and name in self.streams and isinstance(layer, nn.Linear):
                    stack.enter_context(self._skipping(layer))
            if self.streams:
                stack.enter_context(self)
            try:
                run(self.model, batch)
            except _Seen:
                pass
        self.latest = (None,)
        return self.calls

    def _hook(self, name: str) -> Callable[..., torch.Tensor]:
        def note(_: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
            leaf = torch.zeros((), requires_grad=True) if self.strict else None
            output = output if leaf is None else _Cut.apply(output.detach(), leaf)
            copy = snapshot(output) if self.outputs and not self.strict else None
            seen = Call(name, self._input(args, kwargs), copy)
            self.calls.append(seen)
            if name in self.streams:
                self.waiting.append(_Waiting(seen, output, leaf))
            self._end_if_done()
            return output

        return note

    @contextmanager
    def _skipping(self, layer: nn.Linear) -> Iterator[None]:
        """Inside, nothing stands for the layer's output where its call is the last."""
        own, forward = layer.__dict__.get("forward"), layer.forward

        def skip(*args: Any, **kwargs: Any) -> torch.Tensor:
            if self.waiting or len(self.calls) + 1 != self.expected:
                return forward(*args, **kwargs)
            x = first_given(args, kwargs)
            return _Summand.of(x.new_empty(*x.shape[:-1], layer.out_features))

        layer.__dict__["forward"] = skip
        try:
            yield
        finally:
            del layer.__dict__["forward"]
            if own is not None:
                layer.__dict__["forward"] = own

    def _early(self, name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self.calls.append(Call(name, self._input(args, kwargs), None))
            self._end_if_done()

        return note

    def _input(self, args: tuple, kwargs: dict) -> torch.Tensor:
        """A copy of what a layer is given: one for layers that are given one tensor in turn."""
        given = first_given(args, kwargs)
        if self.strict:
            return Gone.of(given)
        version = None if given.is_inference() else given._version
        if given is not self.latest[0] or version is None or version != self.latest[1]:
            self.latest = (given, version, snapshot(given))
        return self.latest[2]

    def _end_if_done(self) -> None:
        if len(self.calls) == self.expected and not self.waiting:
            raise _Seen

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if self.waiting and name in ADDITIONS and len(args) == 2 and not kwargs:
            self._note_addition(*args)
            self._end_if_done()
        return function(*args, **(kwargs or {}))

    def _note_addition(self, left: Any, right: Any) -> None:
        if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
            return
        if left.shape != right.shape:
            return
        for ours, other in ((left, right), (right, left)):
            for waiting in self.waiting:
                if not _is_same(waiting.output, ours) or _is_same(waiting.output, other):
                    continue
                if not (self.strict and _depends(other, waiting.leaf)):
                    waiting.call.stream = Gone.of(other) if self.strict else snapshot(other)
                    self.waiting.remove(waiting)
                break


class _Summand(Gone):
    """Stands for an output that is only looked for in an addition."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is nn.functional.dropout and not (kwargs or {}).get("training", True):
            return args[0]
        return super().__torch_function__(function, types, args, kwargs)


class _Cut(torch.autograd.Function):
    """A copy of a tensor that depends on a leaf, and on nothing before it."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        return snapshot(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return None, torch.zeros(())


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """One tensor, or views of it of one shape (dropout in eval mode gives such)."""
    if a is b or isinstance(a, Gone) or isinstance(b, Gone):
        return a is b
    if a.layout != torch.strided or b.layout != torch.strided:
        return False
    if a.shape != b.shape or a.stride() != b.stride():
        return False
    places = [(storage_of(tensor), int(tensor.storage_offset())) for tensor in (a, b)]
    return places[0] == places[1]


def _depends(y: torch.Tensor, x: torch.Tensor | None) -> bool:
    if x is None or not y.requires_grad:
        return False
    try:
        gradient = torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True)[0]
    # something was computed in place after it was used: only what lies between the two is asked for
    except RuntimeError:
        return True
    return gradient is not None


@torch.enable_grad()
def find_streams(model: nn.Module, batch: Any, names: Collection[str]) -> set[str]:
    """Those of the layers `names` whose output joins a stream whenever the layer runs, in eval
    mode.
    """
    with watching((), model), without_weight_gradients(model), saved_in_files(model, 0):
        calls = Watch(model, names, names, strict=True).run(batch)
    alone = {call.name for call in calls if call.stream is None}
    return {call.name for call in calls} - alone
