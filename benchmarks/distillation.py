"""A student trained from scratch against the same student distilled: same data order, same steps,
and same compute time.

    uv run python train.py  # writes artifacts/model.pth
    uv run python benchmarks/distillation.py --task digits --threads 1
    uv run python benchmarks/distillation.py --task text --teacher artifacts/model.pth --threads 1

Students, all of the architecture that `make_student` gives, a quarter of the teacher:

- scratch: the task's loss, from random weights
- logits: distilled, from the same random weights
- logits + hidden: the same, and the hidden states after each block (text) or stage (digits) matched
- start: the task's loss, from the teacher's weights (`make_student`)
- start + logits: distilled, from the teacher's weights
- start + hidden: the same, and the hidden states matched
- scratch, longer: the task's loss, from random weights, for the steps that fit into the time of
  `start + logits`

All see the same batches in the same order. Those that start from the teacher use the default rates
of `distill`, those from random weights the rates at which the teacher was trained. What a step
costs, the teacher's forward included, is the CPU time of this process over the steps of the run
(with one thread that is the time it would take on an idle core). Rows go to
benchmarks/results/distillation.csv; those that are there already aren't run again. The plot lies
beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import rows
import torch
import torch.nn.functional as F
from torch import nn

import quantize
from quantize import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM, surgery, training
from quantize.compression.distillation import distill, make_student
from quantize.training import TrainConfig, evaluate_images, evaluate_text
from quantize.training.data import ImageBatches, TextBatches, load_images, load_text

LONGER = "scratch, longer"
VARIANTS = (
    *("scratch", "logits", "logits + hidden"),
    *("start", "start + logits", "start + hidden", LONGER),
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
    hidden: Callable[[nn.Module, nn.Module], dict[str, str]]  # student, teacher -> modules matched


def text_task(steps: int) -> Task:
    text = load_text()

    def hidden(start: DecoderLM, teacher: DecoderLM) -> dict[str, str]:
        last, deep = len(start.blocks) - 1, len(teacher.blocks) - 1
        return {f"blocks.{i}": f"blocks.{round(i * deep / max(1, last))}" for i in range(last + 1)}

    return Task(
        name="text",
        build=lambda: DecoderLM(DecoderConfig(width=128, layers=6, heads=2, qk_norm=True)),
        teacher_steps=1600,
        recipe=TrainConfig(steps=steps, batch=4, length=256, lr=1e-2, muon_lr=0.02),
        batches=lambda seed: TextBatches(text.train, batch=4, length=256, seed=seed),
        loss=lambda logits, ids: F.cross_entropy(logits.flatten(0, 1), ids.flatten()),
        score=lambda m: evaluate_text(m, text.validation, max_bytes=2**15)["bits_per_byte"],
        metric="bits per byte",
        student={"depth": 0.5, "width": 0.5},
        temperature=1.0,
        hidden=hidden,
    )


def digits_task(steps: int) -> Task:
    images = load_images()
    held_out = images.validation_images, images.validation_labels
    return Task(
        name="digits",
        build=lambda: ConvNet(ConvNetConfig(widths=(32, 64))),
        teacher_steps=300,
        recipe=TrainConfig(steps=steps, batch=64),
        batches=lambda seed: ImageBatches(images, batch=64, seed=seed),
        loss=F.cross_entropy,
        score=lambda m: evaluate_images(m, *held_out)["accuracy"],
        metric="accuracy",
        student={"width": 0.25},
        temperature=4.0,
        hidden=lambda *_: {"blocks.0": "blocks.0", "blocks.1": "blocks.1"},
    )


TASKS = {"text": text_task, "digits": digits_task}


def train_teacher(task: Task) -> nn.Module:
    torch.manual_seed(0)
    recipe = replace(task.recipe, steps=task.teacher_steps)
    loss = lambda m, batch: task.loss(m(batch[0]).float(), batch[1])  # noqa: E731
    printer = training.ProgressPrinter("teacher")
    return training.fit(task.build(), task.batches(0), loss, recipe, on_progress=printer)


@dataclass
class Experiment:
    """A teacher, and the student that all variants begin as."""

    task: Task
    teacher: nn.Module
    start: nn.Module

    def train(self, variant: str, seed: int, steps: int) -> nn.Module:
        """The student of that variant, trained."""
        task, batches = self.task, self.task.batches(seed + 1)
        torch.manual_seed(seed)
        options = {"steps": steps, "seed": seed}
        student = self.start
        if not variant.startswith("start"):
            student = fresh(self.start)
            options["recipe"] = replace(task.recipe, steps=steps)
        if variant in ("scratch", "start", LONGER):
            return distill(student, self.teacher, batches, alpha=0, loss=task.loss, **options)
        if "hidden" in variant:
            options["hidden"] = task.hidden(self.start, self.teacher)
        inputs = lambda step: batches(step)[0]  # noqa: E731
        return distill(student, self.teacher, inputs, temperature=task.temperature, **options)

    def row(
        self, variant: str, seed: int, steps: int, seconds: float, model: nn.Module
    ) -> rows.Row:
        return {
            "task": self.task.name,
            "variant": variant,
            "seed": seed,
            "steps": steps,
            "parameters": sum(p.numel() for p in model.parameters()),
            "step_ms": 1e3 * seconds / max(1, steps),
            "train_s": seconds,
            "metric": self.task.metric,
            "value": self.task.score(model),
            "threads": torch.get_num_threads(),
        }


def fresh(start: nn.Module) -> nn.Module:
    """The same architecture with new weights."""
    student = surgery.clone(start)
    for module in student.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if isinstance(student, DecoderLM):
        student._initialise()
    return student


def summarize(measured: list[rows.Row]) -> None:
    """Mean and spread over the seeds, and the share of the gap between scratch and teacher that
    each variant closes.
    """
    values: dict[tuple[str, str], list[float]] = {}
    for row in measured:
        values.setdefault((row["task"], row["variant"]), []).append(float(row["value"]))
    means = {key: statistics.mean(found) for key, found in values.items()}
    for (task, variant), found in values.items():
        scratch, teacher = means.get((task, "scratch")), means.get((task, "teacher"))
        closed = ""
        if scratch is not None and teacher is not None and scratch != teacher:
            closed = f"{(scratch - means[task, variant]) / (scratch - teacher):.0%} closed"
        spread = f"{min(found):.4f} to {max(found):.4f}"
        print(f"{task:7} {variant:16} mean {means[task, variant]:.4f}  {spread}  {closed}")


def run(experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Train what isn't in the CSV yet."""
    out, key = arguments.out, ("task", "variant", "seed")
    mine = [row for row in rows.read(out) if row["task"] == experiment.task.name]
    costs = {row["variant"]: float(row["step_ms"]) for row in mine}
    done = {(row["variant"], int(row["seed"])) for row in mine}
    if ("teacher", 0) not in done:
        rows.write(out, [experiment.row("teacher", 0, 0, 0.0, experiment.teacher)], key)
    for seed, variant in product(arguments.seeds, arguments.variants):
        if (variant, seed) in done:
            continue
        steps = arguments.steps
        if variant == LONGER:
            if not {"start + logits", "scratch"} <= costs.keys():
                raise SystemExit(f"{LONGER!r} needs rows of 'scratch' and 'start + logits'")
            steps = max(1, round(steps * costs["start + logits"] / costs["scratch"]))
        before = time.process_time()
        student = experiment.train(variant, seed, steps)
        seconds = time.process_time() - before
        costs.setdefault(variant, 1e3 * seconds / steps)
        rows.write(out, [experiment.row(variant, seed, steps, seconds, student)], key)


def main() -> None:
    parser = rows.Parser(__doc__, "distillation.csv")
    parser.add_argument("--task", choices=TASKS, default="digits", help="(default: digits)")
    parser.file("--teacher", "its file; by default one is trained")
    parser.flag("--steps", "training steps of a student", 200)
    parser.flag("--seeds", "of the students", [0, 1, 2])
    parser.some("--variants", "how they are trained", VARIANTS)
    arguments = parser.parse()
    task = TASKS[arguments.task](arguments.steps)
    teacher = quantize.load(arguments.teacher) if arguments.teacher else train_teacher(task)
    seen = [task.batches(1)(10**6 + i)[0] for i in range(16)]
    start = make_student(teacher, **task.student, example_inputs=seen[0], calibration=seen)
    run(Experiment(task, teacher, start), arguments)
    summarize(rows.read(arguments.out))
    labels = ("CPU seconds of training", task.metric)
    rows.chart(arguments.out, "task", "variant", lambda r: float(r["train_s"]), "value", labels)


if __name__ == "__main__":
    main()
