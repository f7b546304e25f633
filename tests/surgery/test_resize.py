"""Parameters and attributes that change their size."""

from __future__ import annotations

import json

import pytest
import torch
from surgery_models import Net
from torch import nn

from quantize import surgery


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
