"""Training: it learns, from a seed, at the rates and with the optimizers it says."""

import io
from dataclasses import replace

import pytest
import torch
from torch import nn
from training_models import RECIPE, batches, digest, network

from quantize.models import DecoderConfig, DecoderLM
from quantize.training import (
    BatchedMuon,
    ProgressPrinter,
    TrainConfig,
    TrainingError,
    classification_loss,
    fit,
    next_token_loss,
    split_parameters,
)
from quantize.training.resuming import read_state


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
    # before training: even odds
    assert seen[0].loss == pytest.approx(torch.tensor(256.0).log().item(), rel=1e-2)
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
