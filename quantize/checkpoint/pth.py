"""A checkpoint as `.pth`: `torch.save` of plain containers and tensors, located without unpickling.

The record is the third string of the pickle and tensor N is the zip entry `data/N`; both are read
as they lie in the file. The pickle is scanned, so that a file that would run code elsewhere is
refused here too.
"""

from __future__ import annotations

import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Set
from typing import Any, BinaryIO

import torch

from quantize.checkpoint import contents
from quantize.checkpoint.opening import CheckpointError, require

_FOREIGN_PICKLE = (
    "not written by quantize.save. A state dict: model.load_state_dict(torch.load(path, "
    "weights_only=True)). A whole module: "
    "torch.load(path, weights_only=False), which runs the file's code. Then "
    "quantize.save(model, path)"
)
_ZIP_COMMENT = b"quantize sha256 "
_ENTRIES = re.compile(r"data\.pkl|version|byteorder|\.\w+|\.data/serialization_id|data/\d+")
_OPCODES = set(
    "PROTO STOP MARK EMPTY_DICT EMPTY_TUPLE EMPTY_LIST TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM "
    "SETITEMS APPEND APPENDS "
    "BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT NONE NEWTRUE NEWFALSE BINPUT LONG_BINPUT "
    "BINGET LONG_BINGET "
    "GLOBAL BINPERSID REDUCE".split()
)
STORAGES = (
    "Float Double Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble".split()
)
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch.storage UntypedStorage",
    *(f"torch {s}Storage" for s in STORAGES),
    *(f"torch {d}" for d in contents.DTYPES),
}
_end_record: Any = zipfile._EndRecData  # type: ignore[attr-defined]  # private: not in the stubs


def write_pth(file: BinaryIO, text: str, tensors: dict[str, torch.Tensor]) -> None:
    try:
        torch.save(
            {
                "format": contents.FORMAT,
                "version": contents.VERSION,
                "record": text,
                "tensors": tensors,
            },
            file,
        )
    except RuntimeError as error:  # torch's zip writer hides the disk's own error
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    comment = _ZIP_COMMENT + contents.SEAL
    file.seek(-2, os.SEEK_END)  # the length of the comment ends the archive
    file.write(struct.pack("<H", len(comment)) + comment)


def locate_pth(file: BinaryIO) -> contents.Located:
    size = file.seek(0, os.SEEK_END)
    places = zip_entries(file)
    require("data.pkl" in places, "no entry data.pkl")
    start, stop = places["data.pkl"]
    require(
        stop - start <= contents.MAX_HEADER,
        f"a pickle of {stop - start} bytes; at most {contents.MAX_HEADER}",
    )
    file.seek(start)
    head = scan_pickle(file.read(stop - start))
    require(head[:3] == ["format", contents.FORMAT, "version"] and len(head) == 6, _FOREIGN_PICKLE)
    record = contents.parse_record(head[3], head[5])
    count = len(record["tensors"])
    found = [places[f"data/{i}"] for i in range(count) if f"data/{i}" in places]
    require(
        len(found) == count and f"data/{count}" not in places,
        "the number of tensors differs from the record's",
    )
    seal = size - len(contents.SEAL)
    file.seek(seal - len(_ZIP_COMMENT))
    require(
        file.read(len(_ZIP_COMMENT)) == _ZIP_COMMENT,
        "truncated, or written by something else than quantize.save",
    )
    return record, found, seal


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
        ending and ending[5] <= contents.MAX_HEADER // 2,
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
    contents.require_disjoint(places.values(), size)
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
