"""A Llama-style decoder.

Plain eager PyTorch, written so that every compressed form still runs, exports and traces: no width
is hard-coded in a `forward` (the number of heads is read from the projection's output), so linears
may be replaced or shrunk under it. Left out: dropout, attention variants beyond the Llama family,
anything a back end should do. The decoder knows no cache; whoever keeps keys and values passes an
object with `positions` and `attend`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize import checkpoint
from quantize.models import pretrained, published
from quantize.models.attention import (
    apply_rope,
    causal_attention,
    rope_frequencies,
    rope_table,
)
from quantize.models.config import DecoderConfig
from quantize.native import bfloat16


class Cache(Protocol):
    """What the decoder needs of a key-value cache (see kv_cache.KVCache)."""

    def positions(self, new: int, device: torch.device | None = None) -> Tensor:
        """Positions of the next `new` tokens, [T] or [B, T]."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k, v [B, KV, T, D] of one layer; causal attention of q [B, H, T, D] over all kept,
        [B, H, T, D].
        """
        ...


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm that accepts fp32 weights beside 16-bit inputs without leaving the fused
    kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        if bfloat16.takes(x):
            return bfloat16.norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        window = config.window
        self.window = window if window is None or isinstance(window, int) else window[layer]
        wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = nn.Linear(config.width, wide, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, narrow, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, narrow, bias=config.qkv_bias)
        self.out = nn.Linear(wide, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    @property
    def cache_shape(self) -> tuple[int, int, int | None]:
        """Key-value heads, head width and window of what a cache keeps for this layer, as they are
        after pruning.
        """
        return self.k.out_features // self.head_dim, self.head_dim, self.window

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q(x).view(heads)).transpose(1, 2)  # [B, H, T, D]
        k = self.k_norm(self.k(x).view(heads)).transpose(1, 2)  # [B, KV, T, D]
        native = cos.ndim == 2 and bfloat16.takes(q, k, parts=2)
        rotate = bfloat16.rotate if native else apply_rope
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        v = self.v(x).view(heads).transpose(1, 2)
        return self.out(self.attend(q, k, v, cache).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache | None) -> Tensor:
        """Causal attention [B, H, T, D], over what the cache holds too."""
        t = q.shape[2]
        if cache is not None:
            return cache.attend(self.layer, q, k, v)
        if self.window is not None and self.window < t:
            visible = (
                torch.ones(t, t, dtype=torch.bool, device=q.device).tril().triu(1 - self.window)
            )
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
        gate, up = self.gate(x), self.up(x)
        if bfloat16.takes(gate, up):
            return self.down(bfloat16.gated(gate, up))
        return self.down(F.silu(gate) * up)


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

    With a `cache`, ids are the tokens that follow what the cache holds, and only they get logits.
    logits_to_keep: if above 0, compute the logits of that many last positions only.
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
        # Every block starts as the identity: deep stacks then train at high rates.
        for block in self.modules():
            if isinstance(block, DecoderBlock):
                nn.init.zeros_(block.attention.out.weight)
                nn.init.zeros_(block.ffn.down.weight)
        if not self.config.tied_head:
            nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor, cache: Cache | None = None, logits_to_keep: int = 0) -> Tensor:
        config = self.config
        new = ids.shape[1]
        if cache is None:
            positions = torch.arange(new, device=ids.device)
        else:
            positions = cache.positions(new, ids.device)
        x = self.embedding(ids)  # [B, T, width]
        if torch.is_autocast_enabled(x.device.type):
            # else the residual stream is fp32 and each sum a cast
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rope = config.rope_theta, config.rope_frequencies
        cos, sin = rope_table(positions, config.head_dim, *rope)
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
        """A published model of the Llama family in eval mode: Llama, SmolLM2, Mistral, Qwen2,
        Qwen2.5, Qwen3.

        folder: holds `config.json` and `model.safetensors`, or its shards and their index. Weights
        stored in `dtype` stay mapped to the file, others are converted.

        Raises CheckpointError, naming file or folder and the reason, for a file that is missing,
        broken or doesn't fit the config, and for a config that asks for something else than this
        class does; ValueError for another dtype.
        """
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}; allowed: float32, float16, bfloat16")
        folder = Path(folder)
        with checkpoint.blaming(folder):
            config = DecoderConfig(**pretrained.read_config(folder))
            # nothing to initialise
            with torch.device("meta"), checkpoint.Bounded(1000 + 40 * config.layers):
                model = cls(config)
            tensors = published.read_tensors(folder, config.tied_head, dtype)
            if config.tied_head and "embedding.weight" in tensors:
                tensors["head.weight"] = tensors["embedding.weight"]
            published.check_tensors(folder, tensors, model.state_dict())
            checkpoint.assign(model, tensors)
        if config.tied_head:
            model.head.weight = model.embedding.weight
        return model.eval()

    def example_inputs(self, batch: int = 1) -> Tensor:
        """Random ids [batch, T], always the same; T is 256, or the longest context if less."""
        length = min(256, self.config.max_length)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.config.vocab_size, (batch, length), generator=generator)

    def rope_frequencies(self) -> Tensor:
        """Radians per position of each pair of dimensions, fp32 [head_dim / 2]."""
        config = self.config
        if config.rope_frequencies is not None:
            return torch.tensor(config.rope_frequencies, dtype=torch.float32)
        return rope_frequencies(config.head_dim, config.rope_theta)
