"""Which layers of a model can be factorized, and why the others can't."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn
from torch.nn.utils import parametrize

from quantize import surgery
from quantize.calibration import is_finite
from quantize.compression.low_rank import maths
from quantize.nn import low_rank as pairs


def find_layers(
    model: nn.Module, skip: surgery.Skip
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers that can be factorized, by name, and the reasons for those that can't. ValueError if
    there are none.
    """
    surgery.check_initialised(model)
    holders = surgery.holders(model)
    inside = _inside_of_others(model)
    out = surgery.skip_filter(model, skip)
    bound = surgery.bound_layers(model)
    found: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if pairs.linear_shape(module) is None and not isinstance(module, pairs.CONVOLUTIONS):
            if _holds_matrices(name, module):
                reasons[name] = (
                    f"{type(module).__name__} isn't factorized, only linears and convolutions "
                    f"in 1-D and 2-D are"
                )
            continue
        sharing = holders.get(id(module._parameters.get("weight")), ())
        others = [other for other in sharing if other != name]
        obstacle = "skipped by name"
        if not out(name, module):
            obstacle = _obstacle(module, others, id(module) in inside) or bound.get(module)
        if obstacle:
            reasons[name] = obstacle
        else:
            found[name] = module
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer to factorize: looked for nn.Linear, nn.Conv1d "
            f"and nn.Conv2d of one group, and Conv1D; "
            f"left out: {surgery.shortened(reasons) or 'none'}"
        )
    return found, reasons


def _inside_of_others(model: nn.Module) -> set[int]:
    """Ids of the layers whose owner reads their weights, or is made of them."""
    inside: set[int] = set()
    for owner in model.modules():
        if isinstance(owner, nn.MultiheadAttention):
            inside.update(id(module) for module in owner.modules())
        elif isinstance(owner, pairs.Pair):
            inside.update(id(module) for module in owner.children())
    return inside


def _holds_matrices(name: str, module: nn.Module) -> bool:
    """Has a module weights that a pair might stand for, had this technique one for its kind?"""
    if ".parametrizations." in f".{name}.":
        return False
    return surgery.holds_matrix(module)


def _obstacle(module: nn.Module, others: Sequence[str], inside: bool) -> str | None:
    if inside:
        return "its owner reads the weight directly"
    if parametrize.is_parametrized(module):
        return "its weight is computed by a parametrization: make it permanent first"
    if surgery.computing_hooks(module):
        return (
            "its weight is computed by a hook (weight_norm, spectral_norm, prune): make it "
            "permanent first"
        )
    general = surgery.obstacle(module)
    if general is not None:
        return general
    if isinstance(module, pairs.CONVOLUTIONS) and module.groups > 1:
        return f"a convolution of {module.groups} groups"
    if others:
        return f"shares its weight with {others[0]!r}"
    outputs, inputs = pairs.matrix(module).shape
    if not maths.candidate_ranks(outputs, inputs):
        return "no rank makes it smaller"
    return None


def reached(
    layers: Mapping[str, nn.Module], ran: Collection[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Those of `layers` that calibration reaches, by name in `ran`, and the reasons for those that
    it doesn't. ValueError if it reaches none.
    """
    if not ran:
        raise ValueError(
            f"calibration never reaches layer {next(iter(layers))!r}, nor any other that can be "
            f"factorized"
        )
    idle = "calibration never reaches it, or other code computes with its weight"
    used = {name: layer for name, layer in layers.items() if name in ran}
    return used, {name: idle for name in layers if name not in ran}


def check_weights(layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(
                f"layer {name!r} has no numbers, only shapes: its weight is on the meta device"
            )
        if not all(is_finite(p) for p in layer._parameters.values() if p is not None):
            raise ValueError(f"layer {name!r} has weights that are not finite")
