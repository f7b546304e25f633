"""A recipe applied block by block: what each block is given, what the file holds, what is
refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoder, randn, run, seeded, tokens, zoo
from torch import nn

import quantize
from quantize import Given, Int8, LowRank, Prune, Recipe, Recover, write_by_block
from quantize.calibration import Beside, Frontier, distance
from quantize.compression.recipe import Step, blockwise

CALLS: list[str] = []


@dataclass(frozen=True)
class Shifted(Step):
    """Adds the mean of what it is given to a bias."""

    part = "shifted"

    def __call__(self, model: nn.Module, given: Given) -> nn.Module:
        copy = quantize.surgery.clone(model)
        means = [batch["x"].mean() for batch in given.calibration or ()]
        with torch.no_grad():
            copy.down.second.bias += sum(means)
        return copy


class Block(nn.Module):
    """x + down(gelu(up(x))), times a gain that is given by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, *, gain: float = 1.0) -> torch.Tensor:
        CALLS.append(self.name)
        return x + gain * self.down(nn.functional.gelu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, depth: int = 3, gain: float = 0.5) -> None:
        super().__init__()
        self.gain = gain
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Block(f"blocks.{i}") for i in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x).tanh()
        for block in self.blocks:
            x = block(x, gain=self.gain)
        return self.leave(x)


def batches() -> list[torch.Tensor]:
    return [randn(12, 8, seed=seed) for seed in (1, 2, 3)]


def test_blocks_are_fitted_from_what_the_compressed_ones_give(tmp_path):
    """The same as the steps on each block by hand: the last that removes on the outputs of the
    compressed blocks so far, beside those of the original's; the one before on the latter, the one
    after on the former.
    """
    prune, factorize, shift = Prune(0.25), LowRank(0.6, only_faster=False), Shifted()
    model = seeded(Stack)
    path, given = tmp_path / "a.pth", Given(calibration=batches())
    result = write_by_block(prune >> factorize >> shift, model, path, given)
    states = [model.enter(batch).tanh().detach() for batch in batches()]
    wanted = states
    for block in model.blocks:
        theirs = [{"x": x, "gain": 0.5} for x in wanted]
        ours = [{"x": x, "gain": 0.5} for x in states]
        small = prune(block, Given(example_inputs=theirs[0], calibration=theirs))
        small = factorize(small, Given(calibration=Beside(ours, theirs)))
        small = shift(small, Given(calibration=ours))
        states = [small(**inputs).detach() for inputs in ours]
        wanted = [block(**inputs).detach() for inputs in theirs]
    assert torch.equal(model.leave(states[0]), result(batches()[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "step, share", [(Prune({"*up": 0.5}), 1.0), (LowRank(0.7, only_faster=False), 0.95)]
)
def test_what_goes_wrong_in_a_block_is_taken_back_in_later_ones(step, share, tmp_path):
    """Blocks fitted to their own outputs alone are further from the original, on other inputs."""
    model, alone = (seeded(lambda: Stack(depth=8, gain=1.0)) for _ in range(2))
    batches = [randn(200, 8, seed=seed) for seed in (1, 2, 3)]
    path, given = tmp_path / "a.pth", Given(calibration=batches)
    result = write_by_block(Recipe((step,)), model, path, given)
    states = [model.enter(batch).tanh().detach() for batch in batches]
    for place, block in enumerate(model.blocks):
        inputs = [{"x": x, "gain": 1.0} for x in states]
        alone.blocks[place] = step(block, Given(example_inputs=inputs[0], calibration=inputs))
        states = [alone.blocks[place](**each).detach() for each in inputs]
    others = [randn(64, 8, seed=9)]
    assert distance(result, model, others) < share * distance(alone, model, others)


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_rounding_gives_the_bits_of_the_whole_model(name, tmp_path):
    """Int8, which asks no batches, gives the same model in blocks and around them; and the file
    gives that again.
    """
    model, inputs = zoo(name)
    path = tmp_path / "a.safetensors"
    result = write_by_block(Recipe((Int8(),)), model, path, Given(calibration=[inputs]))
    whole = Int8()(model, Given())
    loaded = quantize.load(path, model=zoo(name, seed=1)[0])
    assert torch.equal(run(result, inputs), run(whole, inputs))
    assert torch.equal(run(loaded, inputs), run(result, inputs))
    assert set(result.state_dict()) == set(whole.state_dict())


@pytest.mark.slow
def test_a_decoder_in_all_steps_is_a_file(tmp_path, monkeypatch):
    """Pruned, factorized, in int8: the file alone gives the result back, with one note a step and
    the recipe, and the tensors of blocks lie in files without names.
    """
    monkeypatch.setattr(blockwise, "LEAST", 1)
    model = decoder(width=128, ffn_width=256, heads=2, kv_heads=1)
    recipe = Prune({"*up": 0.5}) >> LowRank(0.5, only_faster=False) >> Int8()
    path, ids = tmp_path / "a.safetensors", tokens(4, 24)
    result = write_by_block(recipe, model, path, Given(calibration=[ids]), metadata={"of": 1})
    assert torch.equal(run(quantize.load(path), ids), run(result, ids))
    steps = quantize.summary(path).steps
    assert [step.technique for step in steps] == ["pruned", "low_rank", "int8", "int8", "by block"]
    assert "blocks.1.ffn.up" in steps[0].done and 0 < steps[-1].distance < 1
    assert quantize.read_metadata(path) == {"of": 1, "recipe": recipe.as_values()}
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    held = result.state_dict()["blocks.0.ffn.up.first.packed"]
    assert _mapped_from(held).startswith(f"{tmp_path}/quantize-")
    assert _mapped_from(held).endswith("(deleted)")


def _mapped_from(tensor: torch.Tensor) -> str:
    """The file whose mapping holds a tensor."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, file = line.split(maxsplit=5)
        start, stop = (int(place, 16) for place in span.split("-"))
        if start <= tensor.data_ptr() < stop:
            return file
    return ""


def test_each_block_runs_once_more_whatever_the_depth():
    """Going through all blocks runs each once for every batch, beside the first look."""
    model = seeded(Stack)
    CALLS.clear()
    frontier = Frontier(model, batches(), [f"blocks.{i}" for i in range(3)])
    looked = len(CALLS)
    for name in frontier.order:
        for batch, found in zip(batches(), frontier.arguments(model, name), strict=True):
            x = model.enter(batch).tanh()
            for block in model.blocks[: int(name[-1])]:
                x = x + 0.5 * block.down(nn.functional.gelu(block.up(x)))
            assert torch.equal(found["x"], x) and found["gain"] == 0.5
    assert looked == 9 and len(CALLS) == looked + 6  # the last block doesn't run


def test_an_end_in_between_leaves_nothing(tmp_path):
    """Whoever stops it finds no file, and the model as it was."""
    model = seeded(Stack)
    before = model(batches()[0])

    def stop(line: str) -> None:
        if line.startswith("compressing blocks.2"):
            raise KeyboardInterrupt

    given = Given(calibration=batches(), progress=stop)
    with pytest.raises(KeyboardInterrupt):
        write_by_block(Recipe((Int8(),)), model, tmp_path / "a.pth", given)
    assert not list(tmp_path.iterdir())
    assert torch.equal(model(batches()[0]), before)


def tied() -> nn.Module:
    model = Stack()
    model.blocks[2].up.weight = model.blocks[1].up.weight
    return model


@pytest.mark.parametrize(
    "build, recipe, given, message",
    [
        (Stack, Prune(0.5) >> Recover(3), {}, "Recover trains the whole model"),
        (Stack, LowRank() >> Int8(), {"calibration": None}, "needs calibration"),
        (lambda: nn.Linear(8, 4), LowRank() >> Int8(), {}, "has no blocks"),
        (tied, LowRank() >> Int8(), {}, "block 'blocks.2' shares a weight with 'blocks.1.up"),
        (Stack, Recipe((Prune({"*upp": 0.5}),)), {}, "block 'blocks.0': amount names '[*]upp'"),
    ],
)
def test_what_blocks_cannot_have_is_refused(build, recipe, given, message, tmp_path):
    """Steps for the whole model, missing batches or blocks, weights of two blocks, a step's own
    refusal with the block's name.
    """
    arguments: dict[str, Any] = {"calibration": batches()} | given
    with pytest.raises(ValueError, match=message):
        write_by_block(recipe, seeded(build), tmp_path / "a.pth", Given(**arguments))


class Cache:
    """Grows with every call."""


class Caching(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, cache=Cache())
        return x


class Cached(Block):
    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        return super().forward(x)


def test_an_argument_that_no_batch_can_hold_is_refused():
    """Objects that may change from call to call aren't kept as if they were values."""
    model = Caching()
    model.blocks = nn.ModuleList(Cached(f"blocks.{i}") for i in range(2))
    frontier = Frontier(model.eval(), batches(), ["blocks.0", "blocks.1"])
    with pytest.raises(ValueError, match="is called with a Cache as 'cache'"):
        frontier.arguments(model, "blocks.0")
