"""Find the best smaller model that was measured to keep a budget, and write it into a folder.

    quantize compress ./folder --data texts/ --max-loss 1% --speedup 2 --out small/
    quantize compress vit/ --data photos/ --bytes 20M --out small/
    quantize compress net.pth --model mypackage.net:Net --data inputs.npz \\
        --evaluate mypackage.test:accuracy --max-loss 0.01 --out small/

Every row of the table is measured from a file, loaded again in a fresh process, in turns with the
original. Without --evaluate, a loss is the KL divergence of logits (of single numbers the variance
that is left unexplained, of other outputs 1 - cosine) from the original's, on the half of the data
that nothing is fitted to, and 1% is of the entropy of its answers (or of 1). `quantize.open_model`
opens the folder. OUT.search holds every point: the same command goes on from there, and one with
another budget starts with them. The exit code is 1 where the budget can't be met: then the folder
holds the best that was found.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from quantize import script
from quantize.checkpoint import IN_FOLDER, atomic_write
from quantize.commands import source
from quantize.compression.search import Result, compress
from quantize.compression.search.budget import TARGETS
from quantize.measuring.report import read_report, write_report
from quantize.measuring.rows import Report
from quantize.measuring.table import print_report
from quantize.models.opening import ABOUT, save_folder, weights_of

NOT_MET = 1  # exit code: the folder holds the best that was found
_PREFIXES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: the arguments; None: those of the process.
    """
    stopped = "stopped; the same command goes on from the points that are measured"
    return script.main(_flags(), argv, _compress, stopped)


def _flags() -> script.Parser:
    parser = script.Parser("quantize compress", __doc__)
    source.add_flags(parser)
    data_help = "text files, images, or one .npz, .npy, .safetensors of inputs; folders too"
    loss_help = "most that the metric may lose: 0.01, 1%% (of the original's), '2 noise'"
    parser.add_argument("--data", nargs="+", type=script.path, required=True, help=data_help)
    parser.add_argument("--out", type=script.path, required=True, help="folder of the result")
    parser.flag("--max-loss", loss_help, type=_loss)
    parser.flag("--speedup", "times as fast as the original, at least", type=float)
    parser.flag("--latency-ms", "milliseconds of a call, at most", type=float)
    parser.flag("--bytes", "of the file, at most: 20000000, 20M, 19Mi", type=_bytes)
    parser.flag("--memory-mb", "MiB of a process that runs it, at most", type=float)
    parser.flag("--minutes", "that the search may take", type=script.minutes, default=5.0)
    parser.flag("--seed", "seed of trainings", type=script.seed, default=0)
    return parser


def _loss(text: str) -> str | float:
    """An absolute loss as a number, others as the text that `Budget.of` reads."""
    try:
        return float(text)
    except ValueError:
        return text


def _bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+\.?\d*(?:e\d+)?)(|k|M|G|Ki|Mi|Gi)B?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes: 20000000, 20M, 19Mi")
    return float(found[1]) * _PREFIXES[found[2]]


def _compress(arguments: argparse.Namespace) -> None:
    budget = script.given(arguments, (*TARGETS, "max_loss"))
    if not budget:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in (*TARGETS, "max_loss"))
        raise ValueError(f"no budget is given: any of {flags}")
    out: Path = arguments.out
    _check_out(out)
    evaluate = script.imported(arguments.evaluate)
    model = source.opened(arguments)
    batches = source.samples(arguments, model)
    search = source.search_of(out)
    result = compress(
        model,
        batches[0],
        calibration=batches,
        evaluate=evaluate,
        budget=budget,
        minutes=arguments.minutes,
        out=search,
        seed=arguments.seed,
    )
    source.write_asked(arguments, search)
    report = read_report(search)
    print_report(report)
    _write(result, out, report)
    print(f"\n{result.reason}\nwritten to {out}")
    print(f"load it: {_how_to_load(arguments, out)}")
    if not result.met:
        raise SystemExit(NOT_MET)


def _check_out(out: Path) -> None:
    """Refuse before any work what `save_folder` would refuse at the end."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"argument --out: {out} exists and is not a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / ABOUT).is_file():
        raise ValueError(f"argument --out: {out} isn't empty, and no earlier call wrote it")


def _write(result: Result, out: Path, report: Report) -> None:
    """The folder that opens again, with the report beside the model, and the very file that was
    measured where `save_folder` writes one of that kind.
    """
    save_folder(result.model, out)
    weights = weights_of(out)
    if weights.name == IN_FOLDER:
        with result.file.open("rb") as measured, atomic_write(weights) as file:
            shutil.copyfileobj(measured, file)
    for row in report["rows"]:
        is_here = row["file"] == result.file.name
        row["file"] = weights.name if is_here else None
        row["bytes"] = weights.stat().st_size if is_here else row["bytes"]
    report["data"]["chosen"] = weights.name
    write_report(report, out)


def _how_to_load(arguments: argparse.Namespace, out: Path) -> str:
    own = arguments.model is not None or arguments.source.suffix == ".py"
    fresh = ", model=a fresh instance of your class" if own else ""
    return f"quantize.open_model({str(out)!r}{fresh})"
