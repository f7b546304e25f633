"""Which module alone reads what a layer gives, told by `torch.fx`, without inputs.

Where it can't follow the whole model, it follows the forward of each layer's owner: the module that
holds the layer. That is proof only if nobody calls the layer past its owner, so a layer counts
there only if no code of the modules around the owner names it.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from quantize.surgery.codes import codes_of, functions_of
from quantize.surgery.edit import clone, deepcopy
from quantize.surgery.record import join

_MOST_OPTIONAL = 3  # arguments, each of which doubles the number of traces
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def traced_followers(
    model: nn.Module,
    names: Collection[str],
    is_reader: Callable[[nn.Module], bool] = lambda module: True,
) -> dict[str, str]:
    """For each layer of `names` that is called once, and whose output goes into one other module
    and nowhere else: the name of that module.

    Args:
        model: stays as it is.
        names: of the layers.
        is_reader: tells which modules count; one that stands in several places never does.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    places = Counter(map(id, modules.values()))
    alone = {name for name, module in modules.items() if places[id(module)] == 1}
    readers = {name for name in alone if is_reader(modules[name])}
    layers = alone & set(names)
    if not readers or not layers:
        return {}
    whole = _followers(_WholeTracer(), clone, model, layers)
    if whole is not None:
        return {name: reader for name, reader in whole.items() if reader in readers}
    found: dict[str, str] = {}
    for owner, inner in _by_owner(modules, layers).items():
        if any(_owner(modules, reader) == owner for reader in readers):
            pairs = _followers_inside(modules, owner, inner)
            found |= {name: reader for name, reader in pairs if reader in readers}
    return found


def _followers(
    tracer: fx.Tracer,
    copied: Callable[[nn.Module], nn.Module],
    module: nn.Module,
    names: Collection[str],
) -> dict[str, str] | None:
    """`traced_followers` of a module's forward, whichever arguments it is called with; None where
    it can't be followed.
    """
    found: dict[str, str] | None = None
    for absent in _ways_to_call(module):
        graph = _graph(tracer, copied(module), absent)
        if graph is None:
            return None
        seen = dict(_pairs(graph, names))
        found = seen if found is None else dict(found.items() & seen.items())
    return found


def _ways_to_call(model: nn.Module) -> list[tuple[str, ...]]:
    """Which of the arguments that are None by default a call may leave out: all choices, and none
    where there are too many. A forward asks whether they are None, and a trace doesn't see that it
    asks.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    optional = [p.name for p in parameters if p.default is None]
    if len(optional) > _MOST_OPTIONAL:
        return []
    ways: list[tuple[str, ...]] = []
    for count in range(len(optional) + 1):
        ways += itertools.combinations(optional, count)
    return ways


def _pairs(graph: fx.Graph, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Layers and their readers in one graph."""
    called = [node for node in graph.nodes if node.op == "call_module"]
    calls = Counter(node.target for node in called)
    read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    once = {name for name, count in calls.items() if count == 1} - read
    for node in called:
        user = next(iter(node.users), node)
        alone = len(node.users) == 1 and user.args == (node,) and not user.kwargs
        if user.op == "call_module" and alone and node.target in once & set(names):
            if user.target in once:
                yield node.target, user.target


# ------------------------------------------------------------------------------------------------
# owners


def _owner(modules: Mapping[str, nn.Module], name: str) -> str:
    """The name of the nearest module around that has a forward of its own."""
    while name:
        name = name.rpartition(".")[0]
        if type(modules[name]) not in CONTAINERS:
            break
    return name


def _by_owner(modules: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_owner(modules, name), []).append(name)
    return found


def _followers_inside(
    modules: Mapping[str, nn.Module], owner: str, names: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """`_followers` in the forward of an owner."""
    around = [modules[name] for name in _around(owner)]
    start = len(owner) + 1 if owner else 0
    inner = {name[start:] for name in names}
    private = {n for n in inner if not any(_names(m, n.partition(".")[0]) for m in around)}
    if private and "forward" not in vars(modules[owner]):
        pairs = _followers(_OwnerTracer(), _without_parts, modules[owner], private) or {}
        for name, reader in pairs.items():
            yield join(owner, name), join(owner, reader)


def _around(name: str) -> Iterator[str]:
    """The names of the modules that hold a module."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _names(module: nn.Module, attribute: str) -> bool:
    """Does code of the module's class name the attribute? Also if it may: code that only this
    object has isn't read.
    """
    if "forward" in vars(module):
        return True
    kinds = [kind for kind in type(module).__mro__ if kind not in (nn.Module, object)]
    members = chain.from_iterable(vars(kind).values() for kind in kinds)
    functions = chain.from_iterable(map(functions_of, members))
    codes = chain.from_iterable(codes_of(function.__code__) for function in functions)
    return any(attribute in (*code.co_names, *code.co_consts) for code in codes)  # strings too


# ------------------------------------------------------------------------------------------------
# graphs


class _WholeTracer(fx.Tracer):
    """Goes into a model's own modules, and into none of torch's or this package's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("quantize.nn")
        return ours or super().is_leaf_module(m, module_qualified_name)


class _OwnerTracer(fx.Tracer):
    """Goes into containers only."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) not in CONTAINERS


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    """Inside, nothing below a critical fault is logged: tracers tell of each forward that they
    can't follow. Nor is what torch collects for a log of every decision on sizes, which takes a
    tenth of the time of an export.
    """
    before, collected = logging.root.manager.disable, logging.getLogger("torch.__trace")
    handlers, collected.handlers = collected.handlers, []
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
        collected.handlers = handlers


def _graph(tracer: fx.Tracer, root: nn.Module, absent: Collection[str]) -> fx.Graph | None:
    """The forward of `root`, called without the arguments `absent`, as a graph; None where it can't
    be followed, or keeps what it computes.
    """
    try:
        with without_logs(), torch.random.fork_rng(devices=[]):
            graph = tracer.trace(root, dict.fromkeys(absent))
    except Exception:  # a forward that reads values, or whatever else a proxy can't answer
        return None
    kept = tree_leaves([list(vars(part).values()) for part in root.modules()])
    return None if any(isinstance(value, fx.Proxy) for value in kept) else graph


def _without_parts(module: nn.Module) -> nn.Module:
    """A copy that shares the modules inside, and the parameters: tracing doesn't run them."""
    shared = (*module.children(), *module.parameters(recurse=False))
    return deepcopy(module, {id(part): part for part in shared})
