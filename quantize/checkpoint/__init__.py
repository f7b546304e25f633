"""Save a model to one file and load it back: self-describing, atomic, safe to open, every bit of it
checked.

Two containers hold the same content. A `.pth` is `torch.save` of `{"format", "version", "record",
"tensors"}`, a `.safetensors` has the record in its header, so `torch.load(path, weights_only=True)`
and `safetensors.safe_open` read them too. The record is JSON: architecture, structure record (see
surgery/record.py), dtype, shape, strides and SHA-256 of every tensor, which names are tied,
metadata, versions. All bytes that are not tensor data go into one more SHA-256 (in the zip's
comment, or first in the header), so no flipped bit and no cut passes, wherever it is.

Loading runs no pickle (see pth.py); the pickle is only scanned, so that a file that would run
code elsewhere is refused here. Names, shapes and dtypes are compared with a model without data
before a tensor is read.

Left out: sharding, encryption, big-endian machines, optimizer state (see training/resuming.py).
"""

from quantize.atomic import atomic_write
from quantize.checkpoint.building import Bounded, assign
from quantize.checkpoint.model import (
    IN_FOLDER,
    architecture,
    load,
    read_metadata,
    read_record,
    save,
    summary,
)
from quantize.checkpoint.opening import CheckpointError, blaming

__all__ = [
    "IN_FOLDER",
    "Bounded",
    "CheckpointError",
    "architecture",
    "assign",
    "atomic_write",
    "blaming",
    "load",
    "read_metadata",
    "read_record",
    "save",
    "summary",
]
