"""A student trained from scratch against the same student distilled: same data order, same steps,
and same compute time.

    uv run python train.py  # writes artifacts/model.pth
    uv run python benchmarks/distillation.py --task digits --threads 1
    uv run python benchmarks/distillation.py --task text --teacher artifacts/model.pth --threads 1

Students, all of the architecture that `make_student` gives, a quarter of the teacher: scratch
  the task's loss, from random weights logits             distilled, from the same random weights
  logits + hidden    the same, and the hidden states after each block (text) or stage (digits)
  matched start              the task's loss, from the teacher's weights (`make_student`) start +
  logits     distilled, from the teacher's weights start + hidden     the same, and the hidden
  states matched scratch, longer    the task's loss, from random weights, for the steps that fit
  into the time of `start + logits`
All see the same batches in the same order. Those that start from the teacher use the default rates
of `distill`, those from random weights the rates at which the teacher was trained. What a step
costs, the teacher's forward included, is
measured once before training: the variants take turns, a few steps each, in seconds of CPU time of
this process (with one thread that is the time it would take on an idle core), and the median
counts. Rows are appended to benchmarks/results/distillation.csv; those that are there already
aren't run again. The plot lies beside it.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import quantize
from quantize import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM, surgery, training
from quantize.compression.distillation import distill, make_student
from quantize.training import TrainConfig, evaluate_images, evaluate_text
from quantize.training.data import ImageBatches, TextBatches, load_images, load_text

RESULTS = Path(__file__).parent / "results" / "distillation.csv"
FIELDS = (
    "task",
    "variant",
    "seed",
    "steps",
    "parameters",
    "step_ms",
    "train_s",
    "metric",
    "value",
    "threads",
)
VARIANTS = (
    "scratch",
    "logits",
    "logits + hidden",
    "start",
    "start + logits",
    "start + hidden",
    "scratch, longer",
)


@dataclass
class Task:
    """How a teacher is trained, how small the student is, its training and the measure."""

    name: str
    build: Callable[[], nn.Module]  # a teacher with new weights
    teacher_steps: int
    recipe: TrainConfig  # of students from random weights, and of the teacher
    batches: Callable[[int], training.Batches]  # seed -> step -> batch
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    score: Callable[[nn.Module], float]
    metric: str
    student: dict  # arguments of make_student
    temperature: float
    hidden: Callable[
        [nn.Module, nn.Module], dict[str, str]
    ]  # student, teacher -> modules that are matched


def text_task(steps: int) -> Task:
    text = load_text()

    def hidden(start: DecoderLM, teacher: DecoderLM) -> dict[str, str]:
        last, deep = len(start.blocks) - 1, len(teacher.blocks) - 1
        return {f"blocks.{i}": f"blocks.{round(i * deep / max(1, last))}" for i in range(last + 1)}

    return Task(
        "text",
        lambda: DecoderLM(DecoderConfig(width=128, layers=6, heads=2, qk_norm=True)),
        1600,
        TrainConfig(steps=steps, batch=4, length=256, lr=1e-2, muon_lr=0.02),
        lambda seed: TextBatches(text.train, batch=4, length=256, seed=seed),
        lambda logits, ids: F.cross_entropy(logits.flatten(0, 1), ids.flatten()),
        lambda m: evaluate_text(m, text.validation, max_bytes=2**15)["bits_per_byte"],
        "bits per byte",
        {"depth": 0.5, "width": 0.5},
        1.0,
        hidden,
    )


def digits_task(steps: int) -> Task:
    images = load_images()
    return Task(
        "digits",
        lambda: ConvNet(ConvNetConfig(widths=(32, 64))),
        300,
        TrainConfig(steps=steps, batch=64),
        lambda seed: ImageBatches(images, batch=64, seed=seed),
        F.cross_entropy,
        lambda m: evaluate_images(m, images.validation_images, images.validation_labels)[
            "accuracy"
        ],
        "accuracy",
        {"width": 0.25},
        4.0,
        lambda *_: {"blocks.0": "blocks.0", "blocks.1": "blocks.1"},
    )


def fresh(start: nn.Module) -> nn.Module:
    """The same architecture with new weights."""
    student = surgery.clone(start)
    for module in student.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if isinstance(student, DecoderLM):
        student._initialise()
    return student


def train_teacher(task: Task, path: Path | None) -> nn.Module:
    if path is not None:
        return quantize.load(path)
    torch.manual_seed(0)
    recipe = replace(task.recipe, steps=task.teacher_steps)
    loss = lambda m, batch: task.loss(m(batch[0]).float(), batch[1])  # noqa: E731
    return training.fit(
        task.build(), task.batches(0), loss, recipe, on_progress=training.ProgressPrinter("teacher")
    )


def train(
    task: Task,
    teacher: nn.Module,
    start: nn.Module,
    variant: str,
    seed: int,
    steps: int,
    on_step: Callable | None = None,
) -> nn.Module:
    """The student of that variant, trained."""
    batches = task.batches(seed + 1)
    torch.manual_seed(seed)
    student = start if variant.startswith("start") else fresh(start)
    options = {"steps": steps, "seed": seed, "on_progress": on_step}
    if not variant.startswith("start"):
        options["recipe"] = replace(task.recipe, steps=steps)
    if variant in ("scratch", "start", "scratch, longer"):
        return distill(student, teacher, batches, alpha=0, loss=task.loss, **options)
    hidden = task.hidden(start, teacher) if "hidden" in variant else None
    return distill(
        student,
        teacher,
        lambda step: batches(step)[0],
        temperature=task.temperature,
        hidden=hidden,
        **options,
    )


def step_costs(
    task: Task, teacher: nn.Module, start: nn.Module, *, rounds: int = 4, steps: int = 8
) -> dict[str, float]:
    """Median CPU seconds of a training step of each variant, which take turns."""
    taken: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, times in taken.items():
            marks: list[float] = []
            train(
                task,
                teacher,
                start,
                variant,
                0,
                steps,
                lambda _, marks=marks: marks.append(time.process_time()),
            )
            times += [b - a for a, b in pairwise(marks[1:])]
    return {variant: statistics.median(times) for variant, times in taken.items()}


def read_rows() -> list[dict]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def write_row(
    task: Task, variant: str, seed: int, steps: int, cost: float, model: nn.Module
) -> None:
    row = {
        "task": task.name,
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_ms": round(1e3 * cost, 2),
        "train_s": round(steps * cost, 2),
        "metric": task.metric,
        "value": round(task.score(model), 4),
        "threads": torch.get_num_threads(),
    }
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def summarize(rows: Sequence[dict]) -> None:
    """Mean and spread over the seeds, and the share of the gap between scratch and teacher that
    each variant closes.
    """
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        means = {}
        for variant in dict.fromkeys(row["variant"] for row in mine):
            points = [row for row in mine if row["variant"] == variant]
            values = [float(row["value"]) for row in points]
            means[variant] = statistics.mean(values)
            gap = means.get("scratch", 0.0) - means.get("teacher", 0.0)
            closed = (
                f"{(means['scratch'] - means[variant]) / gap:7.0%}"
                if gap and "scratch" in means
                else ""
            )
            spread = f"{min(values):.4f} to {max(values):.4f}"
            steps, seconds = points[0]["steps"], float(points[0]["train_s"])
            print(
                f"{task:7} {variant:16} {steps:>5} steps {seconds:7.1f} s  mean "
                f"{means[variant]:.4f}  {spread}  {closed}"
            )


def plot(rows: Sequence[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    _, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        mine = [row for row in rows if row["task"] == task]
        for variant in dict.fromkeys(row["variant"] for row in mine if row["variant"] != "teacher"):
            points = [row for row in mine if row["variant"] == variant]
            values = [float(row["value"]) for row in points]
            spread = [
                [statistics.mean(values) - min(values)],
                [max(values) - statistics.mean(values)],
            ]
            seconds = statistics.mean(float(row["train_s"]) for row in points)
            axis.errorbar(
                seconds, statistics.mean(values), yerr=spread, fmt="o", capsize=3, label=variant
            )
        for row in mine:
            if row["variant"] == "teacher":
                axis.axhline(float(row["value"]), color="gray", linestyle=":", label="teacher")
        axis.set(title=task, xlabel="CPU seconds of training", ylabel=mine[0]["metric"])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(RESULTS.with_suffix(".png"), dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task", choices=["text", "digits"], default="digits", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--teacher", type=Path, help="a trained teacher's file (default: train one)"
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="training steps of a student (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="(default: all)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="torch threads (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    RESULTS.parent.mkdir(exist_ok=True)
    task = (text_task if arguments.task == "text" else digits_task)(arguments.steps)
    teacher = train_teacher(task, arguments.teacher)
    calibration = [task.batches(1)(10**6 + i)[0] for i in range(16)]
    start = make_student(
        teacher, **task.student, example_inputs=calibration[0], calibration=calibration
    )
    rows = [row for row in read_rows() if row["task"] == task.name]
    known = {row["variant"]: float(row["step_ms"]) / 1e3 for row in rows}
    costs = known if set(VARIANTS) <= known.keys() else step_costs(task, teacher, start)
    costs = {**costs, **known}
    done = {(row["variant"], int(row["seed"])) for row in rows}
    if ("teacher", 0) not in done:
        write_row(task, "teacher", 0, 0, 0.0, teacher)
    longer = max(1, round(arguments.steps * costs["start + logits"] / costs["scratch"]))
    for seed in arguments.seeds:
        for variant in arguments.variants:
            if (variant, seed) not in done:
                steps = longer if variant == "scratch, longer" else arguments.steps
                write_row(
                    task,
                    variant,
                    seed,
                    steps,
                    costs[variant],
                    train(task, teacher, start, variant, seed, steps),
                )
    summarize(read_rows())
    plot(read_rows())


if __name__ == "__main__":
    main()
