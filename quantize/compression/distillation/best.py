"""Judge training while it runs: keep the best state, go back and slow down where it leads
astray.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# shares of the steps after which training is judged
CHECKS = (
    1 / 32,
    1 / 8,
    1 / 4,
    1 / 2,
    3 / 4,
    1,
)
SLOWER = 1 / 4  # what is left of the learning rates after training went astray


class Best:
    """The state of `model` with the least loss so far, the start included; a `training.Judge`.

    Training is astray where the loss is not finite or too much larger than the best one so far: ten
    times in the first quarter of the steps, half as large again in the second, 5% larger after
    that. A high rate costs something at first, and so do the running statistics of BatchNorm, which
    follow the weights late. Then the best state is taken back, and rates fall.

    Args:
        loss: the loss on batches held out, of the model as it is; the same on every rank.
        steps: how many training steps there will be.
        where: the batches that the loss is measured on, in words.
    """

    def __init__(self, model: nn.Module, loss: Callable[[], float], steps: int, where: str) -> None:
        self.model, self.loss, self.steps, self.where = model, loss, steps, where
        self.checks = {max(1, round(share * steps)) for share in CHECKS}
        self.losses: dict[int, float] = {}  # by the number of steps done
        self.step = 0  # after which the model was best
        self.scale = 1.0  # of the learning rates
        self.tensors: list[Tensor] = []

    def start(self) -> None:
        """Measure the model as it was given. Raises ValueError if its loss is not finite."""
        loss = self.loss()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss on {self.where} is {loss} before the first step: not finite"
            )
        self.losses[0] = loss
        self._keep(0)

    def check(self, done: int) -> bool:
        """After `done` steps: whether training was astray, and the model is back in its best
        state.
        """
        if done not in self.checks:
            return False
        loss = self.losses[done] = self.loss()
        if loss < self.losses[self.step]:
            self._keep(done)
        astray = not loss <= self._allowed(done) * self.losses[self.step]
        if astray:
            self._take_back()
            self.scale *= SLOWER
        return astray

    def _allowed(self, done: int) -> float:
        """How many times the least loss the present one may be."""
        if 4 * done < self.steps:
            return 10.0
        return 1.5 if 2 * done < self.steps else 1.05

    def finish(self) -> None:
        """Leave the model in its best state."""
        self._take_back()

    def describe(self) -> str:
        """How many steps were worth it, and what they changed, in words."""
        gain = f"loss on {self.where}: {self.losses[0]:.4g} -> {self.losses[self.step]:.4g}"
        slowed = (
            ""
            if self.scale == 1
            else f"; rates fell to {self.scale:g} of what they were, for training led astray"
        )
        if self.step == 0:
            return (
                f"no step of {self.steps} was worth it, the model is as it was given "
                f"({gain}{slowed})"
            )
        return f"{self.step} of {self.steps} steps were worth it ({gain}{slowed})"

    def state_dict(self) -> dict[str, Any]:
        kept = {"losses": dict(self.losses), "step": self.step, "scale": self.scale}
        return {**kept, "tensors": list(self.tensors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        current = self._tensors()
        kept = state["tensors"]
        if [t.shape for t in kept] != [t.shape for t in current]:
            raise ValueError("its best state has tensors of other shapes")
        losses = state["losses"]
        numbers = all(type(step) is int and type(loss) is float for step, loss in losses.items())
        if not numbers or state["step"] not in losses or not 0 < state["scale"] <= 1:
            raise ValueError(
                f"losses {losses}, best after {state['step']}, rates scaled by {state['scale']}"
            )
        self.losses, self.step, self.scale = dict(state["losses"]), state["step"], state["scale"]
        self.tensors = [t.to(now.device) for t, now in zip(kept, current, strict=True)]

    def _tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def _keep(self, done: int) -> None:
        self.step = done
        self.tensors = [tensor.detach().clone() for tensor in self._tensors()]

    @torch.no_grad()
    def _take_back(self) -> None:
        for tensor, kept in zip(self._tensors(), self.tensors, strict=True):
            tensor.copy_(kept)
