"""The passes of a `DecoderLM` that native code runs for it, checked before each one against what
the model is by then.

Nothing is kept on the model: looking at it and noting its pointers takes a few milliseconds, less
than one token takes without it. Float weights aren't copied, so those that change in place are read
as they are. Integer weights are packed once (see `packing`), and again after a change that torch
counts.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.hooks import RemovableHandle

from quantize.models import DecoderLM
from quantize.nn import is_traced
from quantize.run.decoding.lazy import LazyBuffers
from quantize.run.decoding.native import MOST_ROWS, Step
from quantize.run.decoding.recognition import (
    NOT_YET,
    is_plain,
    multiplies_integers,
    obstacle,
    reads_prompts,
)
from quantize.run.kv_cache import KVCache

# Tokens times layers after which 6 s of compiling are paid back, at half a millisecond saved in
# each layer.
WORTH_COMPILING = 12000
# tokens times layers that this process decoded without native code, for want of a compiled library
_run_without = 0


class NativePasses:
    """Logits of a pass, or None for a pass that is left to the model: over the first tokens of a
    text or many of them, unless native code reads prompts (see `reads_prompts`).

    `reason` says why the model runs its passes itself; None while native code does, or before it
    was asked.

    Args:
        model: whose passes to run.
        tokens: how many the caller means to decode. None compiles step.cpp where it isn't kept from
            before, as do integer weights, whose tokens mustn't depend on who decodes them; a number
            does so only once this process has decoded enough without it (WORTH_COMPILING).
        narrow: read float32 weights of float16 layers in 16 bits, and let the layers hold them so.
    """

    def __init__(self, model: DecoderLM, *, tokens: int | None = None, narrow: bool = False):
        self.model, self.narrow = model, narrow
        pays = tokens is None or _run_without + tokens * len(model.blocks) >= WORTH_COMPILING
        self.compile_now = pays or multiplies_integers(model)
        self.reason: str | None = None
        self._looked: tuple[_Watch, Step | None] | None = None

    def __call__(
        self, ids: Tensor, cache: object, logits_to_keep: int, *, unchanged: bool = False
    ) -> Tensor | None:
        """Logits [B, T, V] of ids [B, T]. unchanged: nobody had the time to change the model since
        the last pass, so that it isn't checked.
        """
        global _run_without
        if type(cache) is not KVCache or is_watched():
            return None
        few = bool(cache.length) and ids.numel() <= MOST_ROWS
        if not few and not reads_prompts(self.model):
            return None
        looked = self._looked
        if looked is None or not (unchanged or looked[0].same()):
            looked = None  # as in `look`
            looked = self.look()
        step = looked[1]
        if step is not None:
            return step(ids, cache, logits_to_keep)
        if self.reason == NOT_YET:
            _run_without += ids.shape[-1] * len(cache.shapes)
        return None

    def look(self) -> tuple[_Watch, Step | None]:
        """See what the model is now, and make the native step for it if there can be one."""
        self._looked = None  # which holds tensors that only layers should
        self.reason = obstacle(self.model, compile_now=self.compile_now)
        step = None if self.reason else Step(self.model, narrow=self.narrow)
        watch = _Watch(self.model, step)  # it holds tensors: those that layers give up are gone
        self._looked = looked = watch, step  # together: other threads may use this object
        return looked


def is_watched() -> bool:
    """Whether this pass has to consist of operators and module calls: somebody casts, records or
    counts them.
    """
    return (
        torch.is_autocast_enabled("cpu")
        or is_traced()
        or is_in_torch_dispatch_mode()
        or bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
    )


class _Watch:
    """Notices when a model isn't what it was: its modules, its tensors, their values (in place),
    hooks, attributes added.

    It runs before every token, when what it looks at isn't in the CPU's caches any more: so it asks
    for all of that at once, and looks at as little as it can. Nobody has touched the tensors of a
    layer that holds no integers (see `lazy`), and torch counts all hooks in one place.

    Args:
        model: to watch.
        step: of the model. Values that it reads where they are may change.
    """

    def __init__(self, model: nn.Module, step: Step | None):
        modules = self.modules = list(model.modules())
        self.model, self.config = model, getattr(model, "config", None)
        self.dicts: list[Any] = [vars(module) for module in modules]  # one more: an own `forward`
        self.contents: list[dict] = []
        for module in modules:
            own = (module._modules, module._parameters, module._buffers)
            self.contents += filter(None, own[:1] if isinstance(own[2], LazyBuffers) else own)
            self.dicts += filter(None, (module._forward_hooks, module._forward_pre_hooks))
        self.dicts += self.contents
        self.members = list(_members(self.contents))
        plain = [member for member in self.members if is_plain(member)]
        self.tensors = [tensor for tensor in plain if tensor.numel()]
        in_place = step.addresses() if step else set()
        packed = [tensor for tensor in self.tensors if tensor.data_ptr() not in in_place]
        self.counted = [tensor for tensor in packed if not tensor.is_inference()]
        read = [*map(id, modules), *(id(held) + _DICT_SIZE for held in self.dicts)]
        read += [*map(id, self.tensors), *(tensor._cdata for tensor in self.tensors)]
        self.read, self.step = torch.tensor(read, dtype=torch.int64, device="cpu"), step
        self.state = self._state()

    def same(self) -> bool:
        """Whether nothing has changed since this object was made."""
        if self.model.config is not self.config or self._state() != self.state:
            return False
        return all(map(operator.is_, _members(self.contents), self.members))

    def _state(self) -> tuple[object, ...]:
        if self.step:
            self.step.fetch(self.read)
        kinds = list(map(type, self.modules))
        sizes = list(map(len, self.dicts))
        pointers = list(map(Tensor.data_ptr, self.tensors))
        versions = list(map(_VERSION, self.counted))
        return RemovableHandle.next_id, LazyBuffers.restored, kinds, sizes, pointers, versions


_VERSION = operator.attrgetter("_version")
_DICT_SIZE = 16  # where a dict of CPython holds its size; elsewhere what is asked for is of no use


def _members(contents: Iterable[dict]) -> Iterable[object]:
    return chain.from_iterable(map(dict.values, contents))
