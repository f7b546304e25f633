"""Recipes: the same as calling the functions; prefixes made once."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from helpers import assert_close, in_int8
from recipe_models import RECIPES, Counted, batches, network, same_bits, things
from torch import nn

import quantize
from quantize import Half, Int4, Int8, LowRank, Prune, Recipe, Recover, Student, calibration
from quantize.compression.int8 import tell_distance
from quantize.compression.recipe import make


def by_hand(recipe: Recipe, model: nn.Module) -> nn.Module:
    """The public functions, called one after the other."""
    x = batches()
    result = model
    for step in recipe.steps:
        match step:
            case Prune():
                result = quantize.prune_ln_structured(
                    result, x[0], amount=step.amount, calibration=x
                )
            case LowRank():
                options = {"ratio": step.ratio, "only_faster": step.only_faster}
                result = quantize.factorize_low_rank(result, calibration=x, **options)
            case Recover():
                result = quantize.recover(result, model, x, steps=step.steps, seed=3)
            case Student():
                cut = quantize.make_student(
                    model, width=step.width, example_inputs=x[0], calibration=x
                )
                options = {"steps": step.steps, "temperature": 1.0, "seed": 3}
                result = quantize.distill(cut, model, x, **options)
            case Half():
                result = quantize.to_half(result, getattr(torch, step.dtype))
            case Int8():
                small = in_int8(result, calibration=x if step.smooth else None)
                if not step.smooth:
                    tell_distance(small, result, x[0])
                result = small
            case Int4():
                result = quantize.quantize_weights(result, calibration=x)
    return result


class Waves(nn.Sequential):
    """Sines of large arguments, which int8 moves far."""

    def forward(self, x):
        first, second = self
        return second(torch.sin(30 * first(x)))


def test_int8_in_a_recipe_says_how_far_it_moved():
    """Without SmoothQuant too: the summary has the distance on the first batch, and a large one is
    warned of.
    """
    torch.manual_seed(0)
    model = Waves(nn.Linear(32, 64), nn.Linear(64, 8)).eval()
    with pytest.warns(UserWarning, match="outputs of Waves moved by"):
        small = Recipe([Int8()])(model, things())
    away = calibration.distance(small, model, batches()[:1])
    assert quantize.summary(small).steps[-1].distance == away > 0.05


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (Recipe([Prune(0.9)]), ["pruning"]),
        (Prune(0.9) >> Recover(1), ["recovering"]),
        (Prune(0.9) >> Int8(), ["pruning"]),
        (Prune(0.1) >> Recover(1), []),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_recipe_warns_of_its_result_and_not_of_its_middle(recipe, told):
    """How far a pruned model is from the original is no news where a training follows."""
    asked = network(), replace(things(), calibration=None)
    for made in (lambda: recipe(*asked), lambda: list(make([recipe], *asked))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made()
        far = [str(each.message) for each in caught if each.category is calibration.FarAway]
        assert [line.split(":")[0] for line in far] == told


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_is_its_functions_in_a_row(recipe):
    """The same weights and notes, bit for bit, as by hand; the original stays as it is."""
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = recipe(model, things())
    expected = by_hand(recipe, model)
    assert same_bits(made, expected)
    assert torch.equal(made(batches()[0]), expected(batches()[0]))
    assert quantize.summary(made) == quantize.summary(expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_a_teacher_that_is_given_is_the_teacher():
    """`Recover` learns from the original, or from `given.teacher`."""
    model, other = network(), network()
    with torch.no_grad():
        other[4].weight.neg_()
    recipe = Prune(0.5) >> Recover(20)
    taught = recipe(model, replace(things(), teacher=other))
    pruned = quantize.prune_ln_structured(model, batches()[0], amount=0.5, calibration=batches())
    expected = quantize.recover(pruned, other, batches(), steps=20, seed=3)
    assert same_bits(taught, expected)
    assert not same_bits(taught, recipe(model, things()))


@pytest.mark.parametrize("as_function", [False, True])
def test_joined_batches_are_the_given_ones_in_a_row(as_function):
    """`Recover(joined=2)` sees what recovery on pairs of batches sees."""
    x = batches(8)
    pairs = [torch.cat(x[i : i + 2]) for i in range(0, 8, 2)]
    model = network()
    given = replace(things(), batches=(lambda step: x[step % 8]) if as_function else x)
    made = (Prune(0.5) >> Recover(3, joined=2))(model, given)
    pruned = quantize.prune_ln_structured(model, x[0], amount=0.5, calibration=batches())
    source = (lambda step: pairs[step % 4]) if as_function else pairs
    assert same_bits(made, quantize.recover(pruned, model, source, steps=3, seed=3))
    with pytest.raises(ValueError, match="joined is 5, and there are 4 batches"):
        (Prune(0.5) >> Recover(3, joined=5))(model, things())


def test_trainings_are_told_and_kept_by_name(tmp_path):
    """Each training has its state in a file named by the recipe so far, and its own printer."""
    named, lines = [], []

    class Printer:
        def __init__(self, name):
            named.append(name)

        def __enter__(self):
            return lambda at: named.append(at.step)

        def __exit__(self, *_):
            pass

    recipe = Prune(0.5) >> Recover(2) >> Int8()
    given = replace(things(), states=tmp_path, printer=Printer, progress=lines.append)
    made = recipe(network(), given)
    assert named == ["pruned_recovered", 1, 2]
    assert any(line.startswith("pruned_recovered: ") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["pruned_recovered.state"]
    resumed = replace(given, training={"resume": True})
    assert same_bits(recipe(network(), resumed), made)
    other = Prune(0.5, n=1.0) >> Recover(2)
    with pytest.raises(ValueError, match="another run"):
        other(network(), resumed)


@pytest.fixture
def calls():
    """The amounts with which `Counted` was called, in order."""
    Counted.calls.clear()
    return Counted.calls


def test_prefixes_are_made_once(calls):
    """Recipes that start alike share the steps; each gets what it gets alone."""
    a, b, c = Counted(1.0), Counted(2.0), Counted(4.0)
    wanted = [Recipe([a]), a >> b, a >> b >> c, Recipe([c]), a >> b >> Counted(8.0), a >> b]
    results = list(make(wanted, network()))
    assert [result.recipe for result in results] == wanted
    assert [amount for amount, _ in calls] == [1.0, 2.0, 4.0, 4.0, 8.0]
    bias = network()[0].bias
    for result, total in zip(results, [1, 3, 7, 4, 11, 3], strict=True):
        assert_close(result.model[0].bias, bias + total)
    assert results[1].model is results[5].model


def test_a_failing_recipe_is_not_the_end_of_the_others(calls):
    """It gives its error; one that goes on from it says which one failed, once."""
    bad, good = Counted(-1.0), Counted(1.0)
    wanted = [Recipe([bad]), bad >> good, good >> bad >> good >> good, good >> good]
    results = list(make(wanted, network()))
    assert [str(result.error) for result in results] == [
        "below zero", "counted failed: below zero", "counted+counted failed: below zero", "None",
    ]  # fmt: skip
    assert isinstance(results[0].error, RuntimeError) and results[0].model is None
    assert len(calls) == 4 and results[3].model is not None


def test_models_are_kept_no_longer_than_needed(calls):
    """While a later recipe is made, what none needs any more is gone."""
    import gc
    import weakref

    results = make([Recipe([Counted(1.0)]), Recipe([Counted(2.0)])], network())
    first = weakref.ref(next(results).model)
    next(results)
    gc.collect()
    assert first() is None


def test_make_takes_recipes():
    """A step alone is refused before anything is made."""
    with pytest.raises(TypeError, match="make takes recipes"):
        make([Prune(0.5)], network())
