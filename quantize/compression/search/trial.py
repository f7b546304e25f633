"""Points of a search: each is made, saved, measured from its file, and written down at once."""

from __future__ import annotations

import errno
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
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
from quantize.measuring.nursery import Nursery
from quantize.measuring.rows import build_rows, grade
from quantize.saying import Say

STATE, ORIGINAL = "search.json", "original"
SUFFIX = ".safetensors"
BURST_S = 0.15  # length of a turn
BUSY = 0.1  # share by which the original differs from itself where the machine is busy
UNKNOWN_NOISE = 1e-3  # share of the metric that is noise where nobody knows it, as in reports
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a second measurement of a file leaves as it is.
_JUDGED = ("loss", "loss_noise", "metric", "metric_change", "recipe", "predicted")

Row = dict[str, Any]


class Points:
    """The rows that were measured, in a file that holds them after any interruption.

    Args:
        folder: of that file and of the models.
        identity: what must be the same for rows to be taken over: model, inputs, calibration.

    `known` has what `keep_known` kept: choices layer by layer rest on times, and a search that goes
    on has to make the same ones.

    Raises:
        ValueError: the folder holds a search of something else.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.rows: list[Row] = []
        self.known: dict[str, Any] = {}
        path = folder / STATE
        if path.exists():
            held = json.loads(path.read_text())
            if held["identity"] != self.identity:
                differing = [k for k, v in self.identity.items() if held["identity"].get(k) != v]
                raise ValueError(
                    f"{path} is of another search (other {', '.join(differing)}): give another out="
                )
            self.rows = [row for row in held["rows"] if self._is_whole(row)]
            self.known = held["known"]

    def find(self, name: str) -> Row | None:
        """The row of that name, if it was measured already."""
        return next((row for row in self.rows if row["name"] == name), None)

    def keep(self, row: Row) -> None:
        """Keep a row, on disk too; one of the same name is replaced."""
        names = [other["name"] for other in self.rows]
        if row["name"] in names:
            self.rows[names.index(row["name"])] = row
        else:
            self.rows.append(row)
        self._write()

    def keep_known(self, name: str, values: Any) -> None:
        """Keep what is known of the model's parts, as JSON values."""
        self.known[name] = values
        self._write()

    def _write(self) -> None:
        content = {"identity": self.identity, "rows": self.rows, "known": self.known}
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
        nursery: what measuring processes are forked from.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        given: Given,
        judge: Any,
        budget: Budget,
        points: Points,
        say: Say,
        nursery: Nursery,
    ) -> None:
        self.nursery = nursery
        self.model, self.example_inputs, self.given = model, example_inputs, given
        self.judge, self.budget, self.points, self.say = judge, budget, points, say
        self.allowed = budget.allowed_loss(judge.scale, judge.noise)
        self.least_noise = 0.0 if judge.noise else UNKNOWN_NOISE * judge.scale

    def rows(self) -> list[Row]:
        """All that is known of this model, in the order of measuring, judged by this budget."""
        return [row | self._verdict(row) for row in self.points.rows]

    def find(self, recipe: Recipe) -> Row | None:
        """The row of a recipe that was measured, judged by this budget."""
        known = self.points.find(file_name(recipe))
        return None if known is None else known | self._verdict(known)

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
        row["latency_in_turns_ms"] = row["latency_ms"]["median"]
        if noise > BUSY:
            self.say(f"a busy machine: the original against itself differs by {noise:.0%}")
        return self._keep(row, None)

    def point(self, recipe: Recipe, predicted: Row | None = None) -> Row:
        """The row of one recipe, with what was predicted of it; one that fails has no file and
        says why. Raises OSError where the disk is full.
        """
        name = file_name(recipe)
        self.say(f"trying {name}")
        try:
            row = self._measured(recipe, name)
        except Exception as error:  # of somebody's model or metric
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            row = self._failed(name, _reason(error))
        row["predicted"] = predicted
        return self._keep(row, recipe)

    def path(self, name: str) -> Path:
        return self.points.folder / f"{name}{SUFFIX}"

    def confirmed(self, rows: Sequence[Row], rounds: int = 11) -> list[Row]:
        """Rows measured once more, side by side with the original; a choice rests on them."""
        names = [row["name"] for row in rows]
        self.say(f"measuring {', '.join(names)} once more")
        files = {name: self.path(name) for name in (ORIGINAL, *names)}
        measured = build_rows(self._compare(files, rounds))[1:]
        fresh = []
        for row, again in zip(rows, measured, strict=True):
            new = again | {key: row[key] for key in _JUDGED}
            self._mark(new)
            self._time(new)
            fresh.append(new | self._verdict(new))
        return fresh

    def _measured(self, recipe: Recipe, name: str) -> Row:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the model's summary has what was left
            small = recipe(self.model, self.given)
        path = self.path(name)
        checkpoint.save(small, path, metadata={"recipe": recipe.as_values()})
        loaded = checkpoint.load(path, self.model)
        score = self.judge.score(loaded)
        files = {ORIGINAL: self.path(ORIGINAL), name: path}
        row = build_rows(self._compare(files))[1]
        row["metric"] = self._metric(score.metrics)
        row["metric_change"] = row["metric"]["value"] - self.judge.value
        row |= {"loss": score.loss, "loss_noise": max(score.noise, self.least_noise)}
        self._mark(row)
        self._time(row)
        return row

    def _time(self, row: Row) -> None:
        """Its latency by that of the original and the ratio of both, which took turns: a busy
        moment makes both slower.
        """
        original = self.original()["latency_ms"]["median"]
        row["latency_in_turns_ms"] = original / row["speedup"]

    def _mark(self, row: Row) -> None:
        """Put how much worse a row is than the original before its other notes."""
        marks = [row["notes"]] if row["notes"] else []
        if self.judge.value:
            marks[:0] = grade(self.judge.value, row["loss"], row["loss_noise"])
        row["notes"] = "; ".join(marks)

    def _metric(self, metrics: Mapping[str, float]) -> Row:
        (name, value), *others = metrics.items()
        better = {"higher_is_better": self.judge.higher, "also": dict(others)}
        return {"name": name, "value": value, **better}

    def _compare(self, files: dict[str, Path], rounds: int = 5) -> list[Any]:
        return compare(
            files,
            self.example_inputs,
            model=self.model,
            rounds=rounds,
            burst_seconds=BURST_S,
            nursery=self.nursery,
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
        self.points.keep(row)
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


def _reason(error: Exception) -> str:
    """In one line; errors of this package say by themselves whose they are."""
    said = " ".join(str(error).split())[:300]
    ours = (ValueError, TypeError, RuntimeError, NotImplementedError)
    return said if isinstance(error, ours) and said else f"{type(error).__name__}: {said}"


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
