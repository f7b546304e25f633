"""Models that torch.export follows only with help, and what it says of others."""

from __future__ import annotations

import gc
import types

import pytest
import torch
from helpers import randn
from torch import Tensor, nn

import quantize
from quantize import calibration
from quantize.calibration.exporting import _replaced


class Translator(nn.Module):
    """nn.Transformer with a causal mask that it computes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.body(source, target, tgt_mask=mask)


@pytest.mark.slow
def test_masks_of_a_transformer():
    """It is followed, and the causal mask counts: no output depends on targets that come later."""
    model, inputs = Translator().eval(), (randn(2, 6, 32), randn(2, 5, 32, seed=1))
    with torch.no_grad(), calibration.exporting():
        exported = torch.export.export(model, inputs, strict=False)
    program = exported.module()
    with torch.no_grad():
        expected = model(*inputs)
        assert torch.allclose(program(*inputs), expected, atol=1e-5)
        later = inputs[1].clone()
        later[:, -1] += 1
        moved = (program(inputs[0], later) - expected).abs().amax((0, 2))
    assert moved[:-1].max() < 1e-5 < moved[-1]
    small = quantize.prune_ln_structured(model, inputs)
    assert small.body.encoder.layers[0].linear1.out_features == 32


class Decides(nn.Module):
    """Decides on a value."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(x.relu() if x.sum() > 0 else x)


@pytest.mark.parametrize("technique", [quantize.prune_ln_structured, quantize.fold])
def test_a_refusal_prints_nothing(technique, capfd):
    """The error says it all; torch.export prints the graph so far."""
    with pytest.raises(ValueError, match="Decides can't be"):
        technique(Decides().eval(), randn(4, 32))
    assert capfd.readouterr() == ("", "")


def test_what_is_not_noted_changes_no_graph():
    """With free sizes, the code and every size and stride are those of a plain export; graphs of
    both can be called.
    """
    layers = nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(2)
    auto = torch.export.Dim.AUTO
    options = {"dynamic_shapes": ((auto, None, auto, auto),), "strict": False}
    model, inputs = nn.Sequential(*layers).eval(), (randn(2, 3, 9, 11),)
    plain = torch.export.export(model, inputs, **options)
    with calibration.exporting():
        inside = torch.export.export(model, inputs, **options)
    for one, other in zip(plain.graph.nodes, inside.graph.nodes, strict=True):
        assert str(one.format_node()) == str(other.format_node())
        assert str(one.meta.get("val")) == str(other.meta.get("val"))
    assert plain.range_constraints == inside.range_constraints
    assert plain.module().code == inside.module().code
    state = tuple(model.state_dict().values())
    assert torch.equal(inside.graph_module(*state, *inputs)[0], model(*inputs))


@pytest.mark.parametrize("enabled", [True, False])
def test_collections_go_on_as_before(enabled, monkeypatch):
    """None starts inside; afterwards they are as the caller had them, also after an error."""
    switched = []
    monkeypatch.setattr(gc, "isenabled", lambda: enabled)
    monkeypatch.setattr(gc, "enable", lambda: switched.append("on"))
    monkeypatch.setattr(gc, "disable", lambda: switched.append("off"))
    with pytest.raises(KeyError), calibration.exporting():
        assert switched == ["off"]
        raise KeyError
    assert switched == (["off", "on"] if enabled else ["off"])


def test_patches_of_a_torch_without_the_name():
    """What another torch doesn't have is left alone, and what it has comes back."""
    owner = types.SimpleNamespace(known=1)
    with _replaced(owner, "known", 2), _replaced(owner, "gone", 2):
        assert vars(owner) == {"known": 2}
    assert vars(owner) == {"known": 1}
