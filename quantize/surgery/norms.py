"""BatchNorm folded into the convolution before it, where nothing else reads what lies between.

Who reads it is seen on calibration (`calibration.followers`), or else told by `torch.fx`
(`following`). Where neither can, nothing is folded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_weights

from quantize.surgery.asked import asked_classes
from quantize.surgery.candidates import take_place
from quantize.surgery.edit import deepcopy, replace
from quantize.surgery.forwards import computes_as
from quantize.surgery.record import builder, record

_PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
_NORMS = dict(enumerate(_PAIRS.values(), start=1))  # by the dimensions behind the channels
_NUMBERS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_ROUNDING = 1e-9  # of float64: less than another eps changes
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fold_norms(model: nn.Module, followers: Mapping[str, str]) -> dict[str, str]:
    """Fold BatchNorms in eval mode into the convolutions before them, in place; nn.Identity takes a
    norm's place.

    Args:
        followers: by layer, the module that alone reads its output; see `traced_followers`.

    Returns:
        The names of the norms, by convolution.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    places = Counter(map(id, modules.values()))
    asked = asked_classes(model)
    folded: dict[str, str] = {}
    for conv_name, norm_name in followers.items():
        conv, norm = modules[conv_name], modules[norm_name]
        once = places[id(conv)] == places[id(norm)] == 1
        if once and norm not in asked and _folds(conv, norm):
            _fold(conv, norm)
            folded[conv_name] = norm_name
    absorb(model, folded.values())
    return folded


def own_norms(model: nn.Module) -> dict[str, nn.Module]:
    """By name, norms that do in a forward of their own what a BatchNorm and an activation do, as
    timm's BatchNormAct2d and torchvision's FrozenBatchNorm2d; not all of those found do that alone.
    """
    asked = asked_classes(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if module in asked or not is_plain(module, [type(module)]):
            continue
        dims = _dims(module, ())
        if dims is not None and type(module).forward is not _NORMS[dims].forward:
            found[name] = module
    return found


def split_norms(
    model: nn.Module, inputs: Mapping[str, Collection[tuple[int, ...]]]
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Put a BatchNorm, and an activation, in the places of `own_norms`, in place. Whether a norm
    does what these do, and nothing else, its numbers tell.

    Args:
        model: changed in place.
        inputs: by norm, the shapes that it is known to read; images where there are none.

    Returns the (possibly new) root, and the norms that were replaced.
    """
    made: dict[nn.Module, nn.Module] = {}
    replaced: dict[str, nn.Module] = {}
    for name, module in own_norms(model).items():
        dims = _dims(module, inputs.get(name, ()))
        if dims is not None and _splits(module, dims):
            replaced[name], made[module] = module, split_norm(module, dims)
            record(made[module], "split_norm", dims=dims)
    return replace(model, made), replaced


@builder
def split_norm(module: nn.Module, dims: int | None = None) -> nn.Module:
    """A BatchNorm with the module's own numbers, and the activation inside of it. dims: of the
    space behind the channels.
    """
    norm: Any = module
    kind: Any = _NORMS[dims or _dims(norm, ()) or 2]
    eps, momentum = getattr(norm, "eps", 1e-5), getattr(norm, "momentum", 0.1)
    plain = kind(len(norm.running_mean), eps, momentum, device="meta")
    plain.affine = norm.weight is not None
    plain._parameters, plain._buffers = norm._parameters, norm._buffers
    inside = [part for part in norm.children() if type(part) is not nn.Identity]
    return nn.Sequential(plain, *inside).train(norm.training)


def _dims(norm: nn.Module, inputs: Collection[tuple[int, ...]]) -> int | None:
    """Of the space behind the channels of what a norm reads, in which one of torch is like it; None
    where none is. inputs: shapes that it reads.
    """
    own = norm._parameters.keys() | norm._buffers.keys()
    holds = {"weight", "bias", "running_mean", "running_var"} <= own <= _NUMBERS
    is_norm = isinstance(norm, nn.modules.batchnorm._NormBase)
    like = [dims for dims, kind in _NORMS.items() if isinstance(norm, kind)]
    if holds and not is_norm:
        like = [*_NORMS]
    read = {len(shape) - 2 for shape in inputs} or {2 if 2 in like else next(iter(like), 0)}
    return read.pop() if len(read) == 1 and read <= {*like} else None


def _splits(norm: Any, dims: int) -> bool:
    """Does a norm in eval mode give what `split_norm` gives?"""
    own = norm._parameters.keys() | norm._buffers.keys()
    inside = [*norm.children()]
    if norm.training or norm.running_mean is None or "_half" in vars(norm):
        return False
    if own - _NUMBERS or any([*part.parameters()] for part in inside):
        return False
    generator = torch.Generator().manual_seed(0)
    sizes = 2, len(norm.running_mean), *[3] * dims
    x = torch.randn(sizes, generator=generator, dtype=torch.float64)
    x = x.to(norm.running_mean.device)
    copy: Any = deepcopy(norm).double()  # its forward may keep something
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            return torch.allclose(
                copy(x.clone()), split_norm(copy, dims)(x.clone()), rtol=_ROUNDING
            )
        except Exception:  # a forward that wants something else
            return False


def absorb(model: nn.Module, names: Iterable[str]) -> None:
    """Put nn.Identity in the places of modules whose work the layers before them do, in place."""
    replacements: dict[nn.Module, nn.Module] = {}
    for name in names:
        module = model.get_submodule(name)
        identity = absorbed(module)
        record(identity, "absorbed")
        take_place(module, identity)
        replacements[module] = identity
    replace(model, replacements)


@builder
def absorbed(module: nn.Module) -> nn.Module:
    """nn.Identity in place of a module whose work the layer before it does."""
    return nn.Identity().train(module.training)


@builder
def with_bias(module: nn.Module) -> nn.Module:
    """Give a convolution that has no bias one of zeros, in place."""
    conv: Any = module
    weight = conv.weight
    # torch.zeros_like of a tensor without data imports sympy, which takes a third of a second
    bias = torch.empty(len(weight), dtype=weight.dtype, device=weight.device).zero_()
    conv.bias = nn.Parameter(bias)
    return module


@torch.no_grad()
def _fold(conv: Any, norm: Any) -> None:
    if conv._parameters["bias"] is None:
        with_bias(conv)
        conv._parameters["bias"].requires_grad_(conv.weight.requires_grad)
        record(conv, "with_bias")
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(),
        conv.bias.double(),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        None if norm.weight is None else norm.weight.double(),
        None if norm.bias is None else norm.bias.double(),
    )
    conv.weight.copy_(weight)
    conv.bias.copy_(bias)


def is_plain(module: nn.Module, kinds: Collection[type[nn.Module]]) -> bool:
    """Is it just what torch defines, with nobody watching its output?"""
    watched = any(getattr(module, kind, None) for kind in _HOOKS)
    return type(module) in kinds and not watched and "forward" not in module.__dict__


def _base(conv: Any) -> type[nn.Module] | None:
    """The convolution of torch that it is, or that it takes its forward from."""
    return next(
        (base for base in _PAIRS if isinstance(conv, base) and computes_as(conv, base)), None
    )


def _folds(conv: Any, norm: Any) -> bool:
    base = _base(conv)
    if base is None or not is_plain(conv, [type(conv)]) or not is_plain(norm, [_PAIRS[base]]):
        return False
    if norm.training or norm.running_mean is None or "_half" in vars(conv) | vars(norm):
        return False
    stored = conv._parameters.get("weight")
    same = stored is not None and stored.dtype == norm.running_mean.dtype
    return same and norm.num_features == conv.out_channels
