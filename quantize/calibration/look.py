"""One look at a model through its batches: which layers run, on what, and whether passes leave a
state. Whatever else is to be summed over whole passes is summed in the same ones.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration.gradients import OutputGradients, without_weight_gradients
from quantize.calibration.inputs import (
    check_batches,
    output_tensors,
    run_batch,
    watching,
    without_cache,
)
from quantize.calibration.state import changed
from quantize.calibration.statistics import Calls, InputSums, on_input
from quantize.calibration.stored import saved_in_files

SAVED = 1 << 28  # bytes of what a gradient needs of a pass that stay in memory


class Look:
    """Whole passes over a model, one for each batch, from the model's state.

    Args:
        model: runs in eval mode; it is as before afterwards.
        batches: re-iterable calibration batches.
        layers: of the model, by name: those whose calls are noted.
        inputs: sums that are filled too.
        gradients: sums that are filled too. The first batch then runs twice, once without
            gradients, as later passes do.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        layers: Mapping[str, nn.Module],
        *,
        inputs: InputSums | None = None,
        gradients: OutputGradients | None = None,
    ) -> None:
        self.first = Calls()  # those of the first batch
        self.counts: list[Counter] = []  # of calls, by batch
        self.given: list[tuple[str, bytes]] = []  # digests of inputs in the first batch
        self.contents: list[list[bytes]] = []  # of batches that may be others each time
        self.stateful: set[str] = set()  # modules whose state a pass changes
        self.reached: set[str] = set()  # layers that ran on at least one row
        self.fixed = isinstance(batches, (list, tuple))
        with watching((), model), without_cache(model):
            for number, batch in enumerate(check_batches(batches)):
                self.contents.append(self.content(batch))
                self.counts.append(Counter())
                if number == 0 and gradients is not None:
                    self._run(model, batch, 0, layers, None, None)
                    self.counts[0].clear()
                self._run(model, batch, number, layers, inputs, gradients)
        self.first.latest.clear()

    @property
    def draws(self) -> bool:
        """May a pass draw random numbers? They count as the state of the whole."""
        return "" in self.stateful

    def content(self, batch: Any) -> list[bytes]:
        """What tells a batch from others; nothing where batches are kept in memory."""
        return [] if self.fixed else [digest(tensor) for tensor in output_tensors(batch)]

    def _run(
        self,
        model: nn.Module,
        batch: Any,
        number: int,
        layers: Mapping[str, nn.Module],
        inputs: InputSums | None,
        gradients: OutputGradients | None,
    ) -> None:
        """One pass, and back where gradients are wanted."""
        exactly = number == 0 and gradients is None
        note = self._trace if exactly else self._count

        def run() -> None:
            output = run_batch(model, batch, number)
            if gradients is not None:
                gradients.backward(output)

        with ExitStack() as stack:
            hooks = [on_input(layer, partial(note, name)) for name, layer in layers.items()]
            hooks += inputs.hooks() if inputs is not None else []
            hooks += gradients.hooks() if gradients is not None else []
            for hook in hooks:
                stack.callback(hook.remove)
            if gradients is not None:
                stack.enter_context(without_weight_gradients(model))
                stack.enter_context(saved_in_files(model, SAVED))
            stack.enter_context(torch.set_grad_enabled(gradients is not None))
            self.stateful |= changed(model, run)

    def _count(self, name: str, x: Tensor) -> None:
        self.counts[-1][name] += 1
        if x.numel():
            self.reached.add(name)

    def _trace(self, name: str, x: Tensor) -> None:
        self._count(name, x)
        self.first.note(name, x)
        self.given.append((name, digest(x)))


def digest(x: Tensor) -> bytes:
    """What tells a tensor's content from others."""
    x = x.detach().to_dense() if x.layout != torch.strided else x.detach()
    content = x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.blake2b(content, digest_size=16).digest()
