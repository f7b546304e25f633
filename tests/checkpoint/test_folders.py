"""`save_pretrained` of a changed model writes a folder that is read back as that model, or
refuses.
"""

from __future__ import annotations

import copy
import pickle

import helpers
import pytest
import torch
import transformers
from helpers import in_int8

import quantize
from quantize.compression.int4 import quantize_weights

REFUSED = {
    "int8": in_int8,
    "int4": quantize_weights,
    "low rank": lambda m: quantize.factorize_low_rank(m, ratio=0.5),
    "half, then int8": lambda m: in_int8(quantize.to_half(m)),
}


@pytest.mark.parametrize("transform", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("how", ["result", "copy", "pickle", "loaded", "inside"])
def test_a_compressed_model_refuses_to_become_a_folder(transform, how, tmp_path):
    """The result, its copies, what a file gives and a model inside another one: nothing is
    written.
    """
    model, _ = helpers.zoo("bert")
    small = transform(model)
    if how == "copy":
        small = copy.deepcopy(small)
    elif how == "pickle":
        small = pickle.loads(pickle.dumps(small))
    elif how == "loaded":
        quantize.save(small, tmp_path / "small.pth")
        small = quantize.load(tmp_path / "small.pth", model=model)
    elif how == "inside":
        small = transform(torch.nn.ModuleDict({"encoder": model}))["encoder"]
    with pytest.raises(ValueError, match=r"a folder can't hold this BertModel.*quantize\.save"):
        small.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    assert "save_pretrained" not in model.__dict__


def test_a_half_model_becomes_a_folder(tmp_path):
    """16-bit weights keep names and shapes: the folder gives the same outputs, and a copy of it
    too.
    """
    model, inputs = helpers.zoo("bert")
    half = copy.deepcopy(quantize.to_half(model))
    half.save_pretrained(tmp_path)
    assert torch.equal(
        helpers.run(type(model).from_pretrained(tmp_path).eval(), inputs), helpers.run(half, inputs)
    )


class Wrapped(torch.nn.Module):
    """A module of one's own, with the config of the transformers' model inside."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = transformers.BertModel(config)
        self.head = torch.nn.Linear(config.hidden_size, 3)


@pytest.mark.parametrize("transform", [copy.deepcopy, quantize.to_half, in_int8])
def test_a_module_around_one_of_theirs_becomes_a_folder_of_ours(transform, tmp_path):
    """It has no `save_pretrained`, or one that leaves weights out: all of its own are kept."""
    config = helpers.zoo("bert")[0].config
    small = transform(Wrapped(config).eval())
    quantize.save_folder(small, tmp_path / "small")
    again = quantize.open_model(tmp_path / "small", Wrapped(config)).state_dict()
    for name, tensor in small.state_dict().items():
        assert torch.equal(again[name], tensor), name
