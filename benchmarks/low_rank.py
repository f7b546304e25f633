"""Low-rank factorization of a trained decoder at several ratios: quality, bytes and latency of each saved file.

    uv run python train.py                                        # writes out/model.pth
    uv run python benchmarks/low_rank.py --model out/model.pth
    uv run python benchmarks/low_rank.py --model out/model.pth --recover-steps 120

Three ways at the same budget, on the block linears:
  svd       cut the SVD of each weight, the same share of every layer
  whitened  the same ranks, whitened by the second moment of the inputs in the original model (DRONE, SVD-LLM)
  ours      quantize.factorize_low_rank

Each row is measured on the saved file in a fresh process, on text that was held out of training; calibration text is training
text. Rows go to benchmarks/results/low_rank.csv, the plot beside it.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

import quantize
from quantize import calibration, data, surgery, training
from quantize.low_rank import factorize_low_rank, whitened_svd
from quantize.low_rank.layers import matrix, pair
from quantize.measure import compare, keep_allocations

RESULTS = Path(__file__).parent / "results"


def uniform(model: nn.Module, ratio: float, batches: list[torch.Tensor] | None) -> nn.Module:
    """The same ratio in every block linear, by plain SVD or whitened by the original model's inputs."""
    result = surgery.clone(model)
    layers = surgery.select(result, nn.Linear, skip=("head",))
    originals = surgery.select(model, nn.Linear, skip=("head",))
    seen = calibration.collect(model, batches, originals) if batches else {}
    for name, layer in layers.items():
        m, k = layer.weight.shape
        rank = max(8, math.floor(ratio * m * k / (m + k)) // 8 * 8)
        moment = seen[name].second_moment if batches else None
        first, second, _ = whitened_svd(matrix(layer), moment, rank=rank)
        surgery.replace(result, {layer: pair(layer, first, second, layer.bias)})
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a trained DecoderLM, written by train.py")
    ratios = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    parser.add_argument("--ratios", type=float, nargs="+", default=ratios, help="shares kept (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=16384, help="bytes of training text to calibrate on (default: %(default)s)")
    parser.add_argument("--recover-steps", type=int, default=0, help="training steps after ours (default: none)")
    parser.add_argument("--bytes", type=int, default=65536, help="held-out bytes to score (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (default: %(default)s)")
    parser.add_argument("--name", default="low_rank", help="stem of the files in benchmarks/results (default: %(default)s)")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    keep_allocations()
    model = quantize.load(args.model)
    text = data.load_text()
    stream = data.TextBatches(text.train, batch=8, length=256, seed=1)
    batches = [stream(step)[0] for step in range(args.rows // 2048)]
    ways = {
        "svd": lambda ratio: uniform(model, ratio, None),
        "whitened": lambda ratio: uniform(model, ratio, batches),
        "ours": lambda ratio: factorize_low_rank(model, ratio=ratio, calibration=batches, skip=("head",)),
    }
    facts: dict[str, dict] = {"fp32": {"way": "fp32", "ratio": 1.0, "seconds": 0.0}}
    with tempfile.TemporaryDirectory() as folder:
        files = {"fp32": Path(folder) / "fp32.pth"}
        quantize.save(model, files["fp32"])
        for ratio in args.ratios:
            for way, make in ways.items():
                start = time.perf_counter()
                small = make(ratio)
                add(files, facts, folder, small, way, ratio, time.perf_counter() - start)
                if way == "ours" and args.recover_steps:
                    start = time.perf_counter()
                    recovered = recover(small, text, args.recover_steps)
                    add(files, facts, folder, recovered, "ours+recovered", ratio, time.perf_counter() - start)
        evaluate = partial(training.evaluate_text, text=text.validation, max_bytes=args.bytes)
        example = text.validation[:2048].long().reshape(8, 256)
        results = compare(files, example, evaluate=evaluate, threads=args.threads, progress=print)
    rows = []
    for result in results:
        fact = facts[result.name]
        measured = {"bits_per_byte": result.metrics["bits_per_byte"], "bytes": result.bytes, "parameters": result.parameters}
        rows.append({**fact, **measured, "latency_ms": result.latency_ms.median, "speedup": result.speedup})
    write(rows, args.name)


def add(files: dict, facts: dict, folder: str, model: nn.Module, way: str, ratio: float, seconds: float) -> None:
    """Save a model and note how it was made."""
    name = f"{way}_{ratio}"
    files[name] = Path(folder) / f"{name}.pth"
    quantize.save(model, files[name])
    facts[name] = {"way": way, "ratio": ratio, "seconds": round(seconds, 1)}


def recover(model: nn.Module, text: data.TextData, steps: int) -> nn.Module:
    """Train the pairs on, at lower rates than from scratch."""
    recipe = training.Recipe(steps=steps, batch=4, length=256, lr=1e-3, muon_lr=0.005)
    batches = data.TextBatches(text.train, batch=recipe.batch, length=recipe.length, seed=2)
    return training.fit(surgery.clone(model), batches, training.next_token_loss, recipe)


def write(rows: list[dict], name: str) -> None:
    """CSV and plot of the rows, and the rows on the console."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(*rows[0].keys(), sep="\t")
    for row in rows:
        print(*(round(v, 4) if isinstance(v, float) else v for v in row.values()), sep="\t")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    base = rows[0]
    for way in dict.fromkeys(row["way"] for row in rows[1:]):
        of_way = [row for row in rows if row["way"] == way]
        lost = [row["bits_per_byte"] - base["bits_per_byte"] for row in of_way]
        left.plot([row["ratio"] for row in of_way], lost, "o-", label=way)
        right.plot([row["latency_ms"] for row in of_way], lost, "o", label=way)
    right.axvline(base["latency_ms"], color="gray", linestyle=":", label="fp32")
    left.set(xlabel="share of the block linears' parameters kept", ylabel="bits per byte lost")
    left.set_yscale("symlog", linthresh=0.01)
    right.set(xlabel="latency, 8 x 256 tokens (ms)")
    right.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


if __name__ == "__main__":
    main()
