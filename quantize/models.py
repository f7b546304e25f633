"""The models that the scripts train: a Llama-style decoder, a residual ConvNet and an MLP.

Plain eager PyTorch, written so that every compressed form still runs, exports and traces: no width is
hard-coded in a `forward` (the number of heads is read from the projection's output), so linears may be replaced
or shrunk under it. Left out: dropout, attention variants beyond the Llama family, anything a back end should do.
The decoder knows no cache; whoever keeps keys and values passes an object with `positions` and `attend`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize import checkpoint, pretrained


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a very large number"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _require(config: object, name: str, allowed: str, ok: bool) -> None:
    if not ok:
        raise ValueError(f"{type(config).__name__}.{name} is {_short(getattr(config, name))}; allowed: {allowed}")


MAX_COUNT = 2**31 - 1  # sizes go to compiled code, and configs come from files
MAX_NUMBER = torch.finfo(torch.float32).max


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_COUNT


def _require_count(config: object, *names: str) -> None:
    for name in names:
        _require(config, name, f"an integer from 1 to {MAX_COUNT}", _is_count(getattr(config, name)))


def _is_number(value: object) -> bool:
    """Is it one that float32 can hold?"""
    return type(value) in (int, float) and -MAX_NUMBER <= value <= MAX_NUMBER


# --------------------------------------------------------------------------------------------- decoder


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a Llama-family decoder (Llama, Mistral, Qwen2, Qwen3, SmolLM2 differ only in these fields).

    kv_heads, head_dim and ffn_width left at None become heads, width / heads, and 8/3 width rounded up to 32.
    """

    vocab_size: int = 256
    width: int = 128
    layers: int = 6
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn_width: int | None = None
    max_length: int = 4096  # longest context the model claims to be good for, in tokens
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_head: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    window: int | Sequence[int | None] | None = None  # positions a query sees, itself included; one, or one per layer
    rope_frequencies: Sequence[float] | None = None  # radians per position, head_dim / 2 of them, where RoPE is scaled
    rope_scale: float = 1.0  # factor on cosines and sines (YaRN)
    eos_token_id: int | Sequence[int] | None = None  # what ends a text

    def __post_init__(self) -> None:
        _require_count(self, "vocab_size", "width", "layers", "heads", "max_length")
        fill = {
            "kv_heads": self.heads,
            "head_dim": max(1, self.width // self.heads),
            "ffn_width": math.ceil(8 * self.width / 3 / 32) * 32,
        }
        for name, value in fill.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _require_count(self, "kv_heads", "head_dim", "ffn_width")
        _require(self, "kv_heads", f"a divisor of heads={self.heads}", self.heads % self.kv_heads == 0)
        _require(self, "head_dim", "an even number (RoPE turns pairs)", self.head_dim % 2 == 0)
        for name in ("rope_theta", "norm_eps", "rope_scale"):
            value = getattr(self, name)
            _require(self, name, "a finite number > 0", _is_number(value) and value > 0)
        for name in ("tied_head", "qkv_bias", "qk_norm"):
            _require(self, name, "True or False", isinstance(getattr(self, name), bool))
        for name in ("window", "rope_frequencies", "eos_token_id"):
            if isinstance(getattr(self, name), list):  # as JSON returns it
                object.__setattr__(self, name, tuple(getattr(self, name)))
        one_each = isinstance(self.window, tuple)
        windows = self.window if one_each else (self.window,)
        fits = all(w is None or _is_count(w) for w in windows) and len(windows) == (self.layers if one_each else 1)
        _require(self, "window", f"None, an integer >= 1, or {self.layers} of these", fits)
        pairs = self.rope_frequencies
        fits = isinstance(pairs, tuple) and len(pairs) == self.head_dim // 2 and all(map(_is_number, pairs))
        _require(self, "rope_frequencies", f"None or {self.head_dim // 2} finite numbers", pairs is None or fits)
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        known = all(type(end) is int and 0 <= end < self.vocab_size for end in ends)
        allowed = f"None, or one or several ids below {self.vocab_size}"
        _require(self, "eos_token_id", allowed, self.eos_token_id is None or known)


class Cache(Protocol):
    """What the decoder needs of a key-value cache (see kv_cache.KVCache)."""

    def positions(self, new: int, device: torch.device | None = None) -> Tensor:
        """Positions of the next `new` tokens, [T] or [B, T]."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k, v [B, KV, T, D] of one layer; causal attention of q [B, H, T, D] over all kept, [B, H, T, D]."""


def rope_table(
    positions: Tensor, head_dim: int, theta: float, frequencies: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, fp32 (Su et al., arXiv 2104.09864).

    [T, D/2] for positions [T], [B, 1, T, D/2] for [B, T]. Computed on every pass, once for all layers: nothing to store,
    cast, move or outgrow. frequencies: radians per position [D/2], in place of those that follow from theta.
    """
    if frequencies is None:
        turns = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    else:
        turns = torch.tensor(frequencies, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * turns
    angles = angles if positions.ndim == 1 else angles[:, None]
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, D]: element i is paired with element i + D/2, as in the published Llama checkpoints."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, training: bool = False) -> Tensor:
    """Attention of q [B, H, T, D] over k, v [B, KV, T, D], each position seeing itself and what is before it.

    By blocks where that was faster on CPUs: in bfloat16, and with training=True (T up to 512) in any dtype, for its backward.
    A graph that leaves this process keeps torch's operator, which holds for every length.
    """
    t = q.shape[2]
    leaves = torch.jit.is_tracing() or torch.compiler.is_exporting()
    if q.device.type == "cpu" and not leaves and (t <= 512 if training else q.dtype is torch.bfloat16 and t <= 1024):
        return blocked_causal_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def blocked_causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """`causal_attention` by matrix products, `block` queries at a time, whose scores over the keys before them are in memory.

    On 2 cores, 8 x 8 heads, 256 positions, head width 64, bf16: 4.6 ms against 8.1 ms of torch's CPU kernel, which has no
    bf16 products to use; in fp32 8.7 against 8.4. Forward and backward of 8 x 2 heads in bf16: 4.9 ms (6.0 in one block).
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    b, h, t, d = q.shape
    if torch.compiler.is_compiling():
        block = t  # no loop, which would be unrolled for this length only
    hidden = torch.full((min(block, t),) * 2, -math.inf, dtype=q.dtype, device=q.device).triu(1)
    q, k, v = (x.reshape(b * h, t, d) for x in (q * d**-0.5, k, v))
    parts = []
    for start in range(0, t, block):
        end = min(start + block, t)
        scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2))
        scores[:, :, start:] += hidden[: end - start, : end - start]
        parts.append(torch.bmm(scores.softmax(-1), v[:, :end]))
    return torch.cat(parts, 1).view(b, h, t, d)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm that accepts fp32 weights beside 16-bit inputs without leaving the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window = config.window[layer] if isinstance(config.window, tuple) else config.window
        wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = nn.Linear(config.width, wide, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, narrow, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, narrow, bias=config.qkv_bias)
        self.out = nn.Linear(wide, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    @property
    def cache_shape(self) -> tuple[int, int, int | None]:
        """Key-value heads, head width and window of what a cache keeps for this layer, as they are after pruning."""
        return self.k.out_features // self.head_dim, self.head_dim, self.window

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = apply_rope(self.q_norm(self.q(x).view(heads)).transpose(1, 2), cos, sin)  # [B, H, T, D]
        k = apply_rope(self.k_norm(self.k(x).view(heads)).transpose(1, 2), cos, sin)  # [B, KV, T, D]
        v = self.v(x).view(heads).transpose(1, 2)
        return self.out(self.attend(q, k, v, cache).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache | None) -> Tensor:
        """Causal attention [B, H, T, D], over what the cache holds too."""
        t = q.shape[2]
        if cache is not None:
            return cache.attend(self.layer, q, k, v)
        if self.window is not None and self.window < t:
            visible = torch.ones(t, t, dtype=torch.bool, device=q.device).tril().triu(1 - self.window)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        return causal_attention(q, k, v, self.training)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DecoderBlock(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, cache)
        return x + self.ffn(self.ffn_norm(x))


@checkpoint.architecture
class DecoderLM(nn.Module):
    """Llama-style language model: token ids [B, T] (int64) -> logits [B, T, V].

    With a `cache`, ids are the tokens that follow what the cache holds, and only they get logits. logits_to_keep: if above 0,
    compute the logits of that many last positions only.
    """

    config_class = DecoderConfig

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embedding.weight
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=0.02 if self.config.tied_head else 1.0)
        for block in self.blocks:  # every block starts as the identity: deep stacks then train at high rates
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.ffn.down.weight)
        if not self.config.tied_head:
            nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor, cache: Cache | None = None, logits_to_keep: int = 0) -> Tensor:
        config = self.config
        new = ids.shape[1]
        positions = torch.arange(new, device=ids.device) if cache is None else cache.positions(new, ids.device)
        x = self.embedding(ids)  # [B, T, width]
        if torch.is_autocast_enabled(x.device.type):  # else the residual stream is fp32 and each sum a cast
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = rope_table(positions, config.head_dim, config.rope_theta, config.rope_frequencies)
        if config.rope_scale != 1:
            cos, sin = cos * config.rope_scale, sin * config.rope_scale
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        if logits_to_keep:
            x = x[:, -logits_to_keep:]
        return self.head(self.norm(x))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> DecoderLM:
        """A published model of the Llama family in eval mode: Llama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3.

        folder: holds `config.json` and `model.safetensors`, or its shards and their index. Weights stored in `dtype` stay
        mapped to the file, others are converted.

        Raises CheckpointError, naming file or folder and the reason, for a file that is missing, broken or doesn't fit the
        config, and for a config that asks for something else than this class does; ValueError for another dtype.
        """
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}; allowed: float32, float16, bfloat16")
        folder = Path(folder)
        with checkpoint.blaming(folder):
            config = DecoderConfig(**pretrained.read_config(folder))
            with torch.device("meta"), checkpoint.Bounded(1000 + 40 * config.layers):  # nothing to initialise
                model = cls(config)
            tensors = pretrained.read_tensors(folder, config.tied_head, dtype)
            if config.tied_head and "embedding.weight" in tensors:
                tensors["head.weight"] = tensors["embedding.weight"]
            pretrained.check_tensors(folder, tensors, model.state_dict())
            checkpoint.assign(model, tensors)
        if config.tied_head:
            model.head.weight = model.embedding.weight
        return model.eval()

    def rope_frequencies(self) -> Tensor:
        """Radians per position of each pair of dimensions, fp32 [head_dim / 2]."""
        config = self.config
        if config.rope_frequencies is not None:
            return torch.tensor(config.rope_frequencies, dtype=torch.float32)
        return 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)


# ------------------------------------------------------------------------------------------ image models


@dataclass(frozen=True)
class ConvNetConfig:
    """Shape of a residual ConvNet: one stage per entry of `widths`, each stage after the first at half the size."""

    in_channels: int = 1
    classes: int = 10
    widths: Sequence[int] = (32, 64)
    blocks: int = 1  # residual blocks per stage

    def __post_init__(self) -> None:
        _require_count(self, "in_channels", "classes", "blocks")
        _set_widths(self, "widths")


@dataclass(frozen=True)
class MLPConfig:
    """Shape of a multilayer perceptron with ReLU between its layers."""

    in_features: int = 64
    classes: int = 10
    hidden: Sequence[int] = (256, 256)

    def __post_init__(self) -> None:
        _require_count(self, "in_features", "classes")
        _set_widths(self, "hidden")


def _set_widths(config: object, name: str) -> None:
    """Turn a list (as JSON returns it) into a tuple, so that configs compare equal, and check it."""
    value = getattr(config, name)
    _require(config, name, "a list of at least one integer >= 1", isinstance(value, list | tuple) and len(value) > 0)
    _require(config, name, f"a list of integers from 1 to {MAX_COUNT}", all(map(_is_count, value)))
    object.__setattr__(config, name, tuple(value))


class ConvBlock(nn.Module):
    """Two 3x3 conv-BatchNorm pairs around a shortcut (He et al., arXiv 1512.03385); [N, C, H, W] in and out."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


@checkpoint.architecture
class ConvNet(nn.Module):
    """Residual image classifier: images [N, C, H, W] -> logits [N, classes]; any H and W."""

    config_class = ConvNetConfig

    def __init__(self, config: ConvNetConfig):
        super().__init__()
        self.config = config
        first = config.widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(config.in_channels, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()
        )
        blocks, channels = [], first
        for stage, width in enumerate(config.widths):
            for block in range(config.blocks):
                blocks.append(ConvBlock(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


@checkpoint.architecture
class MLP(nn.Module):
    """Multilayer perceptron: inputs [N, ...] flattened to [N, in_features] -> logits [N, classes]."""

    config_class = MLPConfig

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.config = config
        widths = (config.in_features, *config.hidden)
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [nn.Linear(narrow, wide), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], config.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.flatten(1)))
