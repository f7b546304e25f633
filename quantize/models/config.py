"""Configs of the built-in models. They come from files, so every field is checked before anything
is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a very large number"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _require(config: object, name: str, allowed: str, ok: bool) -> None:
    if not ok:
        raise ValueError(
            f"{type(config).__name__}.{name} is {_short(getattr(config, name))}; allowed: {allowed}"
        )


MAX_COUNT = 2**31 - 1  # sizes go to compiled code, and configs come from files


MAX_NUMBER = torch.finfo(torch.float32).max


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_COUNT


def _require_count(config: object, *names: str) -> None:
    for name in names:
        _require(
            config, name, f"an integer from 1 to {MAX_COUNT}", _is_count(getattr(config, name))
        )


def _is_number(value: object) -> bool:
    """Is it one that float32 can hold?"""
    if type(value) is not int and type(value) is not float:
        return False
    return -MAX_NUMBER <= value <= MAX_NUMBER


_FILLED: Any = None  # not given: `__post_init__` puts a number in its place


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a Llama-family decoder (Llama, Mistral, Qwen2, Qwen3, SmolLM2 differ only in these
    fields).

    kv_heads, head_dim and ffn_width left at None become heads, width / heads, and 8/3 width rounded
    up to 32.
    """

    vocab_size: int = 256
    width: int = 128
    layers: int = 6
    heads: int = 4
    kv_heads: int = _FILLED
    head_dim: int = _FILLED
    ffn_width: int = _FILLED
    max_length: int = 4096  # longest context the model claims to be good for, in tokens
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_head: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    # positions a query sees, itself included; one, or one per layer
    window: int | Sequence[int | None] | None = None
    # radians per position, head_dim / 2 of them, where RoPE is scaled
    rope_frequencies: Sequence[float] | None = None
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
        shared = self.heads % self.kv_heads == 0
        _require(self, "kv_heads", f"a divisor of heads={self.heads}", shared)
        _require(self, "head_dim", "an even number (RoPE turns pairs)", self.head_dim % 2 == 0)
        for name in ("rope_theta", "norm_eps", "rope_scale"):
            value = getattr(self, name)
            _require(self, name, "a finite number > 0", _is_number(value) and value > 0)
        for name in ("tied_head", "qkv_bias", "qk_norm"):
            _require(self, name, "True or False", isinstance(getattr(self, name), bool))
        for name in ("window", "rope_frequencies", "eos_token_id"):
            if isinstance(getattr(self, name), list):  # as JSON returns it
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_optional()

    def _check_optional(self) -> None:
        """What may be None, one value, or several."""
        layers, half = self.layers, self.head_dim // 2
        windows = self.window if isinstance(self.window, tuple) else (self.window,)
        count = layers if windows is self.window else 1
        fits = len(windows) == count and all(w is None or _is_count(w) for w in windows)
        _require(self, "window", f"None, an integer >= 1, or {layers} of these", fits)
        pairs = self.rope_frequencies
        fits = isinstance(pairs, tuple) and len(pairs) == half and all(map(_is_number, pairs))
        allowed = f"None or {half} finite numbers"
        _require(self, "rope_frequencies", allowed, pairs is None or fits)
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        fits = all(type(end) is int and 0 <= end < self.vocab_size for end in ends)
        allowed = f"None, or one or several ids below {self.vocab_size}"
        _require(self, "eos_token_id", allowed, self.eos_token_id is None or fits)


@dataclass(frozen=True)
class ConvNetConfig:
    """Shape of a residual ConvNet: one stage per entry of `widths`, each stage after the first at
    half the size.
    """

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
    """Turn a list (as JSON returns it) into a tuple, so that configs compare equal, and check
    it.
    """
    value = getattr(config, name)
    filled = isinstance(value, list | tuple) and len(value) > 0
    _require(config, name, "a list of at least one integer >= 1", filled)
    _require(config, name, f"a list of integers from 1 to {MAX_COUNT}", all(map(_is_count, value)))
    object.__setattr__(config, name, tuple(value))
