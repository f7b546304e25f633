"""One cell of the contract: one transform on one model, with all invariants checked on one
result.
"""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rounded_twins import rounded_twin
from torch import nn

import quantize
from contract import invariants as promise
from contract.models import batches, build
from contract.transforms import TRANSFORMS, Transform, noisy
from quantize import surgery
from quantize.nn.low_rank import LowRankLinear, Pair

# Deep, random and normalized at every layer, or with steps of its own: rounding errors grow.
ROUGH = {"mobilenet_v2": 5, "resnet": 2, "custom function": 2}
# One of its convolutions has 8 outputs: it alone in int8 changes the answer by 0.12. What it must
# compute is its rounded twin, to the bit.
ROUGH_IN_INT8 = ROUGH | {"resnet": 4}


@dataclass
class Cell:
    """What came out: a refusal, or broken promises by kind (none: it works)."""

    refusal: str = ""
    broken: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, problems: Iterator[str] | list[str]) -> None:
        """Note problems of one kind."""
        problems = list(problems)
        if problems:
            self.broken.setdefault(kind, []).extend(problems)


def examine(transform: str, name: str) -> Cell:
    """Apply one transform to one model and check every promise."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        return _examine(TRANSFORMS[transform], name)


def _examine(transform: Transform, name: str) -> Cell:
    cell = Cell()
    model, inputs = build(name)
    calibration = batches(inputs)
    given = promise.frozen([inputs, calibration])
    state, world = promise.state_of(model), promise.world()
    result, refusal = None, None
    try:
        result = transform.apply(model, inputs, calibration)
    except Exception as error:
        refusal = error
    cell.add("input model changed", promise.changes(state, promise.state_of(model)))
    cell.add(
        "caller's inputs changed", promise.changes(given, promise.frozen([inputs, calibration]))
    )
    cell.add("process changed", promise.changes(world, promise.world()))
    if refusal is not None:
        cell.refusal = f"{type(refusal).__name__}: {refusal}"
        cell.add("refusal", promise.honest(refusal, model))
        return cell
    assert result is not None
    _run(cell, transform, name, model, result)
    return cell


def _run(cell: Cell, transform: Transform, name: str, model: nn.Module, result: nn.Module) -> None:
    """The promises about a result."""
    sequence, expected = _calls(name), _expected(name, transform.evaluates)
    if not transform.script:
        cell.add("shares memory", promise.apart(result, model))
        if transform.technique != "fold":
            modes = (
                promise.in_eval_mode(result)
                if transform.evaluates
                else promise.flags_kept(result, model)
            )
            cell.add("training flags", modes)
            cell.add("hooks", promise.hooks_kept(result, model))
            cell.add("requires_grad", promise.trainable_kept(result, model))
        _summary(cell, transform, name, model, result)
    copies = _copies(cell, transform, name, result)
    dense = copy.deepcopy(copies["deepcopy"]) if "deepcopy" in copies else None
    try:
        actual = promise.answers(result, sequence)
    except Exception as error:
        cell.add("runs", [f"{type(error).__name__}: {str(error)[:200]}"])
        return
    rough = ROUGH_IN_INT8 if transform.technique == "int8" else ROUGH
    bound = None if transform.bound is None else transform.bound * rough.get(name, 1)
    cell.add("close", promise.close_answers(actual, expected, bound, forms=not transform.script))
    if transform.technique == "int8" and "deepcopy" in copies:
        _compare(cell, "definition", rounded_twin(copies["deepcopy"]), actual, sequence)
    if transform.technique == "recover":
        cell.add("close", _no_farther(name, actual, expected, sequence))
    flat = [promise.tensors(answer) for answer in actual]
    for what, copied in copies.items():
        _compare(
            cell,
            what,
            copied,
            flat if transform.script else actual,
            sequence,
            flat=transform.script,
        )
    if not transform.script:
        _after(cell, result, sequence)
        _dense(cell, dense, actual, sequence)


def _calls(name: str) -> list[Any]:
    """Inputs of calls one after the other."""
    inputs = build(name)[1]
    return [inputs, *batches(inputs)[::-1]]


@functools.cache
def _expected(name: str, evaluates: bool) -> list[Any]:
    """What the original answers to `_calls`."""
    original = build(name)[0]
    return promise.answers(original.eval() if evaluates else original, _calls(name))


def _no_farther(
    name: str, actual: list[Any], expected: list[Any], sequence: list[Any]
) -> Iterator[str]:
    """After `recover` the student is no farther from its teacher than before: in its outputs or
    their distributions.
    """
    before = promise.answers(noisy(build(name)[0]).eval(), sequence)
    rows = zip(before, actual, expected, strict=True)
    for i, (start, end, teacher) in enumerate(rows):
        outputs = promise.distance(end, teacher), promise.distance(start, teacher)
        likely = [promise.probabilities(output) for output in (end, start, teacher)]
        shares = promise.distance(likely[0], likely[2]), promise.distance(likely[1], likely[2])
        if all(after > 1.05 * since + 1e-3 for after, since in (outputs, shares)):
            yield (
                f"call {i + 1} was {outputs[1]:.2g} from its teacher's and became {outputs[0]:.2g}"
            )


def _try(cell: Cell, kind: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        cell.add(kind, [f"{type(error).__name__}: {str(error)[:200]}"])
        return None


def _copies(cell: Cell, transform: Transform, name: str, result: nn.Module) -> dict[str, nn.Module]:
    """Copies of a result that has not run yet."""
    with tempfile.TemporaryDirectory() as folder:
        if transform.script:
            path = Path(folder) / "model.pt"

            def again() -> nn.Module:
                result.save(path)
                return torch.jit.load(path)

            made = {"own file": _try(cell, "own file", again)}
        else:
            made = {"deepcopy": _try(cell, "deepcopy", lambda: copy.deepcopy(result))}
            if transform.saved and _pickles(name):
                made["pickle"] = _try(cell, "pickle", lambda: promise.through_pickle(result))
            if transform.saved and not any(module.training for module in result.modules()):
                path = Path(folder) / f"model{_suffix(transform, name)}"
                fresh = build(name, seed=1)[0]
                made["file"] = _try(cell, "file", lambda: promise.through_file(result, fresh, path))
    return {what: copied for what, copied in made.items() if copied is not None}


def _suffix(transform: Transform, name: str) -> str:
    """Half of the cells are written to one container and half to the other."""
    return promise.SUFFIXES[zlib.crc32(f"{transform.technique} {name}".encode()) % 2]


@functools.cache
def _pickles(name: str) -> bool:
    """Can the original be pickled? torch refuses parametrized modules."""
    try:
        pickle.dumps(build(name)[0])
    except Exception:
        return False
    return True


def _compare(
    cell: Cell,
    what: str,
    copied: nn.Module,
    actual: list[Any],
    sequence: list[Any],
    *,
    flat: bool = False,
) -> None:
    """With `flat`, tensors alone: TorchScript knows fewer containers."""
    try:
        answers = promise.answers(copied, sequence)
        answers = [promise.tensors(answer) for answer in answers] if flat else answers
        cell.add(what, promise.same_answers(answers, actual, what))
    except Exception as error:
        cell.add(what, [f"doesn't run: {type(error).__name__}: {str(error)[:200]}"])


def _after(cell: Cell, result: nn.Module, sequence: list[Any]) -> None:
    """A copy of a result that has run goes on as the result does."""
    later = _try(cell, "deepcopy after running", lambda: copy.deepcopy(result))
    if later is not None:
        expected = promise.answers(result, sequence)
        _compare(cell, "deepcopy after running", later, expected, sequence)


def _dense(cell: Cell, copied: nn.Module | None, actual: list[Any], sequence: list[Any]) -> None:
    """Low rank: with each pair's product in a dense layer the result gives the same answers, up to
    rounding.
    """
    pairs = [m for m in copied.modules() if isinstance(m, Pair)] if copied is not None else []
    if not pairs:
        return
    with torch.no_grad():
        twin = surgery.replace(copied, {pair: _dense_layer(pair) for pair in pairs})
    try:
        answers = promise.answers(twin, sequence)
    except Exception as error:
        cell.add("dense product", [f"{type(error).__name__}: {error}"])
        return
    coarse = any(p.dtype in (torch.float16, torch.bfloat16) for p in twin.parameters())
    cell.add(
        "dense product",
        promise.close_answers(actual, answers, 0.02 if coarse else 1e-3, forms=True),
    )


def _dense_layer(pair: Pair) -> nn.Module:
    """The ordinary layer that does what a low-rank pair does."""
    weight, bias = pair.dense_weight(), pair.bias
    if isinstance(pair, LowRankLinear):
        layer: nn.Module = nn.Linear(
            pair.in_features, pair.out_features, bias is not None, dtype=pair.weight.dtype
        )
    else:
        options = {
            name: getattr(pair, name) for name in ("stride", "padding", "dilation", "padding_mode")
        }
        channels = pair.in_channels, pair.out_channels, pair.kernel_size
        layer = nn.Conv2d(*channels, bias=bias is not None, dtype=pair.weight.dtype, **options)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    for kind in promise.HOOKS:
        setattr(layer, kind, getattr(pair, kind))
    return layer.train(pair.training)


def _summary(
    cell: Cell, transform: Transform, name: str, model: nn.Module, result: nn.Module
) -> None:
    told = _try(cell, "summary", lambda: quantize.summary(result))
    if told is None:
        return
    if not told.steps:
        cell.add("summary", ["no step is noted"])
        return
    if transform.layers:
        plain = getattr(model, "_orig_mod", model)  # what is inside of torch.compile's module
        named = {*told.done, *told.left}
        cell.add("summary", [f"layer {n!r} is not named" for n in promise.unnamed(plain, named)])
        cell.add(
            "summary",
            [f"no reason for {n!r}" for n, why in told.left.items() if not str(why).strip()],
        )
    if transform.runs:
        known = isinstance(told.distance, float) and 0 <= told.distance < float("inf")
        cell.add("summary", [] if known else [f"its distance is {told.distance!r}"])
