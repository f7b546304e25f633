"""What training passes change in a model beside its weights: what belongs to the result, and what
is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration import call, output_tensors, untouched
from quantize.seeding import seed_devices


def answers(model: nn.Module, inputs: Any, count: int) -> list[list[Tensor]]:
    """The tensors of the outputs of `count` calls in a row, with the same random numbers; the model
    is as before afterwards.
    """
    found = []
    with untouched(model):
        for _ in range(count):
            seed_devices(0)
            found.append([tensor.clone() for tensor in output_tensors(call(model, inputs))])
    return found


def is_stateful(model: nn.Module, inputs: Any) -> bool:
    """Whether a second call of the model gives other answers than the first."""
    first, second = answers(model, inputs, 2)
    shapes = [t.shape for t in first], [t.shape for t in second]
    return shapes[0] != shapes[1] or any(
        not _same(a, b) for a, b in zip(first, second, strict=True)
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal values; kernels that sum in another order from run to run are no state."""
    return bool(torch.isclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True).all())


def changed_buffers(model: nn.Module, run: Callable[[], object]) -> set[str]:
    """Names of the buffers that `run()` changes; the model is as before afterwards."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with untouched(model):
        run()
        after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {
        name
        for name, buffer in before.items()
        if name not in after or not torch.equal(after[name], buffer)
    }


class Carried:
    """The tensors of a model that training changes by passes alone, and that belong to the result.

    These are statistics: buffers that passes change in training mode and don't in eval mode
    (BatchNorm's, the vectors of spectral norms); and embeddings that their lookup renormalizes. All
    else that a pass changes is a state of running: counters, caches, activations. A stateful model
    is put back before each pass, else it would learn from where it happens to be, through the graph
    of all passes before.
    """

    def __init__(self, model: nn.Module, statistics: set[str], stateful: bool) -> None:
        self.model, self.statistics, self.stateful = model, statistics, stateful
        self._stack = ExitStack()

    def tensors(self) -> dict[str, Tensor]:
        """The carried tensors as they are now, by name."""
        found = {
            name: buffer for name, buffer in self.model.named_buffers() if name in self.statistics
        }
        for name, module in self.model.named_modules():
            if getattr(module, "max_norm", None) is not None:
                own = module.named_parameters(prefix=name, recurse=False)
                found.update(own)
        return found

    def copies(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def put(self, copies: dict[str, Tensor]) -> None:
        """Give the carried tensors the values of `copies`."""
        for name, tensor in self.tensors().items():
            tensor.copy_(copies[name])

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Afterwards the model's state is as before, but for what is carried."""
        try:
            with untouched(self.model):
                try:
                    yield
                finally:
                    self._stack.close()
                    copies = self.copies()
        finally:
            self.put(copies)

    def renew(self) -> None:
        """Put a stateful model back into its first state, but for what is carried."""
        if not self.stateful:
            return
        generator, copies = torch.get_rng_state(), self.copies()
        self._stack.close()
        self.put(copies)
        self._stack.enter_context(untouched(self.model))
        torch.set_rng_state(generator)


def running_norms(model: nn.Module) -> list[nn.Module]:
    """The modules with running statistics."""
    return [
        module for module in model.modules() if getattr(module, "running_mean", None) is not None
    ]
