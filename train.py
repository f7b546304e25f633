"""Train a model, compress it in every way, measure each file, print the table.

    uv run python train.py                                  # text, 4 to 5 minutes on 2 cores
    uv run python train.py --preset tiny                    # half a minute: does everything work?
    uv run python train.py --task image                     # scikit-learn's digits
    uv run python train.py --data my_texts --preset base    # your own files
    uv run python train.py --resume                         # go on after Ctrl-C, a crash or a kill
    uv run python train.py --variants int8 pruned           # only these beside the baseline
    uv run python train.py --budget speedup=2 max_loss=1%   # and what compress finds, as a row
    uv run torchrun --standalone --nproc-per-node 2 train.py --threads 1

Writes into --out: model.pth (the baseline), a file per variant, report.json, report.md,
report.html and pareto.png. Every number in the table is measured from the written file, loaded
again in a fresh process. A variant's file holds its recipe: quantize.read_metadata(file)["recipe"].
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

from quantize import script, training
from quantize.jobs import PRESETS, VARIANTS, choosing, prepare
from quantize.measuring.table import print_report


def flags() -> script.Parser:
    parser = script.Parser("train.py", __doc__)
    sizes, names = list(PRESETS["text"]), ", ".join(VARIANTS)
    devices = ["cpu", "cuda"]
    data_help = "text: files or folders; image: a folder of IDX files; none: built-in data"
    threads_help = "threads to train and measure with; none: the cores that this process may use"
    device_help = "where to train; everything is measured on the CPU"
    parser.flag("--preset", "model and length of training", choices=sizes, default="small")
    parser.flag("--task", "what to learn", choices=list(PRESETS), default="text")
    parser.flag("--data", data_help, nargs="+", type=script.path)
    parser.flag("--out", "folder to write into", type=script.path, default=Path("artifacts"))
    parser.flag("--variants", f"what to make, of {names}", nargs="+", default=list(VARIANTS))
    parser.flag("--steps", "training steps, instead of the preset's", type=script.count)
    parser.flag("--seed", "seed of weights and data order", type=script.seed, default=0)
    parser.flag("--threads", threads_help, type=script.threads)
    parser.flag("--device", device_help, choices=devices, default="cpu")
    budget_help = "a row for what compress finds: any of speedup=2, max_loss=1%%, bytes=1e6, ..."
    parser.flag("--budget", budget_help, nargs="+")
    parser.flag("--minutes", "of the search for --budget", type=script.minutes, default=2.0)
    resume_help = "go on with the interrupted run in --out"
    parser.add_argument("--resume", action="store_true", help=resume_help)
    return parser


def chosen(variants: Sequence[str]) -> list[str]:
    """The names in `--variants`, in the order of the table; commas may join them."""
    names = ",".join(variants).replace(",", " ").split()
    allowed = ("fp32", *VARIANTS)
    for name in names or [""]:
        if name not in allowed:
            raise ValueError(f"argument --variants: {name!r} is not one of {', '.join(allowed)}")
    return [name for name in VARIANTS if name in names]


def run(arguments: argparse.Namespace) -> None:
    names = chosen(arguments.variants)
    budget = choosing.read_budget(arguments.budget) if arguments.budget else None
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("argument --device: this machine has no CUDA device; cpu is allowed")
    with training.distributed(arguments.device) as (rank, _):
        job = prepare(
            arguments.preset,
            task=arguments.task,
            out=arguments.out,
            paths=arguments.data,
            steps=arguments.steps,
            seed=arguments.seed,
            resume=arguments.resume,
            device=arguments.device,
        )
        if rank == 0:
            print(job.describe(), flush=True)
        baseline = job.train()
    if rank > 0:
        return
    job.write(baseline, names)
    if budget is not None:
        choosing.add_chosen(job, baseline, budget, arguments.minutes)
    print_report(job.report())
    following = ["fusion.py", "kv_cache.py"][: 2 if job.is_text else 1]
    commands = ", ".join(f"uv run python {name} --out {job.out}" for name in following)
    print(f"\nwritten to {job.out}; next: {commands}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    stopped = "stopped; the same command with --resume goes on from the last saved step"
    return script.main(flags(), argv, run, stopped)


if __name__ == "__main__":
    sys.exit(main())
