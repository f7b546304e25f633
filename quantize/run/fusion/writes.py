"""Writes of a graph into its own constants: the state that a model carries from call to call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from quantize.run.fusion.edit import may_be_view
from quantize.run.fusion.graph import CaptureError, Program, aten, is_in_place


class TooFree(CaptureError):
    """Fewer sizes have to be free: the model's Python computes with them all the way, or state
    depends on them.
    """


def drop_dead_writes(program: Program) -> None:
    """Remove writes into a constant that nothing reads: statistics for people, activations kept in
    a buffer.
    """
    for constant in program.graph.find_nodes(op="get_attr"):
        writes = list(constant.users)
        only = all(is_in_place(u) and not u.users and u.args[0] is constant for u in writes)
        alone = only and all(list(u.all_input_nodes).count(constant) == 1 for u in writes)
        if alone:
            for write in writes:
                program.graph.erase_node(write)
            program.graph.erase_node(constant)


def find_state(program: Program) -> None:
    """Note which constants and whether inputs are written into; outputs that share memory with such
    a constant are copied.
    """
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not is_in_place(node):
            continue
        root = root_of(node.args[0])
        if root.op == "placeholder":
            program.writes_inputs = True
        elif root.op == "get_attr":
            name = str(root.target)
            if name not in program.state:
                program.state[name] = getattr(program.module, name).clone()
    if program.state:
        _copy_returned_state(program)


def check_assigned(name: str, before: Tensor, after: Tensor) -> None:
    """A buffer that is assigned anew is copied into: right only if it keeps its shape and dtype."""
    sizes = [_known(size) for size in after.shape]
    if sizes != list(before.shape) or after.dtype != before.dtype:
        shapes = f"{sizes} of {after.dtype} where it was {list(before.shape)} of {before.dtype}"
        raise TooFree(f"its forward assigns to {name} a tensor of other shape or dtype: {shapes}")


def _known(size: int | torch.SymInt) -> int | str:
    """A size that the export found out to be fixed is a number."""
    number = size if isinstance(size, int) else size.node.maybe_as_int()
    return str(size) if number is None else number


def _copy_returned_state(program: Program) -> None:
    """What is returned must keep its value at the next call; what was assigned last must not show
    in what was returned.
    """
    output = program.graph.output_node()
    place = next((n for n in program.graph.nodes if n.meta.get("assigned")), output)
    for node in dict.fromkeys(n for n in output.all_input_nodes if root_of(n).op == "get_attr"):
        if root_of(node).target not in program.state:
            continue
        with program.before(place):
            copy = program.call(aten.clone.default, node, val=node.meta.get("val"))
        output.replace_input_with(node, copy)


def root_of(node: Any) -> fx.Node:
    """The node whose memory this one may show: follow views and writes in place back to where they
    began.
    """
    while node.all_input_nodes and may_be_view(node):
        node = node.all_input_nodes[0]
    return node
