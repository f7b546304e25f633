"""Models that are called in unusual ways: in place, by keyword, with control flow, answering in all
kinds of containers.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contract.odd_layers import Perceptron


class InPlace(Perceptron):
    """Normalizes the caller's input in place."""

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.4).div_(0.2)
        return super().forward(x)


class InPlaceActivation(Perceptron):
    """In-place activations all the way, the first one on the caller's input."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu_(x, 0.1)
        return self.down(F.relu_(self.mid(F.relu_(self.up(x)))))


class DataDependent(Perceptron):
    """Goes one way or the other, depending on the data."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(x))
        if x.sum() > 0:
            x = F.relu(self.mid(x))
        return self.down(x)


class Loops(Perceptron):
    """A loop whose length is an attribute."""

    def __init__(self):
        super().__init__()
        self.times = 3

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(x))
        for i in range(self.times):
            x = F.relu(self.mid(x)) if i % 2 else torch.tanh(self.mid(x))
        return self.down(x)


class KeywordsOnly(Perceptron):
    """Takes its arguments by keyword only, one of them optional."""

    def forward(self, *, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = x if scale is None else x * scale
        return super().forward(x)


class ManyArguments(Perceptron):
    """Tensors in a list and in a dict, and a flag."""

    def forward(self, xs: list[Tensor], extra: dict[str, Tensor], flag: bool = True) -> Tensor:
        x = xs[0] + xs[1]
        return super().forward(x + extra["more"] if flag else x)


class AnswersDict(Perceptron):
    """Answers with an ordered dict, one entry of which is None."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = F.relu(self.mid(F.relu(self.up(x))))
        return OrderedDict(logits=self.down(hidden), hidden=hidden, loss=None)


@dataclass
class Answer:
    """What `AnswersDataclass` answers."""

    logits: Tensor
    hidden: Tensor | None = None


class AnswersDataclass(Perceptron):
    """Answers with a dataclass."""

    def forward(self, x: Tensor) -> Answer:
        hidden = F.relu(self.mid(F.relu(self.up(x))))
        return Answer(self.down(hidden), hidden)


class Pair(NamedTuple):
    """What `AnswersNested` has inside."""

    left: Tensor
    right: Tensor


class AnswersNested(Perceptron):
    """Answers with tuples in tuples, a named one and a list among them."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        hidden = F.relu(self.up(x))
        logits = self.down(F.relu(self.mid(hidden)))
        return logits, (Pair(hidden, hidden * 2), [logits.sum(-1)])


class AnswersScalar(Perceptron):
    """Answers with one number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


class AnswersInput(Perceptron):
    """Hands its input back beside the answer."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class ListOfLayers(nn.Sequential):
    """A subclass of Sequential that indexes itself."""

    def __init__(self):
        super().__init__(
            nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self)[:-1]:
            x = layer(x)
        return self[-1](x)


class Delegating(nn.Module):
    """A wrapper that hands attributes it doesn't have on to the model inside, as DataParallel-like
    wrappers do.
    """

    def __init__(self):
        super().__init__()
        self.inner = Perceptron()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Tensor) -> Tensor:
        return self.inner(*args)


class SelfAttention(nn.Module):
    """nn.MultiheadAttention and a feed-forward layer, with residuals."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        seen, _ = self.attention(x, x, x, need_weights=False)
        x = self.norm(x + seen)
        return x + self.down(F.gelu(self.up(x)))


class ImageAndFlag(nn.Module):
    """Convolutions with a reshape to a fixed size and a linear layer behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(3, 32, 3, padding=1),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
        )
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32 * 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.second(F.relu(self.first(x)))))
        return self.head(x.flatten(1))
