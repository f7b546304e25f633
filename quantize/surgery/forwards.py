"""Does a subclass of a layer of torch compute what that layer computes?

Many do: timm's Linear casts its weight in TorchScript alone, others pass their input on. `torch.fx`
follows both forwards, and where it writes the same down they compute the same: a forward that asks
for numbers can't be followed. A layer with an attribute of its own (a flag, a counter, an adapter)
isn't asked: its forward may go another way in another call, or leave something there for others.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

_FORWARDS = ("forward", "_conv_forward", "__call__")
_NAMES = ("input", "weight", "bias")  # of the first arguments of layers' functions


def computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Does a module compute, in every call, what `base`, one of its classes, computes from the same
    attributes?
    """
    kind: Any = type(module)
    own = [getattr(kind, name, None) for name in _FORWARDS]
    if own == [getattr(base, name, None) for name in _FORWARDS]:
        return True
    called = kind.__call__ is not base.__call__
    if called or _attributes(module) - _attributes(_example(base)):
        return False
    for training in (True, False):
        written = [_written(module, one, training) for one in (kind, base)]
        if None in written or written[0] != written[1]:
            return False
    return True


def _example(base: type[nn.Module]) -> nn.Module:
    """A layer of this class of torch, of the least size."""
    count = 3 if issubclass(base, nn.modules.conv._ConvNd) else 2
    kind: Any = base
    return kind(*[1] * count, device="meta")


def _attributes(module: Any) -> set[str]:
    return {*vars(module), *module._parameters, *module._buffers, *module._modules}


def _held(module: Any) -> dict[str, int]:
    """Which objects its attributes and parameters are."""
    return {name: id(held) for name, held in (vars(module) | module._parameters).items()}


def _written(module: Any, kind: type[nn.Module], training: bool) -> list[Any] | None:
    """What `torch.fx` writes down of the forward that a class has for a module's attributes; None
    where it can't follow it, or where it sets one.
    """
    like: Any = kind.__new__(kind)
    own = {"training": training, "_parameters": dict(module._parameters)}
    like.__dict__ = vars(module) | own
    before = _held(like)
    try:
        graph = fx.Tracer().trace(like)
    except Exception:  # a forward may raise anything about what stands for a tensor
        return None
    if _held(like) != before:
        return None
    places = {node: at for at, node in enumerate(graph.nodes)}
    lines: list[Any] = []
    for node in graph.nodes:
        target = None if node.op in ("placeholder", "output") else node.target  # as it is named
        named = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
        given = map_arg((named, node.args[len(_NAMES) :]), places.__getitem__)
        lines.append((node.op, target, given))
    return lines
