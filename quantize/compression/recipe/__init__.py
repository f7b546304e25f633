"""A compression as a value: steps that can be applied, stored, compared and refused.

    recipe = Prune(0.5) >> Recover(160) >> Int8()
    given = Given(example_inputs=inputs, calibration=batches, batches=batches)
    small = recipe(model, given)
    quantize.save(small, "small.pth", metadata={"recipe": recipe.as_values()})
    assert Recipe.from_json(quantize.read_metadata("small.pth")["recipe"]) == recipe

`value` has the recipe, `steps` and `trained` what it is made of, `make` applies several recipes and
makes what they share once,
`blockwise` applies one to a model block by block.
"""

from quantize.compression.recipe.blockwise import write_by_block
from quantize.compression.recipe.make import Made, make
from quantize.compression.recipe.steps import ChannelsLast, Drop, Half, Int4, Int8, LowRank, Prune
from quantize.compression.recipe.trained import Recover, Student
from quantize.compression.recipe.value import Given, Recipe, Step

__all__ = [
    "ChannelsLast",
    "Drop",
    "Given",
    "Half",
    "Int4",
    "Int8",
    "LowRank",
    "Made",
    "Prune",
    "Recipe",
    "Recover",
    "Step",
    "Student",
    "make",
    "write_by_block",
]
