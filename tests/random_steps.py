"""What random models are made of: functions without weights, layers that fit a value, modules with
state.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from random_modules import Attention, Last, Scale, Split, Twice
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

# Steps without weights.

ANY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x + 1, inplace=True),
    "silu": F.silu,
    "x sigmoid(x)": lambda x: x * torch.sigmoid(x),
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "clamp": lambda x: x.clamp(-1, 1.5),
    "hardswish": F.hardswish,
    "softmax": lambda x: x.softmax(-1),
    "transpose": lambda x: x.transpose(1, -1),
    "transpose, contiguous": lambda x: x.transpose(1, -1).contiguous(),
    "half and half": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split, product": lambda x: torch.mul(*x.split(x.shape[-1] // 2, -1)),
    "pad last": lambda x: F.pad(x, (1, 2)),
    "pad all": lambda x: F.pad(x, (1, 0) * (x.dim() - 1)),
    "every second": lambda x: x[:, ::2],
    "roll": lambda x: x.roll(1, -1),
    "flip": lambda x: x.flip(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "max": lambda x: x - x.amax(-1, keepdim=True),
    "expand": lambda x: x[:, :1].expand_as(x) + x,
    "where": lambda x: torch.where(x > 0.1, x, 0.5 * x),
    "masked fill": lambda x: x.masked_fill(x < -0.3, -0.3),
    "stack, unbind": lambda x: sum(torch.stack([x, x * 2]).unbind(0)),
    "slice written": lambda x: _write(x.clone(), lambda y: y[:, :1].mul_(2)),
    "row set": lambda x: _write(x * 1, lambda y: y[:, 0].fill_(0.5)),
    "view written": lambda x: _write(x + 0, lambda y: y.reshape(y.shape[0], -1).add_(1)),
    "read, then written": lambda x: _read_then_write(x * 2),
    "arange": lambda x: x + torch.arange(x.shape[-1], dtype=x.dtype) * 0.1,
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "rms": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "einsum": lambda x: x + torch.einsum("bi...,bj...->bi...", x, x) / x.shape[1],
    "to double and back": lambda x: x.double().mul(1.5).to(x.dtype),
}
IMAGE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max pool": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "mean pool": lambda x: F.avg_pool2d(x, 2, 1),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "bilinear": lambda x: F.interpolate(x, size=(7, 5), mode="bilinear"),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "uneven zeros": lambda x: F.pad(x, (0, 1, 2, 0)),
    "channel shuffle": lambda x: (
        x.reshape(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
    ),
    "pixels": lambda x: x.flatten(2).transpose(1, 2),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "global mean": lambda x: x.mean((2, 3)),
    "gate": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
}
SEQUENCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "last": lambda x: x[:, -1],
    "time mean": lambda x: x.mean(1),
    "flat": lambda x: x.flatten(1),
    "self attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "causal attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "scores": lambda x: (x @ x.transpose(1, 2)).div(x.shape[-1] ** 0.5).softmax(-1) @ x,
    "image": lambda x: x[:, None],
}
BOTH: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": lambda x, y: x + y,
    "add scaled": lambda x, y: torch.add(x, y, alpha=0.5),
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "add in place": lambda x, y: x.mul(0.5).add_(y),
    "cat": lambda x, y: torch.cat([x, y], 1),
    "cat last": lambda x, y: torch.cat([x, y], -1),
}
# Steps that look at chance, sizes or values.
ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "random noise": lambda x: x + 0.1 * torch.rand_like(x),
    "random dropout": lambda x: F.dropout(x, 0.3, training=True),
    "random unused": lambda x: (torch.rand(3), x)[1],
    "size decides": lambda x: x * 2 if x.shape[0] > 2 else x - 1,
    "size loop": lambda x: sum((x * i for i in range(min(x.shape[-1], 4))), x),
    "size scales": lambda x: x / (x.shape[0] + len(x)),
    "value decides": lambda x: x * 2 if bool(x.sum() > 0) else x - 1,
    "value scales": lambda x: x * float(x.abs().max().clamp(0.1, 2)),
    "value indexes": lambda x: x[:, : 1 + int(x.argmax()) % 2],
    "input written: add": lambda x: x.add_(1),
    "input written: view": lambda x: _write(x, lambda y: y[:, 0].mul_(0.5)),
    "input written: relu": lambda x: F.relu(x, inplace=True),
    "input written late": lambda x: _late(x),
}


def _write(x: torch.Tensor, how: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    how(x)
    return x


def _read_then_write(x: torch.Tensor) -> torch.Tensor:
    before = x.sigmoid()
    view = x[:, :1]
    x.add_(1)
    return before * x + view


def _late(x: torch.Tensor) -> torch.Tensor:
    y = torch.tanh(x) * 2
    x.mul_(0.5)
    return F.relu(y + x)


class Apply(nn.Module):
    """A function of one of the tables above."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return next(t for t in (ANY, IMAGE, SEQUENCE, BOTH, ODD) if self.name in t)[self.name](
            *values
        )


# Steps with weights.

NORMED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "old weight norm": nn.utils.weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
    # torch doesn't pickle parametrized modules
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "pruning mask": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


def layer(rng: random.Random, x: torch.Tensor, scale: int = 1) -> nn.Module:
    """A layer with weights that fits x, often; new widths are multiples of `scale`."""
    channels, width = x.shape[1], x.shape[-1]
    out = scale * rng.choice((4, 6, 8))
    any_rank = [
        lambda: nn.Linear(width, out, bias=rng.random() < 0.7),
        lambda: nn.Linear(width, width),
        lambda: nn.LayerNorm(width),
        lambda: nn.RMSNorm(width),
        lambda: Scale(width, rng.choice(("bias", "scale"))),
        lambda: Scale(channels, "channels"),
        lambda: Last(nn.Linear(channels, out), moved=True),
        lambda: Last(nn.LayerNorm(channels), moved=True),
        lambda: nn.PReLU(channels),
        lambda: nn.Dropout(0.3),
        lambda: Twice(width, rng.random() < 0.5),
        lambda: Split(width),
        lambda: nn.Sequential(nn.Linear(width, out), nn.ReLU(inplace=True), nn.Linear(out, width)),
    ]
    norms = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    any_rank += [lambda: norms[x.dim()](channels, affine=rng.random() < 0.8)] * 3
    if x.dim() > 2:
        groups = rng.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
        conv = nn.Conv1d if x.dim() == 3 else nn.Conv2d
        turned = nn.ConvTranspose1d if x.dim() == 3 else nn.ConvTranspose2d
        settings = {
            "kernel_size": rng.choice((1, 2, 3)),
            "padding": rng.choice((0, 1, 1, "same", "valid")),
            "dilation": rng.choice((1, 1, 2)),
            "bias": rng.random() < 0.6,
        }
        mode = rng.choice(("zeros", "zeros", "zeros", "reflect", "circular"))

        def wide(*factors: int) -> int:
            return groups * max(1, scale // groups) * rng.choice(factors)

        any_rank += [
            lambda: conv(channels, wide(2, 4), groups=groups, padding_mode=mode, **settings)
        ] * 4
        any_rank += [
            lambda: conv(channels, out, 3, stride=2, padding=1),
            lambda: nn.Sequential(
                conv(channels, out, 1, bias=False), norms[x.dim()](out), nn.ReLU(inplace=True)
            ),
            lambda: turned(channels, wide(2), 2, stride=rng.choice((1, 2)), groups=groups),
            lambda: nn.GroupNorm(2 - channels % 2, channels),
        ]
    if x.dim() == 3:
        heads = rng.choice([h for h in (1, 2, 4) if width % h == 0])
        any_rank += [lambda: Attention(width, heads, rng.random() < 0.6)] * 2
        any_rank += [
            lambda: Last(nn.LSTM(width, out, batch_first=True, bidirectional=rng.random() < 0.3))
        ]
        any_rank += [lambda: Last(nn.GRU(width, out, batch_first=True))]
        any_rank += [
            lambda: nn.TransformerEncoderLayer(
                width, heads, 8, batch_first=True, norm_first=rng.random() < 0.5
            )
        ]
    return rng.choice(any_rank)()
