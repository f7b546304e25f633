"""`save_pretrained` of a changed model of transformers: only where the folder would be read back as
this model.

A folder says which class and config a model has, and nothing of what was put into it: packed or
factorized weights would be read back as missing ones, filled with random numbers. So a changed
model is compared with what its config builds first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantize.surgery.sizes import unlike

_HARMLESS = {"half"}  # `state_dict()` has the same names and shapes


def guard_folders(model: nn.Module) -> None:
    """Let every module of `model` that has a `save_pretrained` compare itself with its config
    first.
    """
    for module in model.modules():
        if callable(getattr(type(module), "save_pretrained", None)):
            module.__dict__["save_pretrained"] = _Guarded(module)


class _Guarded:
    """Stands for `model.save_pretrained`; on the instance, so that it follows copies and pickles
    and no class is changed.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own `save_pretrained`. Raises ValueError where the folder would be read
        back as another model.
        """
        reason = unlike_its_config(self.model)
        if reason is not None:
            raise ValueError(
                f"a folder can't hold this {type(self.model).__name__}, it would be read back "
                f"with other weights: {reason}. "
                "Use quantize.save(model, path) and quantize.load(path, model=a fresh instance)"
            )
        kind: Any = type(self.model)
        return kind.save_pretrained(self.model, *args, **kwargs)


def unlike_its_config(model: nn.Module) -> str | None:
    """How the tensors of `model` differ from those of a model that its config builds; None if they
    don't.
    """
    if _edits(model) <= _HARMLESS:
        return None
    try:
        with torch.device("meta"):
            built = type(model)(model.config)
    except Exception as error:  # whatever a foreign constructor raises
        return f"its config builds no model to compare it with ({type(error).__name__}: {error})"
    different = unlike(model.state_dict(), built.state_dict())
    if not different:
        return None
    return f"{len(different)} tensors have other names or shapes, {different[0]!r} among them"


def _edits(model: nn.Module) -> set[str]:
    """Names of the builders recorded anywhere in `model`."""
    builders: set[str] = set()
    for module in model.modules():
        builders |= {edit[0] for edit in module.__dict__.get("_structure", ())}
    return builders
