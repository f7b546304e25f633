"""What a search found: the chosen model, every point, and why."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from quantize import checkpoint
from quantize.compression.search.points import Row
from quantize.host import machine
from quantize.measuring.report import write_report
from quantize.saying import Say

_REASON = 160  # characters of why a point failed


@dataclass(frozen=True)
class Result:
    """What `compress` found.

    Args:
        model: the chosen one, in eval mode; the original where nothing else keeps the loss.
        file: where it is; `quantize.load(file, model=...)` reads it.
        rows: one per point that was tried, as in the report, the original first, with "loss",
            "fits" (whether it keeps the budget), "misses" (what it misses) and "recipe".
        met: whether the chosen one kept the budget when it was measured once more.
        reason: why it was chosen, or what couldn't be reached.
        layers: what each layer of the chosen one got and why: dicts of "name", "got", "why".
    """

    model: nn.Module = field(repr=False)
    file: Path
    rows: list[Row] = field(repr=False)
    met: bool = False
    reason: str = ""
    layers: list[dict[str, str]] = field(default_factory=list, repr=False)


def layers_of(row: Row, model: nn.Module) -> list[dict[str, str]]:
    """What each layer got and why: of a choice by layers its reasons, else what the steps say."""
    if row.get("predicted"):
        return row["predicted"]["layers"]
    summary = checkpoint.summary(model)
    left = {name: why for name, why in summary.left.items() if name not in summary.done}
    told = [{"name": n, "got": got, "why": "by its recipe"} for n, got in summary.done.items()]
    return told + [{"name": n, "got": "stays as it is", "why": why} for n, why in left.items()]


def facts_of(row: Row) -> str:
    """What a row is in a line; its latency is the one that a budget is held to."""
    latency = row["latency_in_turns_ms"]
    timed = f"{latency:.4g} ms ({row['speedup']:.2f}x), " if row["latency_ms"] else ""
    return f"{timed}{row['bytes']} bytes, loss {row['loss']:.3g}"


def doubts_of(row: Row, rows: list[Row]) -> str:
    """What a reader must know of a choice: a busy machine; points that failed, where they are most
    or may be why the budget isn't kept.
    """
    told = [note for note in row["notes"].split("; ") if note.startswith("busy machine")]
    failed = [other for other in rows if other["file"] is None]
    if failed and (not row["fits"] or 2 * len(failed) > len(rows)):
        why = textwrap.shorten(failed[0]["notes"], _REASON, placeholder=" ...")
        told.append(f"{len(failed)} of {len(rows)} points failed, {failed[0]['name']}: {why}")
    return "".join(f"; {line}" for line in told)


def report(result: Result, folder: Path, minutes: float, seed: int, say: Say) -> None:
    data = {"minutes": minutes, "seed": seed, "chosen": result.file.name, "reason": result.reason}
    data["layers"] = result.layers
    try:
        write_report({"machine": machine(), "data": data, "rows": result.rows}, folder)
    except OSError as error:  # a full disk: the result is there
        say(f"no report: {error}")
