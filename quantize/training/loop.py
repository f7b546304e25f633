"""Train any module, step by step, so that it can be killed at any moment and go on as if nothing
had happened.

Everything a step does is a function of (weights, optimizer state, step): the batch, the learning
rates, the seed of the random numbers. So a resume needs no more than those, and ends bit for bit
where an uninterrupted run ends (same machine, same threads). Under `torchrun` the gradients are
averaged over the ranks by one plain all-reduce; only rank 0 writes. Left out: gradient
accumulation, sharding, loggers: PyTorch and Lightning do those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantize.calibration import on_tensors
from quantize.host import native_bf16
from quantize.seeding import seed_devices
from quantize.surgery import device_of
from quantize.training.config import TrainConfig
from quantize.training.optimizers import build_optimizers
from quantize.training.progress import Progress
from quantize.training.ranks import average, broadcast, ranks
from quantize.training.resuming import TrainingError, describe, restore, write_state

Batches = Callable[[int], Any]  # step -> batch
Loss = Callable[[nn.Module, Any], Tensor]  # model, batch -> scalar, a mean over the batch


class Judge(Protocol):
    """Judges training while it runs, by something else than the loss of a step (see
    `distillation.best.Best`).
    """

    scale: float  # of the learning rates of the next steps

    def start(self) -> None:
        """Before the first step."""

    def check(self, done: int) -> bool:
        """After so many steps: whether it put the model back into an earlier state."""
        ...

    def finish(self) -> None:
        """After the last step."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def fit(
    model: nn.Module,
    batches: Batches,
    loss_fn: Loss,
    config: TrainConfig,
    *,
    seed: int = 0,
    bf16: bool | None = None,
    checkpoint_path: Path | str | None = None,
    checkpoint_seconds: float = 15.0,
    resume: bool = False,
    identity: dict | None = None,
    judge: Judge | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> nn.Module:
    """Train `model` in place for `config.steps` steps and return it in eval mode.

    Args:
        model: the module to train.
        batches: `batches(step)` gives the batch of a step as a tensor or (nested) tuple, list, dict
            of tensors.
        loss_fn: `loss_fn(model, batch)` gives the scalar to minimize.
        config: steps, learning rates and schedule.
        seed: of the random numbers that a step draws (dropout and the like).
        bf16: compute in bf16 where autocast allows it; None asks `native_bf16`. Weights stay fp32.
        checkpoint_path: file for the training state, written before the first step, about every
            `checkpoint_seconds`, and after the last step.
        checkpoint_seconds: least time between two writings of that file.
        resume: go on from that file if it exists.
        identity: what else must agree between the two runs for a resume to be right (configs,
            hashes of the data), as plain values.
        judge: keeps the best state of the model, in which it ends; its own state is in the file
            too.
        on_progress: called with a `Progress` after every step, on rank 0.

    Returns:
        `model`, in eval mode.

    Raises:
        TrainingError: nothing to train, a loss or gradient that is not finite (the last good state
            stays on disk), a state file that is damaged, of another run, or cannot be written.
    """
    rank, world = ranks()
    device = device_of(model)
    path = None if checkpoint_path is None else Path(checkpoint_path)
    optimizers = build_optimizers(model, config)
    model.train()
    run = {"config": asdict(config), "seed": seed, "bf16": bf16, "world": world}
    run |= {"identity": identity or {}, "model": describe(model)}
    resumed = resume and path is not None and path.exists()
    first = 0
    if path is not None and resumed:
        first = restore(path, model, optimizers, judge, run)
    broadcast(model, world)
    if judge is not None and not resumed:
        judge.start()
    if path is not None and rank == 0 and not resumed:
        write_state(path, model, optimizers, judge, run, 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    started = saved = time.monotonic()
    units = 0
    for step in range(first, config.steps):
        seed_devices(hash((seed, step, rank)))  # dropout is a function of the step too
        scale = 1.0 if judge is None else judge.scale
        _begin_step(optimizers, config.rate(step) * scale)
        batch = _to_device(batches(step), device)
        with autocast(device, bf16):
            loss = loss_fn(model, batch)
        loss_value, norm = _gradients(loss, parameters, world, config.clip)
        _check_finite(step, loss_value, norm, path)
        for optimizer in optimizers:
            optimizer.step()
        done = step + 1
        if judge is not None and judge.check(done):
            optimizers = build_optimizers(model, config)
        now = time.monotonic()
        due = now - saved >= checkpoint_seconds or done == config.steps
        if path is not None and rank == 0 and due:
            write_state(path, model, optimizers, judge, run, done)
            saved = time.monotonic()
        if on_progress is not None and rank == 0:
            units += _units(batch) * world
            on_progress(_progress(done, first, config.steps, loss_value, units, now - started))
    if judge is not None:
        judge.finish()
    return model.eval()


def autocast(device: torch.device | str, bf16: bool | None = None) -> AbstractContextManager:
    """bf16 autocast if asked for; with None, where the device multiplies bf16 natively."""
    if native_bf16(device) if bf16 is None else bf16:
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()


def _progress(
    done: int, first: int, steps: int, loss: float, units: int, elapsed: float
) -> Progress:
    left = elapsed / (done - first) * (steps - done)
    return Progress(done, steps, loss, units / max(elapsed, 1e-9), left)


def _begin_step(optimizers: list, scale: float) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * scale


def _gradients(
    loss: Tensor, parameters: list[nn.Parameter], world: int, clip: float
) -> tuple[float, float]:
    """Gradients averaged over the ranks and clipped; gives the mean loss and the norm before."""
    loss.backward()
    _make_dense(parameters)
    mean = average(loss, parameters, world)
    return mean, nn.utils.clip_grad_norm_(parameters, clip).item()


def _check_finite(step: int, loss: float, norm: float, path: Path | None) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    kept = "" if path is None else f"; the last good state is in {path}"
    raise TrainingError(f"step {step}: loss {loss}, gradient norm {norm}: not finite{kept}")


def _to_device(batch: Any, device: torch.device) -> Any:
    return on_tensors(batch, lambda tensor: tensor.to(device))


def _units(batch: Any) -> int:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch) if batch.is_floating_point() else batch.numel()


def _make_dense(parameters: list[nn.Parameter]) -> None:
    """Gradients of sparse embeddings as plain tensors: neither clipping nor the optimizers take
    sparse ones.
    """
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            parameter.grad = parameter.grad.to_dense()
