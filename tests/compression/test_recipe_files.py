"""Recipes are stored and read back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from recipe_models import Counted, network, same_bits, things

import quantize
from quantize import Half, Int4, Int8, LowRank, Prune, Recipe, Recover, Student
from quantize.compression.recipe import Made, Step, make

# Characters that JSON writes in other ways; among all of Unicode hypothesis looks for seconds.
names = st.text('az.*"/\\\n\0\x7f\xe9\u2028\U0001f600', max_size=8)


layer_names = st.lists(names, max_size=2)


shares = st.floats(0.01, 0.99)


amounts = st.one_of(shares, st.dictionaries(names, shares, min_size=1, max_size=3))


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


@pytest.mark.slow
@settings(max_examples=100)
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


def test_a_step_of_ones_own_is_stored_like_any_other():
    """By its name; a second step of that name elsewhere is refused."""
    recipe = Counted(0.5) >> Int8()
    assert Recipe.from_json(recipe.to_json()) == recipe and recipe.name == "counted+int8"
    with pytest.raises(ValueError, match="two steps are named 'Prune'"):
        type("Prune", (Step,), {"__module__": "elsewhere"})
    assert isinstance(next(make([recipe], network())), Made)
