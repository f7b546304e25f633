"""Measure an artifact from its file, loaded again in a fresh process, and write what was measured
down.
"""

from quantize.measuring.artifact import MeasurementError, fingerprint
from quantize.measuring.comparison import Latency, Measurement, compare, measure
from quantize.measuring.report import (
    build_report,
    build_rows,
    higher_is_better,
    print_report,
    write_report,
)

__all__ = [
    "Latency",
    "Measurement",
    "MeasurementError",
    "build_report",
    "build_rows",
    "compare",
    "fingerprint",
    "higher_is_better",
    "measure",
    "print_report",
    "write_report",
]
