"""Records of files that earlier versions wrote, as this one would write them.

Version 1 called the packed weight of an int8 or 4-bit layer `weight`, and had another name for an
attention in parts.
"""

from __future__ import annotations

from typing import Any

_BUILDERS = {"Int8MultiheadAttention": "ProjectedAttention"}
_PACKED = ("Int8Linear", "Int8Embedding", "Int4Linear")


def upgraded(record: dict[str, Any], version: int) -> dict[str, Any]:
    """The record of a file of that format version with the names of today; tensors keep their
    order.
    """
    if version >= 2:
        return record
    packed = {edit["module"] for edit in record["structure"] if edit["builder"] in _PACKED}
    names = {_inside(module, "weight"): _inside(module, "packed") for module in packed}

    def renamed(name: str) -> str:
        return names.get(name, name)

    tensors = {renamed(name): described for name, described in record["tensors"].items()}
    strides = {renamed(name): order for name, order in record["strides"].items()}
    aliases = {renamed(alias): renamed(name) for alias, name in record["aliases"].items()}
    structure = [
        {**edit, "builder": _BUILDERS.get(edit["builder"], edit["builder"])}
        for edit in record["structure"]
    ]
    record = {**record, "structure": structure}
    return {**record, "tensors": tensors, "strides": strides, "aliases": aliases}


def _inside(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
