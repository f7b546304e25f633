"""A decoder made ready to write one token at a time.

At one token per pass, the arithmetic of a layer is a few short products, and what surrounds them costs as much: a Python call
per module and operation, and a product each for q, k, v, gate and up. `for_decoding` merges those that read the same input, and
runs the pass of a single token as one TorchScript graph, traced through the model on its first token. Longer passes, and caches
that the graph doesn't know (a window, rows of different length, int8), run as before: same weights, same answers.

Left out: a compiler. `torch.compile` needs a C++ compiler where the model runs, and a minute per shape.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.fusion import torchscript
from quantize.int8 import Int8Linear
from quantize.kv_cache import KVCache
from quantize.kv_cache.functions import attention
from quantize.models import Attention, DecoderLM, FeedForward, apply_rope


def for_decoding(model: DecoderLM) -> DecodingLM:
    """`model`, compressed or not, ready for `generate`: the same ids to the same logits, faster at one token.

    It shares the model's weights, except for merged and float32 ones, and follows no later change of the model. Not for
    training or saving. Raises TypeError for something else than a `DecoderLM`.
    """
    if not isinstance(model, DecoderLM):
        raise TypeError(f"for_decoding takes a DecoderLM, got {type(model).__name__}")
    return DecodingLM(model)


class DecodingLM(nn.Module):
    """See `for_decoding`. Token ids [B, T] -> logits [B, T, V], or [B, logits_to_keep, V]."""

    def __init__(self, model: DecoderLM):
        super().__init__()
        self.config = model.config
        blocks = nn.ModuleList(_merge_block(block) for block in model.blocks)
        self.model = _twin(model, blocks=blocks, head=_for_one_row(model.head)).eval()
        self._steps: dict[tuple[int, torch.dtype], nn.Module] = {}

    def forward(self, ids: Tensor, cache: KVCache | None = None, logits_to_keep: int = 0) -> Tensor:
        if ids.shape[1] == 1 and isinstance(cache, KVCache) and ids.device.type == "cpu" and torchscript.available():
            buffers = cache.open_plain(self._dtype)
            if buffers is not None:
                return self._step(ids, cache, *buffers)
        return self.model(ids, cache, logits_to_keep)

    def rope_frequencies(self) -> Tensor:
        return self.model.rope_frequencies()

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def _step(self, ids: Tensor, cache: KVCache, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        inputs = (ids, torch.arange(cache.length + 1), keys, values)
        step = self._steps.get((cache.batch, self._dtype))
        if step is None:
            scratch = (inputs[0], inputs[1], [k.clone() for k in keys], [v.clone() for v in values])
            step = self._steps[cache.batch, self._dtype] = torchscript.plain_frozen(_Step(self.model).eval(), scratch)
        logits = step(*inputs)
        cache.close(1)
        return logits


class _Step(nn.Module):
    """One token per row as a function of tensors: ids [B, 1], positions [S + 1], and each layer's buffers, written in place."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, slots: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        return self.model(ids, _Slots(slots, keys, values))


class _Slots:
    """What a traced pass sees of the cache: the number of positions is a size, so the graph doesn't fix it."""

    def __init__(self, slots: Tensor, keys: list[Tensor], values: list[Tensor]):
        self.slots, self.keys, self.values = slots, keys, values

    def positions(self, new: int, device: torch.device | None = None) -> Tensor:
        return self.slots[-1:]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        held, at = self.slots.shape[0], self.slots[-1:]
        keys, values = self.keys[layer].index_copy_(2, at, k), self.values[layer].index_copy_(2, at, v)
        return attention(q, keys[:, :, :held], values[:, :, :held])


# ---------------------------------------------------------------------------------------------------- merging


def merge_linears(layers: Sequence[nn.Module]) -> nn.Module | None:
    """One layer that computes several on the same input, its outputs side by side; None for kinds that can't be merged."""
    kinds = {type(layer) for layer in layers}
    biases = [layer.bias for layer in layers if hasattr(layer, "bias")]
    if len(kinds) != 1 or len({b is None for b in biases}) != 1 or len({layer.weight.dtype for layer in layers}) != 1:
        return None
    bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
    weight = torch.cat([layer.weight.detach() for layer in layers])
    if kinds == {Int8Linear}:
        return Int8Linear(weight, torch.cat([layer.scale for layer in layers]), bias)
    if kinds == {nn.Linear}:
        merged = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        merged.weight = nn.Parameter(weight, requires_grad=False)
        merged.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return _for_one_row(merged)
    return None


class TransposedLinear(nn.Module):
    """`nn.Linear` with its weight stored [in, out]: at one row of float32, torch reads it 1.4 times as fast."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(-1, self.in_features) @ self.weight
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def _for_one_row(layer: nn.Module) -> nn.Module:
    """The layer, or the same in the form that is fastest with one row."""
    if type(layer) is nn.Linear and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu":
        bias = None if layer.bias is None else layer.bias.detach()
        return TransposedLinear(layer.weight.detach().t().contiguous(), bias)
    return layer


class _MergedAttention(Attention):
    """`Attention` with one product for q, k and v, and one rotation for q and k."""

    @property
    def cache_shape(self) -> tuple[int, int, int | None]:
        return self.kv_heads, self.head_dim, self.window

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: object = None) -> Tensor:
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

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).split(self.sizes, dim=-1)
        return self.down(F.silu(gate) * up)


def _merge_block(block: nn.Module) -> nn.Module:
    attention, ffn = block.attention, block.ffn
    if (qkv := merge_linears((attention.q, attention.k, attention.v))) is not None:
        out = _for_one_row(attention.out)
        attention = _twin(attention, _MergedAttention, q=None, k=None, v=None, qkv=qkv, out=out)
        attention.heads = block.attention.q.out_features // attention.head_dim
        attention.kv_heads = block.attention.k.out_features // attention.head_dim
    if (gate_up := merge_linears((ffn.gate, ffn.up))) is not None:
        ffn = _twin(ffn, _MergedFeedForward, gate=None, up=None, gate_up=gate_up, down=_for_one_row(ffn.down))
        ffn.sizes = (block.ffn.gate.out_features, block.ffn.up.out_features)
    return _twin(block, attention=attention, ffn=ffn)


def _twin(module: nn.Module, kind: type[nn.Module] | None = None, **modules: nn.Module | None) -> nn.Module:
    """A module that shares everything with `module` but its class and the submodules given; None takes one away."""
    twin = copy.copy(module)
    twin.__class__ = kind or type(module)
    twin._modules = {n: m for n, m in module._modules.items() if modules.get(n, m) is not None} | {
        n: m for n, m in modules.items() if m is not None
    }
    return twin
