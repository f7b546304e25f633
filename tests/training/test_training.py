import hashlib
import io
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from quantize.models import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM
from quantize.training import (
    BatchedMuon,
    ProgressPrinter,
    TrainConfig,
    TrainingError,
    classification_loss,
    evaluate_images,
    evaluate_text,
    fit,
    next_token_loss,
    split_parameters,
)
from quantize.training.resuming import read_state

RECIPE = TrainConfig(steps=12, batch=8, warmup=2, lr=1e-2)


def network():
    """A model with dropout and BatchNorm: random numbers and buffers must survive a resume too."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def batches(step):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].argmax(1)


def digest(model):
    content = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(content).hexdigest()


class StopTraining(Exception):
    pass


def stop_after(step):
    def callback(at):
        if at.step == step:
            raise StopTraining

    return callback


def test_training_learns():
    """A hundred steps bring the loss of a learnable task close to zero."""
    model = fit(network(), batches, classification_loss, replace(RECIPE, steps=120))
    x, y = batches(10_000)
    assert classification_loss(model, (x, y)).item() < 0.4
    assert not any(module.training for module in model.modules())


def test_the_same_seed_gives_the_same_weights():
    """Two runs with one seed end bit for bit alike; another seed (dropout) ends elsewhere."""
    first, second = (digest(fit(network(), batches, classification_loss, RECIPE)) for _ in range(2))
    assert first == second != digest(fit(network(), batches, classification_loss, RECIPE, seed=1))


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


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_step_stops_and_keeps_the_last_good_state(tmp_path, poison):
    """A loss or gradient that is not finite stops training; the state on disk is that of the step
    before.
    """
    path = tmp_path / "state"

    def loss_fn(model, batch):
        loss = classification_loss(model, batch[:2])
        if batch[2] != 5:
            return loss
        return (
            loss * float("inf") if poison == "loss" else loss + (model[0].weight.sum() * 0).sqrt()
        )

    settings = {"checkpoint_path": path, "checkpoint_seconds": 0}
    with pytest.raises(TrainingError, match=r"step 5: .* not finite; the last good state is in"):
        fit(
            network(),
            lambda step: (*batches(step), torch.tensor(step)),
            loss_fn,
            RECIPE,
            **settings,
        )
    state = read_state(path)
    assert state["step"] == 5
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_nothing_to_train_is_refused():
    """A model whose parameters are all frozen is refused by name."""
    model = network().requires_grad_(False)
    with pytest.raises(TrainingError, match="Sequential has no parameter that requires a gradient"):
        fit(model, batches, classification_loss, RECIPE)


def test_muon_gets_the_matrices_between_input_and_output():
    """Embedding, head, norms and biases are AdamW's; every other matrix is Muon's; nothing is lost
    or doubled.
    """
    model = DecoderLM(DecoderConfig(width=32, layers=2, qkv_bias=True, qk_norm=True))
    matrices, others = split_parameters(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in matrices} == {
        "q",
        "k",
        "v",
        "out",
        "gate",
        "up",
        "down",
    }
    assert len(matrices) == 14
    assert sorted(map(id, [*matrices, *others])) == sorted(names)


def test_batched_muon_is_muon():
    """Batching the matrices of one shape changes Muon's weights by no more than bf16 rounding of
    the updates.
    """
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 16), (8, 16), (24, 8), (8, 16))]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizers = (
        BatchedMuon(ours, lr=0.1, weight_decay=0.2),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2),
    )
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 0.1 * 5 * 0.02
    assert optimizers[0].state_dict().keys() == optimizers[1].state_dict().keys()


def test_rates_rise_hold_and_fall():
    """The schedule warms up linearly, holds, and falls linearly to almost nothing."""
    recipe = TrainConfig(steps=100, warmup=9, cooldown=0.5)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:51] == [1.0] * 41
    assert rates[50:] == pytest.approx([(50 - i) / 50 for i in range(50)])


@pytest.mark.parametrize(
    "field, value", [("steps", 0), ("lr", float("nan")), ("cooldown", 1.5), ("warmup", -1)]
)
def test_a_wrong_recipe_is_refused(field, value):
    """A recipe names the field that cannot be."""
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field} is"):
        TrainConfig(**{"steps": 10, field: value})


class Copycat(nn.Module):
    """Predicts that the next byte equals the present one, with probability 1/2, and all others
    evenly.
    """

    def forward(self, ids):
        logits = torch.full((*ids.shape, 256), 1 / 255.0).log()
        return logits.scatter(-1, ids[..., None], 0.0)


@pytest.mark.parametrize(
    "length, overlap", [(16, 0), (16, 8), (16, 15), (7, 3), (499, 100), (4000, 3000)]
)
@pytest.mark.parametrize("size", [2, 31, 500])
def test_every_byte_is_scored_once(size, length, overlap):
    """For a model without memory, any windows give the exact entropy and accuracy, first byte at 8
    bits.
    """
    text = torch.randint(3, (size,), generator=torch.Generator().manual_seed(size)).to(torch.uint8)
    repeats = int((text[1:] == text[:-1]).sum())
    result = evaluate_text(Copycat(), text, length=length, overlap=min(overlap, length - 1))
    other = (2 * torch.tensor(255.0)).log2().item()
    expected = (8 + repeats + (size - 1 - repeats) * other) / size
    assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert result["accuracy"] == repeats / (size - 1)
    assert result["bytes"] == size


def test_overlapping_windows_equal_a_context_of_their_own():
    """With the largest overlap, each byte is predicted from all that a window holds: the
    sliding-window oracle.
    """
    torch.manual_seed(0)
    model = DecoderLM(DecoderConfig(width=16, layers=1, heads=2)).eval()
    nn.init.normal_(model.head.weight)
    text = torch.randint(256, (40,)).to(torch.uint8)
    bits = 8.0
    with torch.no_grad():
        for i in range(1, 40):
            context = text[max(0, i - 10) : i].long()[None]
            bits -= (
                model(context)[0, -1].log_softmax(-1)[int(text[i])].item()
                / torch.tensor(2.0).log().item()
            )
    assert evaluate_text(model, text, length=10, overlap=9)["bits_per_byte"] == pytest.approx(
        bits / 40, rel=1e-5
    )


def test_a_limit_scores_a_spread_of_the_text():
    """max_bytes scores about that many bytes, from all over the text, and counts them."""
    text = torch.cat([torch.zeros(5000), torch.arange(5000) % 2]).to(torch.uint8)
    result = evaluate_text(Copycat(), text, length=64, overlap=32, max_bytes=1000)
    assert 900 <= result["bytes"] <= 1064
    assert result["accuracy"] == pytest.approx(0.5, abs=0.05)


def test_evaluation_restores_flags():
    """Evaluating a training model leaves each module's flag as it was."""
    model = ConvNet(ConvNetConfig(widths=(4,)))
    model.stem.eval()
    flags = [module.training for module in model.modules()]
    result = evaluate_images(model, torch.randn(5, 1, 8, 8), torch.arange(5))
    assert [module.training for module in model.modules()] == flags
    assert result["images"] == 5 and 0 <= result["accuracy"] <= 1


def test_progress_counts_steps_and_tokens():
    """Progress reports every step, with the loss of the batch and a time left that ends at zero."""
    seen = []
    model = DecoderLM(DecoderConfig(width=16, layers=1, heads=2))
    tokens = torch.randint(256, (2, 9))
    fit(
        model,
        lambda step: (tokens[:, :-1], tokens[:, 1:]),
        next_token_loss,
        TrainConfig(steps=4),
        on_progress=seen.append,
    )
    assert [at.step for at in seen] == [1, 2, 3, 4]
    assert seen[0].loss == pytest.approx(
        torch.tensor(256.0).log().item(), rel=1e-2
    )  # before training: even odds
    assert seen[-1].seconds_left == 0 and seen[-1].units_per_s > 0


def test_printer_writes_plain_lines_when_piped():
    """Into a pipe go whole lines, few of them, and always the last step."""
    stream = io.StringIO()
    fit(
        network(),
        batches,
        classification_loss,
        RECIPE,
        on_progress=ProgressPrinter("fit", "samples", stream),
    )
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in stream.getvalue()
    assert lines[-1].startswith("fit: step 12/12  loss ") and lines[-1].endswith("0 s left")


CHILD = """
import sys, torch
sys.path.insert(0, {tests!r})
from quantize import training
from test_training import *
with training.distributed() as (rank, world):
    if sys.argv[1] == "kill":
        on_progress = lambda at: print(at.step, flush=True)
        model = fit(network(), batches, classification_loss, replace(RECIPE, steps=120),
                    checkpoint_path=sys.argv[2],
                    checkpoint_seconds=0, resume=True, on_progress=on_progress)
        print(digest(model))
    else:
        model = fit(*two_rank_task(rank, world), bf16=False)
        if rank == 0:
            torch.save(model.state_dict(), sys.argv[2])
"""


def two_rank_task(rank, world):
    """Model, batches, loss, recipe: one step's 8 rows, shared out over the ranks (no BatchNorm: its
    statistics differ).
    """
    torch.manual_seed(rank)  # ranks that start apart must be brought together
    model = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )
    rows = slice(8 // world * rank, 8 // world * (rank + 1))
    return (
        model,
        lambda step: tuple(part[rows] for part in batches(step)),
        classification_loss,
        RECIPE,
    )


def child(*arguments, launcher=()):
    code = CHILD.format(tests=str(Path(__file__).parent))
    script = Path(arguments[1]).with_suffix(".py")
    script.write_text(code)
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_sigkill_and_resume(tmp_path):
    """Killed with SIGKILL and resumed, a run ends with the uninterrupted run's bits; 50 kills:
    benchmarks/kill_resume.py.
    """
    path = tmp_path / "state"
    expected = digest(fit(network(), batches, classification_loss, replace(RECIPE, steps=120)))
    process = child("kill", path)
    for line in process.stdout:
        if int(line) >= 60:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.communicate()
    assert read_state(path)["step"] >= 59
    out, err = child("kill", path).communicate()
    assert out.splitlines()[-1] == expected, err


@pytest.mark.slow
def test_two_ranks_match_one_with_twice_the_batch(tmp_path):
    """torchrun with two ranks ends with the weights of one rank that sees both batches, to float
    tolerance.
    """
    path = tmp_path / "weights"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = child("ranks", path, launcher=launcher)
    assert process.wait(120) == 0, process.stderr.read()
    two = torch.load(path, weights_only=True)
    one = fit(*two_rank_task(0, 1), bf16=False).state_dict()
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().max() < 1e-3, name
