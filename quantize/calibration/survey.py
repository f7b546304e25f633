"""Moments of what layers are given and of the gradients at what they give, from as few passes as
memory allows: one, if all of it fits.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from quantize.calibration.gradients import Moment, OutputGradients
from quantize.calibration.inputs import check_batches, of_original
from quantize.calibration.look import Look
from quantize.calibration.patches import gram_bytes
from quantize.calibration.projected import is_finite_moment
from quantize.calibration.statistics import InputSums, check_reached
from quantize.calibration.sums import InputStatistics
from quantize.saying import Say, silent

log = logging.getLogger(__name__)

MEMORY = 1 << 30  # bytes of moments at a time
_NO_GRADIENTS = (RuntimeError, TypeError, ValueError, NotImplementedError)


class Survey:
    """Statistics of layers of a model, for as many layers at a time as fit in memory.

    The first pass looks at the model too (`look`), and finds which layers are reached. A model that
    takes no gradients has none, and that is no error.

    Args:
        model: the original.
        batches: re-iterable calibration batches; the model is run on those of the original.
        widths: for each layer, of its input and of its output: a moment holds the square.
        watched: more layers for the look, by name.
        by_channel: see `InputSums`.
        projected: weights [M, K] of layers of whose wider side, inputs or gradients, nothing but
            the moment behind the weight is asked: see `Projected`.
        memory: bytes.
        say: called with a line before each pass.

    Raises:
        ValueError: there is no batch, or one that the model doesn't run on; a layer's inputs
            aren't finite.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        widths: Mapping[str, tuple[int, int]],
        *,
        watched: Mapping[str, nn.Module] | None = None,
        by_channel: Collection[str] = (),
        projected: Mapping[str, torch.Tensor] | None = None,
        memory: int = MEMORY,
        say: Say = silent,
    ) -> None:
        self.model = model
        self.batches = check_batches(batches)
        self.layers = {name: model.get_submodule(name) for name in widths}
        self.watched = self.layers | dict(watched or {})
        self.by_channel = by_channel
        self.narrow: dict[str, torch.Tensor] = {}  # weights of projected inputs
        self.wide: dict[str, torch.Tensor] = {}  # of projected gradients
        for name, weight in (projected or {}).items():
            (self.narrow if len(weight) < weight.shape[1] else self.wide)[name] = weight
        self.differentiable = True
        self.say = say
        self.widths = widths
        self.sizes: dict[str, tuple[int, int]] = {}
        for name, (k, m) in widths.items():
            self.sizes[name] = gram_bytes(k), gram_bytes(k if name in self.wide else m)
        self.memory = memory
        # are all moments of gradients kept, from the first pass on?
        self.whole = self._of_gradients() <= memory
        self.reached = set(self.layers)  # until the first pass knows better
        self.statistics: dict[str, InputStatistics] = {}
        self.moments: dict[str, Moment] = {}  # of gradients
        self.rows: dict[str, int] = {}  # of inputs, by layer that was looked at
        self.current: set[str] = set()  # layers that were looked at last
        self.plan(self.layers, inputs=True)
        self.look = self._pass(self.runs[0])
        self.reached = self.look.reached & set(self.layers)

    def _of_gradients(self) -> int:
        return sum(of_gradient for _, of_gradient in self.sizes.values())

    def plan(self, names: Iterable[str], *, inputs: bool) -> None:
        """These layers are asked for next, in this order.

        inputs: False: only for their gradients.
        """
        self.with_inputs = inputs
        if not inputs:
            self.statistics = {}
        apart = self.differentiable and not self.whole
        room = self.memory
        if self.differentiable and self.whole:
            room = max(room - self._of_gradients(), room // 4)
        self.runs: list[list[str]] = [[]]
        used = 0
        for name in names:
            of_input, of_gradient = self.sizes[name]
            size = inputs * of_input + apart * of_gradient
            if self.runs[-1] and used + size > room:
                self.runs.append([])
                used = 0
            self.runs[-1].append(name)
            used += size

    def inputs(self, name: str) -> InputStatistics:
        """What is known of the inputs of a layer that is reached."""
        if name not in self.statistics:
            self._pass(self._run_of(name))
        return self.statistics[name]

    def gradient(self, name: str) -> Any:
        """E[g g^T] of the gradients at a layer's output, [M, M]: a matrix, `Outer` where there are
        few rows, `Projected` where that was asked for; None where there are none that are finite.
        """
        if not self.whole and name not in self.current:
            self._pass(self._run_of(name))
        if name not in self.moments:
            return None
        moment = self.moments[name]()
        return moment if is_finite_moment(moment) else None

    def forget(self, names: Iterable[str]) -> None:
        """Nothing more is asked of these layers."""
        for name in names:
            self.statistics.pop(name, None)
            self.moments.pop(name, None)

    def warn_if_few_rows(self, technique: str) -> None:
        """A UserWarning where a layer has fewer rows than inputs: it can be made to answer exactly
        on so few, and wrongly on others. technique: that fits to the rows.
        """
        few = [name for name, rows in self.rows.items() if rows < self.widths[name][0]]
        if not few:
            return
        name, others = few[0], len(few) - 1
        also = f", and {others} more layers as few" if others else ""
        warnings.warn(
            f"{technique}: calibration gives {name!r} {self.rows[name]} rows for its "
            f"{self.widths[name][0]} inputs{also}: outputs may move much more on other inputs than "
            f"on these; give more batches",
            stacklevel=3,
        )

    def _run_of(self, name: str) -> list[str]:
        return next((run for run in self.runs if name in run), [name])

    def _pass(self, run: list[str]) -> Look:
        """Look at these layers, and forget those before."""
        names = [name for name in run if name in self.reached]
        first = not self.current
        self.current = set(run)
        self.statistics = {}
        with_gradients = names
        if self.whole:  # all at once
            with_gradients = list(self.layers) if first else []
        else:
            self.moments = {}
        if with_gradients and self.differentiable:
            self.say(f"gradients and inputs of {', '.join(names)}")
            try:
                return self._look(names, with_gradients, first)
            except _NO_GRADIENTS as error:
                log.info("no gradients of %s: %s", type(self.model).__name__, error)
                self.differentiable, self.whole = False, True
        elif names:
            self.say(f"inputs of {', '.join(names)}")
        return self._look(names, [], first)

    def _look(self, names: list[str], with_gradients: list[str], first: bool) -> Look:
        inputs = gradients = None
        if self.with_inputs:
            layers = {name: self.layers[name] for name in names}
            narrow = {name: self.narrow[name] for name in names if name in self.narrow}
            inputs = InputSums(layers, by_channel=self.by_channel, projected=narrow)
        if with_gradients:
            layers = {name: self.layers[name] for name in with_gradients}
            gradients = OutputGradients(self.model, layers, projected=self.wide)
        noted = self.watched if first else {}
        given = of_original(self.batches)
        look = Look(self.model, given, noted, inputs=inputs, gradients=gradients)
        if inputs is not None:
            self.statistics = {n: seen for n, seen in inputs.statistics.items() if seen.count}
            check_reached(self.statistics)
            self.rows |= {name: seen.count for name, seen in self.statistics.items()}
        if gradients is not None:
            self.moments |= gradients.result()
        return look
