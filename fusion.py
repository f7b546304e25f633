"""Fuse a trained model into one file that gives the same answers faster, and show what that gained.

    uv run python fusion.py  # artifacts/model.pth -> artifacts/model_fused.pt
    uv run python fusion.py --model artifacts/int8.pth        # any artifact of train.py
    uv run python fusion.py --backend auto  # the fastest of the back ends that are installed
    uv run python fusion.py --batch 1 --threads 1

Without a model.pth it trains the baseline of the tiny preset first. Beside the file it writes
model_fused.json and model_fused.png. Latencies of eager and of the chosen file are of the files,
loaded again in fresh processes that take turns; the other back ends race in this process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # before torch is imported; why: quantize/host.py
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from quantize import script
from quantize.jobs import PRESETS, fuse_file, train_baseline
from quantize.jobs.fusing import describe
from quantize.run.fusion import BACKENDS


def flags() -> script.Parser:
    parser = script.Parser("fusion.py", __doc__)
    sizes, engines = list(PRESETS["text"]), ["auto", *BACKENDS]
    model_help = "checkpoint to fuse; none: model.pth in --out, trained first if it isn't there"
    batch_help = "batch size to fuse for and to measure at, beside 1"
    threads_help = "threads to compute with; none: the cores that this process may use"
    preset_help = "what to train if there is no model.pth"
    parser.flag("--model", model_help, type=script.path)
    parser.flag("--out", "folder to write into", type=script.path, default=Path("artifacts"))
    parser.flag("--preset", preset_help, choices=sizes, default="tiny")
    parser.flag("--backend", "who runs the fused model", choices=engines, default="torchscript")
    parser.flag("--batch", batch_help, type=script.count, default=8)
    parser.flag("--threads", threads_help, type=script.threads)
    return parser


def run(arguments: argparse.Namespace) -> None:
    path = arguments.model or arguments.out / "model.pth"
    if arguments.model is None and not path.exists():
        path = train_baseline(arguments.preset, arguments.out)
    result = fuse_file(
        path,
        arguments.out,
        backend=arguments.backend,
        batch=arguments.batch,
        threads=torch.get_num_threads(),
    )
    print("\n".join(describe(result)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    return script.main(flags(), argv, run)


if __name__ == "__main__":
    sys.exit(main())
