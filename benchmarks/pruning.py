"""Structured pruning side by side: torch.nn.utils.prune, Torch-Pruning and `prune_ln_structured`,
same layers, same amounts.

Each model is trained briefly, pruned by every method, scored on held-out data, recovered by the
same short distillation from the original, scored again: bits per byte (text; less is better) or
accuracy (images; more is better), and the cross-entropy in nats beside it, which also tells models
apart that get the same images right. Every method is recovered at each of `--rates` and keeps the
better result. Torch-Pruning is told to cut the layers that ours cut: its default would cut the
residual streams of transformers too, which costs it more. `--latency` times the same models instead
(medians, taking turns with the original), beside the bound that the multiplications left give.

    uv run --group bench python benchmarks/pruning.py --cache pruned_models              # quality
    # needs the machine to itself
    uv run --group bench python benchmarks/pruning.py --cache pruned_models --latency
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import rows
import tasks
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from quantize import clock, load, prune_ln_structured, save, summary

Models = dict[str, nn.Module | Exception]


def recover(
    task: tasks.Task, pruned: nn.Module, original: nn.Module, steps: int, rates: list[float]
) -> tuple[tasks.Score, float]:
    """Scores after distillation from the original, at the best of the rates (as shares of the
    training rate), and that rate.
    """

    def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
        with torch.no_grad():
            wanted = original(batch[0]).flatten(0, -2).log_softmax(-1)
        given = model(batch[0]).flatten(0, -2).log_softmax(-1)
        return F.kl_div(given, wanted, log_target=True, reduction="batchmean")

    results = []
    for rate in rates:
        batches = lambda step: task.batches(10_000 + step)  # noqa: E731
        model = tasks.fit(copy.deepcopy(pruned), batches, loss, steps, rate * task.rate)
        results.append((task.score(model), rate))
    return min(results, key=lambda result: result[0].nats)


# The methods: model -> pruned model. `layers`: those that ours cut.


def masks(model: nn.Module, layers: list[str], amount: float) -> nn.Module:
    """torch.nn.utils.prune: zeros in the same layers, nothing removed."""
    model = copy.deepcopy(model)
    for name in layers:
        torch.nn.utils.prune.ln_structured(model.get_submodule(name), "weight", amount, n=2, dim=0)
    return model


def torch_pruning(model: nn.Module, x: torch.Tensor, layers: list[str], amount: float) -> nn.Module:
    """Torch-Pruning with its group magnitude criterion, on the same layers.

    Its tracer fails at the split and concatenation of rotary positions, so it sees the decoder
    without them.
    """
    import torch_pruning as tp

    model = copy.deepcopy(model)
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    others = [m for n, m in model.named_modules() if isinstance(m, kinds) and n not in layers]
    options = {"ignored_layers": others, "num_heads": _heads(model, layers)}
    options |= {"pruning_ratio": amount, "head_pruning_ratio": amount, "prune_num_heads": True}
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    with mock.patch("quantize.models.decoder.apply_rope", lambda x, cos, sin: x):
        tp.pruner.MagnitudePruner(
            model, x, importance=importance, prune_head_dims=False, **options
        ).step()
    for module in model.modules():
        if hasattr(module, "num_attention_heads") and hasattr(module, "query"):
            module.num_attention_heads = module.query.out_features // module.attention_head_size
            module.all_head_size = module.query.out_features
    return model


def _heads(model: nn.Module, layers: list[str]) -> dict[nn.Module, int]:
    """How many heads each of the layers projects to."""
    heads = {}
    for name, module in model.named_modules():
        count = getattr(module, "num_attention_heads", None)
        if count is None and hasattr(module, "head_dim") and hasattr(module, "q"):
            count = module.q.out_features // module.head_dim
        for part, layer in module.named_children():
            if count is not None and f"{name}.{part}" in layers:
                heads[layer] = count
    return heads


def multiplications(model: nn.Module, x: torch.Tensor) -> int:
    """Floating-point operations of the matrix products and convolutions of one pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


# Rows.

OURS = "prune_ln_structured"
CALIBRATED = f"{OURS}, calibrated"
METHODS = (OURS, CALIBRATED, "torch.nn.utils.prune", "Torch-Pruning")


def trained(name: str, cache: Path | None) -> tuple[tasks.Task, nn.Module]:
    """The task and its model, trained, or read from the folder `cache` if it is there."""
    torch.manual_seed(0)
    task = tasks.PRUNED[name]()
    file = cache / f"{name}.pth" if cache else None
    if file and file.exists():
        return task, load(file, model=task.model)
    model = tasks.fit(task.model, task.batches, task.loss, task.steps, task.rate)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        save(model, file)
    return task, model


def pruned(task: tasks.Task, model: nn.Module, amount: float, methods: list[str]) -> Models:
    """The model pruned by each method, or why one failed."""
    x = task.batches(0)[0][:2]
    plain = prune_ln_structured(model, x, amount=amount)
    layers = list(summary(plain).done)
    calibration = [task.batches(i)[0] for i in range(16)]
    ours = partial(prune_ln_structured, model, x, amount=amount, calibration=calibration)
    builders = {
        OURS: lambda: plain,
        CALIBRATED: ours,
        "torch.nn.utils.prune": lambda: masks(model, layers, amount),
        "Torch-Pruning": lambda: torch_pruning(model, x, layers, amount),
    }
    made: Models = {}
    for method in methods:
        try:
            made[method] = builders[method]()
            made[method](x)
        except Exception as error:  # a peer that fails is a row too
            made[method] = error
    return made


def latency(model: nn.Module, small: nn.Module, x: torch.Tensor) -> rows.Row:
    """Milliseconds of a batch, and what the multiplications left allow."""
    old, new = clock.race([lambda: model(x), lambda: small(x)], least=15)
    bound = multiplications(model, x) / multiplications(small, x)
    times = {"original_ms": 1000 * old, "latency_ms": 1000 * new, "speedup": old / new}
    return times | {"bound": bound, "threads": torch.get_num_threads()}


def quality(
    task: tasks.Task, model: nn.Module, small: nn.Module, arguments: argparse.Namespace
) -> rows.Row:
    """Scores of the original, after pruning and after recovery."""
    original, before = task.score(model), task.score(small)
    after, rate = recover(task, small, model, arguments.recovery, arguments.rates)
    scores = {"original": original, "before_recovery": before, "after_recovery": after}
    row = {"metric": task.metric}
    row |= {name: score.metric for name, score in scores.items()}
    row |= {f"{name.split('_')[0]}_nats": score.nats for name, score in scores.items()}
    return row | {"recovery_rate": rate}


def rows_of(name: str, arguments: argparse.Namespace) -> Iterator[rows.Row]:
    """One row for every amount and method."""
    task, model = trained(name, arguments.cache)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    for amount in arguments.amounts:
        for method, small in pruned(task, model, amount, arguments.methods).items():
            row = {"model": name, "amount": amount, "method": method}
            if isinstance(small, Exception):
                yield row | {"note": f"{type(small).__name__}: {small}"[:120]}
                continue
            sizes = {"parameters": count(small), "of": count(model)}
            if arguments.latency:
                yield row | latency(model, small, task.batches(0)[0]) | sizes
            else:
                yield row | quality(task, model, small, arguments) | sizes


def main() -> None:
    parser = rows.Parser(__doc__, "pruning.csv")
    parser.some("--models", "which to prune", tasks.PRUNED)
    parser.flag("--amounts", "shares removed", [0.25, 0.5])
    parser.flag("--recovery", "training steps after pruning", 40)
    rates = "of recovery, as shares of the training rate"
    parser.flag("--rates", rates, [0.1, 0.5])
    parser.some("--methods", "who prunes", METHODS)
    parser.add_argument("--latency", action="store_true", help="time the models instead")
    parser.file("--cache", "folder that keeps the trained models")
    arguments = parser.parse()
    warnings.simplefilter("ignore")
    out = arguments.out
    if arguments.latency:
        out = out.with_name(f"{out.stem}_latency.csv")
        arguments.methods = [method for method in arguments.methods if method != CALIBRATED]
    for name in arguments.models:
        for row in rows_of(name, arguments):
            rows.write(out, [row], ("model", "amount", "method"))


if __name__ == "__main__":
    main()
