"""Sizes of inputs: which ones a graph is good for, and inputs of other sizes to try it with."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from quantize.run.fusion.graph import Program
from quantize.run.fusion.nested import flatten, unflatten
from quantize.run.fusion.writes import TooFree

_COMPARISONS = (" == ", " != ", " <= ", " >= ", " < ", " > ")
_WORDS = {"min", "max", "int", "float", "round", "math.ceil", "math.floor", "and", "or", "not"}
_SIZE = r"input_\d+\.size\(\d+\)"
_SIMPLE = re.compile(rf"{_SIZE} == ({_SIZE}|\d+)|{_SIZE} <= \d+")
_SPELLED = {
    "torch.sym_min(": "min(",
    "torch.sym_max(": "max(",
    "torch.sym_float(": "float(",
    "math.trunc(": "int(",
}


def holds(condition: str, shapes: Sequence[Sequence[int]]) -> bool:
    """Is a condition of `Program.conditions` true for inputs of these shapes?"""
    inputs = {
        f"input_{i}": SimpleNamespace(size=list(shape).__getitem__)
        for i, shape in enumerate(shapes)
    }
    try:  # text written by torch.export's printer
        return bool(eval(condition, {"math": math, "min": min, "max": max, **inputs}))
    except ZeroDivisionError:
        return False


def conditions(exported: Any, shapes: Sequence[Sequence[int]]) -> tuple[list[str], list[str]]:
    """What was asked of sizes on the way: first what another answer would surely have led another
    way, then what it may have.

    Left out: what `Program.sizes` and `largest` say, and comparisons of strides. The second list
    has the questions that torch itself asks of every size, whether it is 0 or 1, and those that
    exclude a batch of one: `violating` gives inputs to try. Raises TooFree for what can't be asked
    again.
    """
    one = [[1, *shape[1:]] for shape in shapes]
    certain: dict[str, None] = {}
    doubtful: dict[str, None] = {}
    for text in exported._guards_code:
        text = re.sub(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]", r"input_\1.size(\2)", text)
        for theirs, ours in _SPELLED.items():
            text = text.replace(theirs, ours)
        words = set(re.findall(r"[A-Za-z_][\w.]*", re.sub(r"input_\d+\.size", "", text)))
        if any(word.startswith(("math.", "torch.")) for word in words - _WORDS):
            raise TooFree(f"a file can't ask of its inputs whether {text}")
        if not words <= _WORDS or not holds(text, shapes):
            continue
        left, compared, right = text.partition(next((c for c in _COMPARISONS if c in text), "?"))
        if _SIMPLE.fullmatch(text):
            continue
        unequal = compared == " != "
        ordered = compared != " == " and "input" in left and "input" in right
        small = compared in (" >= ", " > ") and right in ("0", "1", "2")
        if not compared or unequal or ordered or small or not holds(text, one):
            doubtful[text] = None
        else:
            certain[text] = None
    return list(certain), list(doubtful)


def other_sizes(example_inputs: Any) -> Iterator[Any]:
    """The example inputs with other sizes, one group of equal sizes at a time: twice the batch and
    one, longer and shorter. Whole numbers that ascend still do, as offsets of bags have to.
    """
    tensors, spec = flatten(example_inputs, "example_inputs")
    for dim in range(max(t.dim() for t in tensors)):
        for size in sorted({t.shape[dim] for t in tensors if t.dim() > dim}):
            longer, shorter = list(tensors), list(tensors)
            less = min(size, 1) if dim == 0 else max(size - 1, 0)
            for i, tensor in enumerate(tensors):
                if tensor.dim() > dim and tensor.shape[dim] == size:
                    longer[i] = _ascending_as(tensor, torch.cat([tensor, tensor.flip(dim)], dim))
                    shorter[i] = tensor.narrow(dim, 0, less)
            yield unflatten(spec, longer)
            if size > 1:
                yield unflatten(spec, shorter)


def violating(program: Program, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Inputs of sizes near those of `tensors` for which a doubtful condition doesn't hold, each
    once.
    """
    shapes = [list(t.shape) for t in tensors]
    tried: set[str] = set()
    for condition in program.doubtful:
        other = _violating(program, condition, shapes)
        if other is not None and str(other) not in tried:
            tried.add(str(other))
            yield [_resized(t, shape) for t, shape in zip(tensors, other, strict=True)]


def _violating(program: Program, condition: str, shapes: list[list[int]]) -> list[list[int]] | None:
    places = [(int(i), int(d)) for i, d in re.findall(r"input_(\d+)\.size\((\d+)\)", condition)]
    for i, d in dict.fromkeys(places):
        symbol, now = program.sizes[i][d], shapes[i][d]
        near = {*range(1, 33), *range(max(1, now - 8), now + 9)}
        near |= {now // 2 or 1, 2 * now, 2 * now + 1}
        # a number of frames changes once in many samples; an odd step meets all remainders
        near |= {*range(1, 2 * now, now // 64 | 1)}
        for size in sorted(near, key=lambda n: abs(n - now)):
            other = [
                [size if s == symbol else n for s, n in zip(program.sizes[k], shape, strict=True)]
                for k, shape in enumerate(shapes)
            ]
            if not holds(condition, other) and all(holds(c, other) for c in program.conditions):
                return other
    return None


def _resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Longer by repetition, shorter by leaving out the end."""
    found = tensor
    for dim, size in enumerate(shape):
        places = torch.arange(size, device=tensor.device) % max(1, found.shape[dim])
        found = found if size == found.shape[dim] else found.index_select(dim, places)
    return _ascending_as(tensor, found)


def _ascending_as(tensor: Tensor, other: Tensor) -> Tensor:
    """`other`, sorted where `tensor` is a row of whole numbers that ascend: torch reads memory at
    random where offsets don't.
    """
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex():
        return other
    return other.sort().values if bool((tensor[1:] >= tensor[:-1]).all()) else other
