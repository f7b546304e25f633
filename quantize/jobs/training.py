"""The default job: train a baseline, make recipes of it, write a file each, measure them,
report.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize import checkpoint, surgery, training
from quantize.checkpoint import CheckpointError
from quantize.compression.recipe import Given, Recipe, make
from quantize.jobs.presets import PRESETS, Preset, recipes
from quantize.measuring.artifact import MeasurementError, fingerprint
from quantize.measuring.comparison import compare
from quantize.measuring.report import build_report, write_report
from quantize.measuring.result import Measurement
from quantize.models import ConvNet, DecoderConfig, DecoderLM
from quantize.script import in_words
from quantize.seeding import seed_devices
from quantize.training import data

CALIBRATION_BATCHES = 8
BASELINE = "fp32"
METADATA_KEY = "recipe"  # of a variant's file: `Recipe.from_json` takes what is there


@dataclass
class Job:
    """One run: what it trains on, where it writes, and what became of the variants so far.

    Args:
        preset: the model, its training and how it is measured.
        data: of `quantize.training.data.load_text` or `load_images`.
        out: folder for everything that is written.
        seed: of weights, data order and trainings.
        resume: whether trainings go on from the states in `out`.
        device: where to train; everything is measured on the CPU.
        fingerprints: of the outputs of what was saved, by row.
        failed: why a row has no numbers.
        notes: for people, by row.
        layers: what each layer of the row "auto" got and why, as `compress` says it.
    """

    preset: Preset
    data: Any  # TextData or ImageData, as the preset's model takes
    out: Path
    seed: int = 0
    resume: bool = False
    device: str = "cpu"
    fingerprints: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    layers: list[dict[str, str]] = field(default_factory=list)

    @property
    def is_text(self) -> bool:
        return isinstance(self.data, data.TextData)

    def build(self) -> nn.Module:
        """The baseline with new weights."""
        seed_devices(self.seed)
        if isinstance(self.preset.model, DecoderConfig):
            return DecoderLM(self.preset.model)
        return ConvNet(self.preset.model)

    def describe(self) -> str:
        """What is about to be trained, in one line."""
        parameters = surgery.parameter_count(self.build())
        steps = self.preset.training.steps
        return f"training {parameters:,} parameters for {steps} steps on {self.data.name}"

    def train(self) -> nn.Module:
        """The trained baseline, on the CPU. Raises what `training.fit` raises."""
        model = self.build().to(self.device)
        recipe = self.preset.training
        batches = self._batches(int(recipe.short * recipe.steps))
        loss = training.next_token_loss if self.is_text else training.classification_loss
        with self._printer(BASELINE) as on_progress:
            training.fit(
                model,
                batches,
                loss,
                recipe,
                seed=self.seed,
                checkpoint_path=self.out / f"{BASELINE}.state",
                on_progress=on_progress,
                **self._resuming,
            )
        return model.cpu()

    def write(self, baseline: nn.Module, names: Sequence[str]) -> None:
        """Save the baseline, and make and save the variants of these names.

        A variant that can't be made or saved gets a row that says why. Raises OSError.
        """
        self.save(BASELINE, baseline, None)
        known = recipes(self.preset)
        for made in make([known[name] for name in names], baseline, self.given):
            if isinstance(made.error, OSError):
                raise made.error
            if made.model is None:
                self._fail(made.recipe.name, made.error)
                continue
            try:
                self.save(made.recipe.name, made.model, made.recipe)
            except OSError:
                raise
            except Exception as error:  # a layer that no file can hold, an output that isn't there
                self._fail(made.recipe.name, error)

    def file(self, name: str) -> Path:
        """Where the model of a row is."""
        return self.out / ("model.pth" if name == BASELINE else f"{name}.pth")

    def report(self) -> dict[str, Any]:
        """Measure every file in a fresh process, write the report, and return it.

        Raises:
            CheckpointError, MeasurementError: the baseline can't be measured.
            OSError: the report can't be written.
        """
        measurements = []
        for measurement in self._measured(list(self.fingerprints)):
            if measurement.output_sha256 == self.fingerprints[measurement.name]:
                measurements.append(measurement)
            else:
                reason = "the loaded model doesn't give the bits of the one that was saved"
                error = CheckpointError(f"{measurement.file}: {reason}")
                self._fail(measurement.name, error)
        if not measurements or measurements[0].name != BASELINE:
            raise CheckpointError(self.failed[BASELINE])
        about = {
            **self.data.describe(),
            "seed": self.seed,
            "steps": self.preset.training.steps,
            "example_inputs": list(self.example.shape),
        }
        if self.is_text:
            about["baselines_bits_per_byte"] = data.compression_baselines(self.data.validation)
        if self.layers:
            about["layers"] = self.layers
        known = {one.name for one in measurements}
        notes = {name: note for name, note in self.notes.items() if name in known}
        result = build_report(measurements, data=about, failed=self.failed, notes=notes)
        write_report(result, self.out)
        return result

    @cached_property
    def given(self) -> Given:
        """What the recipes work with. Trainings see many short windows."""
        batches = self._batches(short_steps=sys.maxsize)
        return Given(
            example_inputs=self.example,
            calibration=self.calibration,
            batches=lambda step: batches(step)[0],
            seed=self.seed,
            device=self.device,
            states=self.out,
            training=self._resuming,
            printer=self._printer,
            progress=partial(print, file=sys.stderr, flush=True),
        )

    @cached_property
    def calibration(self) -> list[Tensor]:
        """Batches of training inputs."""
        batches = self._batches(short_steps=0)
        return [batches(step)[0] for step in range(CALIBRATION_BATCHES)]

    @cached_property
    def example(self) -> Tensor:
        """The held-out inputs that latency is measured on: ids [B, T] or images [B, C, H, W]."""
        if not self.is_text:
            return self.data.validation_images[: self.preset.batch[0]]
        count, length = self.preset.batch
        text = self.data.validation
        room = max(1, len(text) - length)
        starts = [index * length % room for index in range(count)]
        return torch.stack([text[start : start + length] for start in starts]).long()

    @property
    def evaluate(self) -> Callable[[nn.Module], dict[str, float]]:
        """The metric of a row, from the loaded model, on what was held out."""
        if not self.is_text:
            images, labels = self.data.validation_images, self.data.validation_labels
            return partial(training.evaluate_images, images=images, labels=labels)
        length = self.preset.training.length  # as in training; half of it before each scored byte
        return partial(
            training.evaluate_text,
            text=self.data.validation,
            length=length,
            overlap=length // 2,
            max_bytes=self.preset.validation,
        )

    @property
    def _resuming(self) -> dict[str, Any]:
        return {"resume": self.resume, "identity": {"data": self.data.describe()}}

    def _printer(self, name: str) -> training.ProgressPrinter:
        return training.ProgressPrinter(name, unit="tokens" if self.is_text else "images")

    def _batches(self, short_steps: int) -> training.Batches:
        rank, world = training.ranks()
        recipe = self.preset.training
        shared = {"batch": recipe.batch, "seed": self.seed, "rank": rank, "world": world}
        if not self.is_text:
            return data.ImageBatches(self.data, **shared)
        length = recipe.length
        text = self.data.train
        return data.TextBatches(text, length=length, short_steps=short_steps, **shared)

    def save(self, name: str, model: nn.Module, recipe: Recipe | None) -> None:
        """Write the model of a row, with the recipe that made it. Raises OSError."""
        metadata = {METADATA_KEY: recipe.as_values()} if recipe else None
        checkpoint.save(model, self.file(name), metadata=metadata)
        self.fingerprints[name] = fingerprint(model, self.example)

    def _fail(self, name: str, error: Exception | None) -> None:
        self.failed[name] = in_words(error) if error else "unknown"
        self.fingerprints.pop(name, None)
        print(f"train.py: {name} failed: {self.failed[name]}", file=sys.stderr, flush=True)

    def _measured(self, names: Sequence[str]) -> list[Measurement]:
        """The files side by side; one that can't be measured has a reason in `failed` instead."""
        found = compare(
            {name: self.file(name) for name in names},
            self.example,
            evaluate=self.evaluate,
            rounds=self.preset.rounds,
            keep_going=True,
            progress=partial(print, "measuring:", file=sys.stderr, flush=True),
        )
        for one in found:
            if one.failed is not None:
                self._fail(one.name, MeasurementError(one.failed))
        return [one for one in found if one.failed is None]


def prepare(
    preset: str = "tiny",
    *,
    task: str = "text",
    out: Path,
    paths: Sequence[Path] | None = None,
    steps: int | None = None,
    **options: Any,
) -> Job:
    """A job, after checking whatever can be checked before the first training step.

    Args:
        preset: "tiny", "small" or "base".
        task: "text" or "image".
        out: folder for everything that is written; made here.
        paths: files and folders of text, one folder of IDX files; None: built-in data.
        steps: of the training, instead of the preset's.
        options: `seed`, `resume`, `device` of the job.

    Returns:
        The job, with its data.

    Raises:
        ValueError: data that can't be used, or too little of it.
        OSError: a folder that can't be written to.
    """
    chosen = PRESETS[task][preset]
    if steps:
        chosen = replace(chosen, training=replace(chosen.training, steps=steps))
    if task == "text":
        loaded: data.TextData | data.ImageData = data.load_text(paths)
        _check_length(len(loaded.validation), window=chosen.batch[1])
    else:
        if paths and len(paths) > 1:
            raise data.DataError(f"--data: one folder of IDX files is allowed, got {len(paths)}")
        loaded = data.load_images(paths[0] if paths else None)
        channels = loaded.train_images.shape[1]
        model = replace(chosen.model, in_channels=channels, classes=loaded.classes)
        chosen = replace(chosen, model=model)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):  # can it be written to? no name: ranks don't meet
        pass
    return Job(chosen, loaded, out, **options)


def _check_length(held_out: int, window: int) -> None:
    if held_out <= window:
        need = f"less than one window of {window + 1}: give more text"
        raise data.DataError(f"data: {held_out} bytes held out are {need}")


def train_baseline(preset: str, out: Path) -> Path:
    """Train the text model of a preset and save it, for a script that finds no model.

    Returns:
        The path of the file, `out / "model.pth"`.

    Raises:
        KeyboardInterrupt: with the command that goes on.
        ValueError, OSError: as `prepare` and `Job.train`.
    """
    path = out / "model.pth"
    print(f"there is no {path}: training the {preset} preset first", flush=True)
    job = prepare(preset, out=out)
    try:
        model = job.train()
    except KeyboardInterrupt:
        command = f"train.py --preset {preset} --variants fp32 --out {out} --resume"
        raise KeyboardInterrupt(f"stopped; uv run python {command} goes on") from None
    job.write(model, ())
    return path
