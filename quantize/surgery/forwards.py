"""Does a subclass of a layer of torch compute what that layer computes?

Many do: timm's Linear casts its weight in TorchScript alone, others pass their input on. `torch.fx`
follows both forwards, and where it writes the same down they compute the same: a forward that asks
for numbers can't be followed.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

_FORWARDS = ("forward", "_conv_forward")
_NAMES = ("input", "weight", "bias")  # of the first arguments of layers' functions


def computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Does a module compute what `base`, one of its classes, computes from the same attributes?"""
    kind: Any = type(module)
    own = [getattr(kind, name, None) for name in _FORWARDS]
    if own == [getattr(base, name, None) for name in _FORWARDS]:
        return True
    written = [_written(module, one) for one in (kind, base)]
    return None not in written and written[0] == written[1]


def _written(module: nn.Module, kind: type[nn.Module]) -> list[Any] | None:
    """What `torch.fx` writes down of the forward that a class has for a module's attributes; None
    where it can't follow it.
    """
    like: Any = kind.__new__(kind)
    like.__dict__ = dict(vars(module))
    try:
        graph = fx.Tracer().trace(like)
    except Exception:  # a forward may raise anything about what stands for a tensor
        return None
    places = {node: at for at, node in enumerate(graph.nodes)}
    lines: list[Any] = []
    for node in graph.nodes:
        target = None if node.op in ("placeholder", "output") else node.target  # as it is named
        named = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
        given = map_arg((named, node.args[len(_NAMES) :]), places.__getitem__)
        lines.append((node.op, target, given))
    return lines
