"""The rows of a report: ratios and changes against the first measurement, the baseline, and marks
for what is larger, slower or worse than it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantize.measuring.result import Measurement

# Words of a metric's name that say what is better. One of _LOWER counts first: cosine_distance.
_LOWER = set(
    "loss error errors err bits bpb bpc perplexity ppl nll entropy distance divergence kl mse rmse "
    "mae mape wer cer eer fid mcd difference drop gap regret".split()
)
_HIGHER = set(
    "accuracy acc acc1 acc5 top1 top5 f1 score cosine similarity auc auroc precision recall bleu "
    "rouge meteor map miou iou dice psnr snr sdr ssim pesq stoi mos r2 correlation pearson "
    "spearman mcc kappa ndcg mrr agreement match matches em correct reward".split()
)
_SLOWER_BELOW = 0.98  # one model against itself, interleaved, came out at 0.99 and 1.01
# A change for the worse by more than this share of the baseline's value has this name; less is
# noise.
GRADES = {0.1: "much worse", 0.01: "worse", 0.001: "slightly worse"}
# Metrics that say how many examples a share was taken of.
_COUNTS = ("examples", "images", "samples", "count", "n")

FIELDS = (
    *("name", "file", "bytes", "bytes_ratio", "parameters", "latency_ms", "speedup", "metric"),
    *("metric_change", "load_s", "peak_rss_mb", "notes"),
)  # of a row
_PERCENTILES = ("median", "p10", "p90")
MARKS = ("failed", "larger", "slower", *GRADES.values())

_LEAST_SHOWN = 0.01  # of the best quality: differences within the noise must not fill the panel
_OFF_SCALE = (
    6.0  # a point this many times farther from the best than the median point is drawn on the edge
)
Row = dict[str, Any]
Report = dict[str, Any]


def higher_is_better(metric: str) -> bool | None:
    """Whether a metric of this name is better when higher ("accuracy") or lower ("bits_per_byte",
    "loss"); None where no word of it says so ("metric").
    """
    words = set(re.split("[^a-z0-9]+", metric.lower()))
    if words & _LOWER:
        return False
    return True if words & _HIGHER else None


def build_rows(
    measurements: Sequence[Measurement],
    *,
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """One row per measurement; the first one is the baseline.

    Args:
        measurements: of `compare`.
        notes: added to a row, by name.

    Returns:
        Dicts of name, file (without its folder), bytes, bytes_ratio, parameters, latency_ms
        {median, p10, p90}, speedup, metric {name, value, higher_is_better (None: unknown), also},
        metric_change (value minus the baseline's), load_s, peak_rss_mb, notes. What wasn't
        measured, or isn't finite, is None.
    """
    if not measurements:
        raise ValueError("measurements is empty: a report needs at least one row, the baseline")
    unknown = set(notes or ()) - {m.name for m in measurements}
    if unknown:
        raise ValueError(
            f"notes for rows that aren't there: {sorted(unknown)}; rows: "
            f"{[m.name for m in measurements]}"
        )
    baseline = measurements[0]
    rows: list[Row] = []
    for m in measurements:
        if m.failed is None:
            rows.append(_row(m, baseline, (notes or {}).get(m.name)))
        else:
            rows.append(failed_row(m.name, m.failed, rows[0]))
    return rows


def _row(m: Measurement, baseline: Measurement, note: str | None) -> Row:
    name, value = next(iter(m.metrics.items()), (None, None))
    higher = higher_is_better(name) if name else None
    before = baseline.metrics.get(name) if name else None
    change = value - before if value is not None and before is not None else None
    ratio = m.bytes / baseline.bytes if baseline.bytes and m.bytes is not None else None
    latency = m.latency_ms and {key: getattr(m.latency_ms, key) for key in _PERCENTILES}
    marks = []
    if ratio is not None and ratio > 1:
        marks.append("larger")
    if m.speedup is not None and m.speedup < _SLOWER_BELOW:
        marks.append("slower")
    if value is not None and not math.isfinite(value):
        marks.append(f"worse: {name} is {value}")
    elif higher is not None and before is not None and value is not None and change is not None:
        loss = -change if higher else change
        marks += grade(before, loss, metric_noise(before, value, m.metrics))
    return strict(
        {
            "name": m.name,
            "file": Path(m.file).name if m.file else None,
            "bytes": m.bytes,
            "bytes_ratio": ratio,
            "parameters": m.parameters,
            "latency_ms": latency,
            "speedup": m.speedup,
            "metric": {
                "name": name,
                "value": value,
                "higher_is_better": higher,
                "also": dict(list(m.metrics.items())[1:]),
            },
            "metric_change": change,
            "load_s": m.load_s,
            "peak_rss_mb": m.peak_rss_mb,
            "notes": "; ".join(filter(None, [*marks, note, *m.notes])),
        }
    )


def failed_row(name: str, reason: str, baseline: Row) -> Row:
    """The row of what couldn't be made or measured: the reason, and no numbers."""
    metric = {**baseline["metric"], "value": None, "also": {}}
    return {**dict.fromkeys(baseline), "name": name, "metric": metric, "notes": f"failed: {reason}"}


def grade(before: float, loss: float, noise: float) -> list[str]:
    """How much worse than `before` a metric is that has lost `loss`; nothing for noise.

    Args:
        before: the metric of the baseline.
        loss: its change for the worse.
        noise: a change that may be chance. Where none is known, it is a convention: a thousandth
            of the value.
    """
    if loss <= noise:
        return []
    share = loss / abs(before) if before else math.inf
    return [name for least, name in GRADES.items() if share > least][:1]


def metric_noise(before: float, value: float, metrics: Mapping[str, float]) -> float:
    """What a metric may change by chance: the `standard_error` among the metrics where `evaluate`
    gives one, else that of a share (accuracy) of so many examples; 0 where neither is known. Of a
    share of all or none, as if one more example were right and one more wrong (Laplace's rule).
    """
    given = metrics.get("standard_error")
    if given:
        return given
    count = next((metrics[name] for name in _COUNTS if metrics.get(name)), 0)
    mean = (before + value) / 2
    all_alike = mean in (0.0, 1.0)
    if not count or not 0 <= mean <= 1 or (given == 0 and not all_alike):
        return 0.0
    if all_alike:
        mean = (count * mean + 1) / (count + 2)
    return math.sqrt(mean * (1 - mean) / count)


def strict(value: Any) -> Any:
    """JSON values: non-finite numbers become None, paths and other objects text."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, type(None))) else str(value)


def limits(qualities: list[float]) -> tuple[float, float]:
    """Lowest and highest quality to show, with margins; points far below the rest are not given
    room.
    """
    if not qualities:
        return 0.0, 1.0
    best = max(qualities)
    distances = sorted(best - q for q in qualities)
    nonzero = [d for d in distances if d > 0] or [abs(best) * 0.01 or 1.0]
    typical = nonzero[(len(nonzero) - 1) // 2]
    depth = max([d for d in nonzero if d <= _OFF_SCALE * typical] or nonzero[:1])
    depth = max(depth, _LEAST_SHOWN * abs(best))
    return best - 1.25 * depth, best + 0.2 * depth


def not_beaten(points: list[tuple[float, float]]) -> set[int]:
    """Indices of the points (cost, quality) that no other beats: not in one without losing in the
    other.
    """
    return {
        i
        for i, (x, q) in enumerate(points)
        if not any(a <= x and b >= q and (a < x or b > q) for a, b in points)
    }
