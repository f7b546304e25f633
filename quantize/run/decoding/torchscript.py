"""The pass of a single token as one TorchScript graph of stock operations, traced through the model
on its first token.

Layers that read the same input (q, k and v; gate and up) are merged, and each takes the form that
is fastest with one row. Caches that the graph doesn't know (a window, rows of different length,
another dtype than the model's) are left to the model.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.models import Attention, DecoderLM, FeedForward, apply_rope
from quantize.nn.half import HalfLinear
from quantize.nn.int4 import Int4Linear
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_kernels import in_graph
from quantize.nn.int8_products import sum_weights
from quantize.run.decoding.sizes import blocks_of
from quantize.run.fusion import torchscript
from quantize.run.kv_cache import KVCache
from quantize.run.kv_cache.functions import attention


def merged(model: DecoderLM) -> DecoderLM:
    """A model that shares what it can with `model`, its layers merged and in the form for one
    row.
    """
    blocks = nn.ModuleList(_merge_block(block) for block in blocks_of(model))
    return _twin(model, blocks=blocks, head=_for_one_row(model.head))


class Step:
    """Runs passes of a `merged` model over one token per row."""

    def __init__(self, model: DecoderLM):
        self.model = model
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


#
# -------------------------------------------------------------------------------------------------
# merging


def merge_linears(layers: Sequence[Any]) -> nn.Module | None:
    """One layer that computes several on the same input, its outputs side by side; None for kinds
    that can't be merged.
    """
    kinds = {_kind(layer) for layer in layers}
    first = kinds.pop()
    if first is None or kinds:
        return None
    _, names, kind = first
    tensors = {
        name: torch.cat([getattr(layer, name).detach() for layer in layers]) for name in names
    }
    if kind is not nn.Linear:
        return kind(*tensors.values())
    bias = "bias" in tensors
    merged = nn.Linear(*reversed(tensors["weight"].shape), bias=bias, device="meta")
    merged.load_state_dict(tensors, assign=True)
    return merged.requires_grad_(False)


def _kind(layer: nn.Module) -> tuple[object, tuple[str, ...], type[nn.Module]] | None:
    """What must agree for layers to merge, their tensors with an axis of outputs, and the class to
    make.
    """
    bias = () if getattr(layer, "bias", None) is None else ("bias",)
    if type(layer) is Int8Linear and layer.activation is None:
        return layer.in_features, ("packed", "scale", *bias), Int8Linear
    if type(layer) is Int4Linear:
        return (layer.in_features, layer.group_size), ("packed", "scale", "zero", *bias), Int4Linear
    if type(layer) is nn.Linear or (
        type(layer) is HalfLinear and isinstance(layer.weight, nn.Parameter)
    ):
        return (layer.in_features, layer.weight.dtype), ("weight", *bias), nn.Linear
    return None


class TransposedLinear(nn.Module):
    """`nn.Linear` with its weight stored [in, out]: at one row of float32, torch reads it 1.4 times
    as fast.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(-1, self.in_features) @ self.weight
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


class _OneRow(nn.Module):
    """A compressed layer that leaves out of the graph what one row doesn't need; elsewhere it is
    the layer.
    """

    packed: Tensor
    grid: Tensor
    sums: Tensor

    def __init__(self, layer: Int8Linear | Int4Linear):
        super().__init__()
        self.layer = layer
        if isinstance(layer, Int8Linear):
            self.register_buffer("sums", sum_weights(layer.packed))
        if isinstance(layer, Int4Linear):
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(layer.values().int(), 1)
            self.register_buffer("packed", packed)
            self.register_buffer(
                "grid", torch.stack((layer.scale.t(), layer.zero.t()), -1).contiguous()
            )

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not torch.jit.is_tracing():
            return layer(x)
        if isinstance(layer, Int8Linear):
            return in_graph(x, layer.packed, layer.scale, layer.bias, self.sums)
        rows = x.reshape(-1, layer.in_features)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.bfloat16(), self.packed, layer.group_size, self.grid
        )
        y = y.to(x.dtype)
        y = y if layer.bias is None else y + layer.bias.to(y.dtype)
        return y.view(*x.shape[:-1], layer.out_features)


def _for_one_row(layer: Any) -> nn.Module:
    """The layer, or the same in the form that is fastest with one row."""
    kind = _kind(layer)
    if kind is None or layer.weight.device.type != "cpu":
        return layer
    if kind[2] is nn.Linear and layer.weight.dtype == torch.float32:
        bias = None if layer.bias is None else layer.bias.detach()
        return TransposedLinear(layer.weight.detach().t().contiguous(), bias)
    if kind[2] is Int8Linear or (kind[2] is Int4Linear and layer.out_features % 16 == 0):
        return _OneRow(layer)
    return layer


class _MergedAttention(Attention):
    """`Attention` with one product for q, k and v, and one rotation for q and k."""

    qkv: nn.Module
    heads: int
    kv_heads: int

    @property
    def cache_shape(self) -> tuple[int, int, int | None]:
        return self.kv_heads, self.head_dim, self.window

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any = None) -> Tensor:
        b, t, _ = x.shape
        heads = self.qkv(x).view(b, t, -1, self.head_dim).transpose(1, 2)  # [B, H + 2 KV, T, D]
        qk, v = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if not isinstance(self.q_norm, nn.Identity):
            q, k = qk.split((self.heads, self.kv_heads), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = apply_rope(qk, cos, sin).split((self.heads, self.kv_heads), dim=1)
        return self.out(self.attend(q, k, v, cache).transpose(1, 2).flatten(2))


class _MergedFeedForward(FeedForward):
    """`FeedForward` with one product for gate and up."""

    gate_up: nn.Module
    sizes: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).split(self.sizes, dim=-1)
        return self.down(F.silu(gate) * up)


def _merge_block(block: Any) -> nn.Module:
    attention, ffn = block.attention, block.ffn
    if (qkv := merge_linears((attention.q, attention.k, attention.v))) is not None:
        out = _for_one_row(attention.out)
        attention = _twin(
            attention, _MergedAttention, q=None, k=None, v=None, qkv=_for_one_row(qkv), out=out
        )
        attention.heads = block.attention.q.out_features // attention.head_dim
        attention.kv_heads = block.attention.k.out_features // attention.head_dim
    if (gate_up := merge_linears((ffn.gate, ffn.up))) is not None:
        ffn = _twin(
            ffn,
            _MergedFeedForward,
            gate=None,
            up=None,
            gate_up=_for_one_row(gate_up),
            down=_for_one_row(ffn.down),
        )
        ffn.sizes = (block.ffn.gate.out_features, block.ffn.up.out_features)
    return _twin(block, attention=attention, ffn=ffn)


def _twin(
    module: nn.Module, kind: type[nn.Module] | None = None, **modules: nn.Module | None
) -> Any:
    """A module that shares everything with `module` but its class and the submodules given; None
    takes one away.
    """
    twin = copy.copy(module)
    twin.__class__ = kind or type(module)
    twin._modules = {n: m for n, m in module._modules.items() if modules.get(n, m) is not None} | {
        n: m for n, m in modules.items() if m is not None
    }
    return twin
