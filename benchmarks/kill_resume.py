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
import csv
import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

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
    recipe = training.Recipe(steps=STEPS, batch=2, length=128)

    def started(at: training.Progress) -> None:
        print("step", at.step, flush=True)

    settings = {
        "checkpoint_path": state,
        "checkpoint_seconds": 0.02,
        "resume": True,
        "on_progress": started,
    }
    training.fit(model, batches, training.next_token_loss, recipe, **settings)
    return hashlib.sha256(
        b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    ).hexdigest()


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=50, help="how many kills (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the moments (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "kill_resume.csv"
    )
    parser.add_argument(
        "--train", type=Path, help=argparse.SUPPRESS
    )  # what this script starts as a child
    arguments = parser.parse_args(argv)
    if arguments.train:
        print(train(arguments.train))
        return
    chance = random.Random(arguments.seed)
    expected = train(None)
    print("uninterrupted:", expected)
    rows, kills, finished = [], 0, 0
    with TemporaryDirectory() as folder:
        state = Path(folder) / "train.state"
        while kills < arguments.kills or state.exists():
            # four in five die while they train, the rest while they start; once enough are killed,
            # let one finish
            seconds = chance.uniform(0, 1.5) if chance.random() < 0.8 else -chance.uniform(0.5, 4)
            outcome, digest = run_and_kill(state, seconds if kills < arguments.kills else None)
            step = read_state(state)["step"] if state.exists() else 0  # raises if it is not whole
            rows.append(
                [
                    len(rows),
                    outcome,
                    f"{seconds:.3f}",
                    step,
                    "" if digest is None else digest == expected,
                ]
            )
            print(*rows[-1], flush=True)
            kills += outcome == "killed"
            if outcome == "finished":
                if digest != expected:
                    raise SystemExit(f"finished with other weights: {digest}")
                finished += 1
                state.unlink()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "outcome", "killed_after_s", "step_on_disk", "weights_equal"])
        writer.writerows(rows)
    print(
        f"{kills} kills, {finished} finished runs, all with the uninterrupted run's weights -> "
        f"{arguments.out}"
    )


if __name__ == "__main__":
    main()
