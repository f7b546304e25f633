"""step.cpp, compiled and called: a pass over a few tokens as one C call on the tensors of a model and its cache.

Left out, and so left to the model itself: passes over many tokens, attention sinks, layers of other kinds than this package's
own, hooks, CUDA.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from quantize.int4 import Int4Linear
from quantize.int8 import Int8Linear
from quantize.kv_cache import KVCache
from quantize.low_rank import LowRankLinear
from quantize.models import Attention, DecoderBlock, DecoderLM, FeedForward, RMSNorm
from quantize.precision import HalfLinear

MOST_ROWS = 16  # above, a product of matrices is faster than that many of a matrix and a vector
SOURCE, HEADER = Path(__file__).with_name("step.cpp"), Path(__file__).with_name("numbers.h")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.uint8: 4}  # as in step.cpp


class _Linear(ctypes.Structure):
    pass


_number, _pointer = ctypes.c_int64, ctypes.c_void_p
_Linear._fields_ = [
    *((name, _number) for name in ("kind", "outputs", "inputs", "group")),
    *((name, _pointer) for name in ("weight", "scale", "zero", "bias")),
    ("first", ctypes.POINTER(_Linear)),
]
NORMS = ("attention_norm", "ffn_norm", "q_norm", "k_norm")
LINEARS = ("q", "k", "v", "out", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = [*((name, _pointer) for name in NORMS), *((name, _Linear) for name in LINEARS)]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("layers", "width", "head_dim")),
        *((name, ctypes.c_float) for name in ("norm_eps", "rope_scale")),
        *((name, _pointer) for name in ("frequencies", "norm", "layer")),
        ("head", _Linear),
    ]


class _Held(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("k", "v", "k_scale", "v_scale")),
        *((name, _number) for name in ("capacity", "first", "window")),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("batch", "tokens", "length", "keep", "kind", "threads")),
        *((name, _pointer) for name in ("pad", "held", "x", "logits")),
    ]


# --------------------------------------------------------------------------------------------------- compiling


@functools.cache
def library() -> ctypes.CDLL:
    """step.cpp, compiled for this CPU and kept in the user's cache folder. Raises OSError with what the compiler said."""
    compiler = _compiler()
    if compiler is None:
        raise OSError("there is no C++ compiler (g++ or clang++, or the one that CXX names)")
    # What the compiler knows of this CPU and of itself: a folder may be shared by several machines.
    target = subprocess.run([compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + HEADER.read_bytes() + target + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = _cache_folder()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        return _load(compiler, (folder or Path(scratch)) / f"step-{key}.so", Path(scratch))


def _cache_folder() -> Path | None:
    """Where compiled code is kept between runs; None if there is no such place."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantize"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def _load(compiler: str, path: Path, scratch: Path) -> ctypes.CDLL:
    if not path.exists():
        made = scratch / "made.so"
        for threads in (("-fopenmp",), ()):  # a compiler without OpenMP gives one thread
            done = subprocess.run([compiler, *FLAGS, *threads, str(SOURCE), "-o", str(made)], capture_output=True, text=True)
            if done.returncode == 0:
                break
        else:
            raise OSError(f"{compiler} can't compile {SOURCE.name}: {done.stderr.strip()[-500:]}")
        made.replace(path)
    loaded = ctypes.CDLL(str(path))
    loaded.decode.argtypes, loaded.decode.restype = [ctypes.POINTER(_Model), ctypes.POINTER(_Pass)], None
    return loaded


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))), None)


# ----------------------------------------------------------------------------------------------------- a model


def obstacle(model: DecoderLM) -> str | None:
    """Why `Step` can't run `model`; None if it can."""
    if (found := next(_odd_parts(model), None)) is not None:
        return found
    try:
        library()
    except OSError as error:
        return str(error)
    return None


def _odd_parts(model: DecoderLM) -> Iterator[str]:
    if type(model).forward is not DecoderLM.forward:
        yield f"{type(model).__name__} has a forward of its own"
    places = [(RMSNorm, model.norm)]
    for block in model.blocks:
        places += [(DecoderBlock, block), (Attention, block.attention), (FeedForward, block.ffn)]
        places += [(RMSNorm, block.attention_norm), (RMSNorm, block.ffn_norm)]
        if model.config.qk_norm:
            places += [(RMSNorm, block.attention.q_norm), (RMSNorm, block.attention.k_norm)]
    for kind, part in places:
        if type(part) is not kind:
            yield f"a {type(part).__name__} stands where a {kind.__name__} should"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            yield f"{name or 'the model'} has hooks or a forward of its own"
        if any(t.device.type != "cpu" for t in [*module._parameters.values(), *module._buffers.values()] if t is not None):
            yield f"{name or 'the model'} isn't on the CPU"
    for layer in [model.head, *(layer for block in model.blocks for layer in _linears(block).values())]:
        for part in (layer.first, layer.second) if type(layer) is LowRankLinear else (layer,):
            known = type(part) in (nn.Linear, HalfLinear, Int8Linear, Int4Linear)
            if not known or part.weight.dtype not in KINDS:
                yield f"it has a {type(part).__name__}" + (f" of {part.weight.dtype}" if known else "")


def _linears(block: nn.Module) -> dict[str, nn.Module]:
    attention, ffn = block.attention, block.ffn
    return dict(zip(LINEARS, (attention.q, attention.k, attention.v, attention.out, ffn.gate, ffn.up, ffn.down), strict=True))


class Step:
    """Runs passes of `model` over a few tokens."""

    def __init__(self, model: DecoderLM):
        self.model, self.run = model, library().decode
        self.kept: list[object] = []  # what the pointers point to
        config = model.config
        layers = (_Layer * len(model.blocks))()
        for layer, block in zip(layers, model.blocks, strict=True):
            for name, linear in _linears(block).items():
                setattr(layer, name, self._linear(linear))
            parts = (block.attention_norm, block.ffn_norm, block.attention.q_norm, block.attention.k_norm)
            for name, norm in zip(NORMS, parts, strict=True):
                setattr(layer, name, self._keep(getattr(norm, "weight", None), torch.float32))
        self.kept.append(layers)
        self.described = _Model(
            len(layers), config.width, config.head_dim, config.norm_eps, config.rope_scale,
            self._keep(model.rope_frequencies(), torch.float32), self._keep(model.norm.weight, torch.float32),
            ctypes.addressof(layers), self._linear(model.head),
        )  # fmt: skip
        self.vocabulary, self.heads32 = model.head.out_features, isinstance(model.head, HalfLinear)

    def __call__(self, ids: Tensor, cache: KVCache, logits_to_keep: int) -> Tensor | None:
        """Logits of the last tokens, all for 0; None for a pass that is left to the model."""
        batch, tokens = ids.shape
        if not 0 < batch * tokens <= MOST_ROWS or batch != cache.batch or (store := cache.open(tokens)) is None:
            return None
        kind = KINDS.get(store[0].tensors["k"].dtype)
        if kind is None:
            return None
        held = (_Held * len(store))()
        for to, layer in zip(held, store, strict=True):
            to.capacity, to.first, to.window = layer.capacity, layer.first, layer.window or 0
            for name, tensor in layer.tensors.items():
                setattr(to, name, tensor.data_ptr())
        embedded = self.model.embedding(ids).detach()
        x = embedded.clone() if embedded.dtype is torch.float32 else embedded.float()
        keep = min(logits_to_keep, tokens) or tokens
        logits = torch.empty(batch, keep, self.vocabulary)
        pad = None if cache.pad is None else cache.pad.contiguous()
        self.run(self.described, _Pass(
            batch, tokens, cache.length, keep, kind, torch.get_num_threads(),
            None if pad is None else pad.data_ptr(), ctypes.addressof(held), x.data_ptr(), logits.data_ptr(),
        ))  # fmt: skip
        cache.close(tokens)
        return logits if self.heads32 else logits.to(embedded.dtype)

    def _linear(self, layer: nn.Module) -> _Linear:
        if type(layer) is LowRankLinear:
            first = self._linear(layer.first)
            self.kept.append(first)
            outer = self._linear(layer.second)
            outer.first = ctypes.pointer(first)
            return outer
        weight, scale, zero = layer.weight.detach(), getattr(layer, "scale", None), getattr(layer, "zero", None)
        stored = getattr(layer, "_half", (None, ()))
        if stored[0] is torch.float16 and weight.dtype is torch.float32 and torch.equal(weight.half().float(), weight):
            weight = weight.half()  # the same numbers in half the bytes
        return _Linear(
            KINDS[weight.dtype], layer.out_features, layer.in_features, getattr(layer, "group_size", 0), self._keep(weight),
            self._keep(scale), self._keep(zero), self._keep(layer.bias, torch.float32),
        )  # fmt: skip

    def _keep(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        """The address of a tensor's values, contiguous and in `dtype`; they live as long as this object."""
        if tensor is None:
            return None
        tensor = tensor.detach().to(dtype or tensor.dtype).contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()
