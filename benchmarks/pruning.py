"""Structured pruning side by side: torch.nn.utils.prune, Torch-Pruning and `prune_ln_structured`,
same layers, same amounts.

Each model is trained briefly, pruned by every method, scored on held-out data, recovered by the
same short distillation from the original, scored again: bits per byte (text; less is better) or
accuracy (images; more is better), and the cross-entropy in nats beside it, which also tells models
apart that get the same images right. Every method is recovered at each of `--rates` and keeps the
better result. Torch-Pruning is told to cut the layers that ours cut: its default would cut the
residual streams of transformers too, which costs it more. `--latency` times the same models instead
(least of the passes, taking turns with the original), beside the bound that the multiplications
left give.

    uv sync --group bench
    uv run --no-sync python benchmarks/pruning.py --cache pruned_models              # quality
    # needs the machine to itself
    uv run --no-sync python benchmarks/pruning.py --cache pruned_models --latency
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from quantize import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM, load, save
from quantize.compression.pruning import prune_ln_structured, summary
from quantize.training import classification_loss, evaluate_images, evaluate_text, next_token_loss
from quantize.training.data import ImageBatches, TextBatches, load_images, load_text

RESULTS = Path(__file__).parent / "results"


class Logits(nn.Module):
    """A model of transformers as tensor in, logits out; images enlarged from 8x8 by `enlarge`."""

    def __init__(self, model: nn.Module, enlarge: int = 1):
        super().__init__()
        self.model, self.enlarge = model, enlarge

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, scale_factor=self.enlarge) if self.enlarge > 1 else x
        return self.model(x).logits


@dataclass
class Task:
    """A model, its training and its measure."""

    model: nn.Module
    steps: int
    batches: Callable[[int], tuple]
    loss: Callable[[nn.Module, tuple], torch.Tensor]
    score: Callable[[nn.Module], tuple[float, float]]  # the metric, and the cross-entropy in nats
    metric: str
    rate: float = 2e-3


def text_task(model: nn.Module, steps: int) -> Task:
    text = load_text()
    batches = TextBatches(text.train, batch=8, length=128)

    def score(m: nn.Module) -> tuple[float, float]:
        bits = evaluate_text(m, text.validation, length=128, overlap=64, max_bytes=2**15)[
            "bits_per_byte"
        ]
        return bits, bits * math.log(2)

    return Task(model, steps, batches, next_token_loss, score, "bits per byte")


def image_task(model: nn.Module, steps: int) -> Task:
    data = load_images()

    def score(m: nn.Module) -> tuple[float, float]:
        held_out = evaluate_images(m, data.validation_images, data.validation_labels)
        return held_out["accuracy"], held_out["loss"]

    return Task(model, steps, ImageBatches(data, batch=64), classification_loss, score, "accuracy")


def hugging(kind: str, enlarge: int = 1, **config) -> nn.Module:
    configuration = getattr(transformers, f"{kind}Config")(num_labels=10, num_channels=1, **config)
    return Logits(getattr(transformers, f"{kind}ForImageClassification")(configuration), enlarge)


class Pixels(Logits):
    """A text classifier that reads an 8x8 image as 64 tokens, one of 17 for each pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((16 * x).round().long().flatten(1)).logits


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=17,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=10,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return Pixels(transformers.BertForSequenceClassification(config))


MODELS: dict[str, Callable[[], Task]] = {
    "convnet": lambda: image_task(ConvNet(ConvNetConfig(widths=(32, 64), blocks=2)), 300),
    "vit": lambda: image_task(
        hugging(
            "ViT",
            image_size=8,
            patch_size=2,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
        ),
        400,
    ),
    "resnet": lambda: image_task(
        hugging(
            "ResNet",
            4,
            embedding_size=32,
            hidden_sizes=[32, 64, 128],
            depths=[1, 1, 1],
            layer_type="basic",
        ),
        200,
    ),
    "mobilenet_v2": lambda: image_task(
        hugging("MobileNetV2", 4, image_size=32, depth_multiplier=0.35), 200
    ),
    "convnext": lambda: image_task(
        hugging(
            "ConvNext",
            2,
            image_size=16,
            patch_size=2,
            hidden_sizes=[32, 64],
            depths=[2, 2],
            num_stages=2,
        ),
        300,
    ),
    "decoder": lambda: text_task(DecoderLM(DecoderConfig(width=128, layers=4, heads=4)), 400),
    "bert": lambda: image_task(bert(), 300),
}


def fit(model: nn.Module, batches: Callable, loss: Callable, steps: int, rate: float) -> nn.Module:
    """Train in place by AdamW: a short rise, then a fall over half of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 20, (steps - i) / (0.5 * steps))
    )
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, batches(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def recover(
    task: Task, pruned: nn.Module, original: nn.Module, steps: int, rates: list[float]
) -> tuple[tuple, float]:
    """Scores after distillation from the original, at the best of the rates (as shares of the
    training rate), and that rate.
    """

    def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
        with torch.no_grad():
            wanted = original(batch[0]).flatten(0, -2).log_softmax(-1)
        return F.kl_div(
            model(batch[0]).flatten(0, -2).log_softmax(-1),
            wanted,
            log_target=True,
            reduction="batchmean",
        )

    results = []
    for rate in rates:
        model = fit(
            copy.deepcopy(pruned),
            lambda step: task.batches(10_000 + step),
            loss,
            steps,
            rate * task.rate,
        )
        results.append((task.score(model), rate))
    return min(results, key=lambda r: r[0][1])


# The methods: model, example input, amount, calibration -> pruned model.


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
    ignored = [
        m
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding)) and n not in layers
    ]
    heads = {}
    for name, module in model.named_modules():
        count = getattr(module, "num_attention_heads", None)
        if count is None and hasattr(module, "head_dim") and hasattr(module, "q"):
            count = module.q.out_features // module.head_dim
        if count is not None:
            heads |= {m: count for n, m in module.named_children() if f"{name}.{n}" in layers}
    with mock.patch("quantize.models.apply_rope", lambda x, cos, sin: x):
        pruner = tp.pruner.MagnitudePruner(
            model,
            x,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=amount,
            ignored_layers=ignored,
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=amount,
        )
        pruner.step()
    for module in model.modules():
        if hasattr(module, "num_attention_heads") and hasattr(module, "query"):
            module.num_attention_heads = module.query.out_features // module.attention_head_size
            module.all_head_size = module.query.out_features
    return model


def multiplications(model: nn.Module, x: torch.Tensor) -> int:
    """Floating-point operations of the matrix products and convolutions of one pass."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(x)
    return counter.get_total_flops()


@torch.inference_mode()
def latencies(models: list[nn.Module], x: torch.Tensor, passes: int = 15) -> list[float]:
    """Least milliseconds per pass of each model; the models take turns."""
    best = [float("inf")] * len(models)
    for _ in range(passes):
        for i, model in enumerate(models):
            start = time.perf_counter()
            model(x)
            best[i] = min(best[i], 1000 * (time.perf_counter() - start))
    return best


# Rows.

OURS = "prune_ln_structured"
METHODS = (OURS, f"{OURS}, calibrated", "torch.nn.utils.prune", "Torch-Pruning")


def trained(name: str, cache: Path | None) -> tuple[Task, nn.Module]:
    torch.manual_seed(0)
    task = MODELS[name]()
    file = cache / f"{name}.pth" if cache else None
    if file is not None and file.exists():
        return task, load(file, model=task.model)
    model = fit(task.model, task.batches, task.loss, task.steps, task.rate)
    if file is not None:
        cache.mkdir(parents=True, exist_ok=True)
        save(model, file)
    return task, model


def pruned_by_all(
    task: Task, model: nn.Module, amount: float, calibration: list, methods: list[str]
) -> dict[str, nn.Module | Exception]:
    x = task.batches(0)[0][:2]
    plain = prune_ln_structured(model, x, amount=amount)
    layers = [layer for group in summary(plain).pruned for layer in group.layers]
    made: dict[str, nn.Module | Exception] = {}
    builders = (
        lambda: plain,
        lambda: prune_ln_structured(model, x, amount=amount, calibration=calibration),
        lambda: masks(model, layers, amount),
        lambda: torch_pruning(model, x, layers, amount),
    )
    for method, build in zip(METHODS, builders, strict=True):
        if method not in methods:
            continue
        try:
            made[method] = build()
            made[method](x)  # type: ignore[operator]
        except Exception as error:  # a peer that fails is a row too
            made[method] = error
    return made


def rows_of(name: str, arguments: argparse.Namespace) -> Iterator[dict]:
    """One row for every amount and method."""
    task, model = trained(name, arguments.cache)
    calibration = [task.batches(i)[0] for i in range(16)]
    base, nats = task.score(model)
    x = task.batches(0)[0]
    for amount in arguments.amounts:
        made = pruned_by_all(
            task, model, amount, [] if arguments.latency else calibration, arguments.methods
        )
        for method, pruned in made.items():
            row: dict = {"model": name, "amount": amount, "method": method}
            if isinstance(pruned, Exception):
                if not (arguments.latency and "calibrated" in method):
                    yield row | {"note": f"{type(pruned).__name__}: {pruned}"[:120]}
                continue
            row |= {
                "parameters": sum(p.numel() for p in pruned.parameters()),
                "of": sum(p.numel() for p in model.parameters()),
            }
            if arguments.latency:
                old, new = latencies([model, pruned], x)
                bound = multiplications(model, x) / multiplications(pruned, x)
                row |= {
                    "original_ms": round(old, 2),
                    "latency_ms": round(new, 2),
                    "speedup": round(old / new, 2),
                }
                yield row | {"bound": round(bound, 2), "threads": torch.get_num_threads()}
                continue
            before = task.score(pruned)
            after, rate = recover(task, pruned, model, arguments.recovery, arguments.rates)
            row |= {
                "metric": task.metric,
                "original": base,
                "before_recovery": before[0],
                "after_recovery": after[0],
            }
            row |= {
                "original_nats": nats,
                "before_nats": before[1],
                "after_nats": after[1],
                "recovery_rate": rate,
            }
            yield {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in row.items()
            }


QUALITY = ["model", "amount", "method", "metric", "original", "before_recovery", "after_recovery"]
QUALITY += [
    "original_nats",
    "before_nats",
    "after_nats",
    "recovery_rate",
    "parameters",
    "of",
    "note",
]
LATENCY = [
    "model",
    "amount",
    "method",
    "original_ms",
    "latency_ms",
    "speedup",
    "bound",
    "threads",
    "parameters",
    "of",
    "note",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="(default: all)"
    )
    parser.add_argument(
        "--amounts", nargs="+", type=float, default=[0.25, 0.5], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--recovery",
        type=int,
        default=40,
        help="training steps after pruning (default: %(default)s)",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[0.1, 0.5],
        help="of recovery, as shares of the training rate (default: %(default)s)",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)"
    )
    parser.add_argument("--latency", action="store_true", help="time the models instead")
    parser.add_argument("--cache", type=Path, help="folder for the trained models (default: none)")
    parser.add_argument(
        "--out",
        type=Path,
        help="CSV; rows of the same models and methods are replaced (default: in results)",
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    out = arguments.out or RESULTS / ("pruning_latency.csv" if arguments.latency else "pruning.csv")
    for name in arguments.models:
        kept = []
        if out.exists():
            with out.open(newline="") as file:
                kept = [
                    row
                    for row in csv.DictReader(file)
                    if row["model"] != name or row["method"] not in arguments.methods
                ]
        for row in rows_of(name, arguments):
            print(row, flush=True)
            kept.append(row)
            with out.open("w", newline="") as file:
                writer = csv.DictWriter(file, LATENCY if arguments.latency else QUALITY)
                writer.writeheader()
                writer.writerows(kept)


if __name__ == "__main__":
    main()
