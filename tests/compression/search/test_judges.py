"""What tells `compress` how much a model has lost: the user's metric, and the outputs."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from compression.search.test_search import Net, batches, by_bytes, search
from torch import Tensor, nn

from quantize.compression.search.divergence import Divergence
from quantize.compression.search.judge import Evaluated
from quantize.measuring.artifact import as_metrics, per_example

__all__ = ["batches", "by_bytes"]  # fixtures for the tests here


def values_of(model: nn.Module) -> Tensor:
    """A value for each of 500 examples, about 1, and 0.1 more for models without a first layer of
    64 outputs.
    """
    generator = torch.Generator().manual_seed(0)
    shift = 0.0 if getattr(model[0], "out_features", 0) == 64 else 0.1
    return 1 + torch.randn(500, generator=generator) + shift


def test_values_of_examples_tell_the_noise():
    """The mean counts. Its noise, and that of a difference example by example, are what resampling
    the examples gives.
    """
    first = values_of(Net())
    second = first + 0.1 + 0.05 * torch.randn(500, generator=torch.Generator().manual_seed(1))
    answers = iter([first, first, second])
    judge = Evaluated(lambda model: {"error": next(answers)}, Net())
    score = judge.score(Net())
    assert judge.value == pytest.approx(first.double().mean().item())
    assert score.loss == pytest.approx((second - first).double().mean().item(), rel=1e-5)
    drawn = np.random.default_rng(0).integers(0, 500, (4000, 500))
    for noise, values in ((judge.noise, first), (score.noise, second - first)):
        assert noise == pytest.approx(values.numpy()[drawn].mean(1).std(), rel=0.05)
    assert score.noise < judge.noise / 10


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_values_come_as_lists_arrays_and_tensors(kind):
    """Booleans too; the other metrics of a dict stay numbers."""
    metrics = as_metrics({"accuracy": kind([True, False, True, True]), "loss": 0.5})
    assert metrics["accuracy"] == 0.75 and metrics["loss"] == 0.5 and metrics["examples"] == 4
    assert metrics["standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    each = per_example(("accuracy", kind([1.0, 0.0])))
    assert each is not None and each.tolist() == [1, 0] and per_example(0.5) is None
    with pytest.raises(TypeError, match="one for each example"):
        as_metrics({"accuracy": kind([])})


def agreement(model: nn.Module) -> float:
    """Share of answers that are the original's: a bare number, better when higher."""
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
    same = model(inputs).argmax(-1) == Net()(inputs).argmax(-1)
    return same.double().mean().item()


@pytest.mark.parametrize("evaluate", [agreement, lambda model: agreement(model)])
def test_a_bare_number_gets_worse_as_its_name_or_a_shuffled_copy_says(evaluate):
    """Fewer right answers are a loss, though "metric" doesn't say so; more errors are one too."""
    worse = Net()
    nn.init.zeros_(worse[0].weight)
    lost = 1 - agreement(worse)
    assert lost > 0
    assert Evaluated(evaluate, Net()).score(worse).loss == pytest.approx(lost)
    errors = Evaluated(lambda model: 1 - evaluate(model), Net())
    assert errors.score(worse).loss == pytest.approx(lost)


def test_a_number_of_which_nothing_says_what_is_better_is_named():
    """Neither its name, nor its function's, nor a copy with shuffled weights."""
    with pytest.warns(UserWarning, match="whether a higher 'metric' is better"):
        assert not Evaluated(lambda model: 0.5, Net()).higher


class Embedded(Net):
    """Its answers have length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(x), dim=-1)


@pytest.mark.parametrize("kind", [Embedded, lambda: nn.Sequential(Net(), nn.Sigmoid())])
def test_embeddings_and_probabilities_are_no_logits(kind, batches):
    """Their softmax is nearly uniform whatever they are, so they are compared by their cosine."""
    judge = Divergence(kind(), batches)
    assert judge.name == "cosine_distance" and judge.scale == 1
    assert Divergence(Net(), batches).logits


def test_single_numbers_are_judged_by_the_variance_that_is_left(batches):
    """1 - R^2, by hand: a price has no direction whose cosine could change."""
    price = nn.Linear(16, 1)
    nn.init.constant_(price.bias, 10.0)
    other = copy.deepcopy(price)
    with torch.no_grad():
        other.weight.mul_(0.5)
        expected, actual = (torch.cat([m(b) for b in batches]) for m in (price, other))
    judge = Divergence(price, batches)
    unexplained = (actual - expected).square().mean() / expected.var(correction=0)
    assert judge.name == "unexplained_variance" and judge.score(price).loss == 0
    assert judge.score(other).loss == pytest.approx(unexplained.item(), rel=1e-4)
    assert judge.score(nn.Sequential(other, nn.Flatten())).loss > 0.2


class TwoHeads(nn.Module):
    """Logits, and a pair of numbers beside them of which `zeroed` leaves nothing."""

    def __init__(self, zeroed: bool) -> None:
        super().__init__()
        self.zeroed = zeroed

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        loss = x.mean() + self.zeroed
        beside = x[:, 3:5] * (0 if self.zeroed else 1)
        return {
            "loss": loss,
            "beside": beside,
            "empty": torch.full((2,), math.nan),
            "logits": x[:, :3],
        }


def test_an_output_beside_the_logits_is_not_forgotten(batches):
    """The output that has lost the largest share counts, as that share of the entropy; one that
    never was finite does not, nor does a scalar.
    """
    judge = Divergence(TwoHeads(False), batches)
    assert judge.name == "kl_divergence" and judge.score(TwoHeads(False)).loss == 0
    assert judge.score(TwoHeads(True)).loss == pytest.approx(0.5 * judge.scale)


@pytest.mark.slow
def test_percents_of_a_divergence_are_of_the_entropy(batches):
    """The original's cross-entropy against itself; so a loss of some percent can be kept."""
    model = Net().eval()
    with torch.no_grad():
        odds = torch.cat([model(batch) for batch in batches]).softmax(-1)
    expected = torch.distributions.Categorical(odds).entropy().mean().item()
    assert Divergence(model, batches).scale == pytest.approx(expected, rel=1e-4)
    assert Divergence(nn.Flatten(0), [torch.ones(2, 3)]).scale == 1
    result = search(model, batches, {"max_loss": "1%", "bytes": 8_000})
    assert result.met and result.file.stem != "original"
