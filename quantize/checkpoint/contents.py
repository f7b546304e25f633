"""What both containers hold: a record of plain JSON values, and the places of tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch

from quantize.checkpoint.opening import from_json, require

FORMAT, VERSION = "quantize", 2
OLDEST = 1  # version 2: packed weights have a name of their own
MAX_HEADER = 2**24  # bytes of pickle or JSON; ten thousand tensors need about 2 MB
MAX_DIMENSIONS = 64  # as torch
DTYPES = {
    str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)
}
SEAL = b"0" * 64
# record, (start, stop) of each tensor in its order, seal
Located = tuple[dict[str, Any], list[tuple[int, int]], int]


def parse_record(version: Any, text: Any) -> dict[str, Any]:
    require(type(version) is int and type(text) is str, "not written by quantize.save")
    newer = (
        f"written by a newer quantize (format version {version}; this one reads up to "
        f"{VERSION}): upgrade quantize"
    )
    require(version <= VERSION, newer)
    require(version >= OLDEST, f"unknown format version {version}")
    record = from_json(text)
    kinds = dict.fromkeys(
        ("architecture", "aliases", "strides", "metadata", "versions", "tensors"), dict
    ) | {"structure": list}
    require(isinstance(record, dict), "malformed record")
    found = {key: type(value) for key, value in record.items()}
    found.setdefault("notes", list)  # files of earlier versions have no notes
    require(found == kinds | {"notes": list}, "malformed record")
    built = record["architecture"]
    good = (
        built.keys() == {"name", "config"}
        and type(built["name"]) is str
        and isinstance(built["config"], dict | None)
    )
    require(good, "malformed architecture")
    for name, spec in record["tensors"].items():
        require(_describes_tensor(spec), f"malformed description of {name!r}")
    for alias, name in record["aliases"].items():
        good = type(name) is str and name in record["tensors"] and alias not in record["tensors"]
        require(good, f"malformed alias {alias!r}")
    for edit in record["structure"]:
        shape = {k: type(v) for k, v in edit.items()} if isinstance(edit, dict) else {}
        require(
            shape == {"module": str, "builder": str, "arguments": dict},
            "malformed structure record",
        )
    return record | {"version": version}


def _describes_tensor(spec: object) -> bool:
    if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape", "sha256"}:
        return False
    dtype, shape = spec["dtype"], spec["shape"]
    if (
        type(dtype) is not str
        or dtype not in DTYPES
        or type(shape) is not list
        or len(shape) > MAX_DIMENSIONS
    ):
        return False
    return all(type(n) is int and 0 <= n < 2**63 for n in shape)


def require_disjoint(places: Iterable[tuple[int, int]], size: int) -> None:
    end = 0
    for start, stop in sorted(places):
        require(end <= start <= stop <= size, "truncated, or its parts overlap")
        end = stop


def to_json(content: Any) -> str:
    try:
        return json.dumps(content, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata and structure must be JSON values: {error}") from None


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
