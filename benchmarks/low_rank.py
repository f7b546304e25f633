"""Low-rank factorization of decoders at several ratios: quality, bytes and latency of each saved
file.

    uv run python train.py                                             # writes artifacts/model.pth
    uv run python benchmarks/low_rank.py --model artifacts/model.pth
    uv run python benchmarks/low_rank.py --wide  # latency alone, of a decoder of width 512

Three ways at the same budget, on the block linears:
  svd       cut the SVD of each weight, the same share of every layer whitened  the same ranks,
  whitened by the second moment of the inputs in the original model (DRONE, SVD-LLM) ours
  quantize.factorize_low_rank
The wide decoder has random weights: it is large enough for arithmetic to decide, and has no quality
    to lose.

Each row is measured on the saved file in a fresh process, on text that was held out of training;
calibration text is training text. Rows go to benchmarks/results/low_rank.csv and low_rank_wide.csv,
plots beside them.
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
from quantize import DecoderConfig, DecoderLM, calibration, surgery, training
from quantize.compression.low_rank import factorize_low_rank, whitened_svd
from quantize.host import keep_allocations
from quantize.measuring.comparison import compare
from quantize.nn.low_rank import matrix, pair
from quantize.training import data

RESULTS = Path(__file__).parent / "results"
WIDE = DecoderConfig(width=512, layers=4, heads=8, qk_norm=True)


def uniform(model: nn.Module, ratio: float, batches: list[torch.Tensor] | None) -> nn.Module:
    """The same ratio in every block linear, by plain SVD or whitened by the original model's
    inputs.
    """
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


def make(
    model: nn.Module,
    ways: list[str],
    ratios: list[float],
    batches: list[torch.Tensor],
    folder: Path,
) -> dict[str, dict]:
    """Save the model in every way at every ratio; returns what is known of each file, by its stem.
    Existing files stay.
    """
    facts = {"fp32": {"way": "fp32", "ratio": 1.0, "seconds": 0.0}}
    quantize.save(model, folder / "fp32.pth")
    for ratio in ratios:
        for way in ways:
            file = folder / f"{way}_{ratio}.pth"
            if not file.exists():
                start = time.perf_counter()
                if way == "ours":
                    small = factorize_low_rank(
                        model, ratio=ratio, calibration=batches, skip=("head",)
                    )
                else:
                    small = uniform(model, ratio, batches if way == "whitened" else None)
                quantize.save(
                    small, file, metadata={"seconds": round(time.perf_counter() - start, 1)}
                )
            facts[file.stem] = {
                "way": way,
                "ratio": ratio,
                **quantize.checkpoint.read_metadata(file),
            }
            print(file.stem, facts[file.stem]["seconds"], "s", flush=True)
    return facts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="a trained DecoderLM, written by train.py")
    source.add_argument("--wide", action="store_true", help="an untrained decoder of width 512")
    ratios = [0.3, 0.5, 0.7, 0.8, 0.9]
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=ratios, help="shares kept (default: %(default)s)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=32768,
        help="bytes of training text to calibrate on (default: %(default)s)",
    )
    parser.add_argument(
        "--bytes", type=int, default=32768, help="held-out bytes to score (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the files are kept and found again (default: nowhere)"
    )
    parser.add_argument(
        "--make-only",
        action="store_true",
        help="write the files into --folder and don't measure them",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="torch threads (default: %(default)s)",
    )
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    keep_allocations()
    torch.manual_seed(0)
    model = DecoderLM(WIDE).eval() if args.wide else quantize.load(args.model)
    text = data.load_text()
    stream = data.TextBatches(text.train, batch=8, length=256, seed=1)
    batches = [stream(step)[0] for step in range(max(1, args.rows // 2048))]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        facts = make(
            model,
            ["ours"] if args.wide else ["svd", "whitened", "ours"],
            args.ratios,
            batches,
            folder,
        )
        if args.make_only:
            return
        evaluate = (
            None
            if args.wide
            else partial(training.evaluate_text, text=text.validation, max_bytes=args.bytes)
        )
        example = text.validation[:2048].long().reshape(8, 256)
        files = {name: folder / f"{name}.pth" for name in facts}
        results = compare(
            files, example, evaluate=evaluate, threads=args.threads, rounds=4, progress=print
        )
    rows = []
    for result in results:
        quality = {} if args.wide else {"bits_per_byte": result.metrics["bits_per_byte"]}
        size = {"bytes": result.bytes, "parameters": result.parameters}
        speed = {
            "latency_ms": result.latency_ms.median,
            "speedup": result.speedup,
            "threads": args.threads,
        }
        rows.append({**facts[result.name], **quality, **size, **speed})
    write(rows, RESULTS / ("low_rank_wide" if args.wide else "low_rank"))


def write(rows: list[dict], stem: Path) -> None:
    """CSV and plot of the rows, and the rows on the console."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stem.parent.mkdir(exist_ok=True)
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    print(*rows[0].keys(), sep="\t")
    for row in rows:
        print(*(round(v, 4) if isinstance(v, float) else v for v in row.values()), sep="\t")
    scored = "bits_per_byte" in rows[0]
    figure, axes = pyplot.subplots(1, 1 + scored, figsize=(5 * (1 + scored), 4), squeeze=False)
    for way in dict.fromkeys(row["way"] for row in rows[1:]):
        of_way = [row for row in rows if row["way"] == way]
        ratios = [row["ratio"] for row in of_way]
        axes[0][-1].plot(ratios, [row["speedup"] for row in of_way], "o-", label=way)
        if scored:
            axes[0][0].plot(
                ratios,
                [row["bits_per_byte"] - rows[0]["bits_per_byte"] for row in of_way],
                "o-",
                label=way,
            )
    axes[0][-1].axhline(1, color="gray", linestyle=":", label="fp32")
    for axis in axes[0]:
        axis.set(
            xlabel="share of the block linears' parameters kept",
            ylabel="speed, 8 x 256 tokens, fp32 = 1",
        )
        axis.grid(alpha=0.3)
        axis.legend()
    if scored:
        axes[0][0].set(ylabel="bits per byte lost, without training")
        axes[0][0].set_yscale("symlog", linthresh=0.01)
    figure.tight_layout()
    figure.savefig(stem.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
