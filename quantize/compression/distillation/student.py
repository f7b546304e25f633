"""`make_student`: a smaller model that starts from the teacher's own weights.

Fewer blocks by leaving out every second, third, ... of them; narrower ones by structured pruning,
which is why this file imports `pruning`. Such a start is most of what distillation gains: the
student begins as a bad copy, not as noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from quantize import check, surgery
from quantize.calibration import (
    call,
    main_output,
    output_tensors,
    run_all,
    untouched,
    without_cache,
)
from quantize.compression.pruning import prune_ln_structured
from quantize.saying import Say

# attributes in which modules keep their place in a stack
LAYER_NUMBERS = (
    "layer",
    "layer_id",
    "layer_idx",
    "layer_index",
)


def make_student(
    teacher: nn.Module,
    *,
    depth: int | float | None = None,
    width: float | None = None,
    example_inputs: Any,
    calibration: Iterable[Any] | None = None,
    skip: surgery.Skip = (),
    progress: Say | None = None,
) -> nn.Module:
    """A smaller copy of `teacher` in eval mode, to be distilled.

    Args:
        teacher: any nn.Module; it stays as it is.
        depth: blocks that stay in each stack of like blocks (encoder, decoder, each stage of a
            convolutional network): a number >= 1 of them, or a fraction in (0, 1). Evenly spaced,
            the first always among them.
        width: fraction in (0, 1] of channels, neurons and heads that stay, chosen by
            `prune_ln_structured`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; the student
            is run on them.
        calibration: re-iterable batches like `example_inputs`; with them the channels to keep are
            chosen by what they do, and layers are refitted.
        skip: names, globs or types of layers whose channels stay.
        progress: called with a line for people before each piece of work, with the layer's name.

    Returns:
        The student, with the teacher's weights, refitted where `calibration` is given.

    Raises:
        ValueError: for values out of range, if neither is given, inputs that don't run, a teacher
            without a stack from which blocks can go, and what `prune_ln_structured` raises.
        TypeError: for arguments of the wrong type.
    """
    if depth is None and width is None:
        raise ValueError(
            "give depth (blocks that stay), width (fraction of channels that stay), or both"
        )
    _check(depth, width)
    student = surgery.clone(teacher).eval()
    surgery.check_initialised(student)
    done: dict[str, str] = {}
    left: dict[str, str] = {}
    with without_cache(student):
        expected = _shape(student, example_inputs, "the teacher")
        if depth is not None:
            student, done, left = _shorten(student, depth, example_inputs, expected)
    for name, module in teacher.named_modules():  # copies of copies that ran without a cache
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache") and name in dict(student.named_modules()):
            copied: Any = student.get_submodule(name).config
            copied.use_cache = config.use_cache
    if width is not None and width < 1:
        student = prune_ln_structured(
            student,
            example_inputs,
            amount=1 - width,
            calibration=calibration,
            skip=skip,
            progress=progress,
        )
    if depth is not None:
        surgery.note(student, "student", done=done, left=left, depth=depth)
    return student


def _check(depth: Any, width: Any) -> None:
    if isinstance(depth, float):
        check.number("depth", depth, "(0, 1)")
    elif depth is not None:
        check.as_float("depth", depth, "[1, inf)")
    if width is not None:
        check.as_float("width", width, "(0, 1]")


@torch.no_grad()
def _shape(model: nn.Module, inputs: Any, role: str) -> torch.Size:
    try:
        with untouched(model):
            return main_output(call(model, inputs)).shape
    except Exception as error:
        raise ValueError(
            f"{role} doesn't run on example_inputs: {type(error).__name__}: {error}"
        ) from error


def evenly_spaced(count: int, kept: int) -> list[int]:
    """`kept` of 0 .. count - 1, the first and (from two on) the last among them."""
    return [round(i * (count - 1) / max(1, kept - 1)) for i in range(kept)]


def _stacks(model: nn.Module, prefix: str = "") -> list[str]:
    """Names of the lists of like blocks, outer ones first; a block is a module with modules
    inside.
    """
    found = []
    for name, module in model.named_children():
        path = f"{prefix}.{name}".strip(".")
        blocks = list(module.children())
        like = (
            len(blocks) > 1
            and len({type(b) for b in blocks}) == 1
            and any(True for _ in blocks[0].children())
        )
        if isinstance(module, nn.ModuleList | nn.Sequential) and like:
            found.append(path)
        found += _stacks(module, path)
    return found


def _shorten(
    model: nn.Module, depth: int | float, inputs: Any, expected: torch.Size
) -> tuple[nn.Module, dict[str, str], dict[str, str]]:
    """Take blocks out of every stack where the model still runs after that and gives the same
    shape.

    Returns the shorter model, which blocks stay in each stack, and why the other stacks stay whole.
    """
    done: dict[str, str] = {}
    left: dict[str, str] = {}
    for name in _stacks(model):
        if any(name.startswith(f"{outer}.") for outer in done):
            continue
        blocks: Any = model.get_submodule(name)  # a ModuleList or a Sequential
        count = len(blocks)
        tries = [_kept([range(count)], depth), _kept(_stages(model, blocks, inputs), depth)]
        if len(tries[0]) == count:
            left[name] = f"has only {count} blocks"
            continue
        for indices in tries:
            if len(indices) == count:
                left[name] += ", and no stage of it has blocks to spare"
                continue
            shorter = _without_blocks(model, name, indices)
            reason = _misfit(shorter, inputs, expected)
            if not reason:
                model, done[name] = shorter, f"blocks {indices} of {count} stay"
                left.pop(name, None)
                break
            left[name] = reason
    if not done:
        reasons = (
            "; ".join(f"{n!r}: {why}" for n, why in left.items()) or "it has no list of like blocks"
        )
        raise ValueError(f"depth={depth!r} removes no block of {type(model).__name__}: {reasons}")
    return model, done, left


def _kept(stages: Sequence[Sequence[int]], depth: int | float) -> list[int]:
    """The blocks that stay, of those of each stage."""
    kept = []
    for stage in stages:
        count = len(stage)
        stay = min(count, depth) if isinstance(depth, int) else max(1, round(depth * count))
        kept += [stage[i] for i in evenly_spaced(count, stay)]
    return kept


def _stages(model: nn.Module, blocks: nn.Module, inputs: Any) -> list[list[int]]:
    """Numbers of the blocks, divided before each block whose output has another shape than the
    output before it.
    """
    shapes: dict[int, torch.Size | None] = {}

    def see(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensors = output_tensors(output)
            shapes[number] = tensors[0].shape if tensors else None

        return hook

    children = list(blocks.children())
    hooks = [block.register_forward_hook(see(number)) for number, block in enumerate(children)]
    run_all(model, [inputs], hooks)
    stages: list[list[int]] = []
    for number in range(len(children)):
        new = not stages or shapes.get(number) != shapes.get(number - 1)
        stages = [*stages, [number]] if new else [*stages[:-1], [*stages[-1], number]]
    return stages


def _without_blocks(model: nn.Module, name: str, indices: list[int]) -> nn.Module:
    """A copy in which only these blocks of the stack stay, numbered anew."""
    shorter = surgery.clone(model)
    blocks: Any = shorter.get_submodule(name)
    kept_blocks(blocks, indices)
    surgery.record(blocks, "kept_blocks", indices=indices)
    for new, old in enumerate(indices):
        _renumber(blocks[new], old, new)
    return shorter


@torch.no_grad()
def _misfit(shorter: nn.Module, inputs: Any, expected: torch.Size) -> str:
    """Why the model can't do without the blocks that were taken out; empty if it can."""
    try:
        with untouched(shorter):
            same = main_output(call(shorter, inputs)).shape == expected
    except Exception as error:
        return f"the model fails without some of its blocks ({type(error).__name__})"
    return "" if same else "the output changes its shape without some of its blocks"


@surgery.builder
def kept_blocks(module: nn.Module, indices: Sequence[int]) -> nn.Module:
    """Leave only the children of these numbers in a ModuleList or Sequential, renumbered from 0."""
    blocks = list(module.children())
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        raise ValueError(f"{type(module).__name__} is no ModuleList or Sequential")
    if (
        not indices
        or list(indices) != sorted(set(indices))
        or not 0 <= indices[0] <= indices[-1] < len(blocks)
    ):
        raise ValueError(f"blocks {list(indices)} of {len(blocks)}")
    module._modules = {str(new): blocks[old] for new, old in enumerate(indices)}
    return module


def _renumber(block: nn.Module, old: int, new: int) -> None:
    """Caches know a layer by its number, which attention modules keep in an attribute."""
    if old == new:
        return
    for module in block.modules():
        held = vars(module)
        numbers = {
            name: new for name in LAYER_NUMBERS if type(held.get(name)) is int and held[name] == old
        }
        if numbers:
            surgery.resize(module, tensors={}, attributes=numbers)
