"""RoPE as the config of a published checkpoint asks for it: plain, linear, Llama 3 or YaRN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantize.models.attention import rope_frequencies


def rope_of(raw: Mapping[str, Any], head_dim: int) -> tuple[float, list[float] | None, float]:
    """theta; frequencies [head_dim / 2] if they are scaled; the factor on cosines and sines."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor of RoPE is {raw.get('rope_parameters')!r}; supported: 1.0"
        )
    if kind == "default":
        return theta, None, 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"RoPE scaling is of type {kind!r}; supported: default, linear, llama3, yarn"
        )
    if "factor" not in rope:
        raise ValueError(f"RoPE scaling {kind!r} lacks its factor: {rope!r}")
    frequencies = rope_frequencies(head_dim, theta)
    trained = rope.get("original_max_position_embeddings") or raw.get(
        "max_position_embeddings", 2048
    )
    if kind == "linear":
        return theta, (frequencies / rope["factor"]).tolist(), 1.0
    if kind == "llama3":
        return theta, _llama3(frequencies, trained, rope).tolist(), 1.0
    return theta, _yarn(theta, head_dim, trained, rope).tolist(), _yarn_scale(rope)


def _llama3(frequencies: Tensor, trained: int, rope: Mapping[str, float]) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between mixed."""
    turns = trained * frequencies / (2 * math.pi)  # over the length the model was trained on
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope["factor"]


def _yarn(theta: float, head_dim: int, trained: int, rope: Mapping[str, float]) -> Tensor:
    """YaRN (Peng et al., arXiv 2309.00071): kept above `beta_fast` turns, slowed below `beta_slow`,
    mixed between.
    """

    def pair(turns: float) -> float:
        """The pair of dimensions that turns so often over the trained length."""
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    slowed = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = rope_frequencies(head_dim, theta)
    return frequencies * (1 - slowed) + frequencies / rope["factor"] * slowed


def _yarn_scale(rope: Mapping[str, float]) -> float:
    def length(mscale: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * mscale * math.log(rope["factor"]) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return length(rope["mscale"]) / length(rope["mscale_all_dim"])
    return length(1.0)
