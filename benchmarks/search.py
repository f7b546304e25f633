"""`quantize.compress` on models that it was never tuned on: are budgets met when the file is
measured again, how near are predictions, and what do recipes by hand give?

    uv run python benchmarks/search.py
    uv run python benchmarks/search.py --models cnn --budgets "speedup 1.5" --minutes 2

Each model is trained for some seconds on the standard library's text or scikit-learn's digits. A
row is a budget, or a recipe by hand ("int8", "pruned0.3+int8", "low_rank0.7+int8"). All budgets of
a model share one folder, as a user asks again: `new_points` were made for this one. `met_again` is
from a measurement after the search, original and file in turns; `ratio_by_hand` is the search's
speed over that of the fastest recipe by hand that loses no more, give or take noise, in turns with
it, and 1 where it chose that very one.
`reachable` says whether the search or any recipe by hand kept the budget: beside the three recipes
a grid of extreme ones is measured ("pruned0.9+int8", ...), which take as much away as can be,
whatever is lost. `off` is how far the predicted speed-up of the chosen file was from the one
measured again, `off_median` that of all points so far that were chosen layer by layer.

Rows, trained models and searches are kept in --folder as they are finished: the same command goes
on after an interruption, and a run of its own needs a folder of its own. Five models and eight
budgets take about 30 minutes on two cores.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rows
from search_models import SEED, TASKS, Task, trained
from torch import nn

import quantize
from quantize.checkpoint import atomic_write
from quantize.compression.recipe import Given, Int4, Int8, LowRank, Prune, Recipe
from quantize.compression.search.budget import Budget
from quantize.compression.search.judge import Evaluated
from quantize.measuring import MeasurementError, compare
from quantize.measuring.rows import build_rows

BUDGETS: dict[str, Callable[[rows.Row], dict[str, Any]]] = {  # of the original's row
    "speedup 1.5": lambda row: {"speedup": 1.5},
    "latency 0.4": lambda row: {"latency_ms": 0.4 * row["latency_ms"]["median"]},
    "bytes 0.2": lambda row: {"bytes": int(0.2 * row["bytes"])},
    "speedup 2, memory 1.3": lambda row: {"speedup": 2.0, "memory_mb": 1.3 * row["peak_rss_mb"]},
    "loss 1%": lambda row: {"max_loss": "1%"},
    "loss 0.05": lambda row: {"max_loss": 0.05},
    "loss 2 noise": lambda row: {"max_loss": "2 noise"},
    "speedup 2, loss 2%": lambda row: {"speedup": 2.0, "max_loss": "2%"},
}
BY_HAND = {
    "int8": Recipe((Int8(),)),
    "pruned0.3+int8": Prune(0.3) >> Int8(),
    "low_rank0.7+int8": LowRank(0.7) >> Int8(),
}
TABLES = Int8(embeddings=True)
EXTREMES = {  # of what can be reached at all
    "pruned0.5+int8": Prune(0.5) >> TABLES,
    "pruned0.75+int8": Prune(0.75) >> TABLES,
    "pruned0.9+int8": Prune(0.9) >> TABLES,
    "low_rank0.3+int8": LowRank(0.3) >> TABLES,
    "pruned0.75+low_rank0.3+int8": Prune(0.75) >> LowRank(0.3) >> TABLES,
    "int4+int8": Int4() >> TABLES,
}


def searched(
    name: str,
    model: nn.Module,
    task: Task,
    budget: str,
    original: rows.Row,
    hand: list[rows.Row],
    options: Any,
) -> rows.Row:
    """The row of one budget; of a search that fails, why."""
    wanted = BUDGETS[budget](original)
    folder = options.folder / f"{name}-search"
    before = set(folder.glob("*.safetensors"))
    start = time.monotonic()
    try:
        result = quantize.compress(
            model,
            task.inputs[0],
            calibration=task.inputs,
            evaluate=task.evaluate,
            budget=wanted,
            minutes=options.minutes,
            out=folder,
            progress=options.verbose,
        )
    except (ValueError, MeasurementError) as error:
        failed = {"met": False, "met_again": False, "reason": f"failed: {error}"}
        return {"model": name, "asked": budget, **failed}
    seconds = time.monotonic() - start
    off = offs(folder)
    return {
        "model": name,
        "asked": budget,
        "chosen": result.file.stem,
        **measured_again(result, model, task, wanted, original, hand),
        "points": len(result.rows),
        "new_points": len(set(folder.glob("*.safetensors")) - before),
        "by_layer": len(off),
        "off_median": statistics.median(off) if off else None,
        "seconds": seconds,
        "reason": result.reason,
    }


def measured_again(
    result: quantize.Result,
    model: nn.Module,
    task: Task,
    wanted: rows.Row,
    original: rows.Row,
    hand: list[rows.Row],
) -> rows.Row:
    """The columns of what a search chose: what was asked for, once more."""
    chosen = next(row for row in result.rows if row["name"] == result.file.stem)
    files = {"original": result.file.with_stem("original"), "again": result.file}
    picked = best_by_hand(hand, chosen["loss"] + chosen["loss_noise"])
    same = picked is not None and picked["asked"] == f"by hand: {result.file.stem}"
    if picked is not None and not same:
        recipe_name = picked["asked"].removeprefix("by hand: ")
        files["by hand"] = result.file.parents[1] / f"{picked['model']}-{recipe_name}.pth"
    base, again, *beside = compare(files, task.inputs[0], model=model, rounds=9)
    assert base.latency_ms and again.latency_ms and again.speedup
    assert again.bytes and again.peak_rss_mb
    again_ms = again.latency_ms.median
    misses = {
        "speedup": lambda limit: again.speedup < limit,
        "latency_ms": lambda limit: again_ms > limit,
        "bytes": lambda limit: again.bytes > limit,
        "memory_mb": lambda limit: again.peak_rss_mb > limit,
        "max_loss": lambda limit: not chosen["within"],
    }
    missed = [key for key, limit in wanted.items() if misses[key](limit)]
    predicted = predicted_speedup(chosen, result.rows[0]) if chosen["predicted"] else None
    ratio = again.speedup / beside[0].speedup if beside else None
    return {
        "met": result.met,
        "met_again": result.met and not missed,
        "missed_again": " ".join(missed),
        "speedup": chosen["speedup"],
        "speedup_again": again.speedup,
        "ratio_by_hand": 1.0 if same else ratio,
        "off": abs(predicted / again.speedup - 1) if predicted else None,
        "original_ms": base.latency_ms.median,
        "bytes_ratio": again.bytes / original["bytes"],
        "memory_mb": again.peak_rss_mb,
        "loss": chosen["loss"],
        "loss_noise": chosen["loss_noise"],
    }


def predicted_speedup(row: rows.Row, original: rows.Row) -> float:
    """Ratios are compared: a shared machine is twice as slow from one minute to the next."""
    return original["latency_ms"]["median"] / row["predicted"]["latency_ms"]


def offs(folder: Path) -> list[float]:
    """Of all points of a search that were chosen layer by layer, how far the prediction was off."""
    path = folder / "search.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    told = [row for row in known if row["predicted"] and row["file"]]
    return [abs(predicted_speedup(row, known[0]) / row["speedup"] - 1) for row in told]


def measured_original(name: str, model: nn.Module, task: Task, folder: Path) -> rows.Row:
    """The row of the model as it was trained, which budgets are shares of."""
    known = folder / f"{name}-original.json"
    if not known.exists():
        path = folder / f"{name}.pth"
        row = build_rows(compare([path], task.inputs[0], model=model, rounds=9))[0]
        with atomic_write(known) as file:
            file.write(json.dumps(row).encode())
    return json.loads(known.read_text())


def by_hand(name: str, model: nn.Module, task: Task, folder: Path) -> list[rows.Row]:
    """A row for each recipe by hand that can be made, in turns with the original."""
    judge = Evaluated(task.evaluate, model)
    given = Given(example_inputs=task.inputs[0], calibration=task.inputs, seed=SEED)
    files = {"original": folder / f"{name}.pth"}
    losses = {}
    for recipe_name, recipe in {**BY_HAND, **EXTREMES}.items():
        path = folder / f"{name}-{recipe_name}.pth"
        try:
            quantize.save(recipe(model, given), path)
        except ValueError as error:  # as Int4 of a model without linear layers for it
            print(f"{name}: no {recipe_name}: {error}")
            continue
        files[recipe_name] = path
        losses[recipe_name] = judge.score(quantize.open_model(path, model)).loss
    measured = compare(files, task.inputs[0], model=model, rounds=5)
    return [
        {
            "model": name,
            "asked": f"by hand: {one.name}",
            "speedup_again": one.speedup,
            "bytes_ratio": one.bytes / files["original"].stat().st_size if one.bytes else None,
            "memory_mb": one.peak_rss_mb,
            "loss": losses[one.name],
            "loss_noise": judge.noise,
        }
        for one in measured[1:]
    ]


def finished(path: Path) -> list[rows.Row]:
    """The rows that an earlier run has written, numbers as numbers."""
    known = rows.read(path)
    numbers = ("speedup_again", "bytes_ratio", "memory_mb", "loss", "loss_noise", "ratio_by_hand")
    for row in known:
        row |= {key: float(row[key]) for key in numbers if row.get(key)}
    return known


def best_by_hand(hand: list[rows.Row], most: float) -> rows.Row | None:
    """The fastest of the recipes that people pick that loses no more; None where all lose more."""
    named = {f"by hand: {recipe_name}" for recipe_name in BY_HAND}
    picked = [row for row in hand if row["asked"] in named and row["loss"] <= most]
    return max(picked, key=lambda row: row["speedup_again"], default=None)


def by_any(hand: list[rows.Row], budget: str, original: rows.Row, judge: Evaluated) -> bool:
    """Whether a recipe by hand keeps the budget."""
    wanted = Budget.of(BUDGETS[budget](original))
    allowed = wanted.allowed_loss(judge.scale, judge.noise)
    for row in hand:
        size = row["bytes_ratio"] * original["bytes"]
        in_turns = original["latency_ms"]["median"] / row["speedup_again"]
        facts = {"speedup": row["speedup_again"], "latency_in_turns_ms": in_turns, "bytes": size}
        misses = wanted.misses(facts | {"peak_rss_mb": row["memory_mb"]})
        if not misses and row["loss"] <= allowed:
            return True
    return False


def say_all(found: list[rows.Row], folder: Path) -> None:
    """What all searches of a run come to."""
    asked = [row for row in found if not row["asked"].startswith("by hand")]
    counted = ("reachable", "met", "met_again")
    can, met, again = (sum(str(row[key]) == "True" for row in asked) for key in counted)
    print(f"{len(asked)} searches: {can} can be met, {met} met, {again} met when measured again")
    off: list[float] = []
    for name in {row["model"] for row in asked}:
        off += offs(folder / f"{name}-search")
    if off:
        median = statistics.median(off)
        print(f"{len(off)} points chosen by layer: predictions off by {median:.1%} in the median")
    ratios = [row["ratio_by_hand"] for row in asked if row.get("ratio_by_hand")]
    if ratios:
        median, least = statistics.median(ratios), min(ratios)
        print(f"at equal loss {median:.2f}x the recipe by hand, least {least:.2f}x")


def main() -> None:
    parser = rows.Parser(__doc__, "search.csv")
    parser.some("--models", "which", TASKS)
    parser.some("--budgets", "which", BUDGETS)
    parser.flag("--minutes", "of each search", 0.4)
    parser.flag("--train-seconds", "of each model", 40.0)
    parser.flag("--folder", "for rows, models and searches", "search-benchmark")
    parser.add_argument("--verbose", action="store_true", help="show every point")
    options = parser.parse()
    options.folder = Path(options.folder)
    done = options.folder / "rows.csv"

    def keep(new: list[rows.Row]) -> None:
        """At once, in the folder and among the results."""
        rows.write(done, new, key=("model", "asked"))
        with contextlib.redirect_stdout(None):
            rows.write(Path(options.out), new, key=("model", "asked"))

    for name in options.models:
        task = TASKS[name]()
        model = trained(name, task, options.folder, options.train_seconds)
        mine = {row["asked"]: row for row in finished(done) if row["model"] == name}
        hand = [row for asked, row in mine.items() if asked.startswith("by hand")]
        if not hand:
            hand = by_hand(name, model, task, options.folder)
            keep([row | rows.host() for row in hand])
        original = measured_original(name, model, task, options.folder)
        judge = Evaluated(task.evaluate, model)
        for budget in options.budgets:
            if budget not in mine:
                row = searched(name, model, task, budget, original, hand, options)
                row["reachable"] = row["met"] or by_any(hand, budget, original, judge)
                keep([row | rows.host()])
    say_all(finished(done), options.folder)


if __name__ == "__main__":
    main()
