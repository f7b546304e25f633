"""quantize_dynamic: which layers of a model become int8, and what is said about the others."""

from __future__ import annotations

import copy
import itertools
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from quantize import calibration as calibrating
from quantize import clock, surgery
from quantize.compression import smooth
from quantize.nn import project_attentions, restore_attentions, without_fast_paths
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_embedding import Int8Embedding

Report = dict[str, str]


def quantize_dynamic(
    model: nn.Module,
    *,
    skip: surgery.Skip = (),
    calibration: Iterable[Any] | None = None,
    embeddings: bool = False,
    prefer: str = "size",
) -> nn.Module:
    """Copy of `model` whose linear layers store and compute in int8, with the activations quantized
    as they come.

    Converted: `nn.Linear` (and subclasses that keep its forward), GPT-2 style `Conv1D`,
    `nn.MultiheadAttention`, and `nn.Embedding` tables that share their weight with a linear layer
    (a tied head), or all of them with `embeddings=True`. `quantize.summary(result)` says what was
    converted, what was not, and why, and what part of the bytes stays float; a UserWarning does too
    where that is more than 40 percent.

    Args:
        model: any nn.Module; it stays as it is.
        skip: names, globs or types of modules that stay as they are (`surgery.select`).
        calibration: batches as `calibration.collect` takes. They try SmoothQuant, which is kept if
            the outputs on them come at least a tenth closer to the float model's.
        embeddings: convert all embedding tables.
        prefer: "size", or "speed": layers stay float that a stopwatch finds slower in int8 at any
            of 1, 16 and 256 rows (below a width of about 256, quantizing an input costs more than
            it saves); then the result depends on the machine.

    Returns:
        The copy, for inference only.

    Raises:
        ValueError: nothing to convert, weights or calibration inputs that are not finite (naming
            the layer), calibration without batches, another `prefer`.

    Source: SmoothQuant (Xiao et al., arXiv 2211.10438).
    """
    if prefer not in ("size", "speed"):
        raise ValueError(f"prefer must be 'size' or 'speed', got {prefer!r}")
    source = surgery.clone(model)
    skipped = surgery.skip_filter(source, skip)
    source, attentions, left = project_attentions(source, skipped)
    new, report = _converted(surgery.clone(source), skipped, embeddings, prefer)
    settings: dict[str, Any] = {}
    distance = None
    if calibration is not None:
        linears = {n: f.module for n, f in surgery.facts(source).items() if f.linear}
        calibrating.reached(source, calibration, linears)  # refuses inputs that are not finite
        expected = smooth.outputs(source, calibration)
        distance = calibrating.relative_error(smooth.outputs(new, calibration), expected)
        layers = {n: m for n, m in _smoothable(source) if _became(new, n, Int8Linear)}
        norms = smooth.smooth(source, layers, calibration)
        if norms:
            slower = {n: reason for n, reason in report.items() if reason.startswith(_SLOWER)}
            folded, folded_report = _converted(
                source, lambda n, m: n in slower or skipped(n, m), embeddings, "size"
            )
            smoothed = calibrating.relative_error(smooth.outputs(folded, calibration), expected)
            if smoothed < _CLEARLY * distance:
                new, report, distance = folded, folded_report | slower, smoothed
                settings["smoothed"] = norms
    new = restore_attentions(new, attentions, (Int8Linear,))
    report |= left
    told, total = _with_shares(new, report)
    done = {n: "int8" for n, m in new.named_modules() if isinstance(m, (Int8Linear, Int8Embedding))}
    if total:
        settings["stays_float"] = total
    surgery.note(new, "int8", done=done, left=told, distance=distance, **settings)
    return new


def _with_shares(model: nn.Module, report: Report) -> tuple[Report, str | None]:
    """The reasons with the part of the model's bytes that each layer has, and in words how much of
    it stays float.
    """
    whole = _bytes(model)
    sizes = surgery.stays_float(model)
    shares = {name: sizes.get(name, 0) / whole for name in report} if whole else {}
    told = {
        n: f"{why} ({shares[n]:.0%} of the bytes)" if shares.get(n, 0) >= 0.01 else why
        for n, why in report.items()
    }
    total = sum(sizes.values())
    if not whole or total < 0.01 * whole:
        return told, None
    words = f"{total / whole:.0%} of {whole} bytes"
    if total > _MUCH * whole:
        most = [name for name in sizes if name in report][:4]
        reasons = "; ".join(f"{name or '(the model)'}: {told[name]}" for name in most)
        warnings.warn(f"int8: {words} stay in floating point ({reasons})", stacklevel=3)
    return told, words


_MUCH = 0.4


def _converted(
    model: nn.Module, skipped: Callable[[str, nn.Module], bool], embeddings: bool, prefer: str
) -> tuple[nn.Module, Report]:
    """Convert `model` in place; also gives the reasons why layers stayed."""
    replacements, report = _plan(model, skipped, embeddings, prefer)
    if not replacements:
        already = any(isinstance(m, Int8Linear) for m in model.modules())
        floating = sum(surgery.stays_float(model).values())
        why = (
            "it is already quantized"
            if already
            else f"{floating} of its {_bytes(model)} bytes stay float"
        )
        detail = surgery.shortened(report) or "it has no nn.Linear or Conv1D"
        raise ValueError(
            f"{type(model).__name__} has no linear layer left to quantize: {why} ({detail})"
        )
    for old, new in replacements.items():
        surgery.take_place(old, new)
    model = surgery.replace(model, replacements)
    without_fast_paths(model)
    return model, report


def _bytes(model: nn.Module) -> int:
    return sum(
        tensor.nbytes for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor)
    )


def _plan(
    model: nn.Module, skipped: Callable[[str, nn.Module], bool], embeddings: bool, prefer: str
) -> tuple[dict[nn.Module, nn.Module], Report]:
    """What becomes what, and why the rest stays."""
    facts = surgery.facts(model)
    report: Report = {}
    replacements: dict[nn.Module, nn.Module] = {}
    known: dict[tuple[Any, ...], str | None] = {}
    tables: dict[
        int, nn.Module
    ] = {}  # by identity of the float weight: layers that shared it share the int8 one
    for name, module in model.named_modules():
        fact = facts.get(name)
        if fact is not None and (fact.linear or isinstance(module, nn.Embedding)):
            reason = _reason(name, facts, skipped, embeddings)
            if reason is None:
                surgery.check_finite(name, module)
                new = _convert(fact, tables)
                if prefer == "speed" and isinstance(module, nn.Linear) and len(fact.holders) < 2:
                    reason = _slower(module, new, known)
                if reason is None:
                    replacements[module] = new
            if reason is not None:
                report[name] = reason
        elif _is_left(module):
            report[name] = (
                f"a {type(module).__name__}: only linear layers and embeddings become int8"
            )
    return replacements, report


def _is_left(module: nn.Module) -> bool:
    return any(p is not None and p.ndim > 1 for p in module._parameters.values())


def _reason(
    name: str,
    facts: dict[str, surgery.Facts],
    skipped: Callable[[str, nn.Module], bool],
    embeddings: bool,
) -> str | None:
    """Why this layer stays in float, or None."""
    fact = facts[name]
    if skipped(name, fact.module):
        return "named by skip"
    if fact.obstacle is not None:
        return fact.obstacle
    others = [other for other in fact.holders if other != name]
    tied = any(facts[other].linear for other in others if other in facts)
    if isinstance(fact.module, nn.Embedding) and not (tied or embeddings):
        return "an embedding: embeddings=True quantizes it"
    for other in others:
        held = facts.get(other)
        if held is None or not _follows(held, fact) or skipped(other, held.module):
            return f"it shares its weight with {other}, which stays as it is"
    return None


def _smoothable(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linears whose weight can be multiplied in place."""
    for name, module in model.named_modules():
        stored = isinstance(module._parameters.get("weight"), nn.Parameter)
        if isinstance(module, nn.Linear) and stored and "_half" not in vars(module):
            yield name, module


def _became(model: nn.Module, name: str, kind: type[nn.Module]) -> bool:
    return isinstance(model.get_submodule(name), kind)


_CLEARLY = 0.9  # smaller gains are not seen again on other data
_SLOWER = "int8 is slower here"


def _slower(
    layer: nn.Linear, new: Int8Linear, known: dict[tuple[Any, ...], str | None]
) -> str | None:
    """Why the float layer stays, if it is the faster one on this machine over 1, 16 or 256 rows.
    `known`: by shape.
    """
    key = (layer.weight.shape, layer.weight.dtype, layer.bias is None)
    if key not in known:
        found = []
        for m in (1, 16, 256):
            x = torch.randn(m, layer.in_features).to(layer.weight.dtype)
            slow, fast = _microseconds(layer, x), _microseconds(new, x)
            if fast > slow:
                found.append(f"{fast:.0f} us against {slow:.0f} for {m} rows")
        known[key] = f"{_SLOWER}: {', '.join(found)}" if found else None
    return known[key]


def _microseconds(layer: Any, x: torch.Tensor) -> float:
    """The median time of a call. Copies take turns, so that the weights are not in the nearest
    cache, as in a whole model.
    """
    size = layer.in_features * layer.out_features * 4
    copies = [copy.deepcopy(layer) for _ in range(min(32, max(1, (32 << 20) // size)))]
    inputs = itertools.cycle([x, x.clone()])  # else the second call would find its input quantized

    def call(one: nn.Module) -> None:
        one(next(inputs))

    calls = [partial(call, one) for one in copies]
    return 1e6 * statistics.median(clock.race(calls, least=max(2, 31 // len(copies))))


def _follows(held: surgery.Facts, fact: surgery.Facts) -> bool:
    """Can the layer that holds the same weight be converted too, and to the same integers?"""
    kind = held.linear or isinstance(held.module, nn.Embedding)
    return kind and held.obstacle is None and held.transposed == fact.transposed


def _convert(fact: surgery.Facts, tables: dict[int, Any]) -> Any:
    module: Any = fact.module
    weight = module.weight.t() if fact.transposed else module.weight
    if isinstance(module, nn.Embedding):
        new: Any = Int8Embedding.from_weight(weight, module.padding_idx)
    else:
        new = Int8Linear.from_weight(weight, module.bias)
        new.transposed = fact.transposed
    if "weight" in module._parameters:
        first = tables.setdefault(id(module._parameters["weight"]), new)
        new.packed, new.scale = first.packed, first.scale
    return new
