"""`quantize.compress` on models that it was never tuned on: are budgets met when the file is
measured again, how near are predictions, and what do recipes by hand give?

    uv run python benchmarks/search.py --models cnn
    uv run python benchmarks/search.py --models text vit sentence decoder --minutes 2

Each model is trained for some seconds on the standard library's text or scikit-learn's digits. A
row is a budget, or a recipe by hand ("int8", "pruned0.3+int8", "low_rank0.7+int8"). All budgets of
a model share one folder, as a user asks again: `new_points` were made for this one. `met_again` is
from a measurement after the search, original and file in turns (a latency is that of the original
over the ratio of both); `ratio_by_hand` is the search's
speed over that of the fastest recipe by hand that loses no more; `off` is how far predicted
speed-ups were from measured ones. Trained models are kept in
--folder, so that a run in pieces goes on.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rows
from search_models import SEED, TASKS, Task, trained
from torch import nn

import quantize
from quantize.compression.recipe import Given, Int8, LowRank, Prune, Recipe
from quantize.compression.search.judge import Evaluated
from quantize.measuring import compare
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


def searched(
    name: str, model: nn.Module, task: Task, budget: str, original: rows.Row, options: Any
) -> rows.Row:
    """The row of one budget."""
    wanted = BUDGETS[budget](original)
    folder = options.folder / f"{name}-search"
    before = set(folder.glob("*.safetensors"))
    start = time.monotonic()
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
    seconds = time.monotonic() - start
    chosen = next(row for row in result.rows if row["name"] == result.file.stem)
    files = {"original": folder / "original.safetensors", "again": result.file}
    base, again = compare(files, task.inputs[0], model=model, rounds=9)
    assert base.latency_ms and again.latency_ms and again.bytes and again.peak_rss_mb
    reached = {
        "speedup": lambda value: again.speedup >= value,
        "latency_ms": lambda value: original["latency_ms"]["median"] / again.speedup <= value,
        "bytes": lambda value: again.bytes <= value,
        "memory_mb": lambda value: again.peak_rss_mb <= value,
        "max_loss": lambda value: chosen["within"],
    }
    told = [row for row in result.rows if row.get("predicted") and row["latency_ms"]]
    off = [abs(predicted_speedup(r, result.rows[0]) / r["speedup"] - 1) for r in told]
    return {
        "model": name,
        "asked": budget,
        "chosen": chosen["name"],
        "met": result.met,
        "met_again": result.met and all(reached[key](value) for key, value in wanted.items()),
        "speedup_again": again.speedup,
        "original_ms": base.latency_ms.median,
        "bytes_ratio": again.bytes / original["bytes"],
        "loss": chosen["loss"],
        "loss_noise": chosen["loss_noise"],
        "points": len(result.rows),
        "new_points": len(set(folder.glob("*.safetensors")) - before),
        "by_layer": len(told),
        "off_median": statistics.median(off) if off else None,
        "off_first": off[0] if off else None,
        "off_last": off[-1] if off else None,
        "seconds": seconds,
    }


def predicted_speedup(row: rows.Row, original: rows.Row) -> float:
    """Ratios are compared: a shared machine is twice as slow from one minute to the next."""
    return original["latency_ms"]["median"] / row["predicted"]["latency_ms"]


def measured_original(name: str, model: nn.Module, task: Task, folder: Path) -> rows.Row:
    """The row of the model as it was trained, which budgets are shares of."""
    path = folder / f"{name}-search" / "original.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        quantize.save(model, path)
    return build_rows(compare([path], task.inputs[0], model=model, rounds=9))[0]


def by_hand(name: str, model: nn.Module, task: Task, folder: Path) -> list[rows.Row]:
    """A row for each recipe by hand, in turns with the original."""
    judge = Evaluated(task.evaluate, model)
    given = Given(example_inputs=task.inputs[0], calibration=task.inputs, seed=SEED)
    files = {"original": folder / f"{name}.pth"}
    losses = {}
    for recipe_name, recipe in BY_HAND.items():
        files[recipe_name] = folder / f"{name}-{recipe_name}.pth"
        quantize.save(recipe(model, given), files[recipe_name])
        losses[recipe_name] = judge.score(quantize.open_model(files[recipe_name], model)).loss
    measured = compare(files, task.inputs[0], model=model, rounds=9)
    return [
        {
            "model": name,
            "asked": f"by hand: {one.name}",
            "speedup_again": one.speedup,
            "bytes_ratio": one.bytes / files["original"].stat().st_size if one.bytes else None,
            "loss": losses[one.name],
            "loss_noise": judge.noise,
        }
        for one in measured[1:]
    ]


def known_by_hand(name: str, path: Path) -> list[rows.Row]:
    """The rows of recipes by hand that an earlier run has written."""
    mine = [row for row in rows.read(path) if row["model"] == name]
    found = [row for row in mine if row["asked"].startswith("by hand")]
    numbers = ("speedup_again", "bytes_ratio", "loss", "loss_noise")
    return [row | {key: float(row[key]) for key in numbers} for row in found]


def compared(found: list[rows.Row], hand: list[rows.Row]) -> None:
    """Set against the fastest recipe by hand that loses no more, give or take the noise."""
    for row in found:
        near = [other for other in hand if other["loss"] <= row["loss"] + row["loss_noise"]]
        fastest = max((other["speedup_again"] for other in near), default=math.nan)
        row["ratio_by_hand"] = row["speedup_again"] / fastest if near else None


def main() -> None:
    parser = rows.Parser(__doc__, "search.csv")
    parser.some("--models", "which", TASKS)
    parser.some("--budgets", "which", BUDGETS)
    parser.flag("--minutes", "of each search", 1.0)
    parser.flag("--train-seconds", "of each model", 40.0)
    parser.flag("--folder", "for models and searches", "search-benchmark")
    parser.add_argument("--verbose", action="store_true", help="show every point")
    options = parser.parse()
    options.folder = Path(options.folder)
    for name in options.models:
        task = TASKS[name]()
        model = trained(name, task, options.folder, options.train_seconds)
        hand = known_by_hand(name, Path(options.out))
        if len(hand) < len(BY_HAND):
            hand = by_hand(name, model, task, options.folder)
            rows.write(Path(options.out), [row | rows.host() for row in hand], ("model", "asked"))
        original = measured_original(name, model, task, options.folder)
        for budget in options.budgets:
            row = searched(name, model, task, budget, original, options)
            compared([row], hand)
            rows.write(Path(options.out), [row | rows.host()], key=("model", "asked"))


if __name__ == "__main__":
    main()
