"""One rank of `train.py`."""

import sys

import pytest

import train


def train_briefly(arguments: list[str]) -> None:
    """The script, which measures nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.jobs.training.Job.report", lambda job: None)
        patch.setattr(train, "print_report", print)
        sys.exit(train.main(arguments))
