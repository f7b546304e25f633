"""Points of a search: each is made, saved, measured from its file, and written down at once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize import checkpoint
from quantize.calibration import output_tensors
from quantize.checkpoint import atomic_write
from quantize.compression.recipe import Given, Recipe
from quantize.compression.search.budget import Budget
from quantize.measuring.comparison import compare
from quantize.measuring.rows import build_rows, grade

STATE, ORIGINAL = "search.json", "original"
SUFFIX = ".safetensors"

Row = dict[str, Any]


class Points:
    """The rows that were measured, in a file that holds them after any interruption.

    Args:
        folder: of that file and of the models.
        identity: what must be the same for rows to be taken over: model, inputs, calibration.

    `units` has what `keep_units` kept: choices layer by layer rest on times, and a search that
    goes on has to make the same ones.

    Raises:
        ValueError: the folder holds a search of something else.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.rows: list[Row] = []
        self.units: Any = None
        path = folder / STATE
        if path.exists():
            held = json.loads(path.read_text())
            if held["identity"] != self.identity:
                raise ValueError(f"{path} is of another model or other batches: give another out=")
            self.rows = [row for row in held["rows"] if self._is_whole(row)]
            self.units = held.get("units")

    def find(self, name: str) -> Row | None:
        """The row of that name, if it was measured already."""
        return next((row for row in self.rows if row["name"] == name), None)

    def add(self, row: Row) -> None:
        """Keep a row, on disk too."""
        self.rows.append(row)
        self._write()

    def keep_units(self, units: Any) -> None:
        """Keep what is known of the model's parts, as JSON values."""
        self.units = units
        self._write()

    def _write(self) -> None:
        content = {"identity": self.identity, "rows": self.rows, "units": self.units}
        with atomic_write(self.folder / STATE) as file:
            file.write(json.dumps(content, indent=1).encode())

    def _is_whole(self, row: Row) -> bool:
        """Is the row's file still what was measured? A point that failed has none."""
        path = self.folder / f"{row['name']}{SUFFIX}"
        return row["file"] is None or (path.is_file() and path.stat().st_size == row["bytes"])


class Trial:
    """Makes and measures points of one model.

    Args:
        model: the original, in eval mode.
        example_inputs: what latency is measured on.
        given: what recipes work with.
        judge: `judge.Evaluated` or `judge.Divergence`.
        budget: what is asked for.
        points: where rows are kept.
        say: called with a line for people.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        given: Given,
        judge: Any,
        budget: Budget,
        points: Points,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.example_inputs, self.given = model, example_inputs, given
        self.judge, self.budget, self.points, self.say = judge, budget, points, say
        self.allowed = budget.allowed_loss(judge.value, judge.noise)
        self.seconds: dict[str, float] = {}  # that a point took, by name

    def original(self) -> Row:
        """The row of the model as it is, measured against itself: its speed-up is noise."""
        known = self.points.find(ORIGINAL)
        if known is not None:
            return known
        self.say("measuring the original against itself")
        path = self.path(ORIGINAL)
        checkpoint.save(self.model, path)
        base, again = self._compare({ORIGINAL: path, "again": path})
        row = build_rows([base, again])[0]
        noise = abs(1 - (again.speedup or 1.0))
        row |= {"speed_noise": max(noise, 0.01), "loss": 0.0, "loss_noise": self.judge.noise}
        row |= {"metric": self._metric(self.judge.metrics), "metric_change": 0.0}
        return self._keep(row, None)

    def point(self, recipe: Recipe, predicted: Row | None = None) -> Row:
        """The row of one recipe, with what was predicted of it; one that fails has no file and
        says why.
        """
        name = file_name(recipe)
        known = self.points.find(name)
        if known is not None:
            return known | self._verdict(known)
        started = time.monotonic()
        self.say(f"trying {name}")
        try:
            row = self._measured(recipe, name)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            row = self._failed(name, " ".join(str(error).split())[:300])
        self.seconds[name] = time.monotonic() - started
        row["predicted"] = predicted
        return self._keep(row, recipe)

    def path(self, name: str) -> Path:
        return self.points.folder / f"{name}{SUFFIX}"

    def confirmed(self, row: Row, rounds: int = 11) -> Row:
        """The row measured once more, against the original, with what a choice rests on."""
        self.say(f"measuring {row['name']} once more")
        files = {ORIGINAL: self.path(ORIGINAL), row["name"]: self.path(row["name"])}
        measured = self._compare(files, rounds)
        again = build_rows(measured)[1]
        kept = {
            key: row[key]
            for key in ("loss", "loss_noise", "metric", "metric_change", "recipe", "predicted")
        }
        fresh = again | kept
        return fresh | self._verdict(fresh)

    def _measured(self, recipe: Recipe, name: str) -> Row:
        small = recipe(self.model, self.given)
        path = self.path(name)
        checkpoint.save(small, path, metadata={"recipe": recipe.as_values()})
        loaded = checkpoint.load(path, self.model)
        score = self.judge.score(loaded)
        files = {ORIGINAL: self.path(ORIGINAL), name: path}
        row = build_rows(self._compare(files))[1]
        row["metric"] = self._metric(score.metrics)
        row["metric_change"] = row["metric"]["value"] - self.judge.value
        marks = [row["notes"]] if row["notes"] else []
        if self.judge.value:
            marks[:0] = grade(self.judge.value, score.loss, score.noise)
        row["notes"] = "; ".join(marks)
        return row | {"loss": score.loss, "loss_noise": score.noise}

    def _metric(self, metrics: Mapping[str, float]) -> Row:
        (name, value), *others = metrics.items()
        better = {"higher_is_better": self.judge.higher, "also": dict(others)}
        return {"name": name, "value": value, **better}

    def _compare(self, files: dict[str, Path], rounds: int = 5) -> list[Any]:
        return compare(
            files, self.example_inputs, model=self.model, rounds=rounds, burst_seconds=0.15
        )

    def _failed(self, name: str, reason: str) -> Row:
        empty = dict.fromkeys(self.points.rows[0])
        return empty | {
            "name": name,
            "loss": None,
            "loss_noise": None,
            "notes": f"failed: {reason}",
        }

    def _keep(self, row: Row, recipe: Recipe | None) -> Row:
        row["recipe"] = None if recipe is None else recipe.as_values()
        row.setdefault("predicted", None)
        row |= self._verdict(row)
        self.points.add(row)
        return row

    def _verdict(self, row: Row) -> Row:
        """Whether the row is within the loss, reaches the targets, and what it misses."""
        if row["file"] is None:
            return {"within": False, "reaches": False, "fits": False, "misses": [row["notes"]]}
        misses = self.budget.misses(row)
        within = row["loss"] <= self.allowed
        reaches = not misses
        if not within:
            misses.append(f"the loss is {row['loss']:.4g}, at most {self.allowed:.4g} is allowed")
        return {"within": within, "reaches": reaches, "fits": not misses, "misses": misses}


def file_name(recipe: Recipe) -> str:
    """A recipe's name with the numbers that tell it from others of that name."""
    parts = []
    for step in recipe.steps:
        numbers = {"Prune": "amount", "LowRank": "ratio", "Recover": "steps"}
        number = numbers.get(type(step).__name__)
        options = [name for name in ("embeddings", "smooth") if getattr(step, name, False)]
        if getattr(step, "prefer", "") == "speed":
            options.append("where_faster")
        value = _shown(getattr(step, number)) if number else ""
        parts.append("_".join([step.part + value, *options]))
    return "+".join([*parts, *_by_layer(recipe)])


def _shown(value: Any) -> str:
    return "_by_layer" if isinstance(value, Mapping) else f"{value:g}"


def _by_layer(recipe: Recipe) -> list[str]:
    """What tells a recipe that names layers from others: the start of a digest."""
    values: list[Any] = []
    for step in recipe.as_values():
        values += step.values()
    if not any(value for value in values if isinstance(value, (dict, list))):
        return []
    return [hashlib.sha256(recipe.to_json().encode()).hexdigest()[:8]]


def digest(values: Any) -> str:
    """SHA-256 of the tensors in nested batches."""
    total = hashlib.sha256()
    for tensor in output_tensors(values):
        total.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        numbers = tensor.detach().cpu().contiguous().flatten()
        total.update(numbers.view(torch.uint8).numpy().data)
    return total.hexdigest()
