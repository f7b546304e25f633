"""4-bit weights for decoding one token at a time: which layers get them, and from what calibration.

The layer is `nn/int4.py`. With calibration batches the rounding is GPTQ's, without them each weight
goes to its nearest value. Left out: other bit widths, embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from quantize import calibration as calibrating
from quantize import check, surgery
from quantize.nn import project, restore, without_fast_paths
from quantize.nn.int4 import GROUP_SIZES, Int4Linear
from quantize.saying import Say, silent


def quantize_weights(
    model: nn.Module,
    *,
    bits: int = 4,
    group_size: int = 32,
    skip: surgery.Skip = (),
    calibration: Iterable[Any] | None = None,
    progress: Say | None = None,
) -> nn.Module:
    """Copy of `model` whose linear layers store 4-bit weights, for decoding at batch 1.

    Converted: `nn.Linear` (and subclasses that keep its forward), GPT-2 style `Conv1D`, the
    projections of `nn.MultiheadAttention`.

    Layers that don't fit stay as they are: `quantize.summary(result)` names them and the reasons.

    Args:
        model: any nn.Module; it stays as it is.
        bits: 4.
        group_size: 32, 64, 128 or 256 weights of a row share a scale.
        skip: names, globs or types of modules that stay as they are (`surgery.skip_filter`).
        calibration: batches as `calibration.collect` takes; they turn on GPTQ rounding.
        progress: called with a line for people before each piece of work, with the layer's name.

    Returns:
        The copy, for inference only.

    Raises:
        ValueError: other bits and group sizes, weights that are not finite, no layer that fits.

    Source: GPTQ (Frantar et al., arXiv 2210.17323).
    """
    if bits != 4:
        raise ValueError(f"bits must be 4 (for 8 use quantize_dynamic), got {bits!r}")
    check.one_of("group_size", group_size, GROUP_SIZES)
    say = progress or silent
    model = surgery.clone(model)
    skipped = surgery.skip_filter(model, skip)
    model, projected, left = project(model, skipped)
    chosen, report = _choose(model, skipped, group_size)
    report |= left
    if not chosen:
        detail = surgery.shortened(report) or "it has no nn.Linear"
        raise ValueError(
            f"{type(model).__name__} has no linear layer to store in 4 bits ({detail})"
        )
    moments: dict[str, Tensor] = {}
    if calibration is not None:
        original = surgery.clone(model)
        say(f"inputs of {len(chosen)} layers")
        layers = {name: fact.module for name, fact in chosen.items()}
        run = calibrating.reached(model, calibration, layers)
        statistics = calibrating.collect(
            model, calibration, {name: layers[name] for name in layers if name in run}
        )
        moments = {name: seen.second_moment for name, seen in statistics.items()}
    replacements: dict[nn.Module, nn.Module] = {}
    pace = calibrating.Pace(len(chosen))
    for name, fact in chosen.items():
        say(pace.next(f"rounding {name or 'the model'}"))
        old = fact.module
        replacements[old] = Int4Linear.from_linear(old, group_size, moments.get(name))
        surgery.take_place(old, replacements[old])
    model = surgery.replace(model, replacements)
    without_fast_paths(model)
    model = restore(model, projected, (Int4Linear,))
    distance = None if calibration is None else calibrating.distance(model, original, calibration)
    done = dict.fromkeys(chosen, "int4")
    if calibration is not None:
        done |= {
            name: "int4, rounded to the nearest: no batch reaches it"
            for name in chosen
            if name not in moments
        }
    surgery.note(model, "int4", done=done, left=report, distance=distance, group_size=group_size)
    return model


def _choose(
    model: nn.Module, skipped: Callable[[str, nn.Module], bool], group_size: int
) -> tuple[dict[str, surgery.Facts], dict[str, str]]:
    """Linear layers that become 4-bit, and why others don't."""
    chosen: dict[str, surgery.Facts] = {}
    report: dict[str, str] = {}
    facts = surgery.facts(model)
    for name, module in model.named_modules():
        fact = facts.get(name)
        if fact is None or not fact.linear:
            if surgery.holds_matrix(module):
                report[name] = f"a {type(module).__name__}: only linear layers become 4-bit"
            continue
        reason = "named by skip" if skipped(name, module) else _obstacle(name, fact, group_size)
        if reason is None:
            surgery.check_finite(name, module)
            chosen[name] = fact
        else:
            report[name] = reason
    return chosen, report


def _obstacle(name: str, fact: surgery.Facts, group_size: int) -> str | None:
    if fact.obstacle is not None:
        return fact.obstacle
    others = [other for other in fact.holders if other != name]
    if others:
        return f"it shares its weight with {others[0]}"
    weight: Any = fact.module.weight
    outputs, inputs = (weight.t() if fact.transposed else weight).shape
    if inputs % group_size or outputs == 0:
        return f"its {inputs} inputs are no multiple of group_size={group_size}"
    return None
