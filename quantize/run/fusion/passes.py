"""Rewrites of the graph that hold for every back end: fewer operators, the same answers.

Each pass takes a `Program`, changes its graph in place and says in `program.notes` what it did.
Those that change weights are in folding.py, those that put kernels in are in kernels.py.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from quantize.run.fusion.cheaper import one_pixel_convolutions, rms_norms
from quantize.run.fusion.edit import (
    COPIES,
    LINEARS,
    PADS,
    add_constant,
    argument,
    calls,
    constant,
    drop_dead,
    is_call,
    is_random,
    loosen_views,
    may_be_view,
    mutates,
    overload,
    own_constant,
    replace,
    shape,
)
from quantize.run.fusion.folding import fold_batch_norm, fold_padding, fold_scales, number_padding
from quantize.run.fusion.graph import Program, aten

_DROPOUTS = {
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
}
_SAME = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.detach_.default,
}
_SMALL_BYTES = (
    1 << 16
)  # a folded constant may be this large even if it is larger than what it is made of


def simplify(program: Program) -> bool:
    """All passes, in the order in which they help each other. False, and no pass, if the graph
    writes into memory.

    The passes move operators, which is right only where no value changes between two of them.
    """
    functionalize(program)
    drop_identities(program)
    if any(mutates(n) for n in program.graph.nodes):
        return False
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
        fold_scales,
        sink_permutes,
    ):
        run(program)
        drop_dead(program)
    return True


def functionalize(program: Program) -> None:
    """`x.add_(y)` becomes `x + y` where nobody else looks at x: other passes then needn't think
    about memory.
    """
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    for node in [n for n in program.graph.nodes if n.op == "call_function" and mutates(n)]:
        changed = argument(node, 0)
        if not isinstance(changed, fx.Node) or changed.op != "call_function":
            continue
        fresh = not may_be_view(changed) and not is_random(changed) and not is_random(node)
        alone = all(
            u is node or (order[u] < order[node] and not may_be_view(u)) for u in changed.users
        )
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
        n.meta["val"].dtype
        for n in node.all_input_nodes
        if isinstance(n.meta.get("val"), torch.Tensor)
    ]
    own = argument(node, 0).meta.get("val")
    return isinstance(own, torch.Tensor) and all(
        torch.promote_types(own.dtype, d) == own.dtype for d in dtypes
    )


def drop_identities(program: Program) -> None:
    """Dropout in eval mode, casts to the same dtype, slices of everything, padding by nothing."""
    count = 0
    for node in list(program.graph.nodes):
        if (
            node.op == "call_function"
            and node.args
            and isinstance(argument(node, 0), fx.Node)
            and _is_identity(node)
        ):
            node.replace_all_uses_with(argument(node, 0))
            program.graph.erase_node(node)
            count += node.target in _DROPOUTS
    if count:
        program.notes.append(f"{count} dropout layers removed")


def _is_identity(node: fx.Node) -> bool:
    before: Any = argument(node, 0).meta.get("val")
    after: Any = node.meta.get("val")
    if node.target in _DROPOUTS:
        return not argument(node, 2)
    if node.target in _SAME:
        return True
    if node.target in COPIES:
        copy = bool(node.kwargs.get("copy")) or (
            node.target is aten.to.dtype and bool(argument(node, 3))
        )
        plain = (
            node.kwargs.get("memory_format") is None and node.target is not aten._to_copy.default
        )
        same = (
            isinstance(before, torch.Tensor)
            and before.dtype == after.dtype
            and before.device == after.device
        )
        return same and plain and not copy
    if node.target is aten.slice.Tensor:
        start, end, step = argument(node, 2), argument(node, 3), argument(node, 4, 1)
        return (
            start in (None, 0)
            and (end is None or (isinstance(end, int) and end >= 2**62))
            and step == 1
        )
    if node.target in PADS:
        return all(isinstance(p, int) and p == 0 for p in argument(node, 1))
    if node.target is aten.expand.default:
        return all(s == -1 for s in argument(node, 1)) and len(argument(node, 1)) == before.dim()
    return False


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
        inputs: list[Any] = [constant(program, n) for n in node.all_input_nodes]
        if any(t is None for t in inputs) or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        varies = any(not isinstance(s, int) for s in node.meta["val"].shape)
        if varies or any(mutates(u) for n in node.all_input_nodes for u in n.users):
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
    if count:
        program.notes.append(f"{count} operators on constants computed once")


def merge_equal(program: Program) -> None:
    """The same operator on the same inputs runs once."""
    if any(mutates(n) for n in program.graph.nodes):
        return
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
    if count:
        program.notes.append(f"{count} repeated operators run once")


def linear_form(program: Program) -> None:
    """`addmm`, `mm` and `matmul` by a constant become `linear`, which the other passes know."""
    for node in calls(program, {aten.addmm.default, aten.mm.default, aten.matmul.default}):
        first = 1 if node.target is aten.addmm.default else 0
        bias = argument(node, 0) if first else None
        x, weight = argument(node, first), argument(node, first + 1)
        tensor = own_constant(program, weight)
        if tensor is None or tensor.dim() != 2 or node.kwargs or not tensor.is_floating_point():
            continue
        vector: Any = constant(program, bias)
        if bias is not None and (vector is None or vector.dim() != 1):
            continue
        transposed = add_constant(program, node, f"{weight.target}_t", tensor.t().contiguous())
        with program.graph.inserting_before(node):
            new = program.graph.call_function(
                aten.linear.default, (x, transposed, bias) if bias else (x, transposed)
            )
        replace(node, new)


def through_views(program: Program) -> None:
    """`view` to rows, linear, `view` back (GPT-2's Conv1D) is the linear layer alone: it takes any
    number of dimensions.
    """
    for node in calls(program, LINEARS):
        rows, back = argument(node, 0), next(iter(node.users), None)
        if not is_call(rows, aten.view.default) and not is_call(rows, aten.reshape.default):
            continue
        x = argument(rows, 0)
        if len(node.users) != 1 or not (
            is_call(back, aten.view.default) or is_call(back, aten.reshape.default)
        ):
            continue
        whole, result = shape(x), shape(back)
        if (
            len(shape(rows)) == 2
            and whole[-1:] == shape(rows)[-1:]
            and whole[:-1] == result[:-1]
            and result[-1:] == shape(node)[-1:]
        ):
            with program.graph.inserting_before(back):
                replace(
                    back,
                    program.graph.call_function(
                        aten.linear.default, (x, *node.args[1:]), dict(node.kwargs)
                    ),
                )
            program.graph.erase_node(node)


def sink_permutes(program: Program) -> None:
    """`permute(y) + r` becomes `permute(y + permute back(r))`, so that the sum can join the linear
    layer that made y.
    """
    for node in calls(program, {aten.add.Tensor}):
        for a, b in (node.args, node.args[::-1]):
            if (
                not is_call(a, aten.permute.default)
                or len(a.users) != 1
                or not isinstance(b, fx.Node)
                or node.kwargs
            ):
                continue
            y, order = argument(a, 0), argument(a, 1)
            if (
                not isinstance(y, fx.Node)
                or y.target not in LINEARS
                or len(y.users) != 1
                or shape(b) != shape(a)
                or b.op == "get_attr"
            ):
                continue
            inverse = [list(order).index(i) for i in range(len(order))]
            with program.graph.inserting_before(node):
                back = program.graph.call_function(aten.permute.default, (b, inverse))
                back.meta["val"] = y.meta["val"]
                total = program.graph.call_function(aten.add.Tensor, (back, y))
                total.meta["val"] = y.meta["val"]
                replace(
                    node, program.graph.call_function(aten.permute.default, (total, list(order)))
                )
            break
    for node in calls(program, {aten.permute.default}):
        inner = argument(node, 0)
        if is_call(inner, aten.permute.default) and [
            argument(inner, 1)[i] for i in argument(node, 1)
        ] == list(range(len(argument(node, 1)))):
            node.replace_all_uses_with(argument(inner, 0))


def activations(program: Program) -> None:
    """Activations that are spelt out operator by operator become one: `x * sigmoid(x)` and the tanh
    form of GELU.
    """
    found = 0
    for node in calls(program, {aten.mul.Tensor}):
        new: Any = None
        for a, b in (node.args, reversed(node.args)):
            if is_call(b, aten.sigmoid.default) and argument(b, 0) is a and len(b.users) == 1:
                new = (aten.silu.default, (a,), {})
            x = _tanh_gelu(a, b)
            if x is not None:
                new = (aten.gelu.default, (x,), {"approximate": "tanh"})
        if new and isinstance(new[1][0], fx.Node):
            with program.graph.inserting_before(node):
                replace(node, program.graph.call_function(*new))
            found += 1
    if found:
        program.notes.append(f"{found} activations written out in operators made one operator each")


def _scalar(node: object, target: object) -> tuple[object, float] | None:
    """(x, c) of `x op c`."""
    if (
        is_call(node, target)
        and len(node.args) == 2
        and isinstance(argument(node, 1), (int, float))
        and not node.kwargs
    ):
        return argument(node, 0), float(argument(node, 1))
    return None


def _tanh_gelu(half: object, one_plus: object) -> object | None:
    """x if half is 0.5 x and one_plus is 1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)) (Hendrycks and
    Gimpel, arXiv 1606.08415).
    """
    left, right = _scalar(half, aten.mul.Tensor), _scalar(one_plus, aten.add.Tensor)
    if (
        not left
        or not right
        or left[1] != 0.5
        or right[1] != 1.0
        or not is_call(right[0], aten.tanh.default)
    ):
        return None
    scaled = _scalar(argument(right[0], 0), aten.mul.Tensor)
    if (
        not scaled
        or abs(scaled[1] - math.sqrt(2 / math.pi)) > 1e-6
        or not is_call(scaled[0], aten.add.Tensor)
    ):
        return None
    x, cubic = scaled[0].args[:2]
    small = _scalar(cubic, aten.mul.Tensor)
    if not small or abs(small[1] - 0.044715) > 1e-9 or scaled[0].kwargs:
        return None
    power = _scalar(small[0], aten.pow.Tensor_Scalar)
    return x if power and power == (x, 3.0) and x is left[0] else None


def merge_linears(program: Program) -> int:
    """Linear layers on the same input (query, key and value; gate and up) become one, whose output
    is split. How many did.
    """
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in calls(program, LINEARS):
        bias = argument(node, 2)
        if own_constant(program, argument(node, 1)) is not None and (
            bias is None or constant(program, bias) is not None
        ):
            groups.setdefault(argument(node, 0), []).append(node)
    count = 0
    for x, nodes in groups.items():
        weights: list[Any] = [constant(program, argument(n, 1)) for n in nodes]
        if (
            len(nodes) < 2
            or len({w.dtype for w in weights}) > 1
            or not weights[0].is_floating_point()
        ):
            continue
        biases = [constant(program, argument(n, 2)) for n in nodes]
        bias = None
        if any(b is not None for b in biases):
            filled = [
                b if b is not None else w.new_zeros(w.shape[0])
                for b, w in zip(biases, weights, strict=True)
            ]
            bias = add_constant(
                program, nodes[0], f"{argument(nodes[0], 1).target}_merged_bias", torch.cat(filled)
            )
        weight = add_constant(
            program, nodes[0], f"{argument(nodes[0], 1).target}_merged", torch.cat(weights)
        )
        with program.graph.inserting_before(nodes[0]):
            one = program.graph.call_function(
                aten.linear.default, (x, weight) if bias is None else (x, weight, bias)
            )
            sizes = [w.shape[0] for w in weights]
            parts = program.graph.call_function(aten.split_with_sizes.default, (one, sizes, -1))
            items = [
                program.graph.call_function(operator.getitem, (parts, i)) for i in range(len(nodes))
            ]
        value = nodes[0].meta["val"]
        one.meta["val"] = value.new_empty((*value.shape[:-1], sum(sizes)))
        for node, item in zip(nodes, items, strict=True):
            replace(node, item)
        count += len(nodes)
    if count:
        program.notes.append(f"{count} linear layers on shared inputs merged")
        loosen_views(program)
    drop_dead(program)
    return count
