"""`plan` and `fold`: run the passes, build the result in a few ways, keep the fastest that is equal to the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantize import surgery
from quantize.fusion import kernels, passes, torchscript
from quantize.fusion.equality import check, race
from quantize.fusion.folded import Folded
from quantize.fusion.graph import Program, capture, check_inputs, named_arguments
from quantize.fusion.memory import reuse_memory
from quantize.fusion.nested import from_json, to_json

EXPORTED, SIMPLE, KERNELS, MERGED = "as exported", "simplified", "kernels", "kernels, merged linears"


@dataclass
class Plan:
    """What the passes make of a model."""

    fused: nn.Module  # the fastest way, built and checked
    way: str  # its name
    program: Program  # and its graph
    simple: Program  # without oneDNN kernels, for other back ends
    before: Counter[str]  # operators per call by kind, as exported
    notes: list[str]  # what was done, for people

    @property
    def after(self) -> Counter[str]:
        """Operators per call by kind, as fused."""
        return self.program.operators()


def ways_of(program: Program) -> dict[str, Program]:
    """The programs to choose from, by name, from least to most rewritten."""
    simple = program.copy()
    passes.simplify(simple)
    ways = {EXPORTED: program, SIMPLE: simple}
    if kernels.available():
        ways[KERNELS] = simple.copy()
        kernels.use_kernels(ways[KERNELS])
        reuse_memory(ways[KERNELS])
        merged = simple.copy()
        if passes.merge_linears(merged):
            kernels.use_kernels(merged)
            reuse_memory(merged)
            ways[MERGED] = merged
    return ways


def plan(model: nn.Module, example_inputs: Any, *, build: Callable[[Program], nn.Module] = torchscript.compile) -> Plan:
    """Build every way, check each against the model, let those that agree race. Raises ValueError if none agrees."""
    program = capture(model, example_inputs)
    ways = ways_of(program)
    built: dict[str, nn.Module] = {}
    problems: dict[str, Exception] = {}
    for name in [*list(ways)[1:], EXPORTED]:
        if name == EXPORTED and built:
            break  # only when the passes changed the numbers too much
        try:
            candidate = build(ways[name])
            check(candidate, model, example_inputs)
            built[name] = candidate
        except (ValueError, RuntimeError) as error:
            problems[name] = error
    if not built:
        raise problems[EXPORTED]
    times = race(built, example_inputs)
    best = min(times, key=times.__getitem__)
    notes = [*ways[best].notes, "timed: " + ", ".join(f"{n} {t:.3f} ms" for n, t in times.items())]
    notes += [f"left out: {name}: {str(error).splitlines()[0]}" for name, error in problems.items()]
    return Plan(built[best], best, ways[best], ways[SIMPLE], program.operators(), notes)


def fold(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Our own passes only: an ordinary module, called like the model and returning what it returns, with fewer operators.

    Arguments and what is raised: as for `quantize.fuse`, and ValueError for a model that `torch.export` can't follow.
    `quantize.save` keeps it; its file is loaded with `model=`, a fresh instance of the model that was folded.
    """
    check_inputs(model, example_inputs)
    made = plan(model, example_inputs, build=Folded)
    named, keyword = named_arguments(model, example_inputs)
    arguments = {"edits": surgery.structure(model), "inputs": to_json(named), "keyword": keyword, "way": made.way}
    surgery.record(made.fused, "folded", **arguments)
    return made.fused


@surgery.builder
def folded(module: nn.Module, edits: Sequence[dict[str, Any]], inputs: dict[str, Any], keyword: bool, way: str) -> nn.Module:
    """Repeat `fold` on a fresh module, for a file's tensors: the graph follows from the model and the inputs' shapes."""
    module = surgery.rebuild(surgery.clone(module), edits).eval()
    with ExitStack() as stack:
        # Loading sets modes that keep tensors on the meta device and leave out initialisation; here the model is traced.
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(torch.overrides._pop_mode_temporarily())
        _give_zeros(module)
        named = from_json(inputs)
        program = capture(module, named if keyword else tuple(named.values()))
        ways = ways_of(program)
        if way not in ways:
            raise ValueError(f"this machine has no {way!r} kernels, which the file was folded with")
        return Folded(ways[way])


def _give_zeros(module: nn.Module) -> None:
    """Data for tensors on the meta device; what is one tensor stays one."""
    made: dict[int, torch.Tensor] = {}
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    new = made.setdefault(id(tensor), torch.zeros_like(tensor, device="cpu"))
                    if tensors is child._parameters and not isinstance(new, nn.Parameter):
                        new = made[id(tensor)] = nn.Parameter(new, requires_grad=False)
                    tensors[name] = new
