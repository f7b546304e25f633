"""What was measured: `Measurement`, one artifact's numbers, and the percentiles of its latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantize.host import machine


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call: percentiles over all timed calls, each round weighing the same.

    Args:
        median: half of the calls took no longer.
        p10: the tenth percentile.
        p90: the ninetieth percentile.
        calls: how many calls were timed.
    """

    median: float
    p10: float
    p90: float
    calls: int = 0


@dataclass(frozen=True)
class Measurement:
    """What was measured of one artifact.

    Args:
        name: of the artifact.
        file: its path; None for what has no file.
        bytes: of the file; of a module without one, of its stored tensors; None if unknown.
        parameters: stored elements, weights in parameters and buffers, shared ones once; None for
            what is no module.
        latency_ms: None if there were no inputs to call it with.
        speedup: the median latency of the first artifact of the comparison over that of this one.
        metrics: what `evaluate` returned, by name; the first one is the one to show.
        load_s: from the file to a usable model, or of `Build.make`, torch already imported.
        first_call_ms: cold, kernels are chosen and weights packed in it.
        peak_rss_mb: most memory the fresh process had resident before `evaluate`, in MiB; of torch,
            what it touched.
        output_sha256: `fingerprint` of the output for the example inputs.
        threads: torch's, where this was measured.
        allocator: the state of malloc there.
        notes: what a reader must know.
        waiting: what OpenMP's threads do at a barrier.
        failed: why it could not be measured (see `keep_going` of `compare`); None if it could.
    """

    name: str
    file: str | None
    bytes: int | None
    parameters: int | None
    latency_ms: Latency | None
    speedup: float | None
    metrics: dict[str, float]
    load_s: float | None
    first_call_ms: float | None
    peak_rss_mb: float | None
    output_sha256: str | None
    threads: int
    allocator: str
    notes: tuple[str, ...] = ()
    waiting: str = "unknown"
    failed: str | None = None

    def machine(self) -> dict[str, Any]:
        """`quantize.host.machine()` as it was where this was measured."""
        here = {"threads": self.threads, "allocator": self.allocator, "waiting": self.waiting}
        return {**machine(), **here}


def latency_of(bursts: Sequence[Sequence[float]]) -> Latency:
    """Percentiles of the times of all rounds' calls; a fast round has more calls, but no more
    weight.

    Args:
        bursts: milliseconds of each call, a sequence per round.
    """
    weights = []
    for burst in bursts:
        weights += [1 / len(burst)] * len(burst)
    times, order = torch.cat([torch.tensor(burst, dtype=torch.float64) for burst in bursts]).sort()
    # up to each time, the share of all weight
    share = torch.tensor(weights, dtype=torch.float64)[order].cumsum(0) / len(bursts)
    median, p10, p90 = (times[int((share < part - 1e-9).sum())].item() for part in (0.5, 0.1, 0.9))
    return Latency(median, p10, p90, len(times))
