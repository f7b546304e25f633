"""Rewrites of the graph that hold for every back end: fewer operators, the same answers.

Each pass takes a `Program`, changes its graph in place and says in `program.notes` what it did.
Those for padding, linear layers and activations are in files of their own, those that change
weights in folding.py, those that put kernels in in kernels.py.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from quantize.run.fusion.activations import activations
from quantize.run.fusion.cheaper import one_pixel_convolutions, rms_norms
from quantize.run.fusion.edit import (
    CONVS,
    CONVS_BY_WORD,
    COPIES,
    LINEARS,
    PADS,
    TRANSPOSED,
    add_constant,
    argument,
    calls,
    constant,
    drop_dead,
    is_random,
    may_be_view,
    mutates,
    operators,
    overload,
    replace,
)
from quantize.run.fusion.folding import fold_batch_norm
from quantize.run.fusion.graph import Program, aten
from quantize.run.fusion.linears import linear_form, through_views
from quantize.run.fusion.padding import fold_padding, number_padding

_DROPOUTS = operators("dropout dropout_ feature_dropout alpha_dropout")
_SAME = operators("detach alias lift_fresh_copy detach_")
# A folded constant may be this large even if it is larger than the constants it is made of.
_SMALL_BYTES = 1 << 16


def simplify(program: Program, *, at_load: bool = False) -> bool:
    """All passes, in the order in which they help each other. False, and no pass, if the graph
    writes into memory.

    The passes move operators, which is right only where no value changes between two of them.
    at_load: values may be prepared when a file is loaded.
    """
    drop_identities(program, copies=False)
    functionalize(program)
    if any(mutates(n) for n in program.graph.nodes):
        return False
    if at_load:
        weights_at_load(program)
    for run in (
        drop_identities,
        fold_constants,
        merge_equal,
        linear_form,
        through_views,
        activations,
        number_padding,
        fold_padding,
        fold_batch_norm,
        rms_norms,
        one_pixel_convolutions,
    ):
        run(program)
        drop_dead(program)
    return True


def functionalize(program: Program) -> None:
    """`x.add_(y)` becomes `x + y` where nobody else looks at x: other passes then needn't think
    about memory.
    """
    for node in [n for n in program.graph.nodes if n.op == "call_function" and mutates(n)]:
        changed = argument(node, 0)
        if not isinstance(changed, fx.Node) or changed.op != "call_function":
            continue
        fresh = not may_be_view(changed) and not is_random(changed) and not is_random(node)
        alone = all(u is node or (u < node and not may_be_view(u)) for u in changed.users)
        target = _out_of_place(node)
        if fresh and alone and target is not None and _keeps_dtype(node):
            node.target = target


def _out_of_place(node: fx.Node) -> torch._ops.OpOverload | None:
    """`aten.add.Tensor` for `aten.add_.Tensor`."""
    own = overload(node)
    space, name = own._schema.name.split("::")
    packet = getattr(getattr(torch.ops, space), name.removesuffix("_"), None)
    if not name.endswith("_") or packet is None:
        return None
    found = getattr(packet, own._overloadname or "default", None)
    if found is None or found._schema.is_mutable:
        return None
    names, own_names = ([a.name for a in o._schema.arguments] for o in (found, own))
    return found if names == own_names else None


def _keeps_dtype(node: fx.Node) -> bool:
    """Written in place, a result is rounded to the dtype of what it is written into."""
    dtypes = [
        n.meta["val"].dtype for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)
    ]
    own = argument(node, 0).meta.get("val")
    return isinstance(own, Tensor) and all(
        torch.promote_types(own.dtype, d) == own.dtype for d in dtypes
    )


def drop_identities(program: Program, *, copies: bool = True) -> None:
    """Dropout in eval mode, casts to the same dtype, slices of everything, padding by nothing.

    copies: False leaves what isn't the same memory, the padding, to which a graph may write.
    """
    count = 0
    for node in list(program.graph.nodes):
        known = node.op == "call_function" and isinstance(argument(node, 0), fx.Node)
        if known and _is_identity(node) and (copies or node.target not in PADS):
            replace(node, argument(node, 0))
            count += node.target in _DROPOUTS
    program.note(count, "dropout layers removed")


def _is_identity(node: fx.Node) -> bool:
    before: Any = argument(node, 0).meta.get("val")
    after: Any = node.meta.get("val")
    if node.target in _DROPOUTS:
        return not argument(node, 2)
    if node.target in _SAME:
        return True
    if node.target in COPIES:
        copies = node.kwargs.get("copy") or (node.target is aten.to.dtype and argument(node, 3))
        if copies or node.kwargs.get("memory_format") or node.target is aten._to_copy.default:
            return False
        kept = isinstance(before, Tensor) and before.dtype == after.dtype
        return kept and before.device == after.device
    if node.target is aten.slice.Tensor:
        start, end, step = argument(node, 2), argument(node, 3), argument(node, 4, 1)
        whole = end is None or (isinstance(end, int) and end >= 2**62)
        return whole and start in (None, 0) and step == 1
    if node.target in PADS:
        return all(isinstance(p, int) and p == 0 for p in argument(node, 1))
    if node.target is aten.expand.default:
        return all(s == -1 for s in argument(node, 1)) and len(argument(node, 1)) == before.dim()
    return False


def weights_at_load(program: Program) -> None:
    """Weights of layers in float that are stored in int8 are computed when a file is loaded, which
    stays as small as they are.
    """
    count = 0
    for node in calls(program, {*CONVS, *CONVS_BY_WORD, *TRANSPOSED, *LINEARS}):
        made = _upstream(argument(node, 1))
        stored = [constant(program, one) for one in made if one.op == "get_attr"]
        computed = [one for one in made if one.op == "call_function"]
        fixed = len(stored) + len(computed) == len(made) and not any(map(mutates, computed))
        if fixed and any(tensor is not None and tensor.dtype == torch.int8 for tensor in stored):
            for one in computed:
                one.meta["prepare"] = True
            count += 1
    program.note(count, "weights kept in int8, and computed at load")


def _upstream(node: fx.Node) -> list[fx.Node]:
    """A node and all that its result depends on."""
    found = dict.fromkeys([node])
    waiting = [node]
    while waiting:
        inputs = waiting.pop().all_input_nodes
        waiting += [one for one in inputs if one not in found]
        found.update(dict.fromkeys(inputs))
    return [*found]


def fold_constants(program: Program) -> None:
    """Compute once what depends on constants only, unless the result is much larger than they
    are.
    """
    count = 0
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if mutates(node) or is_random(node) or any(mutates(u) for u in node.users):
            continue
        if node.meta.get("prepare"):
            continue
        inputs: list[Any] = [constant(program, n) for n in node.all_input_nodes]
        if any(t is None for t in inputs) or not isinstance(node.meta.get("val"), Tensor):
            continue
        varies = any(not isinstance(s, int) for s in node.meta["val"].shape)
        users = chain.from_iterable(n.users for n in node.all_input_nodes)
        if varies or any(map(mutates, users)):
            continue
        values = map_arg((node.args, node.kwargs), lambda n: constant(program, n))
        with torch.no_grad():
            result = node.target(*values[0], **values[1])
        if may_be_view(node) and not result.is_floating_point():
            continue  # integer kernels choose by strides, and a view costs nothing
        size = sum(t.numel() * t.element_size() for t in inputs)
        if result.numel() * result.element_size() > max(2 * size, _SMALL_BYTES):
            continue
        replace(node, add_constant(program, node, f"folded_{node.name}", result.contiguous()))
        count += 1
    program.note(count, "operators on constants computed once")


def merge_equal(program: Program) -> None:
    """The same operator on the same inputs runs once."""
    seen: dict[object, fx.Node] = {}
    count = 0
    for node in list(program.graph.nodes):
        if node.op == "get_attr":
            key: object = ("get_attr", node.target)
        elif node.op == "call_function" and not is_random(node):
            key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        else:
            continue
        if key in seen:
            node.replace_all_uses_with(seen[key])
            program.graph.erase_node(node)
            count += node.op == "call_function"
        else:
            seen[key] = node
    program.note(count, "repeated operators run once")
