"""Models whose layers are unusual: under two names, shared, computed, hooked, wrapped, read by
somebody else.

Each class is a small multilayer perceptron or convolution with one peculiarity. All of them are at
module level, so that they can be pickled; widths are multiples of 32, so that every technique has a
layer to act on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers.pytorch_utils import Conv1D


class Perceptron(nn.Module):
    """32 -> 64 -> 64 -> 8 with ReLU: what the peculiar models add something to."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.up, self.mid, self.down = (
            nn.Linear(32, width),
            nn.Linear(width, width),
            nn.Linear(width, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.mid(F.relu(self.up(x)))))


class Alias(Perceptron):
    """A module under two names, called by the second one."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(self.mid, nn.ReLU(), nn.Linear(64, 64))
        self.alias = self.block

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.alias(F.relu(self.up(x))))


class Unused(Perceptron):
    """A layer that no call reaches."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class CalledTwice(Perceptron):
    """One layer in two places of a list: it runs twice a call."""

    def __init__(self):
        super().__init__()
        self.stack = nn.ModuleList([self.mid, self.mid])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(x))
        for layer in self.stack:
            x = F.relu(layer(x)) + x
        return self.down(x)


class SharedWeight(Perceptron):
    """Two linear layers with one weight and biases of their own."""

    def __init__(self):
        super().__init__()
        self.twin = nn.Linear(64, 64)
        self.twin.weight = self.mid.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mid(F.relu(self.up(x))))
        return self.down(F.relu(self.twin(x)))


class Tied(nn.Module):
    """A table of embeddings that is the weight of the head as well."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(96, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 96, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(ids))))


class TiedTranspose(Perceptron):
    """The decoder of an autoencoder multiplies by the transposed weight of its encoder."""

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(self.mid(F.relu(self.up(x))))
        return self.down(F.relu(code)) + F.linear(code, self.up.weight.t()).mean(1, keepdim=True)


class Computed(Perceptron):
    """A weight that a hook or a parametrization computes at every call."""

    def __init__(self, how: str):
        super().__init__()
        self.extra = nn.Linear(64, 64)
        if how == "weight_norm":
            weight_norm(self.mid)
        elif how == "spectral_norm":
            spectral_norm(self.mid)
        elif how == "prune":
            prune.l1_unstructured(self.mid, "weight", amount=0.5)
        elif how == "new weight_norm":
            parametrizations.weight_norm(self.mid)
        elif how == "new spectral_norm":
            parametrizations.spectral_norm(self.mid)
        else:
            parametrizations.orthogonal(self.mid)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.mid(F.relu(self.extra(F.relu(self.up(x)))))))


class ReadsDtype(Perceptron):
    """Casts to the dtype of a layer's weight, as T5 does."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(x.to(self.up.weight.dtype)))
        if x.dtype != self.mid.weight.dtype:
            x = x.to(self.mid.weight.dtype)
        return self.down(F.relu(self.mid(x)))


class ReadsFirst(Perceptron):
    """Makes a tensor of the dtype and on the device of its first parameter, as many published
    models do.
    """

    def forward(self, x: Tensor) -> Tensor:
        first = next(self.parameters())
        mask = torch.ones(x.shape, dtype=first.dtype, device=first.device)
        return super().forward(x * mask)


class CosineHead(Perceptron):
    """Logits are cosines between features and the rows of the head's weight."""

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.mid(F.relu(self.up(x))))
        return F.linear(F.normalize(features, dim=-1), F.normalize(self.down.weight, dim=-1))


class LowRankAdapter(nn.Module):
    """LoRA around a linear layer: the layer's own answer and a low-rank one."""

    def __init__(self, base: nn.Linear, rank: int = 4):
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        self.scaling = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.b(self.a(x))


class MergingAdapter(LowRankAdapter):
    """DoRA-style: the adapted weight is built from the base layer's at every call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.scaling * self.b.weight @ self.a.weight
        norms = weight.norm(dim=1, keepdim=True)
        return F.linear(x, weight / norms * norms.detach(), self.base.bias)


class Adapted(Perceptron):
    """A perceptron whose middle layer has an adapter."""

    def __init__(self, adapter: type[LowRankAdapter]):
        super().__init__()
        self.mid = adapter(self.mid)


class Experts(nn.Module):
    """A mixture of experts: each row goes to the two experts that its router likes best."""

    def __init__(self):
        super().__init__()
        self.inp, self.router, self.out = nn.Linear(32, 32), nn.Linear(32, 3), nn.Linear(32, 8)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        gates, chosen = self.router(x).softmax(-1).topk(2)
        mixed = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, places = (chosen == i).nonzero(as_tuple=True)
            mixed = mixed.index_add(0, rows, expert(x[rows]) * gates[rows, places].unsqueeze(1))
        return self.out(x + mixed)


class DenseExperts(Experts):
    """A mixture in which every expert answers for every row."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        gates = self.router(x).softmax(-1)
        mixed = sum(gates[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return self.out(x + mixed)


class Gpt2Layer(nn.Module):
    """GPT-2's Conv1D, a linear layer whose weight is transposed."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), Conv1D(64, 32), Conv1D(32, 64)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


class Recurrent(nn.Module):
    """An LSTM or a GRU between two linear layers."""

    def __init__(self, kind: type[nn.RNNBase], bidirectional: bool = False):
        super().__init__()
        self.inp = nn.Linear(32, 32)
        self.rnn = kind(32, 32, num_layers=2, batch_first=True, bidirectional=bidirectional)
        self.out = nn.Linear(64 if bidirectional else 32, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.rnn(torch.tanh(self.inp(x)))
        return self.out(hidden)


class GroupNormed(nn.Module):
    """Convolutions, one of them grouped, one transposed, under group and instance norms."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.instance = nn.InstanceNorm2d(32, affine=True)
        self.wider = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        x = F.relu(self.instance(self.grouped(x)))
        return self.head(self.wider(x).mean((2, 3)))


class Sound(nn.Module):
    """One-dimensional convolutions with BatchNorm, a circular padding and a learned scale."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(4, 32, 5, stride=2, padding=2, padding_mode="circular")
        self.norm = nn.BatchNorm1d(32)
        self.second = nn.Conv1d(32, 32, 3, padding="same", dilation=2)
        self.scale = nn.Parameter(torch.ones(32, 1))
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.head((self.second(x) * self.scale).mean(-1))


class Straight(torch.autograd.Function):
    """Rounds forward, passes gradients straight through backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class CustomFunction(Perceptron):
    """An autograd function of the user's own between two layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(Straight.apply(F.relu(self.mid(F.relu(self.up(x))))))


class OwnLinear(nn.Linear):
    """A subclass of nn.Linear that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight.abs().mean(), self.bias).tanh()


class HasOwnLinear(Perceptron):
    """A layer is a subclass with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.up = nn.Sequential(self.up, nn.ReLU(), nn.Linear(64, 64))
        self.mid = OwnLinear(64, 64)


class BareParameter(nn.Module):
    """Weights that belong to no layer: a parameter, a list of them, a table indexed by hand."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.scales = nn.ParameterList(
            [nn.Parameter(torch.ones(64)), nn.Parameter(torch.zeros(64))]
        )
        self.down = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(x)) @ self.weight
        return self.down(F.relu(x * self.scales[0] + self.scales[1]))


class SparseBag(nn.Module):
    """Embeddings with sparse gradients, one of them a bag."""

    def __init__(self):
        super().__init__()
        self.table, self.bag = (
            nn.Embedding(96, 32, sparse=True),
            nn.EmbeddingBag(96, 32, mode="mean", sparse=True),
        )
        self.mix, self.head = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.relu(self.mix(self.table(ids).mean(1) + self.bag(ids))))


class TransposedView(Perceptron):
    """A weight that is a transposed view and a bias that is a slice of a longer one."""

    def __init__(self):
        super().__init__()
        self.mid.weight = nn.Parameter(torch.randn(64, 64).t() / 8)
        self.mid.bias = nn.Parameter(torch.zeros(128)[::2])
