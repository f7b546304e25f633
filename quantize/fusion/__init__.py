"""Hand back the fastest file that gives the same answers: `fold` (our own passes) and `fuse` (a back end's file)."""

from __future__ import annotations

from typing import Any

from torch import nn

from quantize.fusion import torchscript
from quantize.fusion.check import check
from quantize.fusion.graph import CaptureError, capture, check_inputs

__all__ = ["BACKENDS", "CaptureError", "fuse"]

BACKENDS = ("torchscript",)


def fuse(model: nn.Module, example_inputs: Any, *, backend: str = "torchscript") -> nn.Module:
    """A fused version of an eval-mode model: called like the model, equal to it, with `.save(path)`.

    `example_inputs` is a tensor, a tuple of positional arguments or a dict of keyword arguments, on the model's device. Sizes
    that the model leaves free (batch, length) stay free; another value of a size that it fixes is refused when called.
    With `backend="torchscript"` this is a `torch.jit.ScriptModule` whose file needs nothing of this package. An output that is
    a dataclass or a dict becomes a dict of tensors without its None fields.

    Raises ValueError for a model in training mode, for inputs on another device, for a model that changes its answer with
    control flow that depends on data (unless TorchScript can compile it), and for a back end that doesn't exist; TypeError
    for inputs or outputs that aren't made of tensors.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    check_inputs(model, example_inputs)
    try:
        fused = torchscript.compile(capture(model, example_inputs))
    except CaptureError as error:
        fused = torchscript.without_export(model, example_inputs, reason=str(error))
    check(fused, model, example_inputs)
    return fused
