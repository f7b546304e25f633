"""Print a report again, and write its pages again: after an update, or of a report.json alone.

quantize report artifacts/
quantize report small.search/report.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from quantize import script
from quantize.measuring.report import REPORT_FILES, read_report, write_report
from quantize.measuring.table import print_report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: the arguments; None: those of the process.
    """
    parser = script.Parser("quantize report", __doc__)
    parser.add_argument("path", type=script.path, help="a folder with report.json, or that file")
    parser.flag("--threads", "torch threads", type=script.threads, default=1)
    return script.main(parser, argv, _report)


def _report(arguments: argparse.Namespace) -> None:
    path = arguments.path
    report = read_report(path)
    print_report(report)
    if report["data"].get("reason"):
        print(f"\n{report['data']['reason']}")
    folder = path if path.is_dir() else path.parent
    write_report(report, folder)
    print(f"\nwritten to {folder}: {', '.join(REPORT_FILES)}")
