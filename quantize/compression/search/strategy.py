"""Which recipe to try next, from what the ones before gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from quantize import surgery
from quantize.compression.recipe import (
    ChannelsLast,
    Half,
    Int4,
    Int8,
    LowRank,
    Prune,
    Recipe,
    Recover,
)
from quantize.compression.search.times import BF16, INT4, INT8
from quantize.host import native_bf16

FIRST_SHARE = 0.3  # removed by the first recipe of a technique
FINEST = 0.04  # two shares that are nearer are not told apart
PRUNED, FACTORIZED = "pruned", "low_rank"

Row = dict[str, Any]


def whole(small_wanted: bool, mostly_linear: bool, tables: bool) -> Iterator[Recipe]:
    """Recipes that keep every channel: other weights for the same layers. What gains most comes
    first, as the minutes may be over.

    Args:
        small_wanted: whether bytes or memory are asked for.
        mostly_linear: whether linear layers, which alone can have 4 bits, have most of the weights.
        tables: whether embeddings become int8 too.
    """
    yield Recipe((Int8(embeddings=tables),))
    if small_wanted and mostly_linear:
        yield Recipe((Int4(),))
        if tables:
            yield Int4() >> Int8(embeddings=True)
    if native_bf16("cpu"):
        yield Recipe((Half("bfloat16"),))
    elif small_wanted:
        yield Recipe((Half("float16"),))


def by_hand(tables: bool) -> Iterator[Recipe]:
    """What people pick: int8, alone and after a little of either removal; the likeliest first."""
    rounded = Recipe((Int8(embeddings=tables),))
    yield rounded
    for kind in (PRUNED, FACTORIZED):
        yield reduced(FIRST_SHARE, kind, rounded)


def smoothed(tables: bool) -> Recipe:
    """Int8 after SmoothQuant, for a model that loses something without."""
    return Recipe((Int8(embeddings=tables, smooth=True),))


def reduced(share: float, kind: str, tail: Recipe | None) -> Recipe:
    """A recipe that takes `share` of a model away, then what `tail` does.

    Args:
        share: of channels (kind "pruned") or of parameters ("low_rank").
        kind: which technique.
        tail: one of `whole`, or None.
    """
    step = Prune(share) if kind == PRUNED else LowRank(1 - share)
    recipe = Recipe((step,))
    return recipe if tail is None else recipe >> tail


def between(tried: Mapping[float, bool]) -> float | None:
    """The share to try next for one technique: halfway between the largest that was good enough
    and the smallest that was not; None where these are near.

    Args:
        tried: whether each share was within the loss.
    """
    good = max((share for share, fits in tried.items() if fits), default=0.0)
    bad = min((share for share, fits in tried.items() if not fits and share > good), default=0.95)
    middle = round((good + bad) / 2, 3)
    return middle if bad - good > FINEST else None


def recovered(recipe: Recipe, steps: int) -> Recipe:
    """`recipe` with a training between what removes and what rounds."""
    removing = [step for step in recipe.steps if step.removes]
    others = [step for step in recipe.steps if not step.removes]
    return Recipe((*removing, Recover(steps), *others))


def channels_last(recipe: Recipe | None) -> Recipe:
    """`recipe` with the layout of convolutions changed before weights are rounded."""
    steps = () if recipe is None else recipe.steps
    before = [step for step in steps if not step.rounds]
    rounding = [step for step in steps if step.rounds]
    return Recipe((*before, ChannelsLast(), *rounding))


def without_layout(recipe: Recipe) -> Recipe | None:
    """`recipe` less its `ChannelsLast`, which a search adds to everything; None if that was all."""
    steps = [step for step in recipe.steps if not isinstance(step, ChannelsLast)]
    return Recipe(tuple(steps)) if steps else None


def uniform(recipe: Sequence[Mapping[str, Any]] | None) -> tuple[str, float] | None:
    """The kind ("int8", "bf16", "int4") that a row's recipe gives every layer, and the share of the
    channels that it removes; None for others.
    """
    steps = [step for step in recipe or () if step["step"] not in ("ChannelsLast", "Drop")]
    if any(step.get("skip") for step in steps):
        return None
    amount = 0.0
    if steps and steps[0]["step"] == "Prune" and isinstance(steps[0]["amount"], float):
        amount = steps.pop(0)["amount"]
    kinds = [_kind(step) for step in steps]
    if kinds == [INT4, INT8]:
        return INT4, amount
    kind = kinds[0] if kinds in ([INT8], [BF16]) else None
    return None if kind is None else (kind, amount)


def has_tables(recipe: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether a row's recipe stores embeddings in int8."""
    return any(step.get("embeddings") for step in recipe or ())


def is_untrained(recipe: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether a row's recipe removes something and nothing has been trained since."""
    names = {step["step"] for step in recipe or ()}
    return bool(names & {"Prune", "LowRank", "Drop"}) and "Recover" not in names


def dropped(recipe: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """The blocks that a row's recipe leaves out."""
    found: list[str] = []
    for step in recipe or ():
        found += step.get("blocks", ())
    return found


def _kind(step: Mapping[str, Any]) -> str | None:
    """What a step of a row's recipe stores layers as; None for one that does something else too."""
    if step["step"] == "Int8":
        return None if step["smooth"] else INT8
    if step["step"] == "Half":
        return BF16 if step["dtype"] == "bfloat16" else None
    return INT4 if step["step"] == "Int4" else None


def share_of_linear(model: nn.Module) -> float:
    """Of the parameters, how many are those of linear layers (`Conv1D` too)."""
    linear = 0
    for fact in surgery.facts(model).values():
        if fact.linear:
            linear += sum(parameter.numel() for parameter in fact.module.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    return linear / max(total, 1)
