"""A recipe for a model that is larger than memory has room for twice: block by block, into a file.

Each block is compressed by itself and goes to disk before the next one's turn, so memory holds what
a recipe takes for one block. In calibration it is given what the compressed blocks before it give,
and beside that what the original's give. The last step that removes is fitted from the one to what
the block makes of the other, and so takes back what went wrong in the blocks before; steps ahead of
it see the original's alone, those after it the compressed ones' alone. The price: budgets are
shared out inside of blocks.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize import surgery
from quantize.calibration import (
    Beside,
    Frontier,
    Pace,
    Store,
    check_batches,
    distance,
    without_cache,
)
from quantize.checkpoint import save
from quantize.compression.blocks import outer_blocks
from quantize.compression.int8.regions import make_regions
from quantize.compression.recipe.value import Given, Recipe, Step
from quantize.nn.passing import Passed

LEAST = 1 << 16  # bytes of a tensor that is worth a file


def write_by_block(
    recipe: Recipe,
    model: nn.Module,
    path: str | Path,
    given: Given,
    *,
    metadata: dict[str, Any] | None = None,
) -> nn.Module:
    """Compress the blocks of a model one after another, and write the result to a file.

    A block is a module with weights in a list of modules (`nn.ModuleList`, `nn.Sequential`) that
    runs once in every batch. The recipe is applied to each as to a model, so names in it are those
    inside a block (globs like "*up_proj" fit both); outside of the blocks, steps that round apply,
    without calibration. A model whose weights are mapped from a file (`open_model` of a folder)
    stays mapped, and finished blocks wait in nameless files beside `path`, which take as much room
    as the result.

    Args:
        recipe: of steps that don't train.
        model: stays as it is.
        path: as in `save`.
        given: its calibration is needed, batches that fit in memory; `example_inputs` aren't.
        metadata: as in `save`; "recipe" is added.

    Returns:
        The compressed model, in eval mode; the tensors of its blocks lie in files.

    Raises:
        ValueError: a step that trains, no calibration, no blocks, a weight that two blocks or a
            block and something else share, what a step raises, with the block's name.
        TypeError, OSError: as `save`.

    Source: the sequential pipeline of llm-compressor; GPTQ (Frantar et al., arXiv 2210.17323).
    """
    _check(recipe, given)
    batches = list(check_batches(given.calibration or ()))
    result = surgery.shell(model).eval()
    original = surgery.shell(model).eval()
    frontier = Frontier(result, batches, outer_blocks(result))
    names = frontier.order
    beside = None
    if any(step.removes for step in recipe.steps):
        beside = Frontier(original, batches, names, look=frontier.look)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no blocks: looked for modules with parts and weights in a "
            f"list or sequence of modules that run once in every batch"
        )
    _check_alone(result, names)
    store = Store(0, Path(path).absolute().parent)
    pace = Pace(len(names))
    for place, name in enumerate(names):
        given.say(pace.next(f"compressing {name}"))
        inputs = frontier.arguments(result, name)
        if place:  # it has run for the last time
            _to_files(result.get_submodule(names[place - 1]), store)
        wanted = beside.arguments(original, name) if beside is not None else inputs
        block = result.get_submodule(name)
        try:
            small = _compressed(recipe, block, given, Beside(inputs, wanted))
        except ValueError as error:
            raise ValueError(f"block {name!r}: {error}") from error
        result = surgery.exchange(result, {block: small})
    _to_files(result.get_submodule(names[-1]), store)
    _join_notes(result, names)
    result = _rounded_outside(recipe, result, names)
    make_regions(result)  # around several blocks
    with without_cache(result, model):
        away = distance(result, model, batches[:1])
    surgery.note(result, "by block", done=dict.fromkeys(names, "by itself"), distance=away)
    save(result, path, metadata={**(metadata or {}), "recipe": recipe.as_values()})
    return result


def _compressed(recipe: Recipe, block: nn.Module, given: Given, batches: Beside) -> nn.Module:
    """A block after all steps, each given what it is to be fitted to."""
    fitted = [place for place, step in enumerate(recipe.steps) if step.removes]
    given_to = [list(batches) for _ in recipe.steps]
    if fitted:
        given_to[: fitted[-1]] = [batches.original] * fitted[-1]
        given_to[fitted[-1]] = batches
    small = block
    for prefix, calibration in zip(recipe.prefixes, given_to, strict=True):
        now = dataclasses.replace(given, example_inputs=calibration[0], calibration=calibration)
        small = prefix.steps[-1](small, now.at(prefix, block))
    return small


def _check(recipe: Recipe, given: Given) -> None:
    for step in recipe.steps:
        if step.trains:
            raise ValueError(f"{type(step).__name__} trains the whole model, not block by block")
    if given.calibration is None:
        raise ValueError("block by block needs calibration: it shows what a block is given")


def _check_alone(model: nn.Module, names: Sequence[str]) -> None:
    """Raises ValueError where a weight of a block is held outside of it too."""
    inside: dict[int, str] = {}
    for name in names:
        inside |= {id(p): name for p in model.get_submodule(name).parameters()}
    for place, parameter in model.named_parameters(remove_duplicate=False):
        block = inside.get(id(parameter))
        if block is not None and not place.startswith(f"{block}."):
            raise ValueError(f"block {block!r} shares a weight with {place!r}")


@torch.no_grad()
def _to_files(module: nn.Module, store: Store) -> None:
    """Put the module's tensors into files. Buffers become other tensors, so that copies that layers
    have made of them for their kernels go.
    """
    moved: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None and _is_worth(parameter) and id(parameter) not in moved:
                moved[id(parameter)] = parameter
                parameter.data = store.copy(parameter.data)
        for name, buffer in part._buffers.items():
            if buffer is not None and _is_worth(buffer):
                if id(buffer) not in moved:
                    moved[id(buffer)] = store.copy(buffer)
                part._buffers[name] = moved[id(buffer)]


def _is_worth(tensor: torch.Tensor) -> bool:
    return tensor.nbytes >= LEAST and tensor.is_contiguous()


def _join_notes(model: nn.Module, names: Sequence[str]) -> None:
    """One note for each step, with the layers of all blocks and the largest distance."""
    joined: dict[tuple[int, str], dict[str, Any]] = {}
    for name in names:
        block = model.get_submodule(name)
        for place, step in enumerate(surgery.notes(block)):
            whole = joined.setdefault((place, step["technique"]), {"done": {}, "left": {}})
            for kind in ("done", "left"):
                named = {surgery.join(name, n): what for n, what in step[kind].items()}
                whole[kind] |= named
            distances = [whole.get("distance"), step["distance"]]
            whole["distance"] = max((d for d in distances if d is not None), default=None)
        for part in block.modules():
            part.__dict__.pop("_notes", None)
    for (_, technique), whole in joined.items():
        surgery.note(model, technique, **whole, blocks=len(names))


def _rounded_outside(recipe: Recipe, model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The model with what is outside of its blocks rounded as the recipe says."""
    blocks = [model.get_submodule(name) for name in names]
    model = surgery.exchange(model, {block: Passed() for block in blocks})
    for step in recipe.steps:
        if step.rounds:
            model = _rounded(step, model)
    places = [model.get_submodule(name) for name in names]
    return surgery.exchange(model, dict(zip(places, blocks, strict=True)))


def _rounded(step: Step, model: nn.Module) -> nn.Module:
    if getattr(step, "smooth", False):  # which needs batches for the whole model
        step = dataclasses.replace(step, smooth=False)  # type: ignore[type-var]  # all are dataclasses
    try:
        with warnings.catch_warnings():  # that most of what is outside of the blocks stays float
            warnings.simplefilter("ignore", UserWarning)
            return step(model, Given())
    except ValueError as error:
        surgery.note(model, step.part, left={"": str(error)})
        return model
