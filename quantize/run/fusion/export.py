"""From a model to a `Program`: `torch.export` traces a copy of it, and the importer (importing.py)
makes one flat graph of what comes out.

State that the forward writes in place or assigns (buffers, tensors in attributes) becomes constants
that the graph writes into, operator by operator as the model did. Left out: training,
data-dependent control flow, and state that changes its shape: each is refused by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from quantize import surgery
from quantize.calibration import exporting
from quantize.nn import with_padded_encoders
from quantize.run.fusion.graph import CaptureError, Program, lines_of, named_arguments
from quantize.run.fusion.importing import Flat, Importer
from quantize.run.fusion.nested import flatten
from quantize.run.fusion.state import settled
from quantize.run.fusion.writes import TooFree, drop_dead_writes, find_state


def capture(model: nn.Module, example_inputs: Any, changed: Sequence[str] = ()) -> Program:
    """Export a copy of `model` with every size that can vary left free; the model stays as it is.

    Args:
        changed: names of the attributes that a forward changes, as `state.answers` gives them:
            tensors among them are carried.

    Raises:
        CaptureError: `torch.export` can't follow the model, or its state can't be carried; the
            message says why.
    """
    named, keyword = named_arguments(model, example_inputs)
    tensors, spec = flatten(named, "example_inputs")

    def fresh() -> Flat:
        """A copy for each try: tracing runs the model's Python, which may leave something
        behind.
        """
        copied = with_padded_encoders(settled(surgery.clone(model)))
        twin = _with_state_in_buffers(copied, changed)
        return Flat(twin, spec, keyword).eval()

    def program(free: Callable[[int], bool]) -> Program:
        exported, flat, used = _export(fresh, tensors, free=free)
        arguments = dict(zip(named, spec.children, strict=True))
        made = Importer(exported, flat).program(arguments, keyword, [t.shape for t in used])
        made.widened = 1 if used is tensors else 2
        drop_dead_writes(made)
        find_state(made)
        return made

    for free in _FREE[:-1]:
        with contextlib.suppress(TooFree):
            return program(free)
    return program(_FREE[-1])


def _with_state_in_buffers(model: nn.Module, changed: Sequence[str]) -> nn.Module:
    """Tensors in plain attributes that a forward changes become buffers, in place: torch.export
    follows those.
    """
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for key, value in list(module.__dict__.items()):
            if prefix + key in changed and isinstance(value, Tensor):
                del module.__dict__[key]
                module.register_buffer(key, value.detach(), persistent=False)
    return model


# Which dimensions may vary: all, the batch, none.
_FREE: tuple[Callable[[int], bool], ...] = (
    lambda dim: True,
    lambda dim: dim == 0,
    lambda dim: False,
)

# Most models take less than 40 decisions on sizes; solving for a hundred takes torch.export
# minutes.
_MOST_DECISIONS = 60


def _wider(tensors: list[Tensor]) -> list[Tensor]:
    """A batch of one becomes a batch of two, so that `torch.export` doesn't take the 1 for a fixed
    size.
    """
    if all(t.dim() and t.shape[0] == 1 for t in tensors):
        return [torch.cat([t, t]) for t in tensors]
    return tensors


def _export(
    fresh: Callable[[], Flat], tensors: list[Tensor], *, free: Callable[[int], bool]
) -> tuple[Any, Flat, list[Tensor]]:
    """The exported program, the module and the inputs it was traced with; `free` says which
    dimensions may vary.
    """
    wide = _wider(tensors)
    errors = []
    for candidate in [wide, tensors] if wide is not tensors else [tensors]:
        flat = fresh()
        try:
            exported = _traced(flat, candidate, free)
            if candidate is tensors or not _fixes_batch(exported):
                return exported, flat, candidate
            errors.append("its batch can't vary")
        except TooFree:
            raise
        except TypeError as error:
            raise CaptureError(lines_of(error)[0]) from error
        except Exception as error:
            # torch.export raises many kinds; all mean that it can't follow the model.
            errors.append(f"{type(error).__name__}: {lines_of(error)[0]}")
    raise CaptureError(errors[-1])


def _fixes_batch(exported: Any) -> bool:
    """Did the export find out that the model takes no other batch than that of the example?"""
    inputs = exported.graph_signature.user_inputs
    placeholders = exported.graph_module.graph.find_nodes(op="placeholder")
    batches = [node.meta["val"].shape[0] for node in placeholders if node.name in inputs]
    return any(str(batch).isdigit() for batch in batches)


def _traced(flat: Flat, tensors: list[Tensor], free: Callable[[int], bool]) -> Any:
    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mode = detect_fake_mode([*args, *kwargs.values()])
        if mode is None or mode.shape_env is None:
            return
        if len(mode.shape_env.guards) > _MOST_DECISIONS:
            raise TooFree("too many decisions on sizes")

    auto, fixed = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    dynamic = tuple(tuple(auto if free(d) else fixed for d in range(t.dim())) for t in tensors)
    handles = [
        m.register_forward_pre_hook(count, with_kwargs=True) for m in flat.modules() if free(1)
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), exporting():
            exported = torch.export.export(
                flat, tuple(tensors), dynamic_shapes=(dynamic,), strict=False
            )
    finally:
        for handle in handles:
            handle.remove()
    if free(1) and len(exported._guards_code) > _MOST_DECISIONS:
        raise TooFree("too many decisions on sizes")
    return exported
