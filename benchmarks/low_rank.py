"""Low-rank factorization of decoders at several ratios: quality, bytes and latency of each saved
file.

    uv run python train.py                                             # writes artifacts/model.pth
    uv run python benchmarks/low_rank.py --model artifacts/model.pth
    uv run python benchmarks/low_rank.py --wide  # latency alone, of a decoder of width 512

Three ways at the same budget, on the block linears:

- svd: cut the SVD of each weight, the same share of every layer
- whitened: the same ranks, whitened by the second moment of the inputs in the original model
  (DRONE, SVD-LLM)
- ours: quantize.factorize_low_rank

The wide decoder has random weights: it is large enough for arithmetic to decide, and has no quality
to lose.

Each row is measured on the saved file in a fresh process, on text that was held out of training;
calibration text is training text. Rows go to benchmarks/results/low_rank.csv and low_rank_wide.csv,
plots beside them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import rows
import torch
from torch import nn

import quantize
from quantize import DecoderConfig, DecoderLM, calibration, clock, surgery, training
from quantize.compression.low_rank import factorize_low_rank, whitened_svd
from quantize.measuring import Measurement, compare
from quantize.nn.low_rank import matrix, pair
from quantize.training import data

WIDE = DecoderConfig(width=512, layers=4, heads=8, qk_norm=True)
BATCH, LENGTH = 8, 256
KEPT = {"skip": ("head",)}
Batches = list[torch.Tensor]


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """All but the head, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"}


def uniform(model: nn.Module, ratio: float, batches: Batches | None = None) -> nn.Module:
    """The same ratio in every block linear, by plain SVD or whitened by the original model's
    inputs.
    """
    result = surgery.clone(model)
    originals = linears(model)
    seen = calibration.collect(model, batches, originals) if batches else {}
    for name, layer in linears(result).items():
        m, k = layer.weight.shape
        rank = max(8, math.floor(ratio * m * k / (m + k)) // 8 * 8)
        moment = seen[name].second_moment if batches else None
        first, second, _ = whitened_svd(matrix(layer), moment, rank=rank)
        surgery.replace(result, {layer: pair(layer, first, second, layer.bias)})
    return result


def ways(batches: Batches) -> dict[str, Callable[..., nn.Module]]:
    """How to factorize a model at a ratio."""
    return {
        "svd": uniform,
        "whitened": partial(uniform, batches=batches),
        "ours": partial(factorize_low_rank, calibration=batches, **KEPT),
    }


def made(
    model: nn.Module, ways: dict[str, Callable[..., nn.Module]], ratios: list[float], folder: Path
) -> dict[str, rows.Row]:
    """The model in every way at every ratio, a file each; what is known of them, by stem."""
    quantize.save(model, folder / "fp32.pth")
    facts = {"fp32": {"way": "fp32", "ratio": 1.0, "seconds": 0.0}}
    for ratio, (way, make) in product(ratios, ways.items()):
        small, seconds = clock.timed(partial(make, model, ratio=ratio))
        name = f"{way}_{ratio}"
        quantize.save(small, folder / f"{name}.pth")
        facts[name] = {"way": way, "ratio": ratio, "seconds": seconds}
        print(name, f"{seconds:.1f} s", flush=True)
    return facts


def row(measured: Measurement, facts: rows.Row) -> rows.Row:
    return {
        **facts,
        **measured.metrics,
        "bytes": measured.bytes,
        "parameters": measured.parameters,
        "latency_ms": measured.latency_ms.median,
        "speedup": measured.speedup,
        "threads": measured.threads,
    }


def main() -> None:
    parser = rows.Parser(__doc__, "low_rank.csv")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="a trained DecoderLM, written by train.py")
    source.add_argument("--wide", action="store_true", help="an untrained decoder of width 512")
    parser.flag("--ratios", "shares kept", [0.3, 0.5, 0.7, 0.8, 0.9])
    parser.flag("--rows", "bytes of training text to calibrate on", 32768)
    parser.flag("--bytes", "held-out bytes to score", 32768)
    parser.flag("--rounds", "turns of a fifth of a second", 4)
    arguments = parser.parse()
    torch.manual_seed(0)
    text = data.load_text()
    stream = data.TextBatches(text.train, batch=BATCH, length=LENGTH, seed=1)
    batches = [stream(step)[0] for step in range(max(1, arguments.rows // (BATCH * LENGTH)))]
    example = text.validation[: BATCH * LENGTH].long().reshape(BATCH, LENGTH)
    options = {"threads": arguments.threads, "rounds": arguments.rounds, "progress": print}
    makers, out = ways(batches), arguments.out
    y, label = "bits_per_byte", "bits per byte, without training"
    if arguments.wide:
        model, makers = DecoderLM(WIDE).eval(), {"ours": makers["ours"]}
        out = out.with_name(f"{out.stem}_wide.csv")
        y, label = "speedup", "speed, 8 x 256 tokens, fp32 = 1"
    else:
        model = quantize.load(arguments.model)
        scored = {"text": text.validation, "max_bytes": arguments.bytes}
        options["evaluate"] = partial(bits_per_byte, scored)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = made(model, makers, arguments.ratios, folder)
        results = compare({name: folder / f"{name}.pth" for name in facts}, example, **options)
    rows.write(out, [row(result, facts[result.name]) for result in results])
    labels = ("share of the block linears' parameters kept", label)
    rows.chart(out, "threads", "way", lambda row: float(row["ratio"]), y, labels)


def bits_per_byte(scored: dict, model: nn.Module) -> tuple[str, float]:
    return "bits_per_byte", training.evaluate_text(model, **scored)["bits_per_byte"]


if __name__ == "__main__":
    main()
