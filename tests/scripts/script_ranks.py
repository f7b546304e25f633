"""One rank of `train.py`."""

import sys

import pytest
from nurseries import time_briefly

import train


def train_briefly(arguments: list[str]) -> None:
    """The script, with one call of each file timed."""
    with pytest.MonkeyPatch.context() as patch:
        time_briefly(patch)
        sys.exit(train.main(arguments))
