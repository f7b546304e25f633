"""Damage checkpoints at random and count what is noticed: bit flips anywhere in the file, and
truncations.

    uv run python benchmarks/corruption.py --trials 1000

Writes one row per container, model and kind of damage to benchmarks/results/corruption.csv.
"""

from __future__ import annotations

import random
import tempfile
from itertools import product
from pathlib import Path

import rows
import torch

import quantize
from quantize import clock
from quantize.checkpoint import CheckpointError, load, save
from quantize.models import DecoderConfig, DecoderLM


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


def main() -> None:
    parser = rows.Parser(__doc__, "corruption.csv")
    parser.flag("--trials", "of each container, model and damage", 1000)
    parser.flag("--seed", "of models and damage", 0)
    arguments = parser.parse()
    torch.manual_seed(arguments.seed)
    draw = random.Random(arguments.seed)
    baseline = DecoderLM(DecoderConfig(width=32, layers=1, heads=2, tied_head=True)).eval()
    models = {
        "fp32": baseline,
        "fp16": quantize.to_half(baseline),
        "int8": quantize.quantize_dynamic(baseline, prefer="size"),
    }
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix, name in product((".pth", ".safetensors"), models):
            path = Path(folder) / f"{name}{suffix}"
            save(models[name], path)
            content = path.read_bytes()
            for damage in (flip, truncate):

                def trials(path=path, content=content, damage=damage) -> int:
                    caught = 0
                    for _ in range(arguments.trials):
                        path.write_bytes(damage(content, draw))
                        caught += noticed(path)
                    return caught

                caught, seconds = clock.timed(trials)
                row = {"container": suffix, "model": name, "file_bytes": len(content)}
                row |= {"damage": damage.__name__, "trials": arguments.trials}
                found.append(row | {"caught": caught, "seconds": seconds})
    rows.write(arguments.out, found)


if __name__ == "__main__":
    main()
