"""Models with state: buffers, attributes and counters that `forward` changes, hooks, kept
activations, random numbers.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contract.odd_layers import Perceptron


class Remembers(Perceptron):
    """Base of the models that keep a state [4, 64] from call to call; it starts at random
    values.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.randn(4, 64))


class AssignsBuffer(Remembers):
    """Binds a new tensor to its buffer at every call."""

    def forward(self, x: Tensor) -> Tensor:
        self.state = torch.tanh(self.up(x) + self.state)
        return self.down(F.relu(self.mid(self.state)))


class ChangesBuffer(Remembers):
    """Writes into its buffer at every call."""

    def forward(self, x: Tensor) -> Tensor:
        self.state.copy_(torch.tanh(self.up(x) + self.state))
        return self.down(F.relu(self.mid(self.state.clone())))


class RunningMean(Remembers):
    """Subtracts a mean of what it has seen, that a submodule keeps up to date."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.up(x))
        self.seen += 1
        self.state.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        return self.down(F.relu(self.mid(hidden - self.state.mean(0))))


class CountsCalls(Perceptron):
    """A Python counter that the answer depends on."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class ListsCalls(Perceptron):
    """A list that grows by one entry a call; the answer doesn't depend on it."""

    def __init__(self):
        super().__init__()
        self.log: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(float(len(self.log)))
        return super().forward(x)


class PlainTensor(Perceptron):
    """A tensor that is neither a parameter nor a buffer."""

    def __init__(self):
        super().__init__()
        self.offset = torch.linspace(-1, 1, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.mid(F.relu(self.up(x)) + self.offset)))


class ChangesPlainTensor(PlainTensor):
    """The same, changed at every call."""

    def forward(self, x: Tensor) -> Tensor:
        answer = super().forward(x)
        self.offset = self.offset * 0.5
        return answer


class KeepsActivation(Perceptron):
    """Keeps a tensor that is no leaf of the graph, which torch can't deep-copy."""

    def __init__(self):
        super().__init__()
        with torch.enable_grad():
            self(torch.ones(2, 32))

    def forward(self, x: Tensor) -> Tensor:
        self.last = F.relu(self.up(x))
        return self.down(F.relu(self.mid(self.last)))


class HiddenBuffers(Perceptron):
    """Buffers that `state_dict` leaves out: a table that the constructor computes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("angles", torch.arange(64) / 64, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.mid(F.relu(self.up(x)) * self.angles.cos())))


class LazyCache(Perceptron):
    """A cache that is made at the first call and kept."""

    def __init__(self):
        super().__init__()
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None or self.cache.dtype != x.dtype:
            self.cache = torch.linspace(0.5, 1.5, 64, dtype=x.dtype)
        return self.down(F.relu(self.mid(F.relu(self.up(x)) * self.cache)))


class AddsHook(Perceptron):
    """Puts a hook on a layer at the first call, as models of transformers do that capture hidden
    states: with a second one the output is another.
    """

    def __init__(self):
        super().__init__()
        self.hooked = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            self.mid.register_forward_hook(_one_more)
            self.hooked = True
        return super().forward(x)


def _one_more(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + 1


class Noisy(Perceptron):
    """Adds noise in eval mode too: the answer depends on the random state."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.up(x))
        return self.down(F.relu(self.mid(hidden + 0.01 * torch.randn_like(hidden))))


class Regularized(Perceptron):
    """Dropout and BatchNorm, for training mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(64), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.relu(self.norm(self.mid(F.relu(self.up(x)))))))


class PartlyFrozenNorm(Regularized):
    """A BatchNorm that stays in training mode while the model is in eval mode."""


class Uncopyable(Perceptron):
    """Holds a lock, which can't be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


# Hooks. Functions at module level, so that the models can be pickled.


def doubled(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    """Forward hook: the output times two."""
    return output * 2


def shifted(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward pre-hook: the input plus 0.1."""
    return (args[0] + 0.1, *args[1:])


def shifted_keywords(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook that takes keyword arguments."""
    return (args[0] - 0.1, *args[1:]), kwargs


def halved_keywords(
    _module: nn.Module, _args: Any, _kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Forward hook that takes keyword arguments."""
    return output * 0.5


def counted(module: nn.Module, _args: Any, _output: Any) -> None:
    """Forward hook that only counts, as a profiler does."""
    module.hook_calls = getattr(module, "hook_calls", 0) + 1


def same_gradients(_module: nn.Module, _grad_input: Any, _grad_output: Any) -> None:
    """Backward hook that changes nothing."""


def same_state(_module: nn.Module, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
    """State-dict hook that changes nothing."""


class Hooked(Perceptron):
    """Hooks of one kind on the middle layer."""

    def __init__(self, kind: str):
        super().__init__()
        if kind == "forward":
            self.mid.register_forward_hook(doubled)
        elif kind == "pre":
            self.mid.register_forward_pre_hook(shifted)
        elif kind == "keywords":
            self.mid.register_forward_pre_hook(shifted_keywords, with_kwargs=True)
            self.mid.register_forward_hook(halved_keywords, with_kwargs=True)
        elif kind == "counting":
            self.mid.register_forward_hook(counted)
        elif kind == "backward":
            self.mid.register_full_backward_hook(same_gradients)
        elif kind == "state":
            self.mid.register_state_dict_post_hook(same_state)
        elif kind == "root":
            self.register_forward_hook(doubled)
            self.register_forward_pre_hook(shifted)


class Frozen(Perceptron):
    """The first layers don't train."""

    def __init__(self):
        super().__init__()
        self.up.requires_grad_(False)
        self.mid.weight.requires_grad_(False)


class WithGradients(Perceptron):
    """Parameters that hold gradients of a training step."""

    def __init__(self):
        super().__init__()
        with torch.enable_grad():
            super().forward(torch.ones(2, 32)).sum().backward()
