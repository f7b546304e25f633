"""State dicts that others wrote: plain `.safetensors`, and what `torch.save` made of a state dict
or of a whole module.

No code of a file runs. A pickle is read by an unpickler that knows the few functions which rebuild
tensors; every other class in it becomes a stand-in that keeps what it is given, so that the tensors
of a pickled module can be had without the module's class. Left out: legacy files (before torch
1.6), tensors that are no plain dense ones.
"""

from __future__ import annotations

import collections
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from quantize import surgery
from quantize.checkpoint.opening import CheckpointError, blaming, open_regular, require
from quantize.checkpoint.pth import STORAGES

MAX_PICKLE = 2**24  # bytes; a state dict of ten thousand tensors has 2 MB
NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put a state dict


class StandIn:
    """An object of a class that isn't looked up: it keeps its arguments and its state."""

    name = "?"

    def __init__(self, *args: Any, **_kwargs: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *_args: Any, **_kwargs: Any) -> StandIn:
        return self

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def append(self, _value: Any) -> None:
        pass

    def extend(self, _values: Any) -> None:
        pass


class _Call:
    """A function that a pickle may call, as an object that it can't change; what it builds is
    counted, so that a short file can't ask for much memory.
    """

    __slots__ = ("function", "left")

    def __init__(self, function: Any, left: list[int]) -> None:
        self.function, self.left = function, left

    def __call__(self, *args: Any) -> Any:
        self.left[0] -= sum(len(a) for a in args if isinstance(a, (tuple, list, dict)))
        require(self.left[0] >= 0, "its pickle builds far more than it holds")
        return self.function(*args)

    def __setstate__(self, _state: Any) -> None:
        raise CheckpointError("its pickle changes a function")


def _parameter(data: Tensor, *_rest: Any) -> Tensor:
    return data


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_rest: Any) -> Tensor:
    """A view of the storage's numbers."""
    count = math.prod(size)
    require(count <= storage.numel(), f"a tensor of {count} numbers in {storage.numel()}")
    return torch.as_strided(storage, size, stride, offset)


FUNCTIONS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): torch.Size,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


class _Unpickler(pickle.Unpickler):
    """Reads the pickle of a torch archive without running what it names."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self.left = [2 * MAX_PICKLE]
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in FUNCTIONS:
            return _Call(FUNCTIONS[module, name], self.left)
        if module == "torch" and name.endswith("Storage"):
            return name
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        return type(name, (StandIn,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Tensor:
        """The numbers of a storage, 1-D.

        Args:
            pid: "storage", its class or dtype, its key, its device, how many numbers it has.
        """
        kind, key = pid[1], str(pid[2])
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            numbers = torch.frombuffer(content, dtype=_dtype(kind)) if content else torch.empty(0)
            self.storages[key] = numbers
        return self.storages[key]


def _dtype(kind: Any) -> torch.dtype:
    """The dtype of a storage's class, by its name."""
    if isinstance(kind, torch.dtype):
        return kind
    known = isinstance(kind, str) and kind.removesuffix("Storage") in STORAGES
    require(known, f"a storage of kind {str(kind)[:80]!r}")
    return getattr(torch, kind)._dtype  # `dtype` warns


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors in a file, by name, on the CPU; and the class of the module that was pickled.

    Args:
        path: a `.safetensors`, or what `torch.save` wrote of a state dict, of a dict that holds one
            as "state_dict", "model_state_dict" or "model", or of a module.

    Returns:
        The tensors; the class's name where the file holds a module, None where it holds tensors.

    Raises:
        CheckpointError: naming the path, for a file of another kind or a damaged one.
    """
    with blaming(path):
        with open_regular(path) as file:
            start = file.read(4)
        if start == b"PK\x03\x04":
            return _read_archive(path)
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path), None
        raise CheckpointError(
            "neither a .safetensors file nor a zip archive as torch.save writes it"
        )


def _read_archive(path: Path) -> tuple[dict[str, Tensor], str | None]:
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        require(
            not any("/code/" in name for name in names),
            "a TorchScript archive: use torch.jit.load",
        )
        pickles = [name for name in names if name.endswith("/data.pkl")]
        require(len(pickles) == 1, "no torch archive: it has no data.pkl")
        size = archive.getinfo(pickles[0]).file_size
        require(size <= MAX_PICKLE, f"a pickle of {size} bytes; at most {MAX_PICKLE}")
        total = sum(entry.file_size for entry in archive.infolist())
        require(total <= path.stat().st_size + MAX_PICKLE, "its entries are larger than the file")
        with archive.open(pickles[0]) as content:
            folder = pickles[0].removesuffix("data.pkl")
            found = _Unpickler(content, archive, folder).load()
    if isinstance(found, StandIn):
        return _of_module(found), type(found).__name__
    return _of_dict(found), None


def _of_dict(found: Any) -> dict[str, Tensor]:
    """The state dict in what was saved."""
    if isinstance(found, Mapping):
        for key in NESTED:
            if isinstance(found.get(key), Mapping):
                found = found[key]
                break
    require(isinstance(found, Mapping) and found, f"holds a {type(found).__name__}, no state dict")
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    others = [str(name)[:80] for name in found if name not in tensors]
    require(not others, f"no state dict: {others[:3]} are no plain dense tensors")
    require(all(isinstance(name, str) for name in tensors), "its keys are no names")
    return tensors


def _of_module(module: StandIn, prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a pickled module, as `state_dict()` names them."""
    require(depth < 100, "modules nested over 100 deep")
    state = module.state
    require(
        isinstance(state, Mapping) and isinstance(state.get("_modules"), Mapping),
        f"holds a {type(module).name}, no module",
    )
    tensors = {}
    skipped = state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in (state.get(kind) or {}).items():
            if isinstance(value, Tensor) and name not in skipped:
                tensors[prefix + name] = value
    for name, child in state["_modules"].items():
        if isinstance(child, StandIn):
            tensors |= _of_module(child, f"{prefix}{name}.", depth + 1)
    return tensors


def filled(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """`model`, in eval mode, with its state replaced by `tensors`.

    Raises:
        CheckpointError: for names and shapes that differ from the model's.
    """
    wanted = model.state_dict()
    wrong = surgery.unlike(tensors, wanted)
    if wrong:
        name = wrong[0]
        shapes = f"{_words(tensors.get(name))} in the file, {_words(wanted.get(name))} in the model"
        raise CheckpointError(
            f"{len(wrong)} tensors differ from those of {type(model).__name__}: "
            f"{name!r} is {shapes}"
        )
    model.load_state_dict(dict(tensors))
    return model.eval()


def _words(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))
