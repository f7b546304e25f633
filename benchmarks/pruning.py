"""Structured pruning side by side: torch.nn.utils.prune, Torch-Pruning and `prune_ln_structured`, same layers, same amounts.

Each model is trained briefly, pruned by every method, measured, recovered by the same short training, measured again. Quality
is bits per byte (text; less is better) or accuracy (images; more is better) on held-out data; latency is the least of some
passes that take turns with the original's. Torch-Pruning is told to cut the layers that ours cut: its default would cut the
residual streams of transformers too, which costs it more.

    uv pip install torch-pruning
    uv run --no-sync python benchmarks/pruning.py --models convnet vit decoder
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import transformers
from torch import nn

from quantize import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM, load, save
from quantize.data import ImageBatches, TextBatches, load_images, load_text
from quantize.pruning import prune_ln_structured, summary
from quantize.training import classification_loss, evaluate_images, evaluate_text, next_token_loss

RESULTS = Path(__file__).parent / "results" / "pruning.csv"
MASK, RATE = 256, 0.15


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
    score: Callable[[nn.Module], float]
    metric: str
    rate: float = 2e-3


def text_task(model: nn.Module, steps: int) -> Task:
    text = load_text()
    batches = TextBatches(text.train, batch=8, length=256)
    return Task(
        model, steps, batches, next_token_loss, lambda m: evaluate_text(m, text.validation, max_bytes=2**15)["bits_per_byte"],
        "bits per byte",
    )  # fmt: skip


def masked_task(model: nn.Module, steps: int) -> Task:
    text = load_text()
    plain, held_out = TextBatches(text.train, batch=16, length=128), TextBatches(text.validation, batch=16, length=128)

    def hide(batch: tuple, step: int) -> tuple:
        chosen = torch.rand(batch[0].shape, generator=torch.Generator().manual_seed(step)) < RATE
        return batch[0].masked_fill(chosen, MASK), batch[0].masked_fill(~chosen, -100)

    def loss(m: nn.Module, batch: tuple) -> torch.Tensor:
        return F.cross_entropy(m(batch[0]).flatten(0, 1), batch[1].flatten())

    @torch.no_grad()
    def score(m: nn.Module) -> float:
        return sum(loss(m, hide(held_out(i), -1 - i)).item() for i in range(8)) / 8 / 0.6931

    return Task(model, steps, lambda step: hide(plain(step), step), loss, score, "bits per masked byte")


def image_task(model: nn.Module, steps: int) -> Task:
    data = load_images()
    return Task(
        model, steps, ImageBatches(data, batch=64), classification_loss,
        lambda m: evaluate_images(m, data.validation_images, data.validation_labels)["accuracy"], "accuracy",
    )  # fmt: skip


def hugging(kind: str, enlarge: int = 1, **config) -> nn.Module:
    configuration = getattr(transformers, f"{kind}Config")(num_labels=10, num_channels=1, **config)
    return Logits(getattr(transformers, f"{kind}ForImageClassification")(configuration), enlarge)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=257, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Logits(transformers.BertForMaskedLM(config))


MODELS: dict[str, Callable[[], Task]] = {
    "convnet": lambda: image_task(ConvNet(ConvNetConfig(widths=(32, 64), blocks=2)), 300),
    "vit": lambda: image_task(
        hugging("ViT", image_size=8, patch_size=2, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                intermediate_size=256), 400
    ),
    "resnet": lambda: image_task(
        hugging("ResNet", 4, embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic"), 200
    ),
    "mobilenet_v2": lambda: image_task(hugging("MobileNetV2", 4, image_size=32, depth_multiplier=0.35), 200),
    "convnext": lambda: image_task(
        hugging("ConvNext", 2, image_size=16, patch_size=2, hidden_sizes=[32, 64], depths=[2, 2], num_stages=2), 300
    ),
    "decoder": lambda: text_task(DecoderLM(DecoderConfig(width=128, layers=4, heads=4)), 500),
    "bert": lambda: masked_task(bert(), 500),
}  # fmt: skip


def train(task: Task, model: nn.Module, steps: int, rate: float, start: int = 0) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 20, (steps - i) / (0.5 * steps)))
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        task.loss(model, task.batches(start + step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


# The methods: model, example input, amount, calibration -> pruned model.


def masks(model: nn.Module, layers: list[str], amount: float) -> nn.Module:
    """torch.nn.utils.prune: zeros in the same layers, nothing removed."""
    model = copy.deepcopy(model)
    for name in layers:
        torch.nn.utils.prune.ln_structured(model.get_submodule(name), "weight", amount, n=2, dim=0)
    return model


def torch_pruning(model: nn.Module, x: torch.Tensor, layers: list[str], amount: float) -> nn.Module:
    """Torch-Pruning with its group magnitude criterion, on the same layers."""
    import torch_pruning as tp

    model = copy.deepcopy(model)
    ignored = [m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding)) and n not in layers]
    heads = {}
    for name, module in model.named_modules():
        count = getattr(module, "num_attention_heads", None)
        if count is None and hasattr(module, "head_dim") and hasattr(module, "q"):
            count = module.q.out_features // module.head_dim
        if count is not None:
            heads |= {m: count for n, m in module.named_children() if f"{name}.{n}" in layers}
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=amount, ignored_layers=ignored,
        num_heads=heads, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=amount,
    )  # fmt: skip
    pruner.step()
    for module in model.modules():
        if hasattr(module, "num_attention_heads") and hasattr(module, "query"):
            module.num_attention_heads = module.query.out_features // module.attention_head_size
            module.all_head_size = module.query.out_features
    return model


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


def compare(name: str, amounts: list[float], recovery: int, share: float, cache: Path | None) -> list[dict]:
    torch.manual_seed(0)
    task = MODELS[name]()
    file = cache / f"{name}.pth" if cache else None
    if file is not None and file.exists():
        model = load(file, model=task.model)
    else:
        model = train(task, task.model, task.steps, task.rate)
        if file is not None:
            save(model, file)
    x = task.batches(0)[0]
    calibration = [task.batches(i)[0] for i in range(16)]
    base = task.score(model)
    count = sum(p.numel() for p in model.parameters())
    rows = []
    for amount in amounts:
        ours = prune_ln_structured(model, x[:2], amount=amount)
        layers = [layer for group in summary(ours).pruned for layer in group.layers]
        made: dict[str, nn.Module | Exception] = {"prune_ln_structured": ours}
        builders = {
            "prune_ln_structured, calibrated": lambda a=amount: prune_ln_structured(
                model, x[:2], amount=a, calibration=calibration
            ),
            "torch.nn.utils.prune": lambda a=amount, ls=layers: masks(model, ls, a),
            "Torch-Pruning": lambda a=amount, ls=layers: torch_pruning(model, x[:2], ls, a),
        }
        for method, build in builders.items():
            try:
                made[method] = build()
                made[method](x[:2])  # type: ignore[operator]
            except Exception as error:
                made[method] = error
        for method, pruned in made.items():
            row = {"model": name, "amount": amount, "method": method, "metric": task.metric, "original": round(base, 4)}
            if isinstance(pruned, Exception):
                rows.append(row | {"note": f"{type(pruned).__name__}: {pruned}"[:120]})
                continue
            row |= {"parameters": sum(p.numel() for p in pruned.parameters()), "of": count}
            row["before_recovery"] = round(task.score(pruned), 4)
            old, new = latencies([model, pruned], x)
            row |= {"original_ms": round(old, 2), "latency_ms": round(new, 2), "speedup": round(old / new, 2)}
            recovered = train(task, copy.deepcopy(pruned), recovery, task.rate * share, start=10_000)
            row["after_recovery"] = round(task.score(recovered), 4)
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="(default: all)")
    parser.add_argument("--amounts", nargs="+", type=float, default=[0.25, 0.5], help="(default: %(default)s)")
    parser.add_argument("--recovery", type=int, default=40, help="training steps after pruning (default: %(default)s)")
    parser.add_argument("--recovery-rate", type=float, default=0.5, help="of the training rate (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="folder for the trained models (default: none)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV to add rows to (default: %(default)s)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    fields = ["model", "amount", "method", "metric", "original", "before_recovery", "after_recovery", "parameters", "of"]
    fields += ["original_ms", "latency_ms", "speedup", "threads", "note"]
    for name in arguments.models:
        rows = compare(name, arguments.amounts, arguments.recovery, arguments.recovery_rate, arguments.cache)
        new = not arguments.out.exists()
        with arguments.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, fields)
            if new:
                writer.writeheader()
            writer.writerows(row | {"threads": torch.get_num_threads()} for row in rows)


if __name__ == "__main__":
    main()
