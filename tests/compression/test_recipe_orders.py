"""Recipes by name: orders that are allowed, values in range, what a step needs."""

from __future__ import annotations

import itertools
import math

import pytest
from recipe_models import LOW_RANK, RECIPES, network, things
from torch import nn

from quantize import Half, Int4, Int8, LowRank, Prune, Recipe, Recover, Student
from quantize.compression.recipe import make


def test_names_join_parts_and_keep_the_older_rows():
    """`+` between parts; the rows that had names before keep them."""
    names = [recipe.name for recipe in RECIPES]
    assert names == [
        "pruned", "pruned_recovered", "pruned+recovered+int8", "low_rank+recovered+bf16",
        "pruned+low_rank+recovered+int8", "pruned+recovered+pruned+recovered+int4", "student_int8",
        "int8", "fp16",
    ]  # fmt: skip
    assert (LowRank() >> Recover(1)).name == "low_rank_recovered"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Int8(), Prune()], "Prune can't follow Int8"),
        ([Int4(), Prune()], "Prune can't follow Int4"),
        ([Int8(), LowRank()], "LowRank can't follow Int8"),
        ([Int4(), LowRank()], "LowRank can't follow Int4"),
        ([Prune(), Int8(), Recover(1)], "Recover can't follow Int8"),
        ([Prune(), Int4(), Recover(1)], "Recover can't follow Int4"),
        ([Prune(), Half(), Recover(1)], "Recover can't follow Half"),
        ([Half(), Int4()], "Int4 can't follow Half"),
        ([Int4(), Int8(), Int4()], "Int4 can't follow Int8"),
        ([Int8(), Int4()], "Int4 can't follow Int8"),
        ([Int8(), Int8()], "Int8 can't follow Int8"),
        ([Half(), Int8()], "Int8 can't follow Half"),
        ([Int8(), Half(), Half()], "Half can't follow Half"),
        ([Recover(1)], "Recover has nothing to recover: put Prune"),
        ([Prune(), Recover(1), Recover(1)], "Recover has nothing to recover after Recover"),
        ([Student(1, width=0.5), Recover(1)], "Recover has nothing to recover after Student"),
        ([Prune(), Student(1, width=0.5)], "Student can't follow Prune"),
        ([Int8(), Student(1, width=0.5)], "Student can't follow Int8"),
        ([], "1 to 32 steps"),
        ([Prune()] * 33, "1 to 32 steps"),
    ],
)
def test_wrong_orders_are_refused_when_the_recipe_is_made(steps, message):
    """However it is put together, and naming the step."""
    with pytest.raises(ValueError, match=message):
        Recipe(steps)
    if len(steps) > 1:
        with pytest.raises(ValueError, match=message):
            joined = steps[0]
            for step in steps[1:]:
                joined = joined >> step


STEPS = [Prune(0.5), LOW_RANK, Recover(1), Half(), Int8(), Int4(), Student(1, width=0.5)]


@pytest.mark.slow
def test_every_order_that_is_allowed_can_be_made():
    """No recipe of three steps is refused by a step after it was accepted."""
    accepted = []
    for steps in itertools.product(STEPS, repeat=3):
        if steps.count(LOW_RANK) > 1:  # pairs are not factorized again
            continue
        if steps[-2].rounds:  # which leaves no float in this network
            continue
        try:
            accepted.append(Recipe(steps))
        except ValueError:
            continue
    assert 20 < len(accepted) < 100
    results = list(make(accepted, network(), things()))
    assert {result.recipe.name: result.error for result in results if result.error} == {}


def test_joining_is_associative():
    """Steps and recipes join in any grouping to the same recipe."""
    a, b, c = Prune(0.5), Recover(1), Int8()
    assert (a >> b) >> c == Recipe([a, b, c])
    assert (a >> b) >> Recipe([c]) == a >> b >> c
    assert len({a >> b >> c, Recipe([a, b, c])}) == 1


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Prune(1.0), ValueError, r"Prune.amount is 1.0; allowed: \[0, 1\)"),
        (lambda: Prune({"a": -0.1}), ValueError, r"Prune.amount\['a'\] is -0.1"),
        (lambda: Prune({}), ValueError, "empty dict"),
        (lambda: Prune({1: 0.5}), TypeError, "names of layers"),
        (lambda: Prune("half"), TypeError, "Prune.amount must be a number"),
        (lambda: Prune(n=0), ValueError, "Prune.n"),
        (lambda: Prune(math.nan), ValueError, "Prune.amount is nan"),
        (lambda: Prune(skip="head"), TypeError, "Prune.skip must be a sequence"),
        (lambda: Prune(skip=(nn.Linear,)), TypeError, "Prune.skip takes names"),
        (lambda: LowRank(0.0), ValueError, r"LowRank.ratio is 0.0; allowed: \(0, 1\]"),
        (lambda: LowRank(only_faster="yes"), ValueError, "LowRank.only_faster"),
        (lambda: Recover(0), ValueError, "Recover.steps is 0"),
        (lambda: Recover(True), ValueError, "Recover.steps is True"),
        (lambda: Recover(1, joined=0), ValueError, "Recover.joined is 0"),
        (lambda: Recover(1, temperature=-1), ValueError, "Recover.temperature"),
        (lambda: Student(1), ValueError, "depth"),
        (lambda: Student(1, depth=1.5), ValueError, "Student.depth is 1.5"),
        (lambda: Student(1, depth=0), ValueError, "Student.depth is 0"),
        (lambda: Student(1, width=2), ValueError, "Student.width is 2"),
        (
            lambda: Half("float32"),
            ValueError,
            "Half.dtype is 'float32'; allowed: 'float16', 'bfloat16'",
        ),
        (lambda: Int8(embeddings=1), ValueError, "Int8.embeddings is 1"),
        (lambda: Int8(prefer="both"), ValueError, "Int8.prefer"),
        (lambda: Int4(48), ValueError, "Int4.group_size is 48"),
        (lambda: Recipe(Prune()), TypeError, "a sequence of steps"),
        (lambda: Recipe([Prune]), TypeError, "a recipe consists of steps"),
        (lambda: Prune() >> 3, TypeError, "a recipe consists of steps"),
    ],
)
def test_values_out_of_range_are_refused_by_name(build, error, message):
    """When the step is made, before any work."""
    with pytest.raises(error, match=message):
        build()


def test_what_a_step_needs_is_asked_for():
    """A recipe without the inputs that it needs says which."""
    for recipe, missing in [
        (Recipe([Prune(0.5)]), "Prune needs example_inputs"),
        (Recipe([Student(1, width=0.5)]), "Student needs batches"),
        (LOW_RANK >> Recover(1), "Recover needs batches"),
        (Recipe([Int8(smooth=True)]), "needs calibration"),
    ]:
        with pytest.raises(ValueError, match=missing):
            recipe(network())
