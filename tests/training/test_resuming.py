"""States of a training run whose checksum is right and whose content isn't."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
from training_models import RECIPE, batches, digest, network

from quantize.training import classification_loss, fit
from quantize.training.resuming import TrainingError, read_state


def resealed(content: bytes) -> bytes:
    magic = b"quantize training state 1\n"
    return magic + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def packed(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def squeezed(content: bytes) -> bytes:
    """The same archive, compressed: a small file that may unpack to gigabytes."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


class Touch:
    def __reduce__(self):
        return os.system, ("touch RAN",)


WRONG_STATES = {
    "no archive": lambda s: b"PK",
    "compressed": lambda s: squeezed(packed(s)),
    "runs code": lambda s: packed({**s, "step": Touch()}),
    "a list": lambda s: packed([s]),
    "no step": lambda s: packed({k: v for k, v in s.items() if k != "step"}),
    "step of text": lambda s: packed({**s, "step": "3"}),
    "step True": lambda s: packed({**s, "step": True}),
    "step too large": lambda s: packed({**s, "step": 10**40}),
    "step below 0": lambda s: packed({**s, "step": -1}),
    "run a list": lambda s: packed({**s, "run": [1]}),
    "model a list": lambda s: packed({**s, "model": [1]}),
    "model of others": lambda s: packed({**s, "model": {"x": torch.zeros(1)}}),
    "tensors of another shape": lambda s: packed(
        {**s, "model": {k: v[None] for k, v in s["model"].items()}}
    ),
    "tensors of another dtype": lambda s: packed(
        {**s, "model": {k: v.double() for k, v in s["model"].items()}}
    ),
    "numbers for tensors": lambda s: packed({**s, "model": dict.fromkeys(s["model"], 1)}),
    "no optimizer": lambda s: packed({**s, "optimizers": []}),
    "optimizers of text": lambda s: packed({**s, "optimizers": ["a", "b"]}),
    "empty optimizers": lambda s: packed({**s, "optimizers": [{}, {}]}),
    "another rate": lambda s: packed(
        {**s, "optimizers": [_group(o, full_lr=9.0) for o in s["optimizers"]]}
    ),
    "momentum of another shape": lambda s: packed(
        {**s, "optimizers": [_momentum(o) for o in s["optimizers"]]}
    ),
}


def _group(optimizer: dict, **changes: object) -> dict:
    return {
        **optimizer,
        "param_groups": [{**group, **changes} for group in optimizer["param_groups"]],
    }


def _momentum(optimizer: dict) -> dict:
    return {
        **optimizer,
        "state": {k: {n: torch.zeros(1, 1, 1) for n in v} for k, v in optimizer["state"].items()},
    }


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    """What a whole run leaves."""
    path = tmp_path_factory.mktemp("run") / "state"
    fit(network(), batches, classification_loss, RECIPE, checkpoint_path=path)
    return path


@pytest.mark.parametrize("name", WRONG_STATES)
def test_states_of_wrong_content_are_refused_in_one_line(tmp_path, monkeypatch, state, name):
    """With a checksum that fits: one TrainingError with the path, nothing run, nothing of the model
    changed.
    """
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state"
    path.write_bytes(resealed(WRONG_STATES[name](read_state(state))))
    model = network()
    before = digest(model)
    with pytest.raises(TrainingError, match="state") as error:
        fit(model, None, classification_loss, RECIPE, checkpoint_path=path, resume=True)
    assert "\n" not in str(error.value) and digest(model) == before
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_states_that_are_no_file(tmp_path):
    """A folder and a pipe, which must not block, are named."""
    for make in (Path.mkdir, os.mkfifo):
        path = tmp_path / make.__name__
        make(path)
        with pytest.raises(TrainingError, match="not a regular file"):
            fit(network(), None, classification_loss, RECIPE, checkpoint_path=path, resume=True)
