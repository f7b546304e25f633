"""Measure somebody's compressed model again on this machine, and say which of its claims hold.

    quantize verify small/ --data texts/
    quantize verify artifacts/int8.pth
    quantize verify net.pth --model mypackage.net:Net --data inputs.npz --baseline original.pth \\
        --evaluate mypackage.test:accuracy

Claims are those of the report.json beside the file: bytes, the ratio of latencies to the report's
first row, the metric. The digests of the tensors are in the file itself. A ratio is measured where
the baseline's file is beside it or named, a metric where --evaluate gives it, or --data does for
the divergence from the baseline; beside the search that `quantize compress` left here, baseline and
data are known. What can't be checked says what would check it. The exit code is 1 where a claim
doesn't hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from quantize import checkpoint, script
from quantize.checkpoint import CheckpointError
from quantize.commands import source
from quantize.compression.search.divergence import DIVERGENCES, Divergence, held_out
from quantize.measuring.artifact import as_metrics
from quantize.measuring.comparison import compare
from quantize.measuring.report import read_report
from quantize.measuring.rows import metric_noise
from quantize.models.opening import open_model, weights_of

BROKEN = 1  # exit code: a claim doesn't hold
SLACK = 0.1  # share by which a ratio of latencies may fall short: machines differ by the minute
HOLDS, FAILS, UNKNOWN = "holds", "FAILS", "not checked"


@dataclass(frozen=True)
class Finding:
    """What became of one claim: HOLDS, FAILS or UNKNOWN, and in words why."""

    claim: str
    verdict: str
    why: str

    def __str__(self) -> str:
        return f"{self.claim:14}{self.verdict}: {self.why}"


@dataclass(frozen=True)
class Claims:
    """An artifact with what is said of it.

    Args:
        file: of the weights.
        row: of the report; None where there is no report, or none of this file.
        baseline: the file that its ratios are against; None where it isn't there.
    """

    file: Path
    row: dict[str, Any] | None
    baseline: Path | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: the arguments; None: those of the process.
    """
    return script.main(_flags(), argv, _verify)


def _flags() -> script.Parser:
    parser = script.Parser("quantize verify", __doc__)
    source.add_flags(parser)
    data_help = "text, images or arrays that the model reads; none: its own example inputs"
    parser.flag("--baseline", "what it was made of; none: as the report says", type=script.path)
    parser.flag("--data", data_help, type=script.path, nargs="+")
    return parser


def _verify(arguments: argparse.Namespace) -> None:
    source.read_asked(arguments)
    claims = find_claims(arguments.source, arguments.baseline)
    model = source.opened(arguments)  # of our files, this compares every digest
    batches = source.samples(arguments, model) if arguments.data else []
    evaluate = script.imported(arguments.evaluate)
    original = None
    if claims.baseline is not None:
        original = open_model(claims.baseline, source.instance(arguments.model))
    findings = [
        _digest(claims),
        _bytes(claims),
        _ratio(claims, model, original, batches),
        _metric(claims, model, original, batches, evaluate),
    ]
    for finding in findings:
        print(finding)
    if any(finding.verdict == FAILS for finding in findings):
        raise SystemExit(BROKEN)


def find_claims(path: Path, baseline: Path | None) -> Claims:
    """What is said of a file, or of a folder that holds one, and where.

    Raises:
        CheckpointError: no such file or folder; a folder without weights of ours.
    """
    file = weights_of(path) if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    beside = file.parent / "report.json"
    if not beside.is_file():
        return Claims(file, None, baseline)
    report = read_report(beside)
    said = {row["file"]: row for row in report["rows"] if row["file"]}
    first = report["rows"][0]["file"]
    known = file.parent / first if first and (file.parent / first).is_file() else None
    return Claims(file, said.get(file.name), baseline or known)


def _digest(claims: Claims) -> Finding:
    """The model was opened, so where the file has digests, its tensors are those."""
    try:
        count = len(checkpoint.read_record(claims.file)["tensors"])
    except CheckpointError:
        return Finding("digest", UNKNOWN, f"{claims.file.name} of transformers has none")
    return Finding("digest", HOLDS, f"{count} tensors have the SHA-256 that the file says")


def _bytes(claims: Claims) -> Finding:
    size = claims.file.stat().st_size
    if claims.row is None:
        return Finding("bytes", UNKNOWN, f"no report says them; there are {size}")
    said = claims.row["bytes"]
    verdict = HOLDS if said == size else FAILS
    return Finding("bytes", verdict, f"{size}, the report says {said}")


def _ratio(claims: Claims, model: Any, original: nn.Module | None, batches: Any) -> Finding:
    """The speed against the baseline, in turns, each in a fresh process."""
    inputs = batches[0] if batches else None
    has_inputs = inputs is not None or callable(getattr(model, "example_inputs", None))
    needed = ["--baseline, what it was made of,"] if original is None else []
    needed += [] if has_inputs else ["--data, what it reads"]
    if original is None or needed:
        return Finding("latency ratio", UNKNOWN, f"give {' and '.join(needed)}")
    measured = compare({"baseline": original, "file": model}, inputs)[1]
    speed, said = measured.speedup or 0.0, (claims.row or {}).get("speedup")
    notes = [note for note in measured.notes if note.startswith("busy")]
    busy = "".join(f"; {note}: measure again" for note in notes)
    if not said:
        return Finding("latency ratio", UNKNOWN, f"no report says it; here it is {speed:.2f}{busy}")
    verdict = UNKNOWN if busy else FAILS
    verdict = HOLDS if speed >= (1 - SLACK) * said else verdict
    told = f"{speed:.2f} here, the report says {said:.2f}; {SLACK:.0%} less is allowed{busy}"
    return Finding("latency ratio", verdict, told)


def _metric(
    claims: Claims, model: Any, original: nn.Module | None, batches: Any, evaluate: Any
) -> Finding:
    said = (claims.row or {}).get("metric") or {}
    name, value = said.get("name"), said.get("value")
    if value is None:
        return Finding("metric", UNKNOWN, "no report says one")
    found: dict[str, float] = {}
    needed = "--evaluate, the function that gave it"
    if evaluate is not None:
        found = as_metrics(evaluate(model))
        needed = f"an --evaluate that gives it, not {', '.join(found)}"
    elif name in DIVERGENCES:
        needed = "--baseline, what it was made of, and --data, like what it was judged by"
        if batches and original is not None:
            found = Divergence(original, held_out(batches)).score(model).metrics
    if name not in found:
        return Finding("metric", UNKNOWN, f"{name} is {value:.4g} by the report; give {needed}")
    noise = max(metric_noise(value, found[name], {**said["also"], **found}), 1e-3 * abs(value))
    if name in DIVERGENCES:
        noise = max(noise, abs(value))  # on other data; twice as far is no longer the same model
    worse = (value - found[name]) if said["higher_is_better"] else (found[name] - value)
    told = f"{name} is {found[name]:.4g} here, the report says {value:.4g}; noise {noise:.2g}"
    return Finding("metric", HOLDS if worse <= noise else FAILS, told)
