"""Recipes: the same as calling the functions, stored and read back, refused in wrong orders,
prefixes made once.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import assert_close
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

import quantize
from quantize import Given, Half, Int4, Int8, LowRank, Prune, Recipe, Recover, Student
from quantize.compression.recipe import Made, Step, make


def network() -> nn.Module:
    torch.manual_seed(0)
    body = (nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    return nn.Sequential(*body).eval()


def batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 32, generator=generator) for _ in range(count)]


def things() -> Given:
    x = batches()
    return Given(example_inputs=x[0], calibration=x, batches=x, seed=3)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# ------------------------------------------------------------------------------------ what a recipe
# does


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
                result = quantize.quantize_dynamic(result, calibration=x if step.smooth else None)
            case Int4():
                result = quantize.quantize_weights(result, calibration=x)
    return result


LOW_RANK = LowRank(0.6, only_faster=False)
RECIPES = [
    Recipe([Prune(0.5)]),
    Prune({"0": 0.5}) >> Recover(3),
    Prune(0.5) >> Recover(3) >> Int8(),
    LOW_RANK >> Recover(2) >> Half("bfloat16"),
    Prune(0.25) >> LOW_RANK >> Recover(2) >> Int8(),
    Prune(0.5) >> Recover(1) >> Prune(0.5) >> Recover(1) >> Int4(),
    Student(2, width=0.5) >> Int8(),
    Recipe([Int8(smooth=True)]),
    Recipe([Half()]),
]


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


# ------------------------------------------------------------------------------------ names and
# orders


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
        ([Int4(), Int8()], "Int8 can't follow Int4"),
        ([Int8(), Int4()], "Int4 can't follow Int8"),
        ([Int8(), Int8()], "Int8 can't follow Int8"),
        ([Int8(), Half()], "Half can't follow Int8"),
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
        (lambda: Recover(True), TypeError, "Recover.steps must be an integer"),
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


# ------------------------------------------------------------------------------------ files

layer_names = st.lists(st.text(max_size=8), max_size=2)
shares = st.floats(0.01, 0.99)
amounts = st.one_of(shares, st.dictionaries(st.text(max_size=8), shares, min_size=1, max_size=3))
counts = st.integers(1, 10**6)
removing = st.one_of(
    st.builds(
        Prune, amount=amounts, n=st.one_of(st.floats(0.1, 9), st.just(math.inf)), skip=layer_names
    ),
    st.builds(
        LowRank, ratio=amounts, skip=layer_names, only_faster=st.sampled_from([None, True, False])
    ),
)
recovering = st.builds(
    Recover, counts, hidden=layer_names, joined=st.integers(1, 9), temperature=st.floats(0.1, 9)
)
students = st.builds(
    Student, counts, depth=st.one_of(shares, st.integers(1, 9)), width=st.one_of(st.none(), shares)
)
rounding = st.one_of(
    st.builds(Half, dtype=st.sampled_from(["float16", "bfloat16"]), skip=layer_names),
    st.builds(
        Int8,
        embeddings=st.booleans(),
        smooth=st.booleans(),
        prefer=st.sampled_from(["size", "speed"]),
    ),
    st.builds(Int4, group_size=st.sampled_from([32, 64, 128, 256]), skip=layer_names),
)


@st.composite
def recipes(draw):
    steps = [draw(students)] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        steps.append(draw(removing))
        if draw(st.booleans()):
            steps.append(draw(recovering))
    if not steps or draw(st.booleans()):
        steps.append(draw(rounding))
    return Recipe(steps)


@settings(max_examples=100, deadline=None)
@drawn(recipes())
def test_json_gives_an_equal_recipe(recipe):
    """As text and as the values in it; equal recipes have equal hashes and names."""
    read = Recipe.from_json(recipe.to_json())
    assert read == recipe and hash(read) == hash(recipe) and read.name == recipe.name
    assert Recipe.from_json(recipe.as_values()) == recipe
    assert [type(step) for step in read.steps] == [type(step) for step in recipe.steps]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_holds_its_recipe(suffix, tmp_path):
    """Saved as metadata and read back, it makes the same model again."""
    recipe = Prune({"0": 0.5}, n=math.inf) >> Int8()
    made = recipe(network(), things())
    path = tmp_path / f"small{suffix}"
    quantize.save(made, path, metadata={"recipe": recipe.as_values()})
    read = Recipe.from_json(quantize.read_metadata(path)["recipe"])
    assert read == recipe
    assert same_bits(read(network(), things()), quantize.load(path, model=network()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a recipe is JSON"),
        ("{}", "a recipe is a list of steps"),
        ('"Prune"', "a recipe is a list of steps"),
        ("[]", "1 to 32 steps"),
        ("[3]", "a step of a recipe is a dict"),
        ('[{"amount": 0.5}]', "a step of a recipe is a dict"),
        ('[{"step": "Melt"}]', "the step 'Melt'; known: Prune, LowRank"),
        (
            '[{"step": "Prune", "much": 1}]',
            "step Prune has the field 'much'; known: amount, n, skip",
        ),
        ('[{"step": "Prune", "amount": "all"}]', "Prune.amount must be a number"),
        ('[{"step": "Prune", "amount": 2}]', "Prune.amount is 2"),
        ('[{"step": "Recover"}]', "step Recover of a recipe.*steps"),
        ('[{"step": "Int8"}, {"step": "Prune"}]', "Prune can't follow Int8"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(text, message):
    """Unknown steps, unknown fields, values and orders that can't be: ValueError."""
    with pytest.raises(ValueError, match=message):
        Recipe.from_json(text)


# ------------------------------------------------------------------------------------ several at
# once


@dataclass(frozen=True)
class Counted(Step):
    """Adds to the first bias, and counts."""

    amount: float
    part = "counted"
    calls = []  # noqa: RUF012

    def __call__(self, model, given):
        self.calls.append((self.amount, given.recipe.name))
        if self.amount < 0:
            raise RuntimeError("below zero")
        copy = network()
        copy.load_state_dict(model.state_dict())
        copy[0].bias.data.add_(self.amount)
        return copy


@pytest.fixture
def calls():
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


def test_a_step_of_ones_own_is_stored_like_any_other():
    """By its name; a second step of that name elsewhere is refused."""
    recipe = Counted(0.5) >> Int8()
    assert Recipe.from_json(recipe.to_json()) == recipe and recipe.name == "counted+int8"
    with pytest.raises(ValueError, match="two steps are named 'Prune'"):
        type("Prune", (Step,), {"__module__": "elsewhere"})
    assert isinstance(next(make([recipe], network())), Made)
