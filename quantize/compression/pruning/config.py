"""Let the config of a model of transformers say the sizes that pruning left, where all layers
agree.

Which attribute of a config is the width of which layer isn't written anywhere. So every number in
it that is a size before the cut is tried: it is changed if a model built from the config then has
more of the pruned model's shapes, and all that it had.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from quantize import surgery
from quantize.calibration import untouched
from quantize.compression.pruning.proof import Answers

# attributes that stand for a multiple of the width while they are None
IMPLIED = (
    "n_inner",
    "intermediate_size",
    "ffn_dim",
)


def follow_config(
    small: nn.Module, sizes: set[tuple[int, int]], answers: Callable[[], Answers]
) -> dict[str, int]:
    """Change numbers in `small.config` so that `type(small)(small.config)` has small's shapes, as
    far as a config can say them.

    Args:
        sizes: sizes before and after the cut, of widths and of counts of heads.
        answers: gives those of `small`, which must not change with its config.

    Returns:
        The attributes that were changed, and their new values.
    """
    config = getattr(small, "config", None)
    if not sizes or not callable(getattr(config, "to_dict", None)):
        return {}
    wrong = _unlike(small)
    if not wrong:
        return {}
    expected = answers()
    changed: dict[str, int] = {}
    for part in _parts(config):
        for name, old, new in _candidates(part, sizes):
            if getattr(part, name) != old or not _set(part, name, new):
                continue
            now = _unlike(small)
            if now is not None and now < wrong and expected.given_by(small, 0.0):
                wrong = now
                changed[name] = new
            else:
                _set(part, name, old)
    return changed


def _parts(config: Any) -> Iterator[Any]:
    """A config and the configs in it (of a text and a vision model)."""
    yield config
    for value in vars(config).values():
        if callable(getattr(value, "to_dict", None)):
            yield from _parts(value)


def _candidates(config: Any, sizes: set[tuple[int, int]]) -> list[tuple[str, int | None, int]]:
    found: list[tuple[str, int | None, int]] = []
    for name, value in vars(config).items():
        for old, new in sorted(sizes):
            if (type(value) is int and value == old) or (value is None and name in IMPLIED):
                found.append((name, value, new))
    return found


def _set(config: Any, name: str, value: int | None) -> bool:
    try:
        setattr(config, name, value)
    except (TypeError, ValueError, AttributeError):
        return False
    return True


def _unlike(model: nn.Module) -> set[str] | None:
    """Names of tensors that a model built from this one's config has otherwise; None where none can
    be built.
    """
    try:
        with untouched(), torch.device("meta"):
            built = type(model)(copy.deepcopy(model.config))
    except Exception:  # whatever a foreign constructor raises: this config builds nothing
        return None
    return set(surgery.unlike(dict(model.named_parameters()), dict(built.named_parameters())))
