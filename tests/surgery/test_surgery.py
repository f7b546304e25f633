"""Finding, replacing and resizing modules, and the record that repeats it on a fresh model."""

from __future__ import annotations

import copy
import json
import pickle
import threading

import pytest
import torch
from torch import nn

import quantize
from quantize import surgery


class Net(nn.Module):
    """A bit of everything: a tie, a module in two places, a frozen parameter, a hook, modules in
    training and in eval mode.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        self.again = self.body[2]
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.sizes, self.kind, self.flag, self.limit = [1, 2], "plain", True, None

    def forward(self, ids):
        return self.head(self.norm(self.again(self.body[:2](self.embed(ids)))))


class Scaled(nn.Linear):
    """A replacement that the record can name."""

    def __init__(self, old: nn.Linear, factor: float):
        super().__init__(old.in_features, old.out_features, device="meta")
        self.weight, self.bias, self.factor = old.weight, old.bias, factor

    def forward(self, x):
        return super().forward(x) * self.factor


@surgery.builder
def scaled_for_test(module: nn.Module, factor: float) -> nn.Module:
    if not isinstance(module, nn.Linear):
        raise TypeError(f"not a linear: {type(module).__name__}")
    return Scaled(module, factor)


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


def scale(model: nn.Module, names: list[str], factor: float) -> nn.Module:
    replacements = {}
    for name in names:
        new = Scaled(model.get_submodule(name), factor)
        surgery.record(new, "scaled_for_test", factor=factor)
        replacements[model.get_submodule(name)] = new
    return surgery.replace(model, replacements)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


# clone


def test_clone_is_equal_and_shares_no_memory(net):
    """Same tensors, other storage."""
    twin = surgery.clone(net)
    assert twin.state_dict().keys() == net.state_dict().keys()
    for name, tensor in twin.state_dict().items():
        assert (
            torch.equal(tensor, net.state_dict()[name])
            and tensor.data_ptr() != net.state_dict()[name].data_ptr()
        )


def test_clone_keeps_ties_and_shared_modules(net):
    """What was one tensor, or one module, in the original is one in the copy, and another one than
    the original's.
    """
    twin = surgery.clone(net)
    assert twin.head.weight is twin.embed.weight and twin.head.weight is not net.head.weight
    assert twin.again is twin.body[2]


def test_clone_keeps_flags_and_hooks(net):
    """training, requires_grad and hooks survive in the copy and stay as they were in the
    original.
    """
    calls = []
    net.body[0].register_forward_hook(lambda *_: calls.append(1))
    net.norm.eval()
    net.body[0].weight.requires_grad_(False)
    twin = surgery.clone(net)
    for model in (net, twin):
        assert [m.training for m in model.modules()] == [m.training for m in net.modules()]
        assert model.training and not model.norm.training
        assert not model.body[0].weight.requires_grad and model.body[0].bias.requires_grad
    twin(torch.zeros(2, dtype=torch.long))
    assert calls == [1]


def test_clone_refuses_what_it_cannot_edit(net):
    """TorchScript and things that are no module are a TypeError that says so."""
    with pytest.raises(TypeError, match=r"must be an .*Module, got dict"):
        surgery.clone({})
    with pytest.warns(FutureWarning):
        scripted = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(TypeError, match="TorchScript"):
        surgery.clone(scripted)


# select and skip


def test_select_gives_each_module_once_in_order(net):
    """A module in two places is listed under its first name; the order is that of named_modules."""
    assert list(surgery.select(net, nn.Linear)) == ["body.0", "body.2", "head"]
    assert list(surgery.select(net, (nn.ReLU, nn.Embedding))) == ["embed", "body.1"]


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["head"], ["body.0", "body.2"]),
        (["body"], ["head"]),
        (["*.2"], ["body.0", "head"]),
        (["b?dy.*", "h*"], []),
        ([nn.Sequential], ["head"]),
        ([nn.Linear], []),
        (["nothing*"], ["body.0", "body.2", "head"]),
        ([], ["body.0", "body.2", "head"]),
    ],
)
def test_skip_takes_names_globs_and_types(net, skip, left):
    """A skipped name or type takes what is inside it along."""
    assert list(surgery.select(net, nn.Linear, skip=skip)) == left


def test_select_matches_subclasses(net):
    """isinstance decides, as everywhere in torch."""
    assert "body.0" in surgery.select(scale(net, ["body.0"], 2.0), nn.Linear)


@pytest.mark.parametrize(
    ("skip", "error", "named"),
    [
        (["hed"], ValueError, "'hed'"),
        ("head", TypeError, "'head'"),
        ([3], TypeError, "3"),
        (nn.Linear, TypeError, "Linear"),
    ],
)
def test_skip_refuses_what_means_nothing(net, skip, error, named):
    """A misspelt name, a bare string or type, a number: an error naming it, never a skip that
    silently does nothing.
    """
    with pytest.raises(error, match=named):
        surgery.select(net, nn.Linear, skip=skip)


# replace


def test_replace_reaches_every_place(net):
    """A module held twice is replaced in both places."""
    new = nn.Linear(6, 4)
    assert surgery.replace(net, {net.again: new}) is net
    assert net.body[2] is new and net.again is new


def test_replace_the_root(net):
    """The root itself can be replaced: the new one is returned."""
    new = nn.Identity()
    assert surgery.replace(net, {net: new}) is new


def test_replace_by_a_wrapper_around_the_old(net):
    """The replacement may hold what it replaces; it isn't replaced again inside."""
    old = net.head
    surgery.replace(net, {old: nn.Sequential(old)})
    assert net.head[0] is old


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forward", 1),
        ("__class__", "x"),
        ("_parameters", []),
        ("_forward_hooks", []),
        ("embed", 3),
        ("not_there", 3),
        ("kind", 3),
        ("flag", 2),
        ("flag", "yes"),
        ("sizes", "abc"),
        ("sizes", {"a": 1}),
        ("kind", torch.zeros(1)),
    ],
)
def test_resized_sets_plain_attributes_only(net, name, value):
    """A record can't set methods, private state, modules, unknown names, or another kind of
    value.
    """
    before = dict(vars(net))
    with pytest.raises(ValueError, match=name):
        surgery.resized(net, {}, {name: value})
    assert vars(net) == before


@pytest.mark.parametrize(
    ("name", "value", "then"),
    [("sizes", [3, 4], [3, 4]), ("kind", "x", "x"), ("flag", False, False), ("limit", 4, 4)],
)
def test_resized_keeps_the_kind_of_attribute(net, name, value, then):
    """A list stays a list, a tuple a tuple; None may become anything plain."""
    surgery.resized(net, {}, {name: value})
    assert getattr(net, name) == then and type(getattr(net, name)) is type(then)
    norm = nn.LayerNorm(4)
    surgery.resized(norm, {}, {"normalized_shape": [2]})
    assert norm.normalized_shape == (2,)


# resize


def test_resize_keeps_the_parameter_and_its_ties(net):
    """The Parameter object stays, so that the module it is tied to sees the new tensor; no stale
    gradient is left.
    """
    tied = net.embed.weight
    tied.grad = torch.ones_like(tied)
    surgery.resize(
        net.embed, tensors={"weight": torch.zeros(7, 4)}, attributes={"num_embeddings": 7}
    )
    assert net.head.weight is tied and net.embed.weight is tied
    assert tied.shape == (7, 4) and tied.grad is None and tied.requires_grad


def test_resize_twice_is_one_edit(net):
    """The record has the last shape of each tensor and the last value of each attribute."""
    surgery.resize(
        net.body[0], tensors={"weight": torch.zeros(5, 4)}, attributes={"out_features": 5}
    )
    surgery.resize(net.body[0], tensors={"bias": torch.zeros(5)}, attributes={})
    surgery.resize(
        net.body[0], tensors={"weight": torch.zeros(5, 3)}, attributes={"in_features": 3}
    )
    (edit,) = surgery.structure(net)
    assert edit["module"] == "body.0" and edit["builder"] == "resized"
    assert edit["arguments"] == {
        "shapes": {"weight": [5, 3], "bias": [5]},
        "attributes": {"out_features": 5, "in_features": 3},
    }


def test_resize_repeats_on_a_fresh_model(net):
    """Parameters, buffers and attributes of a fresh model get the recorded shapes, without data."""
    surgery.resize(
        net.norm,
        tensors={k: torch.ones(3) for k in ("weight", "bias", "running_mean", "running_var")},
        attributes={"num_features": 3},
    )
    fresh = surgery.rebuild(Net(), json.loads(json.dumps(surgery.structure(net))))
    assert fresh.norm.num_features == 3
    assert fresh.norm.running_mean.shape == fresh.norm.weight.shape == (3,)
    assert (
        fresh.norm.weight.is_meta
        and fresh.norm.weight.requires_grad
        and isinstance(fresh.norm.weight, nn.Parameter)
    )
    assert surgery.structure(fresh) == surgery.structure(net)


def test_resize_names_what_is_not_there(net):
    """An unknown tensor is a ValueError naming module class and tensor."""
    with pytest.raises(ValueError, match="Linear has no parameter or buffer 'gamma'"):
        surgery.resize(net.head, tensors={"gamma": torch.zeros(1)}, attributes={})
    with pytest.raises(ValueError, match="Linear has no parameter or buffer 'bias'"):
        surgery.resize(net.head, tensors={"bias": torch.zeros(1)}, attributes={})


def test_clone_of_results_is_their_values(net):
    """A module that keeps a result with a history is copied: the copy keeps the value, a shared one
    stays shared.
    """
    net.kept = torch.ones(2, requires_grad=True) * 3
    net.twice = net.kept
    copied = surgery.clone(net)
    assert (
        torch.equal(copied.kept, net.kept)
        and copied.kept.grad_fn is None
        and copied.twice is copied.kept
    )


def test_clone_names_what_cannot_be_copied(net):
    """Something that Python can't copy is refused with the module that holds it."""
    holder = nn.Sequential(nn.Identity(), net)
    net.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"module '1' .*can't be copied"):
        surgery.clone(holder)


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
