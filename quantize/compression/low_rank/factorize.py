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

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from quantize import surgery
from quantize.compression.low_rank import budget as budgets
from quantize.compression.low_rank.candidates import check_weights, find_layers, reached
from quantize.compression.low_rank.fit import factors, fit
from quantize.compression.low_rank.notes import write_down
from quantize.compression.low_rank.spectra import spectra
from quantize.nn import low_rank as pairs


def factorize_low_rank(
    model: nn.Module,
    *,
    ratio: float | Mapping[str, float] | None = None,
    energy: float | Mapping[str, float] | None = None,
    rank: int | Mapping[str, int] | None = None,
    calibration: Iterable[Any] | None = None,
    skip: surgery.Skip = (),
    split: str = "auto",
    only_faster: bool | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    max_passes: int = 64,
    memory: int = 1 << 30,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """A copy of `model`, in eval mode, whose linears and convolutions are pairs of low rank where
    that is smaller.

    Give at most one budget (none: ratio=0.5); each may be a dict from module name or glob to value,
    and then only the layers it names are touched, each within its own value.
      ratio: fraction in (0, 1] of the layers' parameters that is kept. A number is one budget for
          all layers together; layers
        that matter more keep more, some all. 1 changes nothing.
      energy: fraction in (0, 1] of each layer's (whitened) squared singular values that is kept.
      rank: rank of each layer as given, at most min(in, out). Ranks from ratio and energy are
          rounded to multiples of 8 or 16.
    calibration: re-iterable batches as for `torch.export.export`. With it, layers that are kept
        whole, but come after one that
      is not, get new weights too. Without it each weight is cut by its plain SVD at the same ratio,
      which is much worse.
    skip: names, globs, types. Always skipped, with the reason in `summary(result)`: weights that
        other modules read or share,
      grouped convolutions, layers that no rank makes smaller.
    split: how k x k convolutions are cut: "channel" (k x k, then 1 x 1), "spatial" (k x 1, then 1 x
        k), or "auto", whichever
      loses less in no more parameters than the channel split of that rank.
    only_faster: factorize only where a pair is no slower by timing on this machine, on inputs
        shaped like the first batch's.
      Default: where there is calibration and the budget isn't given layer by layer (rank, a dict),
      for layers that take at least 0.1 ms. True: everywhere, also where only the time of a call
      counts. False: don't time. A number for ratio keeps the pairs of layers that aren't timed
      below 0.8 of their parameters, where they were no slower on the machines we had.
    loss: loss(output, batch), a scalar summed over rows, whose gradients weigh errors; default
        `calibration.fisher_loss`.
    max_passes: limit on calibration passes after the first; above it, layers share a pass. memory:
        bytes of second moments kept
      at a time. progress: called with a line for people before each piece of work, with the layers'
      names.

    Raises ValueError for a budget out of range, two budgets, no layer to act on, a ratio that no
    ranks reach, weights or calibration inputs that are not finite, and a result that doesn't run;
    TypeError for wrong types. A layer that no batch reaches is left, by name. Warns where little of
    the model was touched.
    """
    kind, value = budgets.read_budget(ratio, energy, rank)
    if split not in ("auto", "channel", "spatial"):
        raise ValueError(f"split is {split!r}; allowed: 'auto', 'channel', 'spatial'")
    if only_faster and calibration is None:
        raise ValueError(
            "only_faster=True needs calibration: timing needs the shapes of the layers' inputs"
        )
    say = progress or (lambda line: None)
    result = surgery.clone(model).eval()
    model = surgery.uncompiled(model)
    layers, skipped = find_layers(result, skip)
    values = budgets.per_layer(kind, value, layers, model)
    layers = {name: layers[name] for name in values}
    check_weights(layers)
    if any(tensor.is_inference() for tensor in model.parameters()):
        model = surgery.clone(model)  # made under inference_mode, it takes no gradients
    if calibration is not None:
        layers, idle = reached(model, calibration, layers)
        skipped.update(idle)
        values = {name: values[name] for name in layers}
    if kind == "ratio" and all(v == 1 for v in values.values()):
        ranks: dict[str, int | None] = dict.fromkeys(layers)
        moments: dict[str, torch.Tensor] = {}
    else:
        losses, moments = spectra(model, calibration, layers, loss, memory, say)
        by_layer = kind == "rank" or isinstance(value, Mapping)
        if only_faster is None and by_layer:
            only_faster = False
        free = kind == "ratio" and not by_layer
        allowed = budgets.allowed_ranks(
            model, calibration, layers, global_ratio=free, only_faster=only_faster
        )
        for name in [name for name in layers if not allowed[name]]:
            skipped[name] = "no rank is as fast on this machine"
            del layers[name]
        if not layers:
            raise ValueError(
                f"no pair is as fast as its layer on this machine ({len(values)} layers tried); "
                f"only_faster=False doesn't ask"
            )
        ranks = budgets.choose_ranks(
            kind, value, values, layers, losses, allowed, weighted=calibration is not None
        )
    for name, r in ranks.items():
        if r is None:
            skipped[name] = (
                "kept whole: the budget is better spent elsewhere"
                if kind == "ratio"
                else "no gain at this rank"
            )
    if calibration is None:
        for name, r in ranks.items():
            if r is None:
                continue
            layer: Any = layers[name]
            first, second, _, split_used = factors(layer, pairs.matrix(layer), None, None, r, split)
            result = surgery.replace(
                result, {layer: pairs.pair(layer, first, second, layer.bias, split=split_used)}
            )
    else:
        ranks = {
            name: ranks.get(name) for name in values
        }  # also layers of which no pair is fast enough
        result = fit(
            model,
            result,
            calibration,
            ranks,
            moments,
            loss=loss,
            max_passes=max_passes,
            memory=memory,
            split=split,
            skipped=skipped,
            say=say,
        )
    surgery.round_stored(result)
    write_down(result, model, skipped, calibration, warn=not isinstance(value, Mapping))
    return result
