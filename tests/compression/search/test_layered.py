"""The choice layer by layer: an exact solver, predictions that are what is measured where the clock
is made up, and recipes that hold the choice.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from compression.search.test_search import INPUTS, Net, by_bytes
from helpers import measured_by_bytes, tensor_bytes
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

import quantize
from quantize.compression.pruning.costs import removable
from quantize.compression.recipe import ChannelsLast, Given, Half, Int8, Prune, Recipe
from quantize.compression.search.budget import Budget
from quantize.compression.search.fits import Parts, Seen, fitted
from quantize.compression.search.knapsack import STEPS, solve
from quantize.compression.search.layered import Layered
from quantize.compression.search.options import Option, Unit, as_values, from_values
from quantize.compression.search.times import BF16, FLOAT, INT4, INT8
from quantize.compression.search.units import survey
from quantize.nn.int4 import Int4Linear
from quantize.nn.int8 import Int8Linear

__all__ = ["by_bytes"]  # a fixture for every test here
KINDS = (FLOAT, INT8, BF16)
TIMED = {
    "speedup": 1.0,
    "latency_ms": {"median": 1.0},
    "latency_in_turns_ms": 1.0,
    "peak_rss_mb": 100.0,
}


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 16, generator=generator) for _ in range(4)]


@drawn(st.data())
@settings(max_examples=40)
def test_the_knapsack_is_as_good_as_trying_everything(data):
    """Within a step of the grid for each unit, no other choice loses less."""
    numbers = st.floats(0, 10, allow_nan=False)
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    costs = [data.draw(st.lists(numbers, min_size=n, max_size=n)) for n in shape]
    losses = [data.draw(st.lists(numbers, min_size=n, max_size=n)) for n in shape]
    budget = data.draw(st.floats(0, 40))
    every = list(itertools.product(*map(range, shape)))

    def total(values, choice):
        return sum(options[i] for options, i in zip(values, choice, strict=True))

    frontier = solve(costs, losses)
    off = frontier.step * len(shape)
    found = frontier.within(budget)
    fitting = [choice for choice in every if total(costs, choice) <= budget - off]
    if fitting:
        assert found is not None
        best = min(total(losses, choice) for choice in fitting)
        assert total(losses, found) <= best + 1e-9
    if found is not None:
        assert total(costs, found) <= budget + off + 1e-9
    limit = data.draw(st.floats(0, 40))
    within = [choice for choice in every if total(losses, choice) <= limit]
    if within:
        cheapest = frontier.cheapest(limit)
        assert total(losses, cheapest) <= limit + 1e-9
        assert total(costs, cheapest) <= min(total(costs, c) for c in within) + off + 1e-9
    assert np.all(np.diff(frontier.losses[np.isfinite(frontier.losses)]) <= 1e-12)
    assert len(frontier.losses) == STEPS + 1


def test_a_knapsack_without_options_is_refused():
    with pytest.raises(ValueError, match="an option"):
        solve([[1.0], []], [[1.0], []])


def nothing_saved() -> dict[str, float]:
    """By sizes of any kind."""
    kinds = (FLOAT, INT8, BF16, INT4)
    return {f"{kind} {size}": 0.0 for size, kind in itertools.product(("width", "rank"), kinds)}


def removed(width: float) -> dict[str, float]:
    """By fewer channels, and nothing by lower ranks."""
    return {"width": width, "rank": 0.0}


def test_factors_are_found_from_points_that_follow_them():
    """Latencies and losses made of the parts by known factors, of each kind its own, are predicted
    again; a kind that no point has gets the factor of the others.
    """
    generator = np.random.default_rng(0)
    points = []
    for _ in range(64):
        kind_s = {INT8: generator.uniform(), BF16: generator.uniform(), INT4: 0.0}
        rounding = {INT8: generator.uniform(), BF16: generator.uniform(), INT4: 0.0}
        size_s = nothing_saved() | {
            "int8 width": generator.uniform(),
            "int8 rank": generator.uniform(),
        }
        removal = {"width": generator.uniform(), "rank": generator.uniform()}
        saved = 0.9 * kind_s[INT8] + 0.3 * kind_s[BF16] + 0.7 * size_s["int8 width"]
        saved += 0.2 * size_s["int8 rank"]
        loss = 3e3 * rounding[INT8] + 8e3 * rounding[BF16] + 9e3 * removal["width"]
        loss += 4e3 * removal["rank"]
        points.append(
            Seen(Parts(kind_s, size_s, rounding, removal, 100.0), saved, loss, 0.0, 150.0)
        )
    factors = fitted(points, seconds=6.6, layers_s=6.0, rest=0.0)
    assert factors.times[:2] == pytest.approx([0.9, 0.3], rel=0.1)
    assert factors.times[5] == pytest.approx(0.7, rel=0.1)
    assert factors.times[6] == pytest.approx(0.2, rel=0.1)
    assert min(factors.times) < factors.times[2] < max(factors.times)
    assert factors.rest == 50
    for point in points:
        assert factors.saved_by(point.parts) == pytest.approx(point.saved_s, rel=0.1)
        assert factors.loss_of(point.parts) == pytest.approx(point.loss, rel=0.1)
    option = Option(INT8, kind_s=2.0, size_s=1.0)
    assert factors.saved_s(option) == pytest.approx(2 * factors.times[0] + factors.times[5])
    assert fitted([], 1.0, 1.0, 7.0).rest == 7


def things(batches) -> Given:
    return Given(example_inputs=INPUTS, calibration=batches)


def test_removal_costs_are_what_pruning_then_loses(batches):
    """Of a linear readout, whose output is the model's: the squared change after the refit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    (group,) = removable(model, INPUTS, batches)
    assert (group.name, group.units) == ("0", 64)
    assert group.outputs == {"0": 1} and group.inputs == {"2": 1}
    assert (group.costs.diff() >= 0).all() and group.costs[0] == 0
    small = quantize.prune_ln_structured(model, INPUTS, amount={"0": 0.5}, calibration=batches)
    assert small[0].out_features == group.kept(0.5)
    rows = torch.cat(batches)
    with torch.no_grad():
        change = (small(rows) - model(rows)).square().sum().item()
    assert float(group.costs[64 - group.kept(0.5)]) == pytest.approx(change, rel=0.5)


def test_a_survey_has_what_can_be_done_to_each_part(batches):
    """Every kind at every width and rank; less is lost the less is removed; JSON keeps it all."""
    units = survey(Net().eval(), things(batches), KINDS, lambda line: None, 3.0)
    assert sum(unit.seconds for unit in units) == pytest.approx(3.0)  # nothing lies between them
    layers = sorted(itertools.chain.from_iterable(unit.layers for unit in units))
    assert layers == ["0", "2", "4"]
    for unit in units:
        assert unit.options[0] == Option(bytes=unit.options[0].bytes)
        assert {option.kind for option in unit.options} == set(KINDS)
        for kind in KINDS:
            narrow = [o for o in unit.options if o.kind == kind and o.amount > 0]
            lost = [option.removal for option in narrow]
            assert lost == sorted(lost) and all(o.size_s > 0 for o in narrow)
        whole_ones = [option for option in unit.options[::-1] if not option.amount]
        small = {option.kind: option.own_bytes for option in whole_ones}
        assert small[INT8] < small[BF16] < small[FLOAT]
    assert from_values(json.loads(json.dumps(as_values(units)))) == units


@pytest.mark.slow
def test_four_bits_are_for_units_whose_layers_all_can_have_them(batches, tmp_path):
    """16 inputs are too few for a group; a choice with both kinds is the model that it says, and
    its file is as large as was predicted.
    """
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 512), nn.Linear(512, 4))
    units = survey(wide.eval(), things(batches), [FLOAT, INT8, INT4], lambda line: None, 1.0)
    assert [unit.layers for unit in units] == [("0",), ("2", "3")]
    kinds = [{option.kind for option in unit.options} for unit in units]
    assert kinds == [{FLOAT, INT8}, {FLOAT, INT8, INT4}]
    narrow = [option.amount for option in units[1].options if option.kind == INT4]
    widths = [16 * round(512 * (1 - amount) / 16) for amount in narrow]  # that pruning leaves
    assert all(width % 32 == 0 for width in widths) and len(narrow) > 1
    quantize.save(wide, tmp_path / "wide.pth")
    size = (tmp_path / "wide.pth").stat().st_size
    row = TIMED | {"bytes": size}
    layered = Layered(units, row, Budget.of({"bytes": 1}), 1.0, False, True)
    wanted = zip(units, (INT8, INT4), strict=True)
    choice = tuple(unit.options.index(whole(unit, kind)) for unit, kind in wanted)
    recipe = layered.recipe(choice)
    assert recipe is not None and recipe.name == "int4+int8"
    small = recipe(wide, things(batches))
    assert [type(small[i]) for i in (0, 2, 3)] == [Int8Linear, Int4Linear, Int4Linear]
    quantize.save(small, tmp_path / "small.pth")
    predicted = layered.predicted(choice)["bytes"]
    assert predicted == pytest.approx((tmp_path / "small.pth").stat().st_size, rel=0.1)


@pytest.mark.slow
def test_bytes_of_layers_that_read_each_other_are_predicted():
    """Convolutions in a row, each with half of its inputs and of its outputs."""
    torch.manual_seed(0)
    sizes = [8, 64, 64, 64, 4]
    layers = [nn.Conv2d(*pair, 3) for pair in itertools.pairwise(sizes)]
    model = nn.Sequential(*itertools.chain.from_iterable((one, nn.ReLU()) for one in layers)).eval()
    images = [torch.randn(4, 8, 12, 12) for _ in range(4)]
    given = Given(example_inputs=images[0], calibration=images)
    units = survey(model, given, [FLOAT, INT8], lambda line: None, 1.0)
    row = TIMED | {"bytes": tensor_bytes_of(model)}
    layered = Layered(units, row, Budget.of({"bytes": 1}), 1.0, False, True)
    choice = tuple(halved(unit) for unit in units)
    small = layered.recipe(choice)(model, given)
    assert [small[i].out_channels for i in (0, 2, 4, 6)] == [32, 32, 32, 4]
    assert layered.parts(choice).bytes == pytest.approx(tensor_bytes_of(small), rel=0.1)
    assert layered.rest == pytest.approx(0)


def tensor_bytes_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def halved(unit: Unit) -> int:
    """The int8 option with half of the channels, or with all where none can go."""
    half = [o for o in unit.options if (o.kind, o.amount) == (INT8, 0.5)]
    return unit.options.index(half[0] if half else whole(unit, INT8))


def whole(unit: Unit, kind: str) -> Option:
    """The option that only stores a unit in another kind."""
    return next(o for o in unit.options if (o.kind, o.amount, o.ratio) == (kind, 0.0, 1.0))


@pytest.mark.slow
def test_choices_by_layer_are_files_that_load(batches, tmp_path, monkeypatch):
    """A search whose clock is made up of the tensors' bytes: several points name layers, each is
    the model its row says, and nothing is returned that is slower or loses more than asked.
    """
    budget = {"speedup": 6.0, "max_loss": 0.5}
    compared = partial(measured_by_bytes, size_of=tensor_bytes)
    monkeypatch.setattr("quantize.compression.search.trial.compare", compared)
    result = quantize.compress(
        Net().eval(), INPUTS, calibration=batches, budget=budget, out=tmp_path, progress=False
    )
    chosen = next(row for row in result.rows if row["name"] == result.file.stem)
    assert result.met and chosen["speedup"] >= 6 and chosen["loss"] <= budget["max_loss"]
    told = [row for row in result.rows if row["predicted"] and row["file"]]
    assert len(told) > 1 and result.layers
    for row in told:
        recipe = Recipe.from_json(row["recipe"])
        again = Recipe.from_json(
            quantize.read_metadata(tmp_path / f"{row['name']}.safetensors")["recipe"]
        )
        assert recipe == again
        assert row["predicted"]["latency_ms"] == pytest.approx(row["latency_ms"]["median"], rel=0.3)
        assert all(part.keys() == {"name", "got", "why"} for part in row["predicted"]["layers"])


@pytest.mark.slow
def test_a_loss_alone_is_chosen_for_by_layer(batches):
    """No loss is known to be there, so removal is tried; no latency is predicted below 0."""
    model, budget = Net().eval(), {"max_loss": 1e-3}
    result = quantize.compress(model, INPUTS, calibration=batches, budget=budget, progress=False)
    chosen = next(row for row in result.rows if row["name"] == result.file.stem)
    assert result.met and chosen["loss"] <= 1e-3
    told = [row for row in result.rows if row["predicted"]]
    assert told and all(row["predicted"]["latency_ms"] > 0 for row in told)


def test_sizes_save_no_more_than_kinds_have_left():
    """Before a size was measured: of layers that take 1 s alone, 0.5 s in int8, where the model
    then takes 0.2 s of 1.2 s.
    """
    nothing = dict.fromkeys((INT8, BF16, INT4), 0.0)
    kinds, rounding = nothing | {INT8: 0.5}, nothing | {INT8: 1.0}
    parts = Parts(kinds, nothing_saved(), rounding, removed(0.0), 100.0)
    factors = fitted([Seen(parts, 1.0, 1.0, 0.0, 100.0)], 1.2, 1.0, 0.0)
    assert factors.times[0] == pytest.approx(2.0) and factors.times[5] == pytest.approx(0.4)
    lucky = replace(parts, size_s=nothing_saved() | {"int8 width": 0.1})  # saved more than it has
    points = [Seen(parts, 1.0, 1.0, 0.0, 100.0), Seen(lucky, 1.15, 1.0, 0.0, 100.0)]
    gone = replace(parts, size_s=nothing_saved() | {"int8 width": 0.5})
    assert fitted(points, 1.2, 1.0, 0.0).saved_by(gone) <= 1.2


def test_losses_within_noise_keep_nothing_from_being_tried():
    """They bound the factors from above; a loss above the noise then tells what removal costs."""
    nothing = dict.fromkeys((INT8, BF16, INT4), 0.0)
    kinds, narrower = nothing | {INT8: 1.0}, nothing_saved() | {"int8 width": 1.0}
    rounded = Parts(kinds, nothing_saved(), kinds, removed(0.0), 100.0)
    narrow = Parts(kinds, narrower, kinds, removed(50.0), 60.0)
    hidden = Seen(rounded, 0.5, -0.2, noise=1.0, bytes=100.0)
    factors = fitted([hidden], 1.0, 1.0, 0.0)
    assert 0 < factors.loss_of(rounded) < 0.1 and factors.loss_of(narrow) < 10
    sure = Seen(narrow, 0.8, 4.0, noise=1.0, bytes=60.0)
    factors = fitted([hidden, sure], 1.0, 1.0, 0.0)
    assert factors.loss_of(narrow) == pytest.approx(4.0, rel=0.05)
    assert factors.loss_of(rounded) < 0.1


@pytest.mark.slow
def test_bfloat16_goes_around_int8():
    """`Int8 >> Half`: integers stay, what they left is stored in 16 bits, and a file keeps both."""
    model = Net().eval()
    small = (Int8(skip=("2",)) >> Half("bfloat16", skip=("4",)))(model)
    plain = Recipe((Int8(skip=("2",)),))(model)
    assert type(small[0]) is type(plain[0]) and torch.equal(small[0].packed, plain[0].packed)
    stored = small[2].state_dict()["weight"]
    assert stored.dtype == torch.bfloat16
    with torch.no_grad():
        away = (small(INPUTS) - plain(INPUTS)).norm() / plain(INPUTS).norm()
    assert 0 < away < 0.02


def test_channels_last_is_an_order_that_a_file_keeps(tmp_path):
    """The same numbers; strides come back from the file; without convolutions it is refused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    recipe = Recipe((ChannelsLast(),))
    new = recipe(model)
    assert new[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[2].weight.is_contiguous()
    quantize.save(new, tmp_path / "new.pth", metadata={"recipe": recipe.as_values()})
    loaded = quantize.load(tmp_path / "new.pth", model=model)
    assert loaded[2].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        assert torch.allclose(loaded(x), model(x), atol=1e-6)
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(ValueError, match="to put channels last in"):
        recipe(Net())
    assert (Prune(0.5) >> ChannelsLast() >> Int8()).name == "pruned+channels_last+int8"
