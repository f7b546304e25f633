"""Measure an artifact from its file, loaded again in a fresh process, and write what was measured
down.
"""

from quantize.measuring.artifact import Build, MeasurementError, fingerprint
from quantize.measuring.comparison import compare, measure
from quantize.measuring.report import build_report, write_report
from quantize.measuring.result import Latency, Measurement
from quantize.measuring.rows import build_rows, higher_is_better
from quantize.measuring.table import print_report

__all__ = [
    "Build",
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
