"""The pass of a single token as one TorchScript graph of stock operations, traced through the model
on its first token.

While it is traced, layers that read the same input (q, k and v; gate and up) are one product, and
each product takes the form that is fastest with one row. Caches that the graph doesn't know (a
window, rows of different length, another dtype than the model's) are left to the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize import surgery
from quantize.models import DecoderLM
from quantize.nn.half import HalfLinear
from quantize.nn.int4 import Int4Linear
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_kernels import in_graph
from quantize.nn.int8_products import sum_weights
from quantize.run.decoding.sizes import blocks_of
from quantize.run.fusion import torchscript
from quantize.run.kv_cache import KVCache
from quantize.run.kv_cache.functions import attention

Compute = Callable[[Tensor], Tensor]


class Step:
    """Runs passes of a model over one token per row, as its weights were when it was made."""

    def __init__(self, model: DecoderLM):
        self.model = for_one_row(model)
        self.shapes = [block.attention.cache_shape[:2] for block in blocks_of(model)]
        self.graphs: dict[int, Callable[..., Tensor]] = {}  # by batch
        self.tracing = threading.Lock()

    def __call__(self, ids: Tensor, cache: KVCache, logits_to_keep: int) -> Tensor | None:
        """Logits [B, 1, V]; None for a pass that is left to the model."""
        if ids.shape != (cache.batch, 1) or cache.pad is not None or cache.shapes != self.shapes:
            return None
        if not torchscript.available():
            return None
        store = cache.open(1)
        if store is None or any(
            s.window or s.tensors["k"].dtype != self.model.norm.weight.dtype for s in store
        ):
            return None
        keys, values = ([s.tensors[name] for s in store] for name in "kv")
        inputs = (ids, torch.arange(cache.length + 1, device="cpu"), keys, values)
        with self.tracing:
            graph = self.graphs.get(cache.batch)
            if graph is None:
                scratch = (*inputs[:2], [k.clone() for k in keys], [v.clone() for v in values])
                graph = self.graphs[cache.batch] = torchscript.plain_frozen(
                    _OneToken(self.model), scratch
                )
        logits = graph(*inputs)
        cache.close(1)
        return logits


class _OneToken(nn.Module):
    """One token per row as a function of tensors: ids [B, 1], positions [S + 1], and each layer's
    buffers, written in place.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, slots: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        return self.model(ids, _Slots(slots, keys, values))


class _Slots:
    """What a traced pass sees of the cache: the number of positions is a size, so the graph doesn't
    fix it.
    """

    def __init__(self, slots: Tensor, keys: list[Tensor], values: list[Tensor]):
        self.slots, self.keys, self.values = slots, keys, values

    def positions(self, new: int, device: torch.device | None = None) -> Tensor:
        return self.slots[-1:]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        held, at = self.slots.shape[0], self.slots[-1:]
        keys, values = (
            self.keys[layer].index_copy_(2, at, k),
            self.values[layer].index_copy_(2, at, v),
        )
        return attention(q, keys[:, :, :held], values[:, :, :held])


# ------------------------------------------------------------------------------------------------
# layers of one row


def for_one_row(model: DecoderLM) -> DecoderLM:
    """A copy to be traced, which shares all tensors with `model`."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin: Any = surgery.deepcopy(model, shared)
    groups = [[twin.head]]
    for block in blocks_of(twin):
        own, ffn = block.attention, block.ffn
        groups += [[own.q, own.k, own.v], [own.out], [ffn.gate, ffn.up], [ffn.down]]
    places: dict[nn.Module, nn.Module] = {}
    for layers in groups:
        places |= zip(layers, side_by_side(layers), strict=True)
    surgery.exchange(twin, places)
    return twin


def side_by_side(layers: Sequence[Any]) -> Sequence[nn.Module]:
    """What stands for layers that read the same input; they themselves if they are of kinds that
    can't be one.
    """
    forms = {_form(layer) for layer in layers}
    form = forms.pop()
    if form is None or forms:
        return layers
    make, _, names, *_ = form
    tensors = [_joined([getattr(layer, name) for layer in layers]) for name in names]
    sizes = [layer.out_features for layer in layers]
    shared = _Shared(make(*tensors), sizes)
    return [_Part(size, partial(shared, at)) for at, size in enumerate(sizes)]


def _joined(parts: list[Any]) -> Tensor | None:
    if parts[0] is None:
        return None
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).detach()


def _form(layer: Any) -> tuple[Any, ...] | None:
    """What makes the product of a layer, and must agree for layers to be one; second the width of
    their input, then the names of their tensors.
    """
    kind = type(layer)
    if kind not in _KINDS or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if layer.weight.device.type != "cpu":
        return None
    width, biased = layer.in_features, layer.bias is not None
    if kind is Int8Linear:
        plain = layer.activation is None
        return (_int8, width, ("packed", "scale", "bias"), biased) if plain else None
    if kind is Int4Linear:
        fits, names = layer.out_features % 16 == 0, ("packed", "scale", "zero", "bias")
        return (_int4, width, names, biased, layer.group_size) if fits else None
    whole = isinstance(layer.weight, nn.Parameter)  # not rounded, and read in another dtype
    return (_float, width, ("weight", "bias"), biased, layer.weight.dtype) if whole else None


_KINDS = (Int8Linear, Int4Linear, nn.Linear, HalfLinear)


def _int8(packed: Tensor, scale: Tensor, bias: Tensor | None) -> Compute:
    sums = sum_weights(packed)
    return lambda x: in_graph(x, packed, scale, bias, sums)


def _int4(packed: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> Compute:
    layer = Int4Linear(packed, scale, zero, bias)
    weight, grid = layer.for_kernel()

    def product(x: Tensor) -> Tensor:
        rows = x.reshape(-1, layer.in_features).bfloat16()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, layer.group_size, grid)
        y = y.to(x.dtype)
        y = y if bias is None else y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], layer.out_features)

    return product


def _float(weight: Tensor, bias: Tensor | None) -> Compute:
    if weight.dtype != torch.float32:
        return lambda x: F.linear(x, weight, bias)
    transposed = weight.t().contiguous()  # at one row, torch reads it 1.4 times as fast

    def product(x: Tensor) -> Tensor:
        y = x.reshape(-1, x.shape[-1]) @ transposed
        y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], -1)

    return product


class _Shared:
    """One product for several layers. The first that is called computes it."""

    def __init__(self, compute: Compute, sizes: Sequence[int]) -> None:
        self.compute, self.sizes = compute, list(sizes)
        self.parts: dict[int, Tensor] = {}

    def __call__(self, at: int, x: Tensor) -> Tensor:
        if not self.parts:
            self.parts = dict(enumerate(self.compute(x).split(self.sizes, -1)))
        return self.parts.pop(at)


class _Part(nn.Module):
    """Stands for a layer in a copy that is traced."""

    def __init__(self, out_features: int, compute: Compute) -> None:
        super().__init__()
        self.out_features, self.compute = out_features, compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)
