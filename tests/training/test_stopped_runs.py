"""Runs that were stopped, killed or split over ranks end with the bits of a whole one."""

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fresh import ended, in_ranks, started
from torch import nn
from training_models import (
    RECIPE,
    batches,
    digest,
    network,
    train_as_rank,
    train_on,
    two_rank_task,
)

from quantize.training import (
    TrainingError,
    classification_loss,
    fit,
)
from quantize.training.resuming import read_state


class StopTraining(Exception):
    pass


def stop_after(step):
    def callback(at):
        if at.step == step:
            raise StopTraining

    return callback


@pytest.mark.parametrize("stopped", [1, 7, 11])
def test_resuming_ends_bit_for_bit_where_an_uninterrupted_run_ends(tmp_path, stopped):
    """Stopped after any step and resumed in a fresh model, training ends with the same bits."""
    path = tmp_path / "state"
    settings = {"checkpoint_path": path, "checkpoint_seconds": 0}
    whole = digest(fit(network(), batches, classification_loss, RECIPE))
    with pytest.raises(StopTraining):
        fit(
            network(),
            batches,
            classification_loss,
            RECIPE,
            on_progress=stop_after(stopped),
            **settings,
        )
    other = nn.Sequential(*network())
    torch.manual_seed(99)  # what the random state was before a resume does not matter
    assert (
        digest(fit(other, batches, classification_loss, RECIPE, resume=True, **settings)) == whole
    )


def test_resuming_a_finished_run_returns_its_weights(tmp_path):
    """After the last step there is nothing to do: resume gives the final weights without asking for
    a batch.
    """
    path = tmp_path / "state"
    whole = digest(fit(network(), batches, classification_loss, RECIPE, checkpoint_path=path))
    assert (
        digest(fit(network(), None, classification_loss, RECIPE, checkpoint_path=path, resume=True))
        == whole
    )


def test_writing_fails_at_any_moment_and_the_old_state_stays(tmp_path, monkeypatch):
    """If any system call of a write fails, the file on disk is still the complete state of
    before.
    """
    path = tmp_path / "state"
    fit(network(), batches, classification_loss, RECIPE, checkpoint_path=path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for owner, name in ((Path, "open"), (os, "fsync"), (Path, "replace"), (Path, "mkdir")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(TrainingError, match="No space left on device"):
                fit(
                    network(),
                    batches,
                    classification_loss,
                    replace(RECIPE, steps=20),
                    checkpoint_path=path,
                )
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_unwritable_folder_is_found_before_training(tmp_path):
    """A path that cannot be written is reported before the first batch is asked for."""
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write the training state"):
        fit(
            network(),
            None,
            classification_loss,
            RECIPE,
            checkpoint_path=tmp_path / "file" / "state",
        )


def test_damaged_states_are_refused_in_one_line(tmp_path):
    """Truncations, bit flips and foreign files give a one-line TrainingError, never a torch
    error.
    """
    path = tmp_path / "state"
    fit(network(), batches, classification_loss, RECIPE, checkpoint_path=path)
    whole = path.read_bytes()
    random = torch.Generator().manual_seed(0)
    damaged = [b"", b"foreign", whole + b"x"]
    for at in torch.randint(len(whole), (60,), generator=random).tolist():
        damaged.append(whole[:at])
        flipped = bytearray(whole)
        flipped[at] ^= 1 << (at % 8)
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(TrainingError) as error:
            fit(network(), batches, classification_loss, RECIPE, checkpoint_path=path, resume=True)
        assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"config": replace(RECIPE, steps=13)}, "config.steps was 12, now 13"),
        ({"seed": 3}, "seed was 0, now 3"),
        ({"identity": {"data": "b"}}, "identity.data was 'a', now 'b'"),
        ({"model": nn.Linear(6, 3)}, "model.class was 'Sequential', now 'Linear'"),
    ],
)
def test_a_state_of_another_run_is_refused(tmp_path, change, message):
    """Resuming with another recipe, seed, data or model names the first difference."""
    path = tmp_path / "state"
    fit(
        network(),
        batches,
        classification_loss,
        RECIPE,
        checkpoint_path=path,
        identity={"data": "a"},
    )
    settings = {
        "model": network(),
        "config": RECIPE,
        "seed": 0,
        "identity": {"data": "a"},
        **change,
    }
    with pytest.raises(TrainingError, match=re.escape(message)):
        fit(
            batches=batches,
            loss_fn=classification_loss,
            checkpoint_path=path,
            resume=True,
            **settings,
        )


@pytest.mark.slow
@pytest.mark.xdist_group("fresh")
def test_sigkill_and_resume(tmp_path):
    """Killed with SIGKILL and resumed, a run ends with the uninterrupted run's bits; 50 kills:
    benchmarks/kill_resume.py.
    """
    expected = digest(fit(network(), batches, classification_loss, replace(RECIPE, steps=200)))
    process, step = started(train_on, tmp_path, 200, 199), tmp_path / "step"
    while not (step.exists() and int(step.read_text() or 0) >= 60):
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    assert ended(process) == -signal.SIGKILL
    assert read_state(tmp_path / "state")["step"] >= 59 and not (tmp_path / "digest").exists()
    assert ended(started(train_on, tmp_path, 200)) == 0
    assert (tmp_path / "digest").read_text() == expected


@pytest.mark.slow
@pytest.mark.xdist_group("fresh")
def test_two_ranks_match_one_with_twice_the_batch(tmp_path):
    """Two ranks end with the weights of one rank that sees both batches, to float tolerance."""
    path = tmp_path / "weights"
    assert in_ranks(train_as_rank, 2, path) == [0, 0]
    two = torch.load(path, weights_only=True)
    one = fit(*two_rank_task(0, 1), bf16=False).state_dict()
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().max() < 1e-3, name
