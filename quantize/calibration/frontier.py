"""What modules of a model are called with, one after another, while those before them change for
good: each costs a pass through the one before it, and not one through the model.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from quantize.calibration.inputs import call, on_tensors, watching, without_cache
from quantize.calibration.look import Look
from quantize.calibration.passes import (
    PLAIN,
    Missing,
    Pass,
    Ran,
    impure_modules,
    leaves,
    routed_through,
)
from quantize.calibration.replay import MEMORY
from quantize.calibration.stored import Store


class _Arrived(BaseException):
    """Ends a pass at the module that is asked for."""


class Frontier:
    """Goes through a model from module to module; see above.

    What ran before a module is kept as outputs of modules, see `passes`, and dropped where no later
    pass reads it.

    Args:
        model: as it is before the first change.
        batches: of calibration, in memory.
        names: modules of the model, of which none is inside another.
        look: at the model, through these batches; None: taken now.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        names: Iterable[str],
        *,
        look: Look | None = None,
    ) -> None:
        self.batches = batches
        modules = {name: model.get_submodule(name) for name in names}
        self.look = look = look or Look(model, batches, modules)
        self.impure = impure_modules(model, look.stateful)
        self.store = Store(MEMORY)
        self.kept = [Ran() for _ in batches]
        # of the modules that run once in every batch
        self.order = [n for n in look.first.counts if all(c[n] == 1 for c in look.counts)]

    @torch.no_grad()
    def arguments(self, model: nn.Module, name: str) -> list[dict[str, Any]]:
        """What the module is called with in each batch, as keyword arguments.

        Args:
            model: in eval mode; what comes after `name` in `order` is still to change.
            name: one of `order`; those before it change no more.

        Raises:
            ValueError: for arguments that have no names, and a batch that doesn't reach the module.
        """
        module = model.get_submodule(name)
        signature = inspect.signature(module.forward)
        later = self.order[self.order.index(name) :]
        running: list[Pass] = []
        found: list[dict[str, Any]] = []

        def arrive(_: nn.Module, args: tuple, kwargs: dict) -> None:
            named = _by_name(name, signature, args, kwargs)
            with torch._C.DisableTorchFunction():
                found.append(on_tensors(named, self.store.copy))
            raise _Arrived

        with routed_through(running, model, later), without_cache(model):
            hook = module.register_forward_pre_hook(arrive, with_kwargs=True)
            with ExitStack() as stack:
                stack.callback(hook.remove)
                for number, batch in enumerate(self.batches):
                    run = partial(self._run, model, batch, number, name, later, running)
                    try:
                        run()
                    except Missing:  # something reads what was dropped: from the input, then
                        self.kept[number] = Ran()
                        run()
                    if len(found) <= number:
                        raise ValueError(f"batch {number} of calibration doesn't reach {name!r}")
        return found

    def _run(
        self,
        model: nn.Module,
        batch: Any,
        number: int,
        name: str,
        later: Sequence[str],
        running: list[Pass],
    ) -> None:
        """One pass as far as the module, or further where it isn't reached."""
        kept, draws = self.kept[number], self.look.draws
        running[:] = [Pass(kept, self.store, [name], later, self.impure, draws=draws)]
        with watching((), model), contextlib.suppress(_Arrived), running[0]:
            call(model, batch)


_NAMELESS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


def _by_name(
    module: str, signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call, by their names in the signature."""
    named: dict[str, Any] = {}
    for key, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[key].kind
        for part in leaves(value):
            if not isinstance(part, (torch.Tensor, *PLAIN)):
                raise ValueError(f"{module!r} is called with a {type(part).__name__} as {key!r}")
        if kind in _NAMELESS and value != ():
            raise ValueError(f"{module!r} takes {key!r} without a name, so no batch can hold it")
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif kind not in _NAMELESS:
            named[key] = value
    return named
