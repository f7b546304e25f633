"""The structure record: rebuilt, stacked, followed through copies, refused where it doesn't fit."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from surgery_models import Net, Scaled, scale, scaled_for_test
from torch import nn

import quantize
from quantize import surgery


@surgery.builder
def merged_for_test(module: nn.Module) -> nn.Module:
    return Scaled(module[0], 1.0)


@surgery.builder
def heir_for_test(module: nn.Module) -> nn.Module:
    """A builder that copies the edits of what it replaces."""
    new = Scaled(module, 1.0)
    new.__dict__["_structure"] = [*module.__dict__.get("_structure", ())]
    return new


@surgery.builder
def wrapped_for_test(module: nn.Module) -> nn.Module:
    return nn.Sequential(module)


# the record
def test_rebuild_repeats_the_structure(net):
    """structure(rebuild(fresh, structure(model))) == structure(model), through JSON, and the
    outputs agree.
    """
    model = scale(surgery.clone(net), ["body.0", "again"], 3.0)
    edits = surgery.structure(model)
    assert [e["module"] for e in edits] == ["body.0", "body.2"]
    torch.manual_seed(0)
    twin = surgery.rebuild(Net(), json.loads(json.dumps(edits)))
    assert surgery.structure(twin) == edits
    assert twin.again is twin.body[2] and type(twin.again) is Scaled
    ids = torch.arange(10)
    assert torch.equal(twin(ids), model(ids)) and not torch.equal(model(ids), net(ids))


def test_edits_stack_in_order():
    """Several edits at one place, equal ones too, the root's too, are repeated in the order they
    were made.
    """
    model = nn.Linear(3, 3)
    surgery.resize(
        model,
        tensors={"weight": torch.ones(2, 3), "bias": torch.ones(2)},
        attributes={"out_features": 2},
    )
    for factor in (2.0, 2.0, 5.0):
        model = scale(model, [""], factor)
    edits = surgery.structure(model)
    assert [e["builder"] for e in edits] == ["resized", *["scaled_for_test"] * 3]
    twin = surgery.rebuild(nn.Linear(3, 3), edits)
    assert type(twin) is Scaled and twin.factor == 5.0 and twin.weight.shape == (2, 3)
    assert surgery.structure(twin) == edits


def test_edits_inside_a_replaced_module_are_kept(net):
    """An edit of an inner module is repeated before the edit that replaced the module around it."""
    model = surgery.clone(net)
    surgery.resize(
        model.body[0],
        tensors={"weight": torch.zeros(5, 4), "bias": torch.zeros(5)},
        attributes={"out_features": 5},
    )
    scale(model, ["body.0"], 2.0)
    merged = merged_for_test(model.body)
    surgery.record(merged, "merged_for_test")
    surgery.replace(model, {model.body: merged})
    surgery.resize(merged, tensors={}, attributes={"out_features": 5})
    edits = surgery.structure(model)
    assert [(e["module"], e["builder"]) for e in edits] == [
        ("body.0", "resized"),
        ("body.0", "scaled_for_test"),
        ("body", "merged_for_test"),
        ("body", "resized"),
    ]
    twin = surgery.rebuild(Net(), json.loads(json.dumps(edits)))
    assert twin.body.weight.shape == (5, 4) and surgery.structure(twin) == edits


def test_edits_that_a_replacement_copied_are_not_doubled(net):
    """Whether or not a builder copies the old module's record, each edit is listed once."""
    model = scale(surgery.clone(net), ["head"], 2.0)
    new = heir_for_test(model.head)
    surgery.record(new, "heir_for_test")
    surgery.replace(model, {model.head: new})
    edits = surgery.structure(model)
    assert [e["builder"] for e in edits] == ["scaled_for_test", "heir_for_test"]
    assert surgery.structure(surgery.rebuild(Net(), edits)) == edits


def test_edits_of_a_wrapped_module_are_repeated_once(net):
    """A replacement that holds the old module takes its edits over; they aren't listed again
    inside.
    """
    model = scale(surgery.clone(net), ["head"], 2.0)
    new = wrapped_for_test(model.head)
    surgery.record(new, "wrapped_for_test")
    surgery.replace(model, {model.head: new})
    edits = surgery.structure(model)
    assert [(e["module"], e["builder"]) for e in edits] == [
        ("head", "scaled_for_test"),
        ("head", "wrapped_for_test"),
    ]
    twin = surgery.rebuild(Net(), edits)
    assert type(twin.head[0]) is Scaled and surgery.structure(twin) == edits


def test_record_follows_copies_and_pickles(net):
    """deepcopy and pickle keep the record, and an edit of the copy doesn't reach the original's."""
    model = scale(net, ["body.0"], 2.0)
    edits = surgery.structure(model)
    twin = copy.deepcopy(model)
    assert surgery.structure(twin) == surgery.structure(pickle.loads(pickle.dumps(model))) == edits
    scale(twin, ["body.2"], 2.0)
    assert surgery.structure(model) == edits


def test_untouched_model_has_no_record(net):
    """No edit, no record, and rebuilding with it changes nothing."""
    assert surgery.structure(net) == []
    assert surgery.rebuild(net, []) is net


def test_two_builders_of_one_name():
    """A builder's name is what files refer to: it can't be given twice, but registering again is
    harmless.
    """
    assert surgery.builder(scaled_for_test) is scaled_for_test

    def other(module):
        return module

    other.__name__ = "scaled_for_test"
    with pytest.raises(ValueError, match="two builders are named 'scaled_for_test'"):
        surgery.builder(other)
    with pytest.raises(ValueError, match="no builder is named 'nonsense'"):
        surgery.record(nn.ReLU(), "nonsense")


@pytest.mark.parametrize(
    ("module", "builder", "arguments", "reason"),
    [
        ("body.0", "os.system", {}, "unknown kind of edit 'os.system'"),
        ("body.7", "scaled_for_test", {"factor": 1}, "no module 'body.7'"),
        ("body.forward", "scaled_for_test", {"factor": 1}, "no module 'body.forward'"),
        ("__class__", "scaled_for_test", {"factor": 1}, "no module '__class__'"),
        ("body.1", "scaled_for_test", {"factor": 1}, "'body.1' can't become scaled_for_test"),
        ("body.0", "scaled_for_test", {"module": 1}, "'body.0' can't become"),
        ("body.0", "scaled_for_test", {}, "'body.0' can't become"),
        (
            "body.0",
            "resized",
            {"shapes": {"w": [1]}, "attributes": {}},
            "no parameter or buffer 'w'",
        ),
        ("body.0", "resized", {"shapes": {"weight": [-1]}, "attributes": {}}, "'body.0' can't"),
        ("body.0", "resized", {"shapes": {"weight": ["a"]}, "attributes": {}}, "'body.0' can't"),
        ("body.0", "resized", {"shapes": [], "attributes": {}}, "'body.0' can't"),
    ],
)
def test_rebuild_refuses_edits_that_do_not_fit(net, module, builder, arguments, reason):
    """Each is a ValueError naming the module, nothing else."""
    with pytest.raises(ValueError, match=reason):
        surgery.rebuild(net, [{"module": module, "builder": builder, "arguments": arguments}])


def test_notes_follow_copies_and_files(net, tmp_path):
    """What was noted is read from the model, a copy, a pickle, a file and a model around it."""
    surgery.note(net, "int8", done={"a": "int8"}, left={"b": "too small"}, distance=0.01, groups=32)
    net = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    quantize.save(net, tmp_path / "net.pth")
    for found in (net, tmp_path / "net.pth"):
        (step,) = quantize.summary(found).steps
        assert (step.technique, step.done, step.left) == ("int8", {"a": "int8"}, {"b": "too small"})
        assert step.distance == 0.01 and step.settings == {"groups": 32}
    assert quantize.summary(nn.ModuleDict({"in": net})).done == {"in.a": "int8"}
