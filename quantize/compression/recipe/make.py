"""Make the models of several recipes, each shared prefix once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from quantize.compression.recipe.value import Given, Recipe


@dataclass(frozen=True)
class Made:
    """What became of one recipe: a model, or the error that kept it from being made."""

    recipe: Recipe
    model: nn.Module | None = None
    error: Exception | None = None


def make(recipes: Iterable[Recipe], model: nn.Module, given: Given | None = None) -> Iterator[Made]:
    """Apply recipes to one model, in order; what several of them start with is made once.

    A model is kept no longer than a later recipe needs it. A recipe that fails, or that starts with
    one that failed, gives its error, and the others are made.

    Args:
        recipes: in the order in which they are to be made.
        model: the original, which stays as it is.
        given: what the steps work with.

    Yields:
        A `Made` for each recipe.

    Raises:
        TypeError: something that is no recipe.
    """
    recipes = tuple(recipes)
    for recipe in recipes:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"make takes recipes, got {recipe!r}; of one step: Recipe([step])")
    return _made(recipes, model, given or Given())


def _made(recipes: tuple[Recipe, ...], original: nn.Module, given: Given) -> Iterator[Made]:
    known: dict[Recipe, Made] = {}
    for index, recipe in enumerate(recipes):
        made = Made(recipe, original)
        for prefix in recipe.prefixes:
            if prefix not in known:
                is_mended = recipe.mends(prefix) and prefix not in recipes
                known[prefix] = _step(prefix, made, original, given, is_mended)
            made = known[prefix]
        needed: set[Recipe] = set()
        for later in recipes[index + 1 :]:
            needed.update(later.prefixes)
        known = {prefix: result for prefix, result in known.items() if prefix in needed}
        yield _told(recipe, made)


def _step(recipe: Recipe, before: Made, original: nn.Module, given: Given, is_mended: bool) -> Made:
    """The last step of `recipe`, on what the steps before it made; their error, if they failed."""
    if before.model is None:
        return before
    given.say(f"making {recipe.name}")
    try:
        made = recipe.finished(before.model, original, given, is_mended=is_mended)
        return Made(recipe, made)
    except Exception as error:
        return Made(recipe, error=error)


def _told(recipe: Recipe, made: Made) -> Made:
    """What became of `recipe`, where `made` may be of the prefix that failed."""
    if made.recipe == recipe:
        return made
    return Made(recipe, error=ValueError(f"{made.recipe.name} failed: {made.error}"))
