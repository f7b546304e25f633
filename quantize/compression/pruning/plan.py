"""Which layers are refitted after a cut, in which order, and which of them together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantize.compression.pruning.cut import Owners, owners
from quantize.compression.pruning.labels import Key
from quantize.compression.pruning.repair import Step, as_matrix
from quantize.compression.pruning.trace import Trace, operation

LAYERS = ("linear", "addmm", "conv1d", "conv2d", "matmul")
# a whole layer with more than so many outputs per input (a vocabulary's) is not refitted: it has
# too little to gain
WIDE = 8


def repair_steps(trace: Trace, model: nn.Module, kept: dict[Key, Tensor]) -> list[Step]:
    """What to repair, in the order of the graph: the first layer whose inputs shrank and all layers
    after it that can be refitted, and BatchNorms. Layers that read the same tensor one after
    another are one step.
    """
    steps, sources = _steps(trace, model, kept)
    for step in steps.values():
        step.stream = step.stream and step.calls == 1
    return _joined(model, steps, sources)


def _steps(
    trace: Trace, model: nn.Module, kept: dict[Key, Tensor]
) -> tuple[dict[str, Step], dict[str, Any]]:
    """A step for each layer, by its name, and what it reads, if that may be shared."""
    shrunk = _shrunk(trace, model, kept)
    outputs = {name: kept.get((name, dim)) for name, dim in trace.labels.outputs}
    steps: dict[str, Step] = {}
    sources: dict[str, Any] = {}
    norms: dict[str, str] = {}  # BatchNorms that are done with the layer that they read
    holders = owners(model)
    for node in trace.values:
        place = trace.place(node)
        if node.op != "call_function" or not place:
            continue
        base, module = operation(node), model.get_submodule(place)
        if place in norms and base == "batch_norm":  # it runs again
            steps[norms.pop(place)].norm = None
            steps[place] = Step({place: kept.get((f"{place}.running_mean", 0))})
        if place in steps:
            steps[place].calls += base in (*LAYERS, "batch_norm")
        elif base in LAYERS and (place in shrunk or (steps and _alone(model, holders, place))):
            steps[place] = Step({place: outputs.get(f"{place}.weight")}, stream=_adds(node))
            if dict(module.named_parameters(recurse=False))["weight"].ndim == 2:
                sources[place] = node.args[1 if base == "addmm" else 0]
        elif base == "batch_norm" and steps and _has_statistics(module):
            outputs_kept = kept.get((f"{place}.running_mean", 0))
            source: Any = node.args[0]
            reads = trace.place(source)
            is_read = operation(source) in ("conv1d", "conv2d") and reads in steps
            if is_read and steps[reads].norm is None:
                steps[reads].norm = (place, outputs_kept)
                norms[place] = reads
            else:
                steps[place] = Step({place: outputs_kept})
    return steps, sources


def _shrunk(trace: Trace, model: nn.Module, kept: dict[Key, Tensor]) -> set[str]:
    """The layers that read fewer channels and can be refitted, which nobody shares."""
    shrunk: set[str] = set()
    holders = owners(model)
    for name, dim in kept:
        (place, module, _), *others = holders(name)
        reads = place == trace.labels.inputs.get((name, dim))
        if reads and not others and as_matrix(module) is not None:
            shrunk.add(place)
    return shrunk


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


def _joined(model: nn.Module, steps: dict[str, Step], sources: dict[str, Any]) -> list[Step]:
    """The steps in order, as one where neighbours read one tensor and all have a bias or none."""
    joined: list[Step] = []
    last: tuple[Any, bool] | None = None  # what the last step reads, and whether it has a bias
    for place, step in steps.items():
        this = None
        if step.calls == 1 and not step.stream and place in sources:
            bias = model.get_submodule(place)._parameters.get("bias")
            this = (sources[place], bias is not None)
        if this is not None and this == last:
            joined[-1].layers.update(step.layers)
        else:
            joined.append(step)
        last = this
    return joined


def _adds(node: torch.fx.Node) -> bool:
    """Is the output, as it is, added to something of its shape?"""
    users = list(node.users)
    while len(users) == 1 and operation(users[0]) in (
        "dropout",
        "dropout_",
        "contiguous",
        "alias",
        "view",
    ):
        users = list(users[0].users)
    if len(users) != 1 or operation(users[0]) not in ("add", "add_"):
        return False
    operands = [a for a in users[0].args if isinstance(a, torch.fx.Node)]
    return len(operands) == 2 and operands[0].meta["val"].shape == operands[1].meta["val"].shape


def _alone(model: nn.Module, holders: Owners, place: str) -> bool:
    """Can this layer be refitted, does nobody else hold its weight, and is it no vocabulary?"""
    matrix = as_matrix(model.get_submodule(place))
    return (
        matrix is not None
        and len(holders(f"{place}.weight")) == 1
        and matrix.shape[0] <= WIDE * matrix.shape[1]
    )
