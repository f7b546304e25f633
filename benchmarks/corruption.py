"""Damage checkpoints at random and count what is noticed: bit flips anywhere in the file, and
truncations.

    uv run python benchmarks/corruption.py --trials 1000

Writes one row per container, model and kind of damage to benchmarks/results/corruption.csv.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
import time
from pathlib import Path

import torch

import quantize
from quantize.checkpoint import CheckpointError, load, save
from quantize.models import DecoderConfig, DecoderLM

RESULTS = Path(__file__).parent / "results" / "corruption.csv"


def flip(content: bytes, draw: random.Random) -> bytes:
    """One bit, anywhere."""
    damaged, bit = bytearray(content), draw.randrange(8 * len(content))
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def truncate(content: bytes, draw: random.Random) -> bytes:
    """Cut at any byte."""
    return content[: draw.randrange(len(content))]


def noticed(path: Path) -> bool:
    """Whether loading raises CheckpointError; any other exception is a failure of its own and ends
    the run.
    """
    try:
        load(path)
    except CheckpointError:
        return True
    return False


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trials",
        type=int,
        default=1000,
        help="per container, model, damage (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="CSV file (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)

    torch.manual_seed(arguments.seed)
    draw = random.Random(arguments.seed)
    baseline = DecoderLM(DecoderConfig(width=32, layers=1, heads=2, tied_head=True)).eval()
    models = {
        "fp32": baseline,
        "fp16": quantize.to_half(baseline),
        "int8": quantize.quantize_dynamic(baseline),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".pth", ".safetensors"):
            for name, model in models.items():
                path = Path(folder) / f"{name}{suffix}"
                save(model, path)
                content = path.read_bytes()
                for damage in (flip, truncate):
                    start = time.perf_counter()
                    caught = 0
                    for _ in range(arguments.trials):
                        path.write_bytes(damage(content, draw))
                        caught += noticed(path)
                    seconds = time.perf_counter() - start
                    rows.append(
                        {
                            "container": suffix,
                            "model": name,
                            "file_bytes": len(content),
                            "damage": damage.__name__,
                            "trials": arguments.trials,
                            "caught": caught,
                            "seconds": round(seconds, 2),
                        }
                    )
                    print(*rows[-1].values(), sep="\t", flush=True)
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
