"""The shape of the cache that a model needs, read from its attention modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from quantize.run.kv_cache.checks import per_layer


def shape_for(model: nn.Module, *, window: Any, limit: int | None) -> dict[str, Any]:
    """Arguments of the `KVCache` that fits `model`, but for those that any cache may have.

    Args:
        model: its attention modules have a `cache_shape` (KV heads, head width, window).
        window: asked for, beside the model's own; of two windows the narrower one counts.
        limit: asked for; None is the model's `config.max_length` where a layer has no window asked.
    """
    modules = _attention_layers(model)
    heads, widths, windows = zip(*(m.cache_shape for m in modules), strict=True)
    asked = per_layer("window", window, len(modules), none=True)
    if limit is None and None in asked:
        limit = getattr(getattr(model, "config", None), "max_length", None)
    return {
        "layers": len(modules),
        "kv_heads": heads,
        "head_dim": widths,
        "window": list(map(_narrower, windows, asked)),
        "limit": limit,
    }


def _attention_layers(model: nn.Module) -> list[Any]:
    """Modules with a `cache_shape`, by their number.

    Raises:
        ValueError: the model has none, or their numbers aren't 0, 1, ...
    """
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "cache_shape")]
    modules.sort(key=lambda module: module.layer)
    numbers = [module.layer for module in modules]
    if not modules or numbers != list(range(len(modules))):
        raise ValueError(
            f"{type(model).__name__} has no attention layers 0, 1, ... with a "
            f"`cache_shape`: found layers {numbers}"
        )
    return modules


def _narrower(one: int | None, other: int | None) -> int | None:
    """The smaller of two windows; None is no window."""
    windows = [window for window in (one, other) if window is not None]
    return min(windows, default=None)
