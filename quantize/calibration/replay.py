"""Two models side by side, layer after layer, at the cost of a few passes and not of one per layer.

`Walk` shows what the layers of an original and of a copy that is being changed are given and give,
some layers at a time, in the order in which they run. What runs before the first layer that may
still change is final: each module that has ended by then is kept as its output, and later passes
take that instead of running the module (see `passes`). Of these outputs only those stay that a
later pass can still read.

In the first batch, the original's layers must get bit for bit what they got in a whole pass, and
batches must be the same each time; where they aren't, every pass runs from the input.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from quantize.calibration.inputs import (
    as_written,
    call,
    check_batches,
    in_eval_mode,
    of_both,
    of_original,
    watching,
    without_cache,
)
from quantize.calibration.look import Look, digest
from quantize.calibration.observe import Call, Watch
from quantize.calibration.passes import Missing, Pass, Ran, impure_modules, routed_through
from quantize.calibration.stored import Store

MEMORY = 1 << 29  # bytes of kept outputs that stay in memory


class Walk:
    """Shows layers of two models side by side; see above.

    Args:
        original: the first of the two models of every call; it stays as it is.
        batches: re-iterable calibration batches; `Beside` where the two models get others.
        layers: those that will be shown, and may be changed in the other model.
        memory: bytes of kept outputs that stay in memory.
        look: at the original, through these batches; None: taken now.
    """

    def __init__(
        self,
        original: nn.Module,
        batches: Iterable[Any],
        layers: Iterable[str],
        *,
        memory: int = MEMORY,
        look: Look | None = None,
    ) -> None:
        self.batches = check_batches(batches)
        self.layers = list(dict.fromkeys(layers))
        self.changing = set(self.layers)
        self.store = Store(memory)
        self.replay = True
        self.skip = True  # may a layer that is only shown its stream be left out?
        if look is None:
            watched = {name: original.get_submodule(name) for name in self.layers}
            look = Look(original, of_original(batches), watched)
        self.look = look
        self.impure = impure_modules(original, look.stateful)
        self.kept: list[dict[int, Ran]] = [{}, {}]  # of the two models, by batch
        self.running: list[Pass] = []

    def finish(self, names: Iterable[str]) -> None:
        """These layers change no more."""
        self.changing.difference_update(names)

    @torch.no_grad()
    def show(
        self, models: Sequence[nn.Module], names: Collection[str], streams: Collection[str] = ()
    ) -> Iterator[list[list[Call]]]:
        """For each batch that reaches the layers `names`, their calls in each of the two models;
        outputs are those of the original alone.

        streams: those of `names` of which it is also noted what their outputs are added to.
        """
        distinct = list({id(model): model for model in models}.values())
        with ExitStack() as stack:
            begun = self.changing.union(names)
            for model in distinct:
                stack.enter_context(routed_through(self.running, model, begun))
            stack.enter_context(without_cache(*distinct))
            stack.enter_context(as_written(*distinct))
            traceless = self.look.fixed and not self.look.stateful
            inside = in_eval_mode if traceless else partial(watching, ())
            stack.enter_context(inside(*distinct))
            for number, given in enumerate(of_both(self.batches)):
                expected = self._expected(number, given[0], names)
                if expected == 0:
                    continue
                passes = []
                for which, model in enumerate(models):
                    watch = Watch(
                        model, names, streams, calls=expected, outputs=not which, skip=self.skip
                    )
                    passes.append(self._run(which, watch, number, given[which]))
                yield passes

    def _expected(self, number: int, batch: Any, names: Collection[str]) -> int | None:
        """How often layers run in a batch; None where it isn't the one that was looked at."""
        seen = self.look
        if number < len(seen.contents) and seen.contents[number] == seen.content(batch):
            return sum(seen.counts[number][name] for name in names)
        self._start_again()
        return None

    def _start_again(self) -> None:
        """From now on, every pass runs from the input."""
        self.replay = False
        for kept in self.kept:
            kept.clear()

    def _run(self, which: int, watch: Watch, number: int, batch: Any) -> list[Call]:
        """The calls in one pass over one of the models."""

        def run(model: nn.Module, batch: Any) -> None:
            with ExitStack() as stack:
                if self.look.stateful:
                    stack.enter_context(watching((), model))
                stack.enter_context(self.running[0])
                call(model, batch)

        root = self.kept[which].setdefault(number, Ran())
        while True:
            changing = self.changing if which else ()  # the original doesn't change
            begun = Pass(
                root, self.store, watch.names, changing, self.impure, draws=self.look.draws
            )
            self.running[:] = [begun]
            begun.final = self.replay
            try:
                calls = watch.run(batch, run)
            except Missing:
                if watch.skip:
                    watch.skip = self.skip = False
                    continue
            else:
                if which or number or not self.replay or self._as_before(calls):
                    return calls
            self._start_again()
            root = Ran()

    def _as_before(self, calls: Sequence[Call]) -> bool:
        """Did the original's layers get what they got in a whole pass over the first batch?"""
        names = {call.name for call in calls}
        given = [known for name, known in self.look.given if name in names]
        return given[: len(calls)] == [digest(call.input) for call in calls]


class Pace:
    """Lines of progress through steps of about the same work, with the time left."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.begun = 0
        self.start = time.monotonic()

    def next(self, what: str) -> str:
        """The line for the step that begins now."""
        self.steps = max(self.steps, self.begun + 1)  # one more may turn out to be needed
        line = f"{what} ({self.begun + 1}/{self.steps})"
        if self.begun:
            taken = (time.monotonic() - self.start) / self.begun
            line += f", {taken * (self.steps - self.begun):.0f} s left"
        self.begun += 1
        return line
