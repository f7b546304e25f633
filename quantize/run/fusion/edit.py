"""What the passes look at and change a graph with."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from quantize.run.fusion.graph import Program, aten
from quantize.run.fusion.graph import is_in_place as mutates


def operators(names: str) -> set[torch._ops.OpOverload]:
    """The default overloads of these operators of aten."""
    return {getattr(aten, name).default for name in names.split()}


LINEARS = {aten.linear.default}
CONVS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
CONVS_BY_WORD = {  # with padding="same" or "valid"
    aten.conv1d.padding: (aten.conv1d.default, 1),
    aten.conv2d.padding: (aten.conv2d.default, 2),
    aten.conv3d.padding: (aten.conv3d.default, 3),
}
TRANSPOSED = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}
COPIES = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.to.other}
FRESH = {  # composite operators whose results have memory of their own
    *LINEARS,
    *CONVS,
    *CONVS_BY_WORD,
    *TRANSPOSED,
    *operators("batch_norm layer_norm group_norm instance_norm rms_norm matmul cat silu relu6"),
    *operators("adaptive_avg_pool2d max_pool2d scaled_dot_product_attention"),
}
PADS = {aten.pad.default, aten.constant_pad_nd.default}


def constant(program: Program, node: object) -> Tensor | None:
    """The tensor behind a `get_attr` node, else None."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    return getattr(program.module, str(node.target))


def weight_of(program: Program, node: fx.Node) -> Any:
    """The weight of a layer, or what one looks like that is prepared at load; None for others."""
    weight = argument(node, 1)
    return weight.meta["val"] if weight.meta.get("prepare") else constant(program, weight)


def own_constant(program: Program, node: Any) -> Tensor | None:
    """A constant that only one operator uses: it can be changed without making a second copy."""
    tensor = constant(program, node)
    if tensor is None:
        return None
    holders = program.graph.find_nodes(op="get_attr", target=node.target)
    return tensor if sum(len(n.users) for n in holders) == 1 else None


def add_constant(program: Program, near: fx.Node, name: str, tensor: Tensor) -> fx.Node:
    """A new constant called something like `name`, for use by `near` and what comes after it."""
    base, count = name, 0
    while hasattr(program.module, name):
        count += 1
        name = f"{base}_{count}"
    program.module.register_buffer(name, tensor.detach())
    with program.before(near):
        node = program.graph.get_attr(name)
    node.meta["val"] = tensor
    return node


def argument(node: fx.Node, index: int, default: object = None) -> Any:
    """Positional argument of an operator, or its default."""
    return node.args[index] if len(node.args) > index else default


def overload(node: fx.Node) -> torch._ops.OpOverload:
    """The operator that a node calls, where it is known to call one of torch's."""
    if not isinstance(node.target, torch._ops.OpOverload):
        raise TypeError(f"node {node.name!r} calls {node.target}, which is no operator of torch")
    return node.target


def set_arguments(node: fx.Node, changes: dict[int, Any]) -> None:
    """Replace positional arguments, filling skipped ones with the schema's defaults."""
    values = list(node.args)
    schema = overload(node)._schema.arguments
    while len(values) <= max(changes):
        values.append(schema[len(values)].default_value)
    for index, value in changes.items():
        values[index] = value
    node.args = tuple(values)


def shape(node: fx.Node) -> list[str]:
    """Sizes as text: equal texts are equal sizes, also of dimensions that vary."""
    return [str(s) for s in node.meta["val"].shape] if "val" in node.meta else []


def replace(node: fx.Node, new: fx.Node) -> None:
    """Let `new` stand for `node`."""
    if "val" in node.meta and "val" not in new.meta:
        new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def calls(program: Program, targets: Container[Any]) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.op == "call_function" and n.target in targets]


def is_random(node: fx.Node) -> bool:
    target = node.target
    known = isinstance(target, torch._ops.OpOverload)
    return known and torch.Tag.nondeterministic_seeded in target.tags


def may_be_view(node: fx.Node) -> bool:
    """May the result share memory with an argument? Composite operators count unless they are known
    to compute.
    """
    if node.op != "call_function" or node.target in FRESH:
        return False
    if not isinstance(node.target, torch._ops.OpOverload) or any(
        r.alias_info for r in node.target._schema.returns
    ):
        return True
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        node.target.name(), "CompositeImplicitAutograd"
    )


def drop_dead(program: Program) -> None:
    """Remove what nobody uses, constants included; not random numbers, after which others come."""
    for node in reversed(program.graph.nodes):
        dead = not node.users and node.op in ("call_function", "get_attr")
        if dead and not mutates(node) and not is_random(node):
            program.graph.erase_node(node)
    used = {n.target for n in program.graph.nodes if n.op == "get_attr"}
    for name in [n for n in program.module._buffers if n not in used]:
        del program.module._buffers[name]


def loosen_views(program: Program) -> None:
    """`view` becomes `reshape`: the same unless a pass changed the strides, and then it copies
    instead of failing.
    """
    for node in calls(program, {aten.view.default}):
        node.target = aten.reshape.default


def is_call(node: object, target: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.target is target
