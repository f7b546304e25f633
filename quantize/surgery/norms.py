"""BatchNorm folded into the convolution before it, where nothing else reads what lies between.

Who reads it is seen on calibration (`calibration.followers`), or else told by `torch.fx`, which
follows the forward of a copy. Where it can't, nothing is folded.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_weights

from quantize.surgery.asked import asked_classes
from quantize.surgery.candidates import take_place
from quantize.surgery.edit import clone, replace
from quantize.surgery.record import builder, record

_PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fold_norms(model: nn.Module, followers: Mapping[str, str]) -> dict[str, str]:
    """Fold BatchNorms in eval mode into the convolutions before them, in place; nn.Identity takes a
    norm's place.

    Args:
        followers: by layer, the module that alone reads its output; see `traced_followers`.

    Returns:
        The names of the norms, by convolution.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    places = Counter(map(id, modules.values()))
    asked = asked_classes(model)
    folded: dict[str, str] = {}
    for conv_name, norm_name in followers.items():
        conv, norm = modules[conv_name], modules[norm_name]
        once = places[id(conv)] == places[id(norm)] == 1
        if once and norm not in asked and _folds(conv, norm):
            _fold(conv, norm)
            folded[conv_name] = norm_name
    absorb(model, folded.values())
    return folded


def absorb(model: nn.Module, names: Iterable[str]) -> None:
    """Put nn.Identity in the places of modules whose work the layers before them do, in place."""
    replacements: dict[nn.Module, nn.Module] = {}
    for name in names:
        module = model.get_submodule(name)
        identity = absorbed(module)
        record(identity, "absorbed")
        take_place(module, identity)
        replacements[module] = identity
    replace(model, replacements)


@builder
def absorbed(module: nn.Module) -> nn.Module:
    """nn.Identity in place of a module whose work the layer before it does."""
    return nn.Identity().train(module.training)


@builder
def with_bias(module: nn.Module) -> nn.Module:
    """Give a convolution that has no bias one of zeros, in place."""
    conv: Any = module
    conv.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0].flatten(1)[:, 0]))
    return module


@torch.no_grad()
def _fold(conv: Any, norm: Any) -> None:
    if conv._parameters["bias"] is None:
        with_bias(conv)
        conv._parameters["bias"].requires_grad_(conv.weight.requires_grad)
        record(conv, "with_bias")
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(),
        conv.bias.double(),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        None if norm.weight is None else norm.weight.double(),
        None if norm.bias is None else norm.bias.double(),
    )
    conv.weight.copy_(weight)
    conv.bias.copy_(bias)


def traced_followers(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """For each layer of `names` that the model's forward calls once, and whose output goes into one
    other module and nowhere else, whichever arguments it is called with: the name of that module;
    none where `torch.fx` can't follow.
    """
    modules = model.modules()
    readers = (*_PAIRS.values(), nn.ReLU, nn.ReLU6)
    if not any(isinstance(module, readers) for module in modules):
        return {}
    found: dict[str, str] | None = None
    for absent in _ways_to_call(model):
        graph = _graph(model, absent)
        if graph is None:
            return {}
        seen = _followers(graph, names)
        found = seen if found is None else dict(found.items() & seen.items())
    return found or {}


def _ways_to_call(model: nn.Module) -> list[list[str]]:
    """Which arguments a call may leave out: none, all that are None by default, and all of these
    but one. A forward asks whether they are None, and a trace doesn't see that it asks.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    optional = [p.name for p in parameters if p.default is None]
    ways = [[], optional]
    ways += [[other for other in optional if other != name] for name in optional]
    return [way for i, way in enumerate(ways) if way not in ways[:i]]


def _followers(graph: fx.Graph, names: Collection[str]) -> dict[str, str]:
    """`traced_followers` of one graph."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    found = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op != "call_module" or name not in names or len(node.users) != 1:
            continue
        user = next(iter(node.users))
        reader = str(user.target)
        alone = calls[name] == calls[reader] == 1 and not read & {name, reader}
        if user.op == "call_module" and alone and user.args == (node,):
            found[name] = reader
    return found


def is_plain(module: nn.Module, kinds: Collection[type[nn.Module]]) -> bool:
    """Is it just what torch defines, with nobody watching its output?"""
    watched = any(getattr(module, kind, None) for kind in _HOOKS)
    return type(module) in kinds and not watched and "forward" not in module.__dict__


def _folds(conv: Any, norm: Any) -> bool:
    if not is_plain(conv, _PAIRS) or not is_plain(norm, [_PAIRS[type(conv)]]):
        return False
    if norm.training or norm.running_mean is None or "_half" in vars(conv) | vars(norm):
        return False
    stored = conv._parameters.get("weight")
    same = stored is not None and stored.dtype == norm.running_mean.dtype
    return same and norm.num_features == conv.out_channels


class _Tracer(fx.Tracer):
    """Goes into a model's own modules, and into none of torch's or this package's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("quantize.nn")
        return ours or super().is_leaf_module(m, module_qualified_name)


def _graph(model: nn.Module, absent: Collection[str]) -> fx.Graph | None:
    """The forward of a copy, called without the arguments `absent`, as a graph; None where it can't
    be followed.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]):
            return _Tracer().trace(clone(model), dict.fromkeys(absent))
    except Exception:  # a forward that reads values, or whatever else a proxy can't answer
        return None
    finally:
        logging.disable(before)
