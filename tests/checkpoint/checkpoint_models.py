"""Models and files that the tests of checkpoints share."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from quantize import surgery
from quantize.checkpoint import architecture, container, contents

SUFFIXES = [".pth", ".safetensors"]


both = pytest.mark.parametrize("suffix", SUFFIXES)


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    width: int = 4
    layers: int = 2
    sizes: tuple[int, ...] = (3, 5)

    def __post_init__(self):
        if not isinstance(self.width, int) or self.width < 1:
            raise ValueError(f"width is {self.width!r}; allowed: an integer >= 1")


@architecture
class Tiny(nn.Module):
    """A built-in model."""

    config_class = TinyConfig

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(
            nn.Linear(config.width, config.width) for _ in range(config.layers)
        )
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).relu()
        return x


class Net(nn.Module):
    """A foreign model with a tie, a shared module, an LSTM, BatchNorm, frozen parameters, a buffer
    that isn't saved.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.body = nn.Linear(4, 4)
        self.again = self.body
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.body.bias.requires_grad_(False)
        self.register_buffer("shift", torch.full((10,), 0.5), persistent=False)

    def forward(self, ids):
        x = self.lstm(self.embed(ids))[0]
        return (
            self.head(self.again(self.body(self.norm(x.transpose(1, 2)).transpose(1, 2))))
            + self.shift
        )


class Holder(nn.Module):
    """Holds the given tensors as buffers a, b, c, ..., h, t8, t9, ..."""

    def __init__(self, *tensors: torch.Tensor):
        super().__init__()
        names = [*"abcdefgh", *(f"t{i}" for i in range(8, len(tensors)))]
        for name, tensor in zip(names, tensors, strict=False):
            self.register_buffer(name, tensor)


class Doubled(nn.Module):
    def __init__(self, weight: torch.Tensor, bits: int):
        super().__init__()
        self.register_buffer("weight8", weight)
        self.bits = bits

    def forward(self, x):
        return nn.functional.linear(x, self.weight8.float())


@surgery.builder
def doubled_for_test(module: nn.Module, shape: list[int], bits: int) -> nn.Module:
    return Doubled(torch.zeros(shape, dtype=torch.int8), bits)


def net() -> Net:
    model = Net()
    model.norm.running_mean.normal_()
    return model.eval()


IDS = torch.arange(10).reshape(2, 5)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Same names, dtypes and bits."""
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name, x in a.items():
        y = b[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert bits(x) == bits(y), name


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def rewrite(path: Path, change) -> None:
    """Write the file again, sealed as if by `save`, with its record changed: what an attacker can
    do.
    """
    suffix = path.suffix
    with path.open("rb") as file:
        record, places = container.read_header(file, suffix)
        specs = record.pop("tensors")
        tensors = {
            n: container.read_tensor(file, *p, **s)
            for (n, s), p in zip(specs.items(), places, strict=True)
        }
    change(record)
    with mock.patch.object(contents, "parse_record", lambda _, text: json.loads(text)):
        container.write(path, record, tensors)


class Reduce:
    """Pickles to a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def archive(
    pickled: bytes, more: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as z:
        z.writestr("archive/data.pkl", pickled)
        for name, content in {"version": b"3\n", "byteorder": b"little", **(more or {})}.items():
            z.writestr(f"archive/{name}", content)
    return file.getvalue()


def ours() -> bytes:
    file = io.BytesIO()
    torch.save(
        {"format": "quantize", "version": 1, "record": "{}", "tensors": {"a": torch.zeros(2)}}, file
    )
    return zipfile.ZipFile(file).read("archive/data.pkl")
