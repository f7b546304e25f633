"""Copies of tensors, of which those past a number of bytes go to files without names, which end
with their tensors: outputs of modules, and what a graph saves for its way back.
"""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from quantize.calibration.patches import snapshot, storage_of

WORTH_A_FILE = 1 << 16  # bytes of what a graph saves


class Store:
    """Copies of tensors, in memory up to a limit, then in files that have no name any more.

    Args:
        memory: bytes that stay in memory.
        folder: of the files; None: the system's for temporary ones.
    """

    def __init__(self, memory: int, folder: Path | None = None) -> None:
        self.memory = memory
        self.folder = folder
        self.used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if self.used + size > self.memory and tensor.device.type == "cpu" and size:
            return _in_a_file(tensor, self.folder)
        kept = snapshot(tensor)
        self.used += size
        weakref.finalize(kept, self._free, size)
        return kept

    def _free(self, size: int) -> None:
        self.used -= size


def _in_a_file(tensor: Tensor, folder: Path | None) -> Tensor:
    with tempfile.NamedTemporaryFile(prefix="quantize-", dir=folder) as file:
        file.truncate(tensor.nbytes)
        mapped = mmap.mmap(file.fileno(), tensor.nbytes)  # holds the file until it goes itself
    values = torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
    values.copy_(tensor)
    if hasattr(mmap, "MADV_DONTNEED"):  # the pages stay in the file, no longer in this process
        mapped.madvise(mmap.MADV_DONTNEED)
    return values


@contextmanager
def saved_in_files(model: nn.Module, memory: int) -> Iterator[None]:
    """Inside, of what the graph of one pass saves for its way back, `memory` bytes stay in memory;
    the rest goes to files.
    """
    store = Store(0)
    weights = {storage_of(parameter) for parameter in model.parameters()}
    kept = 0

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        nonlocal kept
        plain = tensor.detach()
        movable = type(plain) is Tensor and plain.layout == torch.strided
        if movable and plain.nbytes >= WORTH_A_FILE and storage_of(plain) not in weights:
            kept += plain.nbytes
            if kept > memory:
                plain = store.copy(plain)
        return plain, plain._version

    def unpack(saved: tuple[Tensor, int]) -> Tensor:
        tensor, version = saved
        if tensor._version != version:  # as torch does for what it saves itself
            raise RuntimeError("a tensor that a gradient needs was modified in place")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
