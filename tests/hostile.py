"""Makes hostile and damaged files, each a function of its number: what `load` and `from_pretrained`
must survive.

A seal is a checksum, no signature, so most of the files are sealed as `quantize.save` would: what
they say is what is wrong with them. Used by test_hostile_files.py (a sample) and
benchmarks/hostile.py (all of them, with limits on time and memory).
"""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile_folders import folders
from hostile_parts import MARK, SUFFIXES, damage, models, seal, sealed, whole, written
from hostile_records import hostile_config, hostile_edits, hostile_record

import quantize
from quantize.models import DecoderLM


def damaged(draw: random.Random, folder: Path) -> Path:
    suffix = draw.choice(SUFFIXES)
    return written(folder, damage(draw, whole(draw.choice(sorted(models())), suffix)), suffix)


SIZE = 200_000  # of what is repeated, in bytes; benchmarks/hostile.py sets more


def bulk(draw: random.Random, folder: Path) -> Path:
    """Much of one thing: what costs more than linear time shows here."""
    kind = draw.choice(
        (
            "edits",
            "aliases",
            "keys",
            "nesting",
            "lists",
            "marks",
            "entries",
            "digits",
            "dimensions",
            "layers",
        )
    )
    good = whole("plain", ".safetensors")
    edit = {"module": "head", "builder": "resized", "arguments": {"shapes": {}, "attributes": {}}}
    changes: dict[str, Callable[[dict], Any]] = {
        "edits": lambda r: r["structure"].extend([edit] * (SIZE // 90)),
        "aliases": lambda r: r["aliases"].update(
            {f"{i:x}": "norm.weight" for i in range(SIZE // 25)}
        ),
        "keys": lambda r: r["metadata"].update({f"{i:x}": 0 for i in range(SIZE // 10)}),
        "lists": lambda r: r["metadata"].update({"a": [[]] * (SIZE // 3)}),
        "dimensions": lambda r: r["tensors"]["norm.weight"].update(shape=[2**62] * (SIZE // 20)),
        "layers": lambda r: [
            r["architecture"]["config"].update(layers=10**9),
            changes["aliases"](r),
        ],
    }
    if kind in changes:
        return written(folder, sealed(good, changes[kind]))
    if kind in ("nesting", "digits"):
        value = "[" * (SIZE // 2) + "]" * (SIZE // 2) if kind == "nesting" else "9" * SIZE
        return written(
            folder, seal(f'{{"__metadata__":{{"sha256":"{"0" * 64}","a":{value}}}}}'.encode(), b"")
        )
    if kind == "marks":
        return written(folder, _archive(b"\x80\x02" + b"(" * SIZE + b"."), ".pth")
    names = {f"data/{i}": b"" for i in range(SIZE // 100)}
    return written(folder, _archive(b"\x80\x02}.", names), ".pth")


def _archive(
    pickled: bytes, more: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in (more or {}).items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


class _Call:
    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def pickles(draw: random.Random, folder: Path) -> Path:
    """Pickles that run a command, whole or spliced into one of ours, in archives, compressed,
    bare.
    """
    command = (f"touch {MARK}",)
    calls = (
        _Call(os.system, command),
        _Call(getattr, (_Call(__import__, ("os",)), "system")),
        {"a": _Call(eval, (f"open({MARK!r},'w')",))},
    )
    attack = pickle.dumps(draw.choice(calls), draw.randrange(6))
    with zipfile.ZipFile(io.BytesIO(whole("plain", ".pth"))) as archive:
        ours = archive.read(archive.namelist()[0])
    at = draw.randrange(2, len(ours))
    pickled = draw.choice(
        (
            attack,
            ours[:-1] + attack[2:],
            ours[:at] + attack[2:],
            ours + attack,
            ours[:at] + attack[2:] + ours[at:],
        )
    )
    if draw.random() < 0.2:
        return written(folder, pickled, draw.choice(SUFFIXES))
    more = {"data/0": bytes(8), "version": b"3\n", "byteorder": b"little"}
    compression = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    return written(folder, _archive(pickled, more, compression), ".pth")


KINDS = (damaged, hostile_config, hostile_edits, hostile_record, bulk, pickles, folders)


def make(number: int, folder: Path) -> tuple[str, Path]:
    """The file (or folder) of this number, written into `folder`: its kind and path. The same
    number gives the same file.
    """
    kind = KINDS[number % len(KINDS)]
    return kind.__name__, kind(random.Random(number), folder)


def load(path: Path) -> torch.nn.Module:
    """What a user calls for it."""
    return DecoderLM.from_pretrained(path) if path.is_dir() else quantize.load(path)


def use(model: torch.nn.Module) -> None:
    """Run what was loaded, where C++ trusts the sizes it is told. Raises what Python raises."""
    if isinstance(model, DecoderLM):
        fast = quantize.for_decoding(model)
        quantize.generate(fast, torch.tensor([[1, 2, 3]]), max_new_tokens=3)
