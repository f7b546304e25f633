"""Walk a model, choose a rank for every linear and convolution, and put pairs of smaller layers in
their places.

With calibration, three things make the result far better than cutting the SVD of each weight
(`maths` has the formulas): the SVD is whitened by the moments of the layer's inputs and of the
gradients at its output; one global budget goes where the loss per parameter is highest; and layers
are done in the order in which they run, each fitted to what the original layer gave, from the
inputs that the already factorized layers give, so that errors are repaired downstream instead of
piling up. Layers that the budget leaves whole are fitted too, and a layer whose output is added to
a residual stream also takes back the error that the stream has there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from quantize import calibration as calibrate
from quantize import surgery
from quantize.compression.low_rank import budget as budgets
from quantize.compression.low_rank.candidates import check_weights, find_layers, reached
from quantize.compression.low_rank.fit import factors, fit
from quantize.compression.low_rank.notes import write_down
from quantize.compression.low_rank.spectra import spectra
from quantize.nn import low_rank as pairs
from quantize.saying import Say, silent


def factorize_low_rank(
    model: nn.Module,
    *,
    ratio: float | Mapping[str, float] | None = None,
    rank: int | Mapping[str, int] | None = None,
    calibration: Iterable[Any] | None = None,
    skip: surgery.Skip = (),
    only_faster: bool | None = None,
    memory: int = 1 << 30,
    progress: Say | None = None,
) -> nn.Module:
    """A copy of `model`, in eval mode, whose linears and convolutions are pairs of low rank where
    that is smaller.

    Give at most one budget (none: ratio=0.5); each may be a dict from module name or glob to value,
    and then only the layers it names are touched, each within its own value. Always left, with the
    reason in `quantize.summary(result)`: weights that other modules read or share, grouped
    convolutions, layers that no rank makes smaller. Warns where little of the model was touched,
    and where the outputs moved by more than half on the first batch of calibration.

    Args:
        model: any module; it stays as it is.
        ratio: fraction in (0, 1] of the layers' parameters that is kept. A number is one budget for
            all layers together; layers that matter more keep more, some all. 1 changes nothing.
        rank: rank of each layer as given, at most min(in, out). Ranks from ratio are rounded
            to multiples of 8 or 16.
        calibration: re-iterable batches as for `torch.export.export`. With it, layers that are kept
            whole, but come after one that is not, get new weights too; a layer that no batch
            reaches is left. Without it each weight is cut by its plain SVD at the same ratio, which
            is much worse.
        skip: names, globs, types.
        only_faster: factorize only where a pair is no slower by timing on this machine, on inputs
            shaped like the first batch's. Default: where there is calibration and the budget isn't
            given layer by layer (rank, a dict), for layers that take at least 0.1 ms. True:
            everywhere, also where only the time of a call counts. False: don't time. A number for
            ratio keeps the pairs of layers that aren't timed below 0.8 of their parameters, where
            they were no slower on the machines we had.
        memory: bytes of second moments kept at a time.
        progress: called with a line for people before each piece of work, with the layers' names.

    Returns:
        The copy. What stands for a layer is a `LowRankLinear`, `LowRankConv1d` or
            `LowRankConv2d`.

    Raises:
        ValueError: for a budget out of range, two budgets, no layer to act on, a ratio that no
            ranks reach, weights or calibration inputs that are not finite, and a result that
            doesn't run.
        TypeError: for wrong types.

    Source: DRONE (Chen et al., NeurIPS 2021), SVD-LLM (Wang et al., arXiv 2403.07378).
    """
    kind, value = budgets.read_budget(ratio, rank)
    if only_faster and calibration is None:
        raise ValueError(
            "only_faster=True needs calibration: timing needs the shapes of the layers' inputs"
        )
    say = progress or silent
    model = surgery.shell(model).eval()
    layers, left = find_layers(model, skip)
    values = budgets.per_layer(kind, value, layers, model)
    layers = {name: layers[name] for name in values}
    check_weights(layers)
    survey = None
    if calibration is not None:
        survey = calibrate.Survey(
            model,
            calibration,
            _widths(layers),
            projected=_projected(layers),
            memory=memory,
            say=say,
        )
        layers, idle = reached(layers, survey.reached)
        left.update(idle)
    values = {name: values[name] for name in layers}
    budget = budgets.Budget(kind, value, values)
    ranks: dict[str, int | None] = dict.fromkeys(layers)
    if not budget.keeps_all:
        ranks |= _choose(budget, layers, survey, only_faster, left)
    whole = "no gain at this rank"
    if kind == "ratio":
        whole = "kept whole: the budget is better spent elsewhere"
    for name in [name for name, r in ranks.items() if r is None]:
        left.setdefault(name, whole)
    result = surgery.shell(model)
    if survey is None:
        result = _cut(result, ranks)
    else:
        result = fit(result, survey, ranks, left, say)
        survey.warn_if_few_rows("low rank")
    original = {id(parameter) for parameter in model.parameters()}
    new = [parameter for parameter in result.parameters() if id(parameter) not in original]
    result = surgery.clone(result, sharing=new)
    surgery.round_stored(result)
    write_down(result, model, left, calibration, warn=not isinstance(value, Mapping))
    return result


def _widths(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Of the input and of the output of each layer."""
    widths = {}
    for name, layer in layers.items():
        outputs, inputs = pairs.matrix(layer).shape
        widths[name] = (inputs, outputs)
    return widths


def _projected(layers: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The weights [M, K] of layers whose wider side is only asked for through them: the inputs
    before, and the gradients of all that aren't cut in space.
    """
    weights = {}
    for name, layer in layers.items():
        weight = pairs.matrix(layer)
        outputs, inputs = weight.shape
        plain = outputs < inputs or not isinstance(layer, pairs.CONVOLUTIONS)
        if outputs != inputs and plain and not layer._forward_hooks:  # those may change outputs
            weights[name] = weight
    return weights


def _choose(
    budget: budgets.Budget,
    layers: Mapping[str, nn.Module],
    survey: calibrate.Survey | None,
    only_faster: bool | None,
    left: dict[str, str],
) -> dict[str, int | None]:
    """The ranks of layers of which a pair may stand in for the layer; the others are noted."""
    losses = spectra(layers, survey)
    if only_faster is None and budget.by_layer:
        only_faster = False
    shapes = survey.look.first.shapes if survey and only_faster is not False else {}
    allowed = budgets.allowed_ranks(budget, layers, shapes, always=bool(only_faster))
    for name in layers:
        if not allowed[name]:
            left[name] = "no rank is as fast on this machine"
    layers = {name: layer for name, layer in layers.items() if allowed[name]}
    if not layers:
        raise ValueError(
            f"no pair is as fast as its layer on this machine ({len(allowed)} layers tried); "
            f"only_faster=False doesn't ask"
        )
    return budgets.choose_ranks(budget, layers, losses, allowed, weighted=survey is not None)


def _cut(result: nn.Module, ranks: Mapping[str, int | None]) -> nn.Module:
    """Cut the plain SVD of each weight."""
    for name, rank in ranks.items():
        if rank is None:
            continue
        layer: Any = result.get_submodule(name)
        first, second, _, used = factors(layer, pairs.matrix(layer), None, None, rank)
        pair = pairs.pair(layer, first, second, layer.bias, split=used)
        result = surgery.replace(result, {layer: pair})
    return result
