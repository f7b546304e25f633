"""Train any module, step by step, so that it can be killed at any moment and go on as if nothing had happened.

Everything a step does is a function of (weights, optimizer state, step): the batch, the learning rates, the seed of
the random numbers. So a resume needs no more than those, and ends bit for bit where an uninterrupted run ends (same
machine, same threads). Under `torchrun` the gradients are averaged over the ranks by one plain all-reduce; only rank 0
writes. Left out: gradient accumulation, sharding, loggers: PyTorch and Lightning do those.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from rich.progress import Progress as RichProgress
from torch import Tensor, nn

from quantize.calibration import on_tensors
from quantize.host import native_bf16
from quantize.resuming import TrainingError, describe, restore, write_state

Batches = Callable[[int], Any]  # step -> batch
Loss = Callable[[nn.Module, Any], Tensor]  # model, batch -> scalar, a mean over the batch


# ---------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """How to train: all that `fit` needs to know beside the model, the batches and the loss.

    Matrices between the input and the output layer are updated by Muon at `muon_lr`, all else by AdamW at `lr`. Rates
    rise over `warmup` steps, hold, and fall to zero over the last `cooldown` share of the steps.
    """

    steps: int
    batch: int = 32
    length: int = 256  # tokens in a window (text)
    short: float = 0.0  # share of the steps, at the start, that see twice as many windows of half the length
    lr: float = 3e-3
    muon_lr: float = 0.02
    momentum: float = 0.9  # Muon's
    weight_decay: float = 0.0
    warmup: int = 20
    cooldown: float = 0.6
    clip: float = 1.0  # longest gradient norm; larger ones are scaled down to it

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(f"Recipe.{name} is {getattr(self, name)!r}; allowed: an integer >= 1")
        for name in ("lr", "muon_lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Recipe.{name} is {getattr(self, name)!r}; allowed: a finite number > 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"Recipe.weight_decay is {self.weight_decay!r}; allowed: a finite number >= 0")
        if not (isinstance(self.warmup, int) and self.warmup >= 0):
            raise ValueError(f"Recipe.warmup is {self.warmup!r}; allowed: an integer >= 0")
        for name in ("cooldown", "short"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Recipe.{name} is {getattr(self, name)!r}; allowed: 0 to 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"Recipe.momentum is {self.momentum!r}; allowed: at least 0, less than 1")

    def rate(self, step: int) -> float:
        """Share of the full learning rates that `step`, counted from 0, uses."""
        rise = (step + 1) / (self.warmup + 1)
        fall = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return min(1.0, rise, fall)


# -------------------------------------------------------------------------------------------- optimizers


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters for Muon and for AdamW.

    Muon (Jordan et al., 2024) is for the matrices that map features to features. The embeddings and the last linear,
    whose rows stand for tokens or classes, and everything that is not a matrix are AdamW's.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    rows = [module for module in model.modules() if isinstance(module, nn.Embedding)] + linears[-1:]
    excluded = {id(module.weight) for module in rows}
    matrices, others = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and id(parameter) not in excluded
            (matrices if is_matrix else others).append(parameter)
    if not matrices and not others:
        raise TrainingError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to train")
    return matrices, others


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` (same state, same update) that orthogonalizes all matrices of one shape in one batch.

    One at a time, the matrices of a small model leave the cores idle: 42 of them took 34 ms a step on 2 cores.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(momentum, group["momentum"]))
                update = orthogonalize(torch.stack(updates), group["ns_coefficients"], group["ns_steps"])
                lr = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(update.float().unbind()), alpha=-lr)


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Move the singular values of each matrix of x [N, A, B] near 1 by Newton-Schulz steps, in bf16 (as torch's Muon)."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices, others = split_parameters(model)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(BatchedMuon(matrices, lr=recipe.muon_lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay))
    if others:
        optimizers.append(
            torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


# -------------------------------------------------------------------------------------------------- fit


@dataclass(frozen=True)
class Progress:
    """Where training stands, for `on_progress`."""

    step: int  # steps done
    steps: int
    loss: float  # mean of the batch, nats; over all ranks
    units_per_s: float  # tokens (integer inputs) or samples per second, over all ranks
    seconds_left: float


class Judge(Protocol):
    """Judges training while it runs, by something else than the loss of a step (see `distillation.best.Best`)."""

    scale: float  # of the learning rates of the next steps

    def start(self) -> None:
        """Before the first step."""

    def check(self, done: int) -> bool:
        """After so many steps: whether it put the model back into an earlier state."""

    def finish(self) -> None:
        """After the last step."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ProgressPrinter:
    """`on_progress` for people, as a context: a bar on a terminal, else a plain line now and then."""

    def __init__(self, name: str = "train", unit: str = "tokens", stream: TextIO | None = None, every_s: float = 10.0):
        self.name, self.unit, self.every_s = name, unit, every_s
        self.console = Console(file=stream or sys.stderr)
        self.bar = RichProgress(
            *("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[status]}"), console=self.console
        )
        self._task: int | None = None
        self._shown = -math.inf

    def __enter__(self) -> ProgressPrinter:
        return self

    def __exit__(self, *_error: object) -> None:
        self.bar.stop()

    def __call__(self, at: Progress) -> None:
        loss = f"{at.loss:.3f}" if at.loss >= 0.1 else f"{at.loss:.3g}"  # a good student's is 0.000432
        status = f"loss {loss}  {at.units_per_s:,.0f} {self.unit}/s  {at.seconds_left:.0f} s left"
        now = time.monotonic()
        if self.console.is_terminal:
            if self._task is None:
                self.bar.start()
                self._task = self.bar.add_task(self.name, total=at.steps, status=status)
            self.bar.update(self._task, completed=at.step, status=status)
        elif now - self._shown >= self.every_s or at.step == at.steps:
            self._shown = now
            self.console.print(f"{self.name}: step {at.step}/{at.steps}  {status}", highlight=False, soft_wrap=True)


def fit(
    model: nn.Module,
    batches: Batches,
    loss_fn: Loss,
    recipe: Recipe,
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
    """Train `model` in place for `recipe.steps` steps and return it in eval mode.

    Args:
        batches: `batches(step)` gives the batch of a step as a tensor or (nested) tuple, list, dict of tensors.
        loss_fn: `loss_fn(model, batch)` gives the scalar to minimize.
        bf16: compute in bf16 where autocast allows it; None asks `native_bf16`. Weights stay fp32.
        checkpoint_path: file for the training state, written before the first step, about every
            `checkpoint_seconds`, and after the last step.
        resume: go on from that file if it exists.
        identity: what else must agree between the two runs for a resume to be right (configs, hashes of the
            data), as plain values.
        judge: keeps the best state of the model, in which it ends; its own state is in the file too.

    Raises:
        TrainingError: nothing to train, a loss or gradient that is not finite (the last good state stays on disk),
            a state file that is damaged, of another run, or cannot be written.
    """
    rank, world = ranks()
    device = next(model.parameters()).device
    path = None if checkpoint_path is None else Path(checkpoint_path)
    optimizers = _optimizers(model, recipe)
    model.train()
    run = {
        "recipe": asdict(recipe),
        "seed": seed,
        "bf16": bf16,
        "world": world,
        "identity": identity or {},
        "model": describe(model),
    }
    resumed = resume and path is not None and path.exists()
    first = restore(path, model, optimizers, judge, run) if resumed else 0
    _broadcast(model, world)
    if judge is not None and not resumed:
        judge.start()
    if path is not None and rank == 0 and not resumed:
        write_state(path, model, optimizers, judge, run, 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    started = saved = time.monotonic()
    units = 0
    for step in range(first, recipe.steps):
        torch.manual_seed(hash((seed, step, rank)))  # dropout and the like: a function of the step too
        scale = recipe.rate(step) if judge is None else recipe.rate(step) * judge.scale
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * scale
        batch = _to_device(batches(step), device)
        with autocast(device, bf16):
            loss = loss_fn(model, batch)
        loss.backward()
        _make_dense(parameters)
        loss_value = _average(loss, parameters, world)
        norm = nn.utils.clip_grad_norm_(parameters, recipe.clip).item()
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            kept = "" if path is None else f"; the last good state is in {path}"
            raise TrainingError(f"step {step}: loss {loss_value}, gradient norm {norm}: not finite{kept}")
        for optimizer in optimizers:
            optimizer.step()
        done = step + 1
        if judge is not None and judge.check(done):
            optimizers = _optimizers(model, recipe)
        now = time.monotonic()
        if path is not None and rank == 0 and (now - saved >= checkpoint_seconds or done == recipe.steps):
            write_state(path, model, optimizers, judge, run, done)
            saved = time.monotonic()
        if on_progress is not None and rank == 0:
            units += _units(batch) * world
            elapsed = now - started
            left = elapsed / (done - first) * (recipe.steps - done)
            on_progress(Progress(done, recipe.steps, loss_value, units / max(elapsed, 1e-9), left))
    if judge is not None:
        judge.finish()
    return model.eval()


def autocast(device: torch.device | str, bf16: bool | None = None) -> AbstractContextManager:
    """bf16 autocast if asked for; with None, where the device multiplies bf16 natively."""
    if native_bf16(device) if bf16 is None else bf16:
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()


def next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy, in nats, of next tokens [B, T] under `model(ids [B, T])` -> logits [B, T, V]."""
    ids, targets = batch
    return F.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten())


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy, in nats, of classes [N] under `model(images)` -> logits [N, classes]."""
    images, labels = batch
    return F.cross_entropy(model(images).float(), labels)


def _to_device(batch: Any, device: torch.device) -> Any:
    return on_tensors(batch, lambda tensor: tensor.to(device))


def _units(batch: Any) -> int:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch) if batch.is_floating_point() else batch.numel()


# --------------------------------------------------------------------------------------------- evaluate


def evaluate(model: nn.Module, data: Any, **settings: Any) -> dict[str, float]:
    """`evaluate_text` or `evaluate_images` on what `data` (of `load_text` or `load_images`) held out."""
    if data.task == "text":
        return evaluate_text(model, data.validation, **settings)
    return evaluate_images(model, data.validation_images, data.validation_labels, **settings)


@torch.inference_mode()
def evaluate_text(
    model: nn.Module,
    text: Tensor,
    *,
    length: int = 256,
    overlap: int = 128,
    batch: int = 8,
    max_bytes: int | None = None,
) -> dict[str, float]:
    """Bits per byte and next-byte accuracy of `model(ids [B, T]) -> logits [B, T, V]` on a 1-D uint8 text.

    Windows of `length` bytes overlap by `overlap`: a byte is predicted from at least `overlap` bytes before it (the
    first bytes of the text excepted), and counted once. The very first byte is charged 8 bits. With `max_bytes`, only
    that many bytes are scored, in windows spread evenly over the text. A model should not be asked for longer windows than
    it was trained on.
    """
    if not 0 <= overlap < length:
        raise ValueError(f"overlap={overlap} must be >= 0 and less than length={length}")
    if len(text) < 2:
        raise ValueError(f"text holds {len(text)} bytes; at least 2 are needed to predict one")
    length = min(length, len(text) - 1)
    stride = length - min(overlap, length - 1)
    starts = list(range(0, len(text) - length, stride))
    if starts[-1] + length + 1 < len(text):
        starts.append(len(text) - length - 1)
    ends = [start + length + 1 for start in starts]  # targets of a window end here
    windows = [(start, end - max(previous, 1)) for start, end, previous in zip(starts, ends, [1, *ends], strict=False)]
    if max_bytes is not None:
        count = min(len(windows), max(1, max_bytes // stride))
        windows = [windows[i * len(windows) // count] for i in range(count)]
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    nats, hits, scored = 0.0, 0, 0
    with eval_mode(model):
        for i in range(0, len(windows), batch):
            rows = [text[start : start + length + 1] for start, _ in windows[i : i + batch]]
            ids = torch.stack(rows).to(device).long()
            logits = model(ids[:, :-1]).float()
            for row, (_, new) in enumerate(windows[i : i + batch]):
                guess, target = logits[row, -new:], ids[row, -new:]
                nats += F.cross_entropy(guess, target, reduction="sum").item()
                hits += int((guess.argmax(-1) == target).sum())
                scored += new
    first = 1 if windows[0][0] == 0 else 0
    bits = nats / math.log(2) + 8 * first
    return {"bits_per_byte": bits / (scored + first), "accuracy": hits / scored, "bytes": scored + first}


@torch.inference_mode()
def evaluate_images(model: nn.Module, images: Tensor, labels: Tensor, *, batch: int = 256) -> dict[str, float]:
    """Accuracy and mean cross-entropy (nats) of `model(images) -> logits [N, classes]`."""
    if len(images) == 0:
        raise ValueError("no images to evaluate on")
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    hits, nats = 0, 0.0
    with eval_mode(model):
        for i in range(0, len(images), batch):
            logits, target = model(images[i : i + batch].to(device)).float(), labels[i : i + batch].to(device)
            hits += int((logits.argmax(-1) == target).sum())
            nats += F.cross_entropy(logits, target, reduction="sum").item()
    return {"accuracy": hits / len(images), "loss": nats / len(images), "images": len(images)}


@contextmanager
def eval_mode(model: nn.Module):
    """Evaluate without dropout and leave every module's flag as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


# ------------------------------------------------------------------------------------------- many ranks


def ranks() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) outside `torchrun`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def distributed(device: str = "cpu"):
    """Join the processes that `torchrun` started (gloo on CPU, nccl on CUDA) and leave at the end; yields `ranks()`."""
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if joins:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield ranks()
    finally:
        if joins:
            dist.destroy_process_group()


def _broadcast(model: nn.Module, world: int) -> None:
    """Start every rank from rank 0's weights."""
    if world > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), 0)


def _make_dense(parameters: list[nn.Parameter]) -> None:
    """Gradients of sparse embeddings as plain tensors: neither clipping nor the optimizers take sparse ones."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            parameter.grad = parameter.grad.to_dense()


def _average(loss: Tensor, parameters: list[nn.Parameter], world: int) -> float:
    """Average loss and gradients over the ranks, in one message; so all ranks also agree on what is not finite."""
    if world == 1:
        return loss.item()
    for parameter in parameters:  # a rank whose batch left a parameter unused still takes part
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    values = [loss.detach().float().reshape(1)] + [p.grad.flatten() for p in parameters]
    flat = torch.cat(values) / world
    dist.all_reduce(flat)
    mean, *gradients = flat.split([value.numel() for value in values])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))
    return mean.item()
