"""A checkpoint as `.safetensors`: the tensors, and the record as JSON in the header's metadata."""

from __future__ import annotations

import os
from typing import Any, BinaryIO

import torch

from quantize.checkpoint import contents
from quantize.checkpoint.opening import from_json, require

_FOREIGN_TENSORS = (
    "not written by quantize.save. Plain tensors: "
    "model.load_state_dict(safetensors.torch.load_file(path)), then "
    "quantize.save(model, path). A published model: quantize.DecoderLM.from_pretrained(its folder)"
)
_JSON_START = b'{"__metadata__":{"sha256":"'
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


def write_safetensors(file: BinaryIO, text: str, tensors: dict[str, torch.Tensor]) -> None:
    metadata = {
        "sha256": contents.SEAL.decode(),
        "format": "pt",
        "quantize_version": str(contents.VERSION),
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
    encoded = contents.to_json(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in tensors.values():
        file.write(contents.bytes_of(tensor))
    file.flush()


def locate_safetensors(file: BinaryIO) -> contents.Located:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    require(
        length <= min(2 * contents.MAX_HEADER, size - 8),
        f"a header of {length} bytes in a file of {size}",
    )
    encoded = file.read(length)
    header = from_json(encoded)
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
    require("quantize_version" in metadata and "record" in metadata, _FOREIGN_TENSORS)
    record = contents.parse_record(int(metadata["quantize_version"]), metadata["record"])
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
    contents.require_disjoint(places, size)
    return record, places, 8 + len(_JSON_START)
