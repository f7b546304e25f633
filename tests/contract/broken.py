"""Cells that break a promise, with the reason: to be empty. They are expected to fail, strictly."""

from __future__ import annotations

BROKEN: dict[str, dict[str, str]] = {
    "recovered": {
        "convnext": "judged on the batch held out, it ends farther from its teacher on the one "
        "that it learned from"
    },
}

BROKEN_PAIRS: dict[tuple[str, str], dict[str, str]] = {}
