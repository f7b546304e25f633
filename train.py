"""Train a model, compress it in every way, measure each file, print the table.

    uv run python train.py                                  # text, under 5 minutes on 2 cores
    uv run python train.py --preset tiny                    # half a minute: does everything work?
    uv run python train.py --task image                     # scikit-learn's digits
    uv run python train.py --data my_texts --preset base    # your own files
    uv run python train.py --resume                         # go on after Ctrl-C, a crash or a kill
    uv run python train.py --variants int8 pruned           # only these beside the baseline
    uv run torchrun --standalone --nproc-per-node 2 train.py --threads 1

Writes into --out: model.pth (the baseline), a file per variant, report.json, report.md and pareto.png. Every number in the
table is measured from the written file, loaded again in a fresh process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

if "OMP_WAIT_POLICY" not in os.environ:  # before torch is imported; why: quantize/host.py
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import nn

import quantize
from quantize import data, script, training
from quantize.checkpoint import CheckpointError
from quantize.host import default_threads, keep_allocations
from quantize.measure import Measurement, MeasurementError, compare, fingerprint
from quantize.models import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM
from quantize.report import build_report, print_report, write_report
from quantize.script import in_words
from quantize.training import Recipe

CALIBRATION_BATCHES = 8


@dataclass(frozen=True)
class Preset:
    """A model, how it is trained, and on what it is measured."""

    model: DecoderConfig | ConvNetConfig
    recipe: Recipe
    batch: tuple[int, ...]  # example inputs for latency: (rows, tokens) of text, (rows,) of images
    validation: int | None = None  # bytes of held-out text that each row is evaluated on; None: all
    rounds: int = 7  # in which the files take turns for timing
    depth: float | None = 0.5  # share of the blocks of each stage that the student keeps; None: all


_DECODER = DecoderConfig(width=128, layers=6, heads=2, qk_norm=True, max_length=1024)
_FAST = {"lr": 1e-2, "muon_lr": 0.02}

PRESETS = {
    "text": {
        "tiny": Preset(
            replace(_DECODER, layers=2, ffn_width=1024),
            Recipe(steps=30, length=128, batch=4, **_FAST),
            (4, 128),
            2**12,
            rounds=2,
        ),
        "small": Preset(_DECODER, Recipe(steps=800, length=256, batch=8, short=0.6, **_FAST), (8, 256), 2**15, rounds=5),
        "base": Preset(
            DecoderConfig(width=512, layers=8, heads=8, qk_norm=True, max_length=2048),
            Recipe(steps=8000, length=512, batch=16, short=0.6, lr=5e-3, muon_lr=0.02),
            (8, 256),
            2**16,
        ),
    },
    "image": {
        "tiny": Preset(ConvNetConfig(widths=(32, 64)), Recipe(steps=60, batch=64), (64,), rounds=3, depth=None),
        "small": Preset(ConvNetConfig(widths=(64, 128), blocks=2), Recipe(steps=300, batch=64), (64,)),
        "base": Preset(ConvNetConfig(widths=(64, 128, 256), blocks=2), Recipe(steps=3000, batch=128), (64,)),
    },
}


@dataclass
class Job:
    """One run of this script: what it trains on, and the variants made so far."""

    task: str
    preset: Preset
    data: Any
    out: Path
    seed: int
    resume: bool
    device: str
    made: dict[str, nn.Module] = field(default_factory=dict)  # in memory, by name of the row
    failed: dict[str, str] = field(default_factory=dict)  # why a row has no numbers

    @cached_property
    def loss(self) -> training.Loss:
        return training.next_token_loss if self.task == "text" else training.classification_loss

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return (DecoderLM if self.task == "text" else ConvNet)(self.preset.model)

    def batches(self, recipe: Recipe) -> training.Batches:
        rank, world = training.ranks()
        shared = {"batch": recipe.batch, "seed": self.seed, "rank": rank, "world": world}
        if self.task == "text":
            short_steps = int(recipe.short * recipe.steps)
            return data.TextBatches(self.data.train, length=recipe.length, short_steps=short_steps, **shared)
        return data.ImageBatches(self.data, **shared)

    def progress(self, name: str) -> training.ProgressPrinter:
        return training.ProgressPrinter(name, unit="tokens" if self.task == "text" else "images")

    def options(self, name: str, printer: training.ProgressPrinter) -> dict[str, Any]:
        """What makes any training of this job resumable under `name`."""
        return {
            "seed": self.seed, "resume": self.resume, "checkpoint_path": self.out / f"{name}.state",
            "identity": {"data": self.data.describe()}, "on_progress": printer,
        }  # fmt: skip

    def train(self) -> nn.Module:
        recipe = self.preset.recipe
        with self.progress("fp32") as printer:
            model = self.build().to(self.device)
            training.fit(model, self.batches(recipe), self.loss, recipe, **self.options("fp32", printer))
        return model.cpu()

    def distil(self, name: str, how: Callable[..., nn.Module], student: nn.Module, rows: int = 1, **options: Any) -> nn.Module:
        """`student` taught by the baseline in a fifth of its steps, on many short windows, in batches `rows` times as large."""
        recipe = self.preset.recipe
        batches, steps = self.batches(replace(recipe, short=1.0, batch=rows * recipe.batch)), max(1, recipe.steps // 5)
        with self.progress(name) as printer:
            model = how(
                student.to(self.device), self.model("fp32").to(self.device), lambda step: batches(step)[0], steps=steps,
                **options, **self.options(name, printer),
            ).cpu()  # fmt: skip
        print(f"{name}: {quantize.summary(model).steps[-1].done['']}", flush=True)
        return model

    def recover(self, name: str, model: nn.Module, rows: int = 1) -> nn.Module:
        """`distil` for a model of the baseline's depth: what leaves its blocks is compared too."""
        names = [f"blocks.{i}" for i in range(len(self.model("fp32").blocks))] if self.task == "text" else None
        return self.distil(name, quantize.recover, model, rows, hidden=names)

    def student(self) -> nn.Module:
        """About a quarter of the baseline's parameters, cut out of it: half its depth (where a stage has more than one
        block) and half its inner widths."""
        return quantize.make_student(
            self.model("fp32"),
            depth=self.preset.depth,
            width=0.5,
            example_inputs=self.example,
            calibration=self.calibration,
        )

    def model(self, name: str) -> nn.Module:
        """The model of a row, made on first use."""
        if name in self.failed:
            raise ValueError(f"{name} failed: {self.failed[name]}")
        if name not in self.made:
            print(f"making {name}", flush=True)
            self.made[name] = VARIANTS[name](self)
        return self.made[name]

    def write(self, name: str) -> None:
        """Make a row's model and save it; a variant that can't be made gets a row that says why."""
        try:
            quantize.save(self.model(name), self.file(name))
        except OSError:
            raise
        except Exception as error:
            if name == "fp32":
                raise
            self.fail(name, error)

    def fail(self, name: str, error: Exception) -> None:
        self.failed[name] = in_words(error)
        print(f"train.py: {name} failed: {self.failed[name]}", file=sys.stderr, flush=True)

    def file(self, name: str) -> Path:
        return self.out / ("model.pth" if name == "fp32" else f"{name}.pth")

    @cached_property
    def calibration(self) -> list[torch.Tensor]:
        """Batches of training inputs."""
        batches = self.batches(replace(self.preset.recipe, short=0.0))
        return [batches(step)[0] for step in range(CALIBRATION_BATCHES)]

    @cached_property
    def example(self) -> torch.Tensor:
        """The held-out inputs that latency is measured on: ids [B, T] or images [B, C, H, W]."""
        if self.task == "image":
            return self.data.validation_images[: self.preset.batch[0]]
        rows, length = self.preset.batch
        text = self.data.validation
        return torch.stack([text[i * length % max(1, len(text) - length) :][:length] for i in range(rows)]).long()

    @property
    def evaluate(self) -> Callable[[nn.Module], dict[str, float]]:
        if self.task == "text":
            length = self.preset.recipe.length  # the context it was trained on; half of it before each byte that counts
            return partial(
                training.evaluate_text, text=self.data.validation, length=length, overlap=length // 2,
                max_bytes=self.preset.validation,
            )  # fmt: skip
        return partial(training.evaluate_images, images=self.data.validation_images, labels=self.data.validation_labels)


# Half of the feed-forward neurons of a decoder, half of the channels of a network for images.
PRUNED: dict[str, Any] = {"text": {"blocks.*.ffn.up": 0.5}, "image": 0.5}

# What each variant is made of. A recovered one is distilled from the baseline in a fifth of the baseline's steps.
VARIANTS: dict[str, Callable[[Job], nn.Module]] = {
    "fp16": lambda job: quantize.to_half(job.model("fp32"), torch.float16),
    "bf16": lambda job: quantize.to_half(job.model("fp32"), torch.bfloat16),
    "int8": lambda job: quantize.quantize_dynamic(job.model("fp32"), embeddings=True),
    "pruned": lambda job: quantize.prune_ln_structured(
        job.model("fp32"), job.example, amount=PRUNED[job.task], calibration=job.calibration
    ),
    "pruned_recovered": lambda job: job.recover("pruned_recovered", job.model("pruned")),
    "low_rank": lambda job: quantize.factorize_low_rank(
        job.model("fp32"),
        ratio=0.5,
        calibration=job.calibration,
        skip=("head",),
        only_faster=False,  # ranks that depend on a moment's timing would keep a resumed run from going on
    ),
    "low_rank_recovered": lambda job: job.recover("low_rank_recovered", job.model("low_rank"), rows=2),
    "student": lambda job: job.distil("student", partial(quantize.distill, temperature=1.0), job.student()),
    "student_int8": lambda job: quantize.quantize_dynamic(job.model("student"), embeddings=True),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script.Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, help=f"{text} (default: %(default)s)", **options)

    add("--preset", "size of the model and length of the training", choices=list(PRESETS["text"]), default="small")
    add("--task", "what to learn", choices=list(PRESETS), default="text")
    add("--data", "text: files or folders; image: a folder of IDX files; none: built-in data", nargs="+", type=script.path)
    add("--out", "folder for everything that is written", type=script.path, default=Path("artifacts"))
    add("--variants", f"compressed variants to make, of {', '.join(VARIANTS)}", nargs="+", default=list(VARIANTS))
    add("--steps", "training steps, instead of the preset's", type=script.count)
    add("--seed", "seed of weights and data order", type=script.seed, default=0)
    add("--threads", "threads to train and measure with; none: the cores that this process may use", type=script.threads)
    add("--device", "where to train; everything is measured on the CPU", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    arguments = parser.parse_args(argv)
    arguments.variants = [name for entry in arguments.variants for name in entry.split(",") if name]
    for name in arguments.variants:
        if name not in VARIANTS and name != "fp32":
            parser.error(f"argument --variants: {name!r} is not one of fp32, {', '.join(VARIANTS)}")
    if not arguments.variants:
        parser.error(f"argument --variants: no name is given; allowed: fp32, {', '.join(VARIANTS)}")
    if arguments.task == "image" and arguments.data and len(arguments.data) > 1:
        parser.error(f"argument --data: one folder of IDX files is allowed for images, got {len(arguments.data)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this machine has no CUDA device; cpu is allowed")
    return arguments


def prepare(arguments: argparse.Namespace) -> Job:
    """Check whatever can be checked before the first training step."""
    preset = PRESETS[arguments.task][arguments.preset]
    if arguments.steps:
        preset = replace(preset, recipe=replace(preset.recipe, steps=arguments.steps))
    if arguments.task == "text":
        loaded = data.load_text(arguments.data)
        if len(loaded.validation) <= preset.batch[1]:
            held, window = len(loaded.validation), preset.batch[1]
            raise data.DataError(f"data: {held} bytes held out are less than one window of {window + 1}: give more text")
    else:
        loaded = data.load_images(arguments.data[0] if arguments.data else None)
        channels = loaded.train_images.shape[1]
        preset = replace(preset, model=replace(preset.model, in_channels=channels, classes=loaded.classes))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=arguments.out):  # can it be written to? no name, so that ranks don't meet
        pass
    return Job(arguments.task, preset, loaded, arguments.out, arguments.seed, arguments.resume, arguments.device)


def measure(job: Job, names: Sequence[str], **options: Any) -> list[Measurement]:
    files = {name: job.file(name) for name in names}
    return compare(files, job.example, evaluate=job.evaluate, **options)


def measure_each(job: Job, names: Sequence[str]) -> list[Measurement]:
    """Measure the files side by side; where one of them makes that fail, the others, and its row says why."""
    options = {"rounds": job.preset.rounds, "progress": lambda line: print(f"measuring: {line}", file=sys.stderr, flush=True)}
    try:
        return measure(job, names, **options)
    except (CheckpointError, MeasurementError):
        for name in names[1:]:
            try:
                measure(job, [name], rounds=1, burst_seconds=0.0)
            except (CheckpointError, MeasurementError) as error:
                job.fail(name, error)
        if not job.failed.keys() & set(names):
            raise
        return measure(job, [name for name in names if name not in job.failed], **options)


def report(job: Job, names: Sequence[str]) -> None:
    """Measure every file in a fresh process, write the report and print the table."""
    measurements = []
    for measurement in measure_each(job, names):
        if measurement.output_sha256 == fingerprint(job.model(measurement.name), job.example):
            measurements.append(measurement)
        else:
            reason = f"{measurement.file}: the loaded model doesn't give the bits of the one that was saved"
            job.fail(measurement.name, CheckpointError(reason))
    if not measurements or measurements[0].name != "fp32":
        raise CheckpointError(job.failed["fp32"])
    about = {
        **job.data.describe(), "seed": job.seed, "steps": job.preset.recipe.steps,
        "example_inputs": list(job.example.shape),
    }  # fmt: skip
    if job.task == "text":
        about["baselines_bits_per_byte"] = data.compression_baselines(job.data.validation)
    result = build_report(measurements, data=about, failed=job.failed)
    write_report(result, job.out)
    print_report(result)


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads or default_threads())
    keep_allocations()
    with training.distributed(arguments.device) as (rank, _):
        job = prepare(arguments)
        if rank == 0:
            parameters = sum(p.numel() for p in job.build().parameters())
            print(f"training {parameters:,} parameters for {job.preset.recipe.steps} steps on {job.data.name}", flush=True)
        job.made["fp32"] = job.train()
    if rank > 0:
        return
    names = ["fp32", *(name for name in VARIANTS if name in arguments.variants)]
    for name in names:
        job.write(name)
    report(job, [name for name in names if name not in job.failed])
    commands = ["fusion.py", "kv_cache.py"] if job.task == "text" else ["fusion.py"]
    following = ", ".join(f"uv run python {command} --out {job.out}" for command in commands)
    print(f"\nwritten to {job.out}; next: {following}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    arguments = parse(argv)
    stopped = "stopped; the same command with --resume goes on from the last saved step"
    return script.exit_code("train.py", lambda: run(arguments), stopped, quiet=int(os.environ.get("RANK", "0")) > 0)


if __name__ == "__main__":
    sys.exit(main())
