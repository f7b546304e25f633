"""What the tests of measuring share, and measuring processes import: models, inputs, metrics."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from quantize.measuring import measure
from quantize.models import MLP

QUICK = {"threads": 1, "rounds": 2, "burst_seconds": 0.0}
INPUTS = torch.linspace(-1, 1, 32).reshape(2, 16)


class Net(nn.Module):
    """A foreign architecture: two inputs, a tied weight, a BatchNorm, a weight kept in a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.b.weight = self.a.weight
        self.register_buffer("table", torch.ones(16, dtype=torch.int8))
        self.register_buffer("mask", torch.ones(99), persistent=False)

    def forward(self, x, scale=1.0):
        return {"out": self.norm(self.b(self.a(x))) * self.table * scale}


def weight_sum(model, factor=1.0):
    return {
        "weight_sum": factor * model.state_dict()["head.weight"].double().sum().item(),
        "pid": os.getpid(),
    }


def die(model):
    os.kill(os.getpid(), signal.SIGKILL)


def complain(model):
    print("on standard output")
    raise RuntimeError("no such metric")


def sleep_long(model):
    time.sleep(60)


def multiply(model):
    # hangs in a child that was forked from a process with a thread pool
    torch.ones(512, 512) @ torch.ones(512, 512)
    return {"product": 1.0}


def leave_unread():
    raise AssertionError("this must run in the child only")


class OnlyHere:
    """Pickles here, and can't be read back anywhere."""

    def __reduce__(self):
        return leave_unread, ()

    def __call__(self, model):
        return 3.0


def weight_sum_or_zero(model, factor):
    return (
        weight_sum(model, factor)
        if isinstance(model, MLP)
        else {"weight_sum": 0.0, "pid": os.getpid()}
    )


class Numpy:
    """A second engine: reads a weight from a file and multiplies in NumPy."""

    def __init__(self, file):
        self.weight, self.pid = np.load(file), os.getpid()

    def __call__(self, x):
        return torch.from_numpy(x.numpy() @ self.weight)


def no_engine():
    raise ImportError("no such engine")


def score(model):
    if isinstance(model, nn.Identity):
        raise RuntimeError("no score")
    return 1.0


def start_children() -> None:
    """One in the process group, one in a session of its own, one that holds the worker's pipes."""
    subprocess.Popen(["sleep", "1000"])
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    multiprocessing.get_context("fork").Process(
        target=time.sleep, args=(1000,), daemon=True
    ).start()


def start_children_and_hang(model) -> None:
    start_children()
    Path(os.environ["QUANTIZE_TEST_STARTED"]).touch()
    time.sleep(1000)


def measure_without_end(file: Path, environment: dict[str, str], spawn: bool) -> None:
    """Measure a file with a function that never returns."""
    os.environ.update(environment)
    tempfile.tempdir = None
    if spawn:
        del os.fork
    measure(file, INPUTS, evaluate=start_children_and_hang, **QUICK)


def start_children_and_answer(model) -> float:
    start_children()
    return 3.0


def start_children_and_die(model) -> None:
    start_children()
    os._exit(7)


def leave(model) -> None:
    sys.exit(5)
