"""Leave whole blocks out of a residual network, where its output hardly depends on them.

A block is a module in a list or sequence of modules that turns one tensor into another one of its
shape. Without it the tensor goes on as it is. Which blocks can go is for a metric to say. Left out:
models that write text with a cache, whose layers are counted.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from quantize import surgery
from quantize.calibration import run_all
from quantize.nn.passing import Passed

FEWEST = 2  # blocks of a model that can do without one


def find_blocks(model: nn.Module, example_inputs: Any) -> list[str]:
    """Names of the blocks that could be left out, in the order in which they run.

    Args:
        model: any module; it stays as it is.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
    """
    if any(_caches(module) for module in model.modules()):
        return []
    fits: dict[str, list[bool]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            fits.setdefault(name, []).append(_alike(given, output))

        return hook

    members = _members(model)
    hooks = [m.register_forward_hook(note(n), with_kwargs=True) for n, m in members.items()]
    run_all(model, [example_inputs], hooks)
    found = [name for name, calls in fits.items() if calls == [True]]
    outer = [name for name in members if name in found and not _is_inside(name, found)]
    return outer if len(outer) >= FEWEST else []


def outer_blocks(model: nn.Module) -> list[str]:
    """Names of the modules with parts and weights in lists and sequences, those inside of others
    left out.
    """
    members = list(_members(model))
    return [name for name in members if not _is_inside(name, members)]


def drop_blocks(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Copy of `model` without the blocks of these names.

    Args:
        model: any module; it stays as it is.
        names: of blocks, see `find_blocks`.

    Raises:
        ValueError: no name, or one that no module has.
    """
    if not names:
        raise ValueError("no block is named: name at least one")
    new = surgery.clone(model)
    modules = dict(new.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no module {unknown[0]!r} to leave out")
    replacements: dict[nn.Module, nn.Module] = {}
    for name in names:
        passed = Passed.rebuild(modules[name])
        surgery.record(passed, "Passed")
        replacements[modules[name]] = passed
    new = surgery.replace(new, replacements)
    surgery.note(new, "drop_blocks", done=dict.fromkeys(names, "left out"))
    return new


def _caches(module: Any) -> bool:
    """Whether a cache counts its layers, or it is a model that has one."""
    generates = getattr(module, "can_generate", None)
    if callable(generates) and generates():
        return True
    try:
        return "cache" in inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # a forward that isn't Python
        return False


def _members(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with parts of their own and with weights in lists and sequences, by name."""
    found = {}
    for name, parent in model.named_modules():
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            for key, child in parent.named_children():
                has_parts = next(child.children(), None) is not None
                if has_parts and next(child.parameters(), None) is not None:
                    found[f"{name}.{key}".strip(".")] = child
    return found


def _alike(given: Any, output: Any) -> bool:
    both = isinstance(given, Tensor) and isinstance(output, Tensor)
    return both and given.shape == output.shape and given.dtype == output.dtype


def _is_inside(name: str, others: Sequence[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)
