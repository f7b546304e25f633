"""The two containers: how bytes become a record and the places of tensors, and how every one of
those bytes is checked.

Each container has a writer and a function that locates in a file the record, each tensor's bytes
and the digest (the "seal") of everything else. No pickle runs here: in a `.pth` the record is the
third string of the pickle and tensor N is the zip entry `data/N`, both read as they lie there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any, BinaryIO

import torch

from quantize.atomic import atomic_write
from quantize.checkpoint.opening import CheckpointError, from_json, require
from quantize.checkpoint.versions import upgraded

FORMAT, VERSION = "quantize", 2
OLDEST = 1  # version 2: packed weights have a name of their own
MAX_HEADER = 2**24  # bytes of pickle or JSON; ten thousand tensors need about 2 MB
MAX_DIMENSIONS = 64  # as torch


_FOREIGN_PICKLE = (
    "not written by quantize.save. A state dict: model.load_state_dict(torch.load(path, "
    "weights_only=True)). A whole module: "
    "torch.load(path, weights_only=False), which runs the file's code. Then "
    "quantize.save(model, path)"
)
_FOREIGN_TENSORS = (
    "not written by quantize.save. Plain tensors: "
    "model.load_state_dict(safetensors.torch.load_file(path)), then "
    "quantize.save(model, path). A published model: quantize.DecoderLM.from_pretrained(its folder)"
)

DTYPES = {
    str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)
}
_READ_AT_ONCE = 2**20
_SEAL = b"0" * 64
_ZIP_COMMENT = b"quantize sha256 "
_JSON_START = b'{"__metadata__":{"sha256":"'
_ENTRIES = re.compile(r"data\.pkl|version|byteorder|\.\w+|\.data/serialization_id|data/\d+")
_OPCODES = set(
    "PROTO STOP MARK EMPTY_DICT EMPTY_TUPLE EMPTY_LIST TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM "
    "SETITEMS APPEND APPENDS "
    "BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT NONE NEWTRUE NEWFALSE BINPUT LONG_BINPUT "
    "BINGET LONG_BINGET "
    "GLOBAL BINPERSID REDUCE".split()
)
_STORAGES = (
    "Float Double Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble".split()
)
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch.storage UntypedStorage",
    *(f"torch {s}Storage" for s in _STORAGES),
    *(f"torch {d}" for d in DTYPES),
}
_SAFETENSORS_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}

Located = tuple[
    dict[str, Any], list[tuple[int, int]], int
]  # record, (start, stop) of each tensor in its order, seal


def write(path: Path, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write the file; adds `"tensors"` to the record. The tensors are contiguous, on the CPU, with
    a storage each.
    """
    if path.suffix == ".safetensors":  # its readers want the wide dtypes first, for alignment
        tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    described = {
        name: {
            "dtype": str(t.dtype).removeprefix("torch."),
            "shape": list(t.shape),
            "sha256": _sha256(t),
        }
        for name, t in tensors.items()
    }
    text = _to_json(record | {"tensors": described})
    if len(text) > MAX_HEADER // 2:
        raise ValueError(
            f"names, structure and metadata take {len(text)} bytes; at most {MAX_HEADER // 2} fit"
        )
    with atomic_write(path) as file:
        (_write_pth if path.suffix == ".pth" else _write_safetensors)(file, text, tensors)
        _, places, seal = _LOCATE[path.suffix](file)
        digest = _digest(file, places, seal)
        file.seek(seal)
        file.write(digest)


def _write_pth(file: BinaryIO, text: str, tensors: dict[str, torch.Tensor]) -> None:
    try:
        torch.save({"format": FORMAT, "version": VERSION, "record": text, "tensors": tensors}, file)
    except RuntimeError as error:  # torch's zip writer hides the disk's own error
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    comment = _ZIP_COMMENT + _SEAL
    file.seek(-2, os.SEEK_END)  # the length of the comment ends the archive
    file.write(struct.pack("<H", len(comment)) + comment)


def _locate_pth(file: BinaryIO) -> Located:
    size = file.seek(0, os.SEEK_END)
    places = zip_entries(file)
    require("data.pkl" in places, "no entry data.pkl")
    start, stop = places["data.pkl"]
    require(stop - start <= MAX_HEADER, f"a pickle of {stop - start} bytes; at most {MAX_HEADER}")
    file.seek(start)
    head = scan_pickle(file.read(stop - start))
    require(head[:3] == ["format", FORMAT, "version"] and len(head) == 6, _FOREIGN_PICKLE)
    record = _parse_record(head[3], head[5])
    count = len(record["tensors"])
    found = [places[f"data/{i}"] for i in range(count) if f"data/{i}" in places]
    require(
        len(found) == count and f"data/{count}" not in places,
        "the number of tensors differs from the record's",
    )
    seal = size - len(_SEAL)
    file.seek(seal - len(_ZIP_COMMENT))
    require(
        file.read(len(_ZIP_COMMENT)) == _ZIP_COMMENT,
        "truncated, or written by something else than quantize.save",
    )
    return record, found, seal


_end_record: Any = zipfile._EndRecData  # type: ignore[attr-defined]  # private: not in the stubs


def zip_entries(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Start and stop of each entry of an archive of torch.save: stored as it is, within the file,
    apart from each other.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(32)
    require(
        not start.startswith(b"quantize training state"),
        "a training state: go on from it with train.py --resume",
    )
    require(
        start[:4] == b"PK\x03\x04",
        "no zip archive (a legacy torch file, a bare pickle, or something else)",
    )
    ending = _end_record(file)
    require(
        ending and ending[5] <= MAX_HEADER // 2,
        "truncated, or a zip directory of more entries than fit",
    )
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    folder = entries[0].filename.split("/")[0] + "/" if entries else ""
    places: dict[str, tuple[int, int]] = {}
    for entry in entries:
        name = entry.filename.removeprefix(folder)
        require(
            not name.startswith(("code/", "constants.pkl")),
            "a TorchScript archive, not a checkpoint: use torch.jit.load",
        )
        require(
            _ENTRIES.fullmatch(name) and entry.orig_filename == folder + name,
            f"unexpected entry {entry.filename[:80]!r}",
        )
        require(name not in places, f"two entries {entry.filename!r}")
        stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        require(
            stored and entry.compress_size == entry.file_size,
            f"entry {entry.filename!r} is compressed or encrypted",
        )
        file.seek(entry.header_offset)
        local = file.read(30)
        require(
            local[:4] == b"PK\x03\x04", f"entry {entry.filename!r} isn't where the directory says"
        )
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        places[name] = start, start + entry.file_size
    _require_disjoint(places.values(), size)
    return places


def scan_pickle(
    data: bytes, *, more_opcodes: Set[str] = frozenset(), more_globals: Set[str] = frozenset()
) -> list[Any]:
    """The first six values in a pickle, which is refused if it has an opcode or a global that no
    checkpoint of ours has.
    """
    head: list[Any] = []
    opcodes, calls = _OPCODES | more_opcodes, _GLOBALS | more_globals
    left = 1000 + len(data) // 2  # ours have five bytes an opcode
    end = 0
    for opcode, argument, end in pickletools.genops(data):  # noqa: B007
        name = opcode.name
        left -= 1
        if name not in opcodes or left < 0:
            raise CheckpointError(f"{_FOREIGN_PICKLE} (its pickle has opcode {name})")
        if name == "GLOBAL" and argument not in calls:
            raise CheckpointError(f"{_FOREIGN_PICKLE} (its pickle calls {str(argument)[:80]!r})")
        if len(head) < 6 and argument is not None and name != "PROTO" and "PUT" not in name:
            head.append(argument)
    require(end == len(data) - 1, "not written by quantize.save: bytes after the pickle's end")
    return head


def _write_safetensors(file: BinaryIO, text: str, tensors: dict[str, torch.Tensor]) -> None:
    metadata = {
        "sha256": _SEAL.decode(),
        "format": "pt",
        "quantize_version": str(VERSION),
        "record": text,
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _SAFETENSORS_DTYPES or name == "__metadata__":
            raise ValueError(
                f"{name!r} ({dtype}) can't be stored in a .safetensors file: save as .pth"
            )
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = _to_json(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in tensors.values():
        file.write(_bytes(tensor))
    file.flush()


def _locate_safetensors(file: BinaryIO) -> Located:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    require(
        length <= min(2 * MAX_HEADER, size - 8), f"a header of {length} bytes in a file of {size}"
    )
    encoded = file.read(length)
    header = from_json(encoded)
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
    require("quantize_version" in metadata and "record" in metadata, _FOREIGN_TENSORS)
    record = _parse_record(int(metadata["quantize_version"]), metadata["record"])
    require(
        encoded.startswith(_JSON_START), "altered, or written by something else than quantize.save"
    )
    require(
        header.keys() == record["tensors"].keys(), "the header's tensors differ from the record's"
    )
    places = []
    for name, spec in record["tensors"].items():
        entry = header[name]
        expected = {"dtype": _SAFETENSORS_DTYPES.get(spec["dtype"]), "shape": spec["shape"]}
        described = {key: value for key, value in entry.items() if key != "data_offsets"}
        require(described == expected, f"the header describes {name!r} otherwise than the record")
        start, stop = entry["data_offsets"]
        require(type(start) is int and type(stop) is int, f"malformed offsets of {name!r}")
        places.append((8 + length + start, 8 + length + stop))
    _require_disjoint(places, size)
    return record, places, 8 + len(_JSON_START)


_LOCATE = {".pth": _locate_pth, ".safetensors": _locate_safetensors}


def _require_disjoint(places: Iterable[tuple[int, int]], size: int) -> None:
    end = 0
    for start, stop in sorted(places):
        require(end <= start <= stop <= size, "truncated, or its parts overlap")
        end = stop


def read_header(file: BinaryIO, suffix: str) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    record, places, seal = _LOCATE[suffix](file)
    file.seek(seal)
    require(
        file.read(len(_SEAL)) == _digest(file, places, seal),
        "altered: the header's SHA-256 differs",
    )
    return upgraded(record, record.pop("version")), places


def _digest(file: BinaryIO, places: list[tuple[int, int]], seal: int) -> bytes:
    """SHA-256, in hex, of all bytes of the file but the tensors' (which have their own) and the
    digest itself.
    """
    total, end = hashlib.sha256(), 0
    size = file.seek(0, os.SEEK_END)
    for start, stop in sorted([*places, (seal, seal + len(_SEAL)), (size, size)]):
        file.seek(end)
        while end < start:
            part = file.read(min(start - end, _READ_AT_ONCE))
            require(part, "truncated")
            total.update(part)
            end += len(part)
        end = stop
    return total.hexdigest().encode()


def _parse_record(version: Any, text: Any) -> dict[str, Any]:
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
    found = {"notes": list} | {
        k: type(v) for k, v in record.items()
    }  # files of earlier versions have no notes
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


def _to_json(content: Any) -> str:
    try:
        return json.dumps(content, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata and structure must be JSON values: {error}") from None


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _read_into(file: Any, tensor: torch.Tensor) -> int:
    return file.readinto(_bytes(tensor))


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def read_tensor(
    file: BinaryIO, start: int, stop: int, *, dtype: str, shape: list[int], sha256: str
) -> torch.Tensor:
    itemsize = DTYPES[dtype].itemsize
    require(
        math.prod(shape) * itemsize == stop - start,
        f"{stop - start} bytes can't be {dtype} of shape {shape}",
    )
    tensor = torch.empty(shape, dtype=DTYPES[dtype])
    file.seek(start)
    require(_read_into(file, tensor) == stop - start, "truncated")
    require(_sha256(tensor) == sha256, f"altered: the SHA-256 of a tensor of shape {shape} differs")
    return tensor
