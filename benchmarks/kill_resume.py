"""Kill a training run with SIGKILL at random moments, resume it each time, and compare with a run
left alone.

    # 50 kills, a few minutes; writes results/kill_resume.csv
    uv run python benchmarks/kill_resume.py

Trains a small decoder on the default text and writes its state as often as it can (after nearly
every step), so that many kills fall into a write. After each kill the state file must be readable;
each finished run must have the same weights, bit for bit, as the uninterrupted one.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import rows
import torch

from quantize import training
from quantize.models import DecoderConfig, DecoderLM
from quantize.training.data import TextBatches, load_text
from quantize.training.resuming import read_state

STEPS = 150


def train(state: Path | None) -> str:
    """Train from `state` if it exists and return the SHA-256 of the final weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DecoderLM(DecoderConfig(width=64, layers=2, heads=2))
    batches = TextBatches(load_text().train, batch=2, length=128)
    recipe = training.TrainConfig(steps=STEPS, batch=2, length=128)

    def started(at: training.Progress) -> None:
        print("step", at.step, flush=True)

    settings = {"checkpoint_path": state, "checkpoint_seconds": 0.02, "resume": True}
    loss = training.next_token_loss
    training.fit(model, batches, loss, recipe, on_progress=started, **settings)
    content = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(content).hexdigest()


def run_and_kill(state: Path, seconds: float | None) -> tuple[str, str | None]:
    """Start the training and kill it `seconds` after its first step (negative: after its start;
    None: never).
    """
    command = [sys.executable, __file__, "--train", str(state)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    first = ""
    if seconds is not None:
        if seconds >= 0:
            first = process.stdout.readline()  # of a run that had only to finish, its result
        time.sleep(abs(seconds))
        process.send_signal(signal.SIGKILL)
    with process.stdout:
        output = first + process.stdout.read()  # not communicate(): readline() has read ahead
    process.wait()
    if process.returncode == -signal.SIGKILL:
        return "killed", None
    if process.returncode != 0:
        raise SystemExit(f"training failed with exit code {process.returncode}")
    return "finished", output.split()[-1]


def runs(state: Path, kills: int, chance: random.Random, expected: str) -> list[rows.Row]:
    """A row per run, until so many were killed and one more has finished."""
    found: list[rows.Row] = []
    killed = 0
    while killed < kills or state.exists():
        # four in five die while they train, the rest while they start; once enough are killed, let
        # one finish
        seconds = chance.uniform(0, 1.5) if chance.random() < 0.8 else -chance.uniform(0.5, 4)
        outcome, digest = run_and_kill(state, seconds if killed < kills else None)
        step = read_state(state)["step"] if state.exists() else 0  # raises if it is not whole
        row = {"run": len(found), "outcome": outcome, "killed_after_s": seconds}
        found.append(row | {"step_on_disk": step, "weights_equal": ""})
        killed += outcome == "killed"
        if digest is not None:
            found[-1]["weights_equal"] = digest == expected
            state.unlink()
        print(found[-1], flush=True)
        if digest not in (None, expected):
            raise SystemExit(f"finished with other weights: {digest}")
    return found


def main() -> None:
    parser = rows.Parser(__doc__, "kill_resume.csv")
    parser.flag("--kills", "how many", 50)
    parser.flag("--seed", "of the moments", 0)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # started as a child
    arguments = parser.parse()
    if arguments.train:
        print(train(arguments.train))
        return
    expected = train(None)
    print("uninterrupted:", expected)
    chance = random.Random(arguments.seed)
    with TemporaryDirectory() as folder:
        state = Path(folder) / "train.state"
        rows.write(arguments.out, runs(state, arguments.kills, chance, expected))


if __name__ == "__main__":
    main()
