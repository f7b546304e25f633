"""quantize_dynamic: a model in int8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from quantize import calibration as calibrating
from quantize import check, surgery
from quantize.compression import smooth
from quantize.compression.int8.joining import Joining, following
from quantize.compression.int8.layers import (
    Choice,
    Plan,
    Report,
    Rounded,
    Skipped,
    Stored,
    can_be_stored,
    choose,
    computes,
    overlapping,
    small,
)
from quantize.compression.int8.limit import Group, Result, Trial, warn_if_far, within
from quantize.compression.int8.noise import warn_of_noise
from quantize.compression.int8.outliers import find_plans
from quantize.compression.int8.regions import Inputs, gaining_together
from quantize.compression.int8.rounding import find_rounded
from quantize.compression.int8.samples import Sample, find_samples, shapes_of
from quantize.compression.int8.shifts import find_shifts
from quantize.compression.int8.speed import affordable, slower
from quantize.compression.int8.telling import Made, nothing, tell, unconverted, warn_of_stored
from quantize.compression.int8.whole import finished, plainly, slowness, stored_alone, within_error
from quantize.nn import project, restore
from quantize.saying import Say, silent

PREFERENCES = ("speed", "size")
_CLEARLY = 0.9  # smaller gains are not seen again on other data


def quantize_dynamic(
    model: nn.Module,
    *,
    skip: surgery.Skip = (),
    calibration: Iterable[Any] | None = None,
    embeddings: bool | None = None,
    prefer: str = "speed",
    max_error: float | None = None,
    progress: Say | None = None,
) -> nn.Module:
    """Copy of `model` whose layers store and compute in int8, with the activations quantized as
    they come.

    Can be converted: `nn.Linear` (and subclasses that keep its forward), GPT-2 style `Conv1D`,
    convolutions of 1 to 3 dimensions (transposed ones compute in int8 where windows touch, and else
    in float), `nn.LSTM`, `nn.GRU`, the cells `nn.LSTMCell`, `nn.GRUCell` and `nn.RNNCell`,
    `nn.MultiheadAttention`, experts that a module holds in parameters of three dimensions, and
    `nn.Embedding` and `nn.EmbeddingBag` tables that are large or share their weight with a linear
    layer (a tied head).
    `quantize.summary(result)` says what was converted, what was not, and why, and what part of the
    bytes stays float. A UserWarning does too where that is more than 40 percent, and another one
    says where the outputs moved by more than 5 percent on calibration, or, without it, by more than
    10 percent on random images, ids or features, or where the model runs on none of these alone, so
    that nothing was compared or timed; the summary says how far they moved there. A BatchNorm in
    eval mode and a ReLU that alone read the output of a convolution are folded into it: calibration
    shows that, or else `torch.fx` where it can follow the forward. So are norms that apply an
    activation themselves, as timm's do, and frozen ones. So a linear layer does the work of the
    GELU, ReLU or SiLU module that alone reads its output.

    By default the result is never slower than the model: each layer is timed here in float and in
    int8, and computes in float where int8 loses; the summary has both times. A convolution's weight
    is stored in int8 then, too. Convolutions that run as one native program are timed as one. So
    the result depends on the machine. The whole model is timed too, on the smallest batch of
    calibration and on the largest, or, without it, on random inputs, if the model runs on such
    alone. Where int8 loses as a whole, tables and convolutions alone are stored in int8, and
    convolutions compute in float; where that loses too, or there are none, or where int8 loses in
    every layer, the result is a float copy. A UserWarning and the summary say so; it is no error,
    since one that depends on a stopwatch would come and go.

    Calls of single layers are what is timed. A decoder that goes on to `for_decoding` should be
    converted with prefer="size": there a step of one row is one native call for the whole model,
    and reading a quarter of the bytes is faster at every width.

    Args:
        model: any nn.Module; it stays as it is.
        skip: names, globs or types of modules that stay as they are (`surgery.skip_filter`).
        calibration: batches as `calibration.collect` takes. SmoothQuant is tried on them, then for
            each layer up to 4 outlier channels of its input in float, and a factor for each of the
            others, then rounding by GPTQ for LSTMs and GRUs; what brings the outputs at least a
            tenth closer to the float model's is kept. At last biases bring back what the means of
            outputs miss, if that brings them closer.
            They also say at how many rows each layer is timed: the fewest, the middle and the most
            it gets.
        embeddings: convert all embedding tables, or (False) only those tied to a head; None: large
            ones too, those of 1048576 numbers (4 MB in float32), and those of 65536 that hold a
            tenth of the model's.
        prefer: "speed": layers compute in float that a stopwatch finds slower in int8 at any of
            these numbers of rows (without calibration 1, 16 and 256, 32 steps of 1 and of 16
            sequences, and for convolutions what they get in a random image of 112 and of 224 pixels
            a side; 14 and 56 pixels a side where the model runs on no such image). "size": all
            become int8, but for convolutions with a few weights per output (depthwise ones), and
            the result doesn't depend on the machine.
        max_error: largest relative error of the result on calibration: the square root of the
            summed squares of the differences over that of the summed squares of the model's
            outputs, over all floating point tensors that it returns for all batches. Layers go
            back to float until it holds, first those that change the output most when they alone
            are int8; the summary has both numbers. It takes a run over calibration per layer.
            Inputs unlike calibration may move the outputs more.
        progress: called with a line for people before each piece of work, with the layer's name.

    Returns:
        The copy, for inference only.

    Raises:
        ValueError: nothing to convert, weights or calibration inputs that are not finite (naming
            the layer), calibration without batches, another `prefer`, `max_error` without
            calibration or not above 0, and one that no layer keeps (naming the numbers).

    Source: SmoothQuant (Xiao et al., arXiv 2211.10438), LLM.int8() (Dettmers et al., arXiv
        2208.07339), GPTQ (Frantar et al., arXiv 2210.17323), bias correction (Nagel et al., arXiv
        1906.04721).
    """
    _check(prefer, max_error, calibration)
    say = progress or silent
    source = surgery.clone(model)
    skipped = surgery.skip_filter(source, skip)
    source, projected, left = project(source, skipped)
    choice = _chosen(source, skipped, embeddings, prefer)
    samples: list[Sample] = []
    expected: list[Tensor] = []
    if calibration is None:
        samples = find_samples(source, most=2 if prefer == "speed" else 1)
        shapes: Inputs = shapes_of(samples)
    else:
        shapes = _input_shapes(source, calibration, expected)
    plans: dict[str, Stored] = {n: Stored(why) for n, why in overlapping(choice).items()}
    stored: dict[str, Stored] = {}
    if prefer == "speed":
        choice, stored = _faster(choice, slower(choice, shapes, say, plans))
        plans |= stored
    if not choice.chosen:
        why = f"no layer of {type(model).__name__} is faster in int8 here"
        return unconverted(model, choice.left | left, why)
    source, joining = _folded(source, choice, calibration, shapes)
    if stored:
        say("timing the modules that can run as one native program")
        gaining = gaining_together(source, choice, plans, stored, joining, shapes)
        plans = {name: plan for name, plan in plans.items() if name not in gaining}
    trial = Trial(source, () if calibration is None else calibration, expected, plans, joining)
    timed = _timed_on(prefer, calibration, samples)
    if calibration is None:
        made = plainly(trial, choice, keep=timed is not None)
    else:
        made = _calibrated(trial, choice, shapes if prefer == "speed" else None, max_error, say)
    why = slowness(model, finished(made, projected), timed)
    if why is not None:
        plans, choice = stored_alone(plans, choice, why)
        made = within_error(replace(trial, plans=plans), choice, max_error)
        if made is None or slowness(model, finished(made, projected), timed):
            stays = dict.fromkeys(choice.chosen, why)
            return unconverted(model, stays | choice.left | left, why)
        warn_of_stored(why)
    if made.distance is None:
        made.settings |= warn_of_noise(made.model, model, samples)
    elif max_error is None:
        warn_if_far(model, made.distance)
    tell(made, plans, left, {**joining[1], **made.joined})
    return made.model


def _chosen(model: nn.Module, skipped: Skipped, embeddings: bool | None, prefer: str) -> Choice:
    """The layers that can be converted. Raises ValueError where there are none."""
    choice = choose(model, skipped, embeddings)
    if prefer == "size":
        choice = choice.without(small(choice))
    if not choice.chosen:
        raise ValueError(nothing(model, choice.left))
    return choice


def _folded(
    model: nn.Module, choice: Choice, calibration: Iterable[Any] | None, shapes: Inputs
) -> tuple[nn.Module, Joining]:
    """Fold norms into the convolutions that they alone read, in place; the (possibly new) root, and
    what is joined then.
    """
    model, split = surgery.split_norms(model, shapes)
    readers = following(model, choice, calibration)
    folded = {norm: conv for conv, norm in surgery.fold_norms(model, readers).items()}
    model = restore(model, split, (nn.Identity,))
    names = {name for name, _ in model.named_modules()}
    kept = {name: reader for name, reader in readers.items() if {name, reader} <= names}
    return model, (kept, folded)


def _timed_on(
    prefer: str, calibration: Iterable[Any] | None, samples: Sequence[Sample]
) -> Iterable[Any] | None:
    """Batches on which the whole model is timed, if it is."""
    if prefer == "size":
        return None
    return calibration if calibration is not None else [one.first for one in samples] or None


def _calibrated(
    trial: Trial,
    choice: Choice,
    shapes: Inputs | None,
    max_error: float | None,
    say: Say,
) -> Made:
    """The int8 model as close as calibration can bring it; see `_improved` for `shapes`."""
    best, settings = _improved(trial, choice, shapes, say)
    result = best.result
    if max_error is not None:
        settings["max_error"] = max_error
        if result.error > max_error:
            result, choice = within(best.trial, choice, max_error, say)
    return Made(result.model, choice, result.joined, result.error, settings)


def _check(prefer: str, max_error: float | None, calibration: Iterable[Any] | None) -> None:
    if prefer not in PREFERENCES:
        raise ValueError(f"prefer must be 'speed' or 'size', got {prefer!r}")
    if max_error is None:
        return
    if calibration is None:
        raise ValueError(f"max_error={max_error!r} needs calibration, on which it is measured")
    check.number("max_error", max_error, "(0, inf)")


@dataclass(frozen=True)
class _Tried:
    """A trial, and what it made with all layers in int8."""

    trial: Trial
    result: Result

    def closer(self, trial: Trial, groups: Sequence[Group], *, share: float = _CLEARLY) -> _Tried:
        """The other trial where its error is below this share of the error here, or else this."""
        other = _Tried(trial, trial.made(groups))
        return other if other.result.error < share * self.result.error else self

    def with_plans(self, plans: Mapping[str, Plan | Rounded], groups: Sequence[Group]) -> _Tried:
        """What these plans too give, where they bring it clearly closer."""
        if not plans:
            return self
        return self.closer(replace(self.trial, plans={**self.trial.plans, **plans}), groups)


def _improved(
    trial: Trial, choice: Choice, shapes: Inputs | None, say: Say
) -> tuple[_Tried, dict[str, Any]]:
    """The trial with smoothed norms, with outliers in float and with recurrent weights rounded for
    their inputs, each if it brings the int8 model clearly closer, and with shifted biases if they
    bring it closer; and the settings to note.

    shapes: of the inputs at which a layer with outliers must not be slower than in float; None: it
    may be.
    """
    groups, calibration = choice.groups(), trial.calibration
    say("trying SmoothQuant")
    best = _Tried(trial, trial.made(groups))
    settings: dict[str, Any] = {}
    smoothed = surgery.clone(trial.source)
    layers = {n: m for n, m in _smoothable(smoothed) if n in choice.chosen}
    norms = smooth.smooth(smoothed, layers, calibration)
    if norms:
        best = best.closer(replace(trial, source=smoothed), groups)
        if best.trial is not trial:
            settings["smoothed"] = norms
            choice = replace(choice, chosen=_facts_of(smoothed, choice))
    say("trying outlier channels in float")
    source = best.trial.source
    plans = find_plans(source, choice, calibration)
    if shapes is not None:
        plans = affordable(plans, choice, shapes, say)
    best = before = best.with_plans(plans, groups)
    say("rounding recurrent weights for their inputs")
    rounded = find_rounded(source, choice, calibration)
    best = best.with_plans(rounded, groups)
    if best is not before:
        settings["rounded"] = list(rounded)
    say("bringing back the means of outputs")
    before = best
    shifts = find_shifts(source, choice, best.trial.plans, calibration)
    if shifts:
        best = best.closer(replace(best.trial, shifts=shifts), groups, share=1.0)
    if best is not before:
        settings["shifted"] = list(shifts)
    return best, settings


def _facts_of(model: nn.Module, choice: Choice) -> dict[str, surgery.Facts]:
    facts = surgery.facts(model)
    return {name: facts[name] for name in choice.chosen}


def _input_shapes(model: nn.Module, calibration: Iterable[Any], outputs: list[Tensor]) -> Inputs:
    """Of the layers that compute, and of norms that may be split. Adds what the model gives to
    `outputs`.
    """
    facts = surgery.facts(model).items()
    layers = {name: fact.module for name, fact in facts if computes(fact)}
    layers |= surgery.own_norms(model)

    def note(result: Any) -> None:
        outputs.extend(smooth.floating(result))

    return calibrating.input_shapes(model, calibration, layers, note)


def _faster(choice: Choice, reasons: Report) -> tuple[Choice, dict[str, Stored]]:
    """The choice less the layers that are slower in int8, and those of them that can store it and
    compute in float.
    """
    stored, left = dict[str, Stored](), dict[str, str]()
    for name, why in reasons.items():
        fact = choice.chosen[name]
        if can_be_stored(fact):
            stored[name] = Stored(why)
        else:
            left[name] = why
    return choice.without(left), stored


def _smoothable(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linears whose weight can be multiplied in place."""
    for name, module in model.named_modules():
        stored = isinstance(module._parameters.get("weight"), nn.Parameter)
        if isinstance(module, nn.Linear) and stored and "_half" not in vars(module):
            yield name, module
