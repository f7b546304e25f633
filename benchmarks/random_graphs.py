"""Random models through every technique, each against an oracle: is there a crash, a hang or a
wrong result without a word?

    uv run python benchmarks/random_graphs.py  # 500 models, about twenty minutes on one core
    uv run python benchmarks/random_graphs.py --models 50 --first 500 --only fused pruned

A model is made from its seed by `tests/random_models.py` (every second one with odd steps: state,
writes in place, chance, control flow), and examined by `tests/contract/oracles.py`. Printed are
counts of ok, refused (by message), crash, hang and silent difference; the exit code is 1 if there
is one of the last three. Left out: speed, back ends other than TorchScript.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the models are tiny
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import pytest
import torch
from contract.oracles import TECHNIQUES, examine
from nurseries import rewrite_most

from quantize import clock

FAILURES = ("crash", "hang", "silent difference")


def count(arguments: argparse.Namespace) -> tuple[Counter, Counter]:
    """Outcomes by technique, and refusals by message; failures are printed as they come."""
    outcomes: Counter[tuple[str, str]] = Counter()
    refusals: Counter[str] = Counter()
    seeds = range(arguments.first, arguments.first + arguments.models)
    for seed, name in product(seeds, arguments.only):
        odd = seed % 2 == 1
        outcome, message = examine(name, seed, odd)
        message = " ".join(message.split())
        outcomes[name, outcome] += 1
        if outcome == "refused":
            refusals[f"{name}: {message[:90]}"] += 1
        elif outcome != "ok":
            where = f"seed {seed}{' odd' if odd else ''}, {name}"
            print(f"{where}: {outcome}: {message[:200]}", flush=True)
    return outcomes, refusals


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=500, help="how many (default: 500)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one (default: 0)")
    names = list(TECHNIQUES)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="(default: all)")
    arguments = parser.parse_args()
    with pytest.MonkeyPatch.context() as patch:
        rewrite_most(patch)
        (outcomes, refusals), seconds = clock.timed(lambda: count(arguments))
    print(f"{arguments.models} models in {seconds:.0f} s, torch {torch.__version__}")
    for name in arguments.only:
        kinds = ("ok", "refused", *FAILURES)
        print(f"{name:10}", ", ".join(f"{kind} {outcomes[name, kind]}" for kind in kinds))
    for message, times in refusals.most_common(40):
        print(f"{times:5} refused, {message}")
    return int(any(outcomes[name, kind] for name, kind in product(names, FAILURES)))


if __name__ == "__main__":
    sys.exit(main())
