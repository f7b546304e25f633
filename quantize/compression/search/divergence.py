"""What a model has lost where nobody's metric judges it: how far its outputs are from the
original's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize import surgery
from quantize.calibration import call, main_output, output_tensors, watching, without_cache
from quantize.compression.distillation.match import is_categories
from quantize.compression.search.judge import Score
from quantize.measuring.artifact import standard_error

KL, COSINE, UNEXPLAINED = "kl_divergence", "cosine_distance", "unexplained_variance"
DIVERGENCES = (KL, COSINE, UNEXPLAINED)
TINY = 1e-9  # entropy of answers that are certain


def fitted(batches: Sequence[Any]) -> Sequence[Any]:
    """Those of batches that calibrate where the others judge; one does both."""
    return batches[: (len(batches) + 1) // 2]


def held_out(batches: Sequence[Any]) -> Sequence[Any]:
    """Those that judge where nobody's metric does."""
    return batches[len(fitted(batches)) :] or batches


class Divergence:
    """Judges by the outputs on held-out batches, each output by what it is: KL divergence of
    logits, the unexplained share of the variance of single numbers, 1 - cosine of other rows.

    `scale` is what a loss in percent is a share of: the entropy of the original's answers, which is
    its cross-entropy against itself and rises by the divergence; of others, 1. Of several outputs
    the one that has lost the largest share counts, in the units of the main one.

    Args:
        original: its outputs are kept.
        batches: as `calibration.call` takes them.

    Raises:
        ValueError: the original gives something that isn't finite.
    """

    higher = False

    def __init__(self, original: nn.Module, batches: Sequence[Any]) -> None:
        self.batches = batches
        answers = [_answers(original, batch) for batch in batches]
        found = [_Output(of_batches) for of_batches in zip(*answers, strict=False)]
        main = found[0]
        if not main.finite:
            raise ValueError("the original's outputs on calibration are not finite")
        self.outputs = {place: output for place, output in enumerate(found) if output.finite}
        self.logits = main.name == KL
        self.name, self.scale = main.name, main.scale
        self.value = 0.0
        self.noise = 0.0
        self.metrics = {self.name: 0.0}

    def score(self, model: Any) -> Score:
        """Raises ValueError for outputs of another shape or that are not finite."""
        lost: dict[int, list[Tensor]] = {place: [] for place in self.outputs}
        for number, batch in enumerate(self.batches):
            answers = _answers(model, batch)
            if len(answers) <= max(self.outputs):
                raise ValueError(f"it has {len(answers)} outputs, not {max(self.outputs) + 1}")
            for place, output in self.outputs.items():
                lost[place].append(output.share(answers[place][0], number))
        each = max(map(torch.stack, lost.values()), key=torch.mean)
        each = each * self.scale
        loss = each.mean().item()
        return Score({self.name: loss}, loss, standard_error(each))


class _Output:
    """One output of the original, on all batches.

    Args:
        answers: of each batch, the rows [N, C] and whether they are logits.
    """

    def __init__(self, answers: Sequence[tuple[Tensor, bool]]) -> None:
        self.rows = [rows for rows, _ in answers]
        self.finite = all(len(rows) and rows.isfinite().all() for rows in self.rows)
        self.scale = 1.0
        if all(is_logits for _, is_logits in answers):
            self.name, self.measure = KL, _kl
            self.scale = max(_entropy(self.rows), TINY)
        elif all(rows.shape[1] == 1 for rows in self.rows):
            self.name = UNEXPLAINED
            self.measure = partial(_unexplained, variance=_variance(self.rows))
        else:
            self.name, self.measure = COSINE, _cosine_distance

    def share(self, actual: Tensor, batch: int) -> Tensor:
        """What rows of a batch have lost, as a share of `scale`."""
        expected = self.rows[batch]
        if actual.shape != expected.shape:
            raise ValueError(f"its output is {list(actual.shape)}, not {list(expected.shape)}")
        lost = self.measure(actual, expected).double()
        if not torch.isfinite(lost):
            raise ValueError("its outputs are not finite")
        return lost.clamp(min=0) / self.scale  # rounding may leave less


def _answers(model: Any, batch: Any) -> list[tuple[Tensor, bool]]:
    """The floating outputs, the main one first, as rows [N, C] in fp32, and whether they are
    logits. Beside the main one scalars don't count: losses, where labels are among the inputs.
    """
    with torch.no_grad():
        if surgery.is_eager(model):
            with watching((), model), without_cache(model):
                output = call(model, batch)
        else:
            output = call(model, batch)
    main = main_output(output)
    others = [part for part in output_tensors(output) if part.is_floating_point() and part.ndim]
    rows = [_rows(main), *(_rows(part) for part in others if part is not main)]
    is_logits = is_categories(output) and not (output is main and _normalized(rows[0]))
    return [(rows[0], is_logits), *((other, False) for other in rows[1:])]


def _rows(output: Tensor) -> Tensor:
    columns = output.shape[-1] if output.ndim > 1 else 1
    return output.reshape(-1, columns).float().clone()


def _normalized(rows: Tensor) -> bool:
    """Probabilities, or embeddings of length 1? As logits they would all be nearly uniform."""
    shares = (rows >= 0).all() and (rows <= 1).all()
    return bool(shares or ((rows.norm(dim=-1) - 1).abs() < 1e-3).all())


def _entropy(logits: Sequence[Tensor]) -> float:
    """Of the answers in batches of rows [N, C], in nats, on average."""
    logs = torch.cat(list(logits)).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean().item()


def _kl(actual: Tensor, expected: Tensor) -> Tensor:
    target = expected.log_softmax(-1)
    return F.kl_div(actual.log_softmax(-1), target, log_target=True, reduction="batchmean")


def _cosine_distance(actual: Tensor, expected: Tensor) -> Tensor:
    """1 - cosine of rows, from their difference: rounding leaves 0 at 0, also of rows of zeros."""
    apart = F.normalize(actual, dim=-1) - F.normalize(expected, dim=-1)
    return apart.square().sum(-1).mean() / 2


def _unexplained(actual: Tensor, expected: Tensor, variance: Tensor) -> Tensor:
    """1 - R^2."""
    return (actual - expected).square().mean() / variance


def _variance(numbers: Sequence[Tensor]) -> Tensor:
    """Of the original's numbers [N, 1]; their mean square where all are the same, or 1."""
    values = torch.cat(list(numbers)).double()
    spread, power = values.var(correction=0), values.square().mean()
    usual = spread if spread > 1e-12 * power else power
    return usual if usual > 0 else torch.ones_like(usual)
