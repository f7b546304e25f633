"""What hostile files are made of: good files, damage, values that a record should not hold."""

from __future__ import annotations

import functools
import io
import json
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import in_int8

import quantize
from quantize.checkpoint.container import _LOCATE, _digest
from quantize.models import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM

SUFFIXES = (".pth", ".safetensors")
MARK = "RAN"  # a file that runs code leaves a file of this name in the current folder
NUMBERS = (
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**9,
    10**18,
    10**40,
    1.5,
    float("nan"),
    float("inf"),
    True,
    None,
)
VALUES = (*NUMBERS, "", "x" * 1000, [], [1], [[]], [10**9] * 3, {}, {"a": 1}, [None] * 1000)
DECODER = DecoderConfig(vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, max_length=64)


@functools.cache
def models() -> dict[str, torch.nn.Module]:
    """Small models of every compressed kind."""
    torch.manual_seed(0)
    plain = DecoderLM(DECODER).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(0, 0.2)
    return {
        "plain": plain,
        "half": quantize.to_half(plain),
        "int8": in_int8(plain),
        "int4": quantize.quantize_weights(plain),
        "low rank": quantize.factorize_low_rank(plain, ratio=0.6),
        "convnet": ConvNet(ConvNetConfig(widths=(8, 8))).eval(),
    }


@functools.cache
def whole(model: str, suffix: str) -> bytes:
    """A good file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"m{suffix}"
        quantize.save(models()[model], path)
        return path.read_bytes()


def sealed(content: bytes, change: Callable[[dict], Any]) -> bytes:
    """A good .safetensors file with its record changed, sealed again as far as that can be done."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    record = json.loads(header["__metadata__"]["record"])
    change(record)
    header["__metadata__"]["record"] = json.dumps(record, separators=(",", ":"))
    return seal(json.dumps(header, separators=(",", ":")).encode(), content[8 + length :])


def seal(header: bytes, data: bytes) -> bytes:
    """Header and data with the digest that `save` would write, where they can have one."""
    header += b" " * (-len(header) % 8)
    file = io.BytesIO(len(header).to_bytes(8, "little") + header + data)
    try:
        _, places, at = _LOCATE[".safetensors"](file)
        digest = _digest(file, places, at)
    except Exception:  # so malformed that it has no digest
        return file.getvalue()
    file.seek(at)
    file.write(digest)
    return file.getvalue()


def written(folder: Path, content: bytes, suffix: str = ".safetensors") -> Path:
    """The path of a file with this content."""
    path = folder / f"m{suffix}"
    path.write_bytes(content)
    return path


def damage(draw: random.Random, content: bytes) -> bytes:
    """A bit flipped, the end cut off, a size replaced, bytes left out or copied."""
    at, damaged = draw.randrange(len(content)), bytearray(content)
    how = draw.randrange(5)
    if how == 0:
        damaged[at] ^= 1 << draw.randrange(8)
    elif how == 1:
        del damaged[at:]
    elif how == 2:
        damaged[at : at + 8] = struct.pack(
            "<Q", draw.choice((0, 2**31, 2**32 - 1, 2**40, 2**64 - 1))
        )
    elif how == 3:
        del damaged[at : at + draw.randrange(1, 300)]
    else:
        other = draw.randrange(len(content))
        damaged[at : at + 50] = content[other : other + 50]
    return bytes(damaged)
