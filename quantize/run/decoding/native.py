"""step.cpp, compiled and called: a pass over a few tokens as one C call on the tensors of a model
and its cache.

Left out, and so left to the model itself: passes over many tokens, attention sinks, layers of other
kinds than this package's own, hooks, CUDA.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from quantize.host import usable_cores
from quantize.models import Attention, DecoderBlock, DecoderLM, FeedForward, RMSNorm
from quantize.nn import operands
from quantize.nn.half import HalfLinear
from quantize.nn.int4 import Int4Linear
from quantize.nn.int8 import Int8Linear
from quantize.nn.low_rank import LowRankLinear
from quantize.run.decoding.build import built, library
from quantize.run.decoding.sizes import blocks_of, contradictions
from quantize.run.decoding.structs import LINEARS, NORMS, Held, Layer, Linear, Model, Pass
from quantize.run.kv_cache import KVCache

MOST_ROWS = 16  # above, a product of matrices is faster than that many of a matrix and a vector
KINDS = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int8: 3,
    torch.uint8: 4,
}  # as in step.cpp
NOT_YET = "compiling step.cpp doesn't pay yet"
CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)

#
# -------------------------------------------------------------------------------------------------
# a model


def obstacle(model: DecoderLM, *, compile_now: bool = True) -> str | None:
    """Why `Step` can't run `model`; None if it can. compile_now: as in `build.library`."""
    try:
        found = next(_odd_parts(model), None)
    except (
        AttributeError
    ) as error:  # parts of somebody else's that don't have what a DecoderLM's have
        return f"it isn't made as a DecoderLM is: {error}"
    if found is not None:
        return found
    try:
        compiled = library(compile_now=compile_now)
    except OSError as error:
        return str(error)
    return NOT_YET if compiled is None else None


def is_plain(value: Any) -> TypeGuard[Tensor]:
    """Whether `value` is a tensor of torch's own, with its numbers in memory where `data_ptr`
    says.
    """
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout is torch.strided
        and value.device.type != "meta"
    )


def _odd_parts(model: DecoderLM) -> Iterator[str]:
    yield from _changed_code(model)
    config = model.config
    for index, block in enumerate(blocks_of(model)):
        attention = block.attention
        if (attention.layer, attention.head_dim) != (index, config.head_dim):
            yield f"blocks.{index}.attention isn't layer {index} of heads {config.head_dim} wide"
    norms = [module for module in model.modules() if type(module) is RMSNorm]
    if any(norm.eps != config.norm_eps for norm in norms):
        yield "its norms have another eps than its config"
    places: list[tuple[type, Any]] = [(RMSNorm, model.norm)]
    for block in blocks_of(model):
        places += [(DecoderBlock, block), (Attention, block.attention), (FeedForward, block.ffn)]
        places += [(RMSNorm, block.attention_norm), (RMSNorm, block.ffn_norm)]
        norm = RMSNorm if config.qk_norm else nn.Identity
        places += [(norm, block.attention.q_norm), (norm, block.attention.k_norm)]
    for kind, part in places:
        if type(part) is not kind:
            yield f"a {type(part).__name__} stands where a {kind.__name__} should"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            yield f"{name or 'the model'} has hooks or a forward of its own"
        tensors = [
            t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
        ]
        if any(tensor.device.type != "cpu" for tensor in tensors):
            yield f"{name or 'the model'} isn't on the CPU"
        if not all(map(is_plain, tensors)):
            yield (
                f"{name or 'the model'} holds a tensor of another layout or class than torch's own"
            )
    yield from contradictions(model)
    if getattr(model.embedding, "embedding_dim", config.width) != config.width:
        yield f"its embedding isn't {config.width} wide, as its config says"
    layers = [model.head]
    for block in blocks_of(model):
        layers += _linears(block).values()
    for layer in layers:
        for part in (layer.first, layer.second) if type(layer) is LowRankLinear else (layer,):
            known = type(part) in (nn.Linear, HalfLinear, Int8Linear, Int4Linear)
            stored = operands(part) if known else None
            if stored is None:
                yield f"it has a {type(part).__name__}"
            elif stored.weight.dtype not in KINDS:
                yield f"it has a {type(part).__name__} of {stored.weight.dtype}"


_OWN_CODE = {
    (kind, name): getattr(kind, name)
    for kind, name in (
        (DecoderLM, "forward"),
        (DecoderLM, "rope_frequencies"),
        (DecoderBlock, "forward"),
        (Attention, "forward"),
        (Attention, "attend"),
        (FeedForward, "forward"),
        (RMSNorm, "forward"),
        (KVCache, "attend"),
        (nn.Linear, "forward"),
        (HalfLinear, "forward"),
        (Int8Linear, "forward"),
        (Int4Linear, "forward"),
        (LowRankLinear, "forward"),
        (nn.Module, "__call__"),
    )
}


def _changed_code(model: DecoderLM) -> Iterator[str]:
    """Methods that step.cpp stands for and that somebody replaced, in a subclass or in the class
    itself.
    """
    kind = type(model)
    for name in ("forward", "rope_frequencies", "__call__"):
        if getattr(kind, name) is not getattr(DecoderLM, name):
            yield f"{kind.__name__} has a {name} of its own"
    for (kind, name), function in _OWN_CODE.items():
        if getattr(kind, name) is not function:
            yield f"{kind.__name__}.{name} was replaced"


def _linears(block: Any) -> dict[str, Any]:
    attention, ffn = block.attention, block.ffn
    return dict(
        zip(
            LINEARS,
            (attention.q, attention.k, attention.v, attention.out, ffn.gate, ffn.up, ffn.down),
            strict=True,
        )
    )


class Step:
    """Runs passes of `model` over a few tokens. narrow: float32 weights that hold float16 values
    are read from a copy.
    """

    def __init__(self, model: DecoderLM, *, narrow: bool = True):
        self.model, self.run, self.narrow = model, built().functions, narrow
        self.most_threads = usable_cores()  # one beyond the quota stops, and all others wait for it
        self.kept: list[object] = []  # what the pointers point to
        config = model.config
        layers = (Layer * len(model.blocks))()
        for layer, block in zip(layers, blocks_of(model), strict=True):
            for name, linear in _linears(block).items():
                setattr(layer, name, self._linear(linear))
            parts = (
                block.attention_norm,
                block.ffn_norm,
                block.attention.q_norm,
                block.attention.k_norm,
            )
            for name, norm in zip(NORMS, parts, strict=True):
                setattr(layer, name, self._keep(getattr(norm, "weight", None), torch.float32))
        self.kept.append(layers)
        with torch.device("cpu"):  # whatever the default is
            frequencies = model.rope_frequencies()
        self.described = Model(
            len(layers), config.width, config.head_dim, config.norm_eps, config.rope_scale,
            self._keep(frequencies, torch.float32), self._keep(model.norm.weight, torch.float32),
            ctypes.addressof(layers), self._linear(model.head),
        )  # fmt: skip
        self.vocabulary = model.head.out_features
        self.answers = model.head.weight.dtype if isinstance(model.head, HalfLinear) else None
        self.shapes = [block.attention.cache_shape[:2] for block in blocks_of(model)]

    def __call__(self, ids: Tensor, cache: KVCache, logits_to_keep: int) -> Tensor | None:
        """Logits of the last tokens, all for 0; None for a pass that is left to the model, which
        may refuse it by name.
        """
        if ids.dim() != 2 or ids.device.type != "cpu" or logits_to_keep < 0 or not cache.length > 0:
            return None
        batch, tokens = ids.shape
        if (
            not 0 < batch * tokens <= MOST_ROWS
            or batch != cache.batch
            or cache.shapes != self.shapes
        ):
            return None
        pad = cache.pad
        if pad is not None:
            pad = pad.cpu().contiguous()
            if (
                pad.shape != (batch,)
                or pad.dtype != torch.int64
                or int(pad.max()) > cache.length
                or int(pad.min()) < 0
            ):
                return None  # a row of padding alone sees itself, which only the model does
        store = cache.open(tokens)
        if store is None:
            return None
        held = held_by(store, batch, cache.length, tokens)
        if held is None:
            return None
        embedded = self.embed(ids)
        if embedded is None:
            return None
        x = widened(embedded)
        keep = min(logits_to_keep, tokens) or tokens
        logits = torch.empty(batch, keep, self.vocabulary, dtype=torch.float32, device="cpu")
        request = Pass(
            batch=batch,
            tokens=tokens,
            length=cache.length,
            keep=keep,
            kind=KINDS[store[0].tensors["k"].dtype],
            threads=self.threads,
            pad=None if pad is None else pad.data_ptr(),
            held=ctypes.addressof(held),
            x=x.data_ptr(),
            logits=logits.data_ptr(),
        )
        self.run(self.described, request)
        cache.close(tokens)
        return logits.to(self.answers or embedded.dtype)

    @property
    def threads(self) -> int:
        return min(torch.get_num_threads(), self.most_threads)

    def embed(self, ids: Tensor) -> Tensor | None:
        """The embeddings [B, T, width] of ids [B, T]; None if the model's are of another shape."""
        embedded = self.model.embedding(ids).detach()
        return embedded if embedded.shape == (*ids.shape, self.described.width) else None

    def _linear(self, layer: nn.Module) -> Linear:
        if type(layer) is LowRankLinear:
            first = self._linear(layer.first)
            self.kept.append(first)
            outer = self._linear(layer.second)
            outer.first = ctypes.pointer(first)
            return outer
        stored = operands(layer)
        if stored is None:
            raise TypeError(f"a {type(layer).__name__} has no operands")
        weight = stored.weight
        half = getattr(layer, "_half", (None, ()))[0]
        may_narrow = self.narrow and half is torch.float16 and weight.dtype is torch.float32
        if may_narrow and torch.equal(weight.half().float(), weight):
            weight = weight.half()  # the same numbers in half the bytes
        return Linear(
            KINDS[weight.dtype],
            layer.out_features,
            layer.in_features,
            stored.group,
            self._keep(weight),
            self._keep(stored.scale),
            self._keep(stored.zero),
            self._keep(stored.bias, torch.float32),
        )

    def _keep(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        """The address of a tensor's values, contiguous and in `dtype`; they live as long as this
        object.
        """
        if tensor is None:
            return None
        tensor = tensor.detach().to(dtype or tensor.dtype).contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()


def widened(embedded: Tensor) -> Tensor:
    """Embeddings as a pass takes them, and overwrites: a copy in fp32."""
    return embedded.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def held_by(store: list, batch: int, length: int, tokens: int) -> ctypes.Array[Held] | None:
    """What each layer of a cache holds, as step.cpp reads it; None unless every tensor is what
    step.cpp takes it for.
    """
    dtype = store[0].tensors["k"].dtype
    if dtype not in CACHE_DTYPES:
        return None
    held = (Held * len(store))()
    for to, layer in zip(held, store, strict=True):
        shape = (batch, layer.kv_heads, layer.capacity)
        expected = {"k": (dtype, layer.head_dim), "v": (dtype, layer.head_dim)}
        if dtype is torch.int8:
            expected |= {"k_scale": (torch.bfloat16, 1), "v_scale": (torch.bfloat16, 1)}
        if expected.keys() != layer.tensors.keys():
            return None
        if not 0 <= layer.first <= length or length + tokens - layer.first > layer.capacity:
            return None
        for name, tensor in layer.tensors.items():
            kind, width = expected[name]
            as_expected = (
                tensor.dtype is kind
                and tensor.shape == (*shape, width)
                and tensor.device.type == "cpu"
            )
            if not as_expected or not tensor.is_contiguous():
                return None
            setattr(to, name, tensor.data_ptr())
        to.capacity, to.first, to.window = layer.capacity, layer.first, layer.window or 0
    return held
