"""A student trained from scratch against the same student distilled: same data order, same steps, and same compute time.

    uv run python benchmarks/distillation.py --task digits
    uv run python benchmarks/distillation.py --task text --teacher out/model.pth     # none: trains one first

Variants, all of the architecture that `make_student` gives:
  scratch            the task's loss, from random weights
  scratch, longer    the same for as many steps as fit in the CPU seconds that the slowest distillation took, teacher included
  logits             distilled, from the same random weights
  start              the task's loss, from the teacher's weights (`make_student`)
  start + logits     distilled, from the teacher's weights
  start + hidden     the same, and the hidden states after each block (text) or stage (digits) matched
Rows are appended to benchmarks/results/distillation.csv; those that are there already aren't run again. The plot
lies beside it. Time is CPU seconds of this process, which other work on the machine disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import quantize
from quantize import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM, training
from quantize.data import ImageBatches, TextBatches, load_images, load_text
from quantize.distillation import distill, make_student
from quantize.training import Recipe, evaluate_images, evaluate_text

RESULTS = Path(__file__).parent / "results" / "distillation.csv"
FIELDS = ("task", "variant", "seed", "steps", "parameters", "cpu_s", "metric", "value", "threads")
VARIANTS = ("scratch", "logits", "start", "start + logits", "start + hidden", "scratch, longer")


@dataclass
class Task:
    """A teacher's architecture, how small the student is, the training and the measure."""

    name: str
    build: Callable[[], nn.Module]
    teacher_steps: int
    recipe: Recipe
    batches: Callable[[int], training.Batches]  # seed -> step -> batch
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    score: Callable[[nn.Module], float]
    metric: str
    student: dict  # arguments of make_student
    fresh: Callable[[], nn.Module]  # the same architecture with new weights
    hidden: dict[str, str]


def text_task(steps: int) -> Task:
    text = load_text()
    return Task(
        "text", lambda: DecoderLM(DecoderConfig(width=128, layers=4, heads=4)), 1600, Recipe(steps=steps, batch=4, length=256),
        lambda seed: TextBatches(text.train, batch=4, length=256, seed=seed),
        lambda logits, ids: F.cross_entropy(logits.flatten(0, 1), ids.flatten()),
        lambda m: evaluate_text(m, text.validation, max_bytes=2**16)["bits_per_byte"], "bits per byte",
        {"depth": 0.5, "width": 0.5},
        lambda: DecoderLM(DecoderConfig(width=128, layers=2, heads=2, head_dim=32, ffn_width=176)),
        {"blocks.0": "blocks.0", "blocks.1": "blocks.3"},
    )  # fmt: skip


def digits_task(steps: int) -> Task:
    images = load_images()
    return Task(
        "digits", lambda: ConvNet(ConvNetConfig(widths=(32, 64))), 300, Recipe(steps=steps, batch=64),
        lambda seed: ImageBatches(images, batch=64, seed=seed), F.cross_entropy,
        lambda m: evaluate_images(m, images.validation_images, images.validation_labels)["accuracy"], "accuracy",
        {"width": 0.25}, lambda: ConvNet(ConvNetConfig(widths=(8, 16))), {"blocks.0": "blocks.0", "blocks.1": "blocks.1"},
    )  # fmt: skip


def train_teacher(task: Task, path: Path | None) -> nn.Module:
    if path is not None:
        return quantize.load(path)
    torch.manual_seed(0)
    recipe = replace(task.recipe, steps=task.teacher_steps)
    loss = lambda m, batch: task.loss(m(batch[0]).float(), batch[1])  # noqa: E731
    return training.fit(task.build(), task.batches(0), loss, recipe, on_progress=training.ProgressPrinter("teacher"))


def run(task: Task, teacher: nn.Module, variant: str, seed: int, start: nn.Module, longer: int) -> dict:
    """One row: the student of that variant, trained, timed and scored."""
    batches, recipe = task.batches(seed + 1), task.recipe
    torch.manual_seed(seed)
    student = start if variant.startswith("start") else task.fresh()
    assert [p.shape for p in student.parameters()] == [p.shape for p in start.parameters()]
    began = time.process_time()
    if variant in ("scratch", "start", "scratch, longer"):
        recipe = replace(recipe, steps=longer) if "longer" in variant else recipe
        trained = distill(student, teacher, batches, steps=recipe.steps, alpha=0, loss=task.loss, recipe=recipe, seed=seed)
    else:
        hidden = task.hidden if "hidden" in variant else None
        trained = distill(
            student, teacher, lambda step: batches(step)[0], steps=recipe.steps, hidden=hidden, recipe=recipe, seed=seed
        )
    spent = time.process_time() - began
    return row_of(task, variant, seed, recipe.steps, trained, spent)


def row_of(task: Task, variant: str, seed: int, steps: int, model: nn.Module, cpu_s: float) -> dict:
    return {
        "task": task.name, "variant": variant, "seed": seed, "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()), "cpu_s": round(cpu_s, 2), "metric": task.metric,
        "value": round(task.score(model), 4), "threads": torch.get_num_threads(),
    }  # fmt: skip


def read_rows() -> list[dict]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def write_row(row: dict) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def plot(rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    _, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        mine = [row for row in rows if row["task"] == task]
        for variant in dict.fromkeys(row["variant"] for row in mine):
            points = [row for row in mine if row["variant"] == variant]
            values = [float(row["value"]) for row in points]
            spread = [[statistics.mean(values) - min(values)], [max(values) - statistics.mean(values)]]
            seconds = statistics.mean(float(row["cpu_s"]) for row in points)
            axis.errorbar(seconds, statistics.mean(values), yerr=spread, fmt="o", capsize=3, label=variant)
        axis.set(title=task, xlabel="CPU seconds of training", ylabel=mine[0]["metric"])
        axis.grid(alpha=0.3)
        axis.legend()
    plt.tight_layout()
    plt.savefig(RESULTS.with_suffix(".png"), dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["text", "digits"], default="digits", help="(default: %(default)s)")
    parser.add_argument("--teacher", type=Path, help="a trained teacher's file (default: train one)")
    parser.add_argument("--steps", type=int, default=300, help="training steps of a student (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="(default: all)")
    arguments = parser.parse_args(argv)
    RESULTS.parent.mkdir(exist_ok=True)
    task = (text_task if arguments.task == "text" else digits_task)(arguments.steps)
    teacher = train_teacher(task, arguments.teacher)
    done = {(r["task"], r["variant"], int(r["seed"])) for r in read_rows()}
    if (task.name, "teacher", 0) not in done:
        write_row(row_of(task, "teacher", 0, task.teacher_steps, teacher, float("nan")))
    calibration = [task.batches(1)(10**6 + i)[0] for i in range(16)]
    start = make_student(teacher, **task.student, example_inputs=calibration[0], calibration=calibration)
    for seed in arguments.seeds:
        for variant in arguments.variants:
            if (task.name, variant, seed) in done:
                continue
            mine = [r for r in read_rows() if r["task"] == task.name and int(r["seed"]) == seed and r["variant"] != "teacher"]
            spent = {r["variant"]: float(r["cpu_s"]) for r in mine}
            if variant == "scratch, longer" and not {"scratch", "start + hidden"} <= spent.keys():
                continue
            slowest = max((s for v, s in spent.items() if v != "scratch, longer"), default=0.0)
            longer = round(arguments.steps * slowest / spent.get("scratch", 1.0))
            write_row(run(task, teacher, variant, seed, start, max(1, longer)))
    plot([row for row in read_rows() if row["variant"] != "teacher"])


if __name__ == "__main__":
    main()
