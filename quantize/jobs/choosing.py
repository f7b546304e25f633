"""The autopilot's row of the default job: what `compress` chooses within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from quantize import checkpoint
from quantize.compression.recipe import Recipe
from quantize.compression.search import compress
from quantize.compression.search.budget import Budget
from quantize.jobs.training import Job

AUTO = "auto"  # the row's name


def read_budget(words: Sequence[str]) -> dict[str, Any]:
    """The budget in words such as "speedup=2" and "max_loss=1%".

    Raises:
        ValueError: a word without a value, and what `Budget.of` refuses.
    """
    budget: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"argument --budget: {word!r} is not NAME=VALUE, such as speedup=2")
        try:
            budget[name] = float(value)
        except ValueError:
            budget[name] = value
    try:
        Budget.of(budget)
    except ValueError as error:
        raise ValueError(f"argument --budget: {error}") from None
    return budget


def add_chosen(job: Job, baseline: nn.Module, budget: dict[str, Any], minutes: float) -> None:
    """Search, and save the model that was chosen as one more row of the job.

    Args:
        job: with its baseline written.
        baseline: the trained model.
        budget: as `compress` takes it.
        minutes: of the search, which goes on from `search/` in the job's folder.

    Raises:
        ValueError, OSError: as `compress`.
    """
    result = compress(
        baseline,
        job.example,
        calibration=job.calibration,
        evaluate=job.evaluate,
        budget=budget,
        minutes=minutes,
        out=job.out / "search",
        seed=job.seed,
    )
    steps = checkpoint.read_metadata(result.file).get("recipe")
    recipe = Recipe.from_json(steps) if steps else None
    job.save(AUTO, result.model, recipe)
    met = "" if result.met else "the budget isn't met; "
    job.notes[AUTO] = f"{met}{result.file.stem}"
    job.layers = result.layers
