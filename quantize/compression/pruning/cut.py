"""Take the removed channels out of a copy of the model, or write zeros there (the masked twin)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantize import surgery
from quantize.compression.pruning.groups import Group
from quantize.compression.pruning.labels import Key, Value, varying
from quantize.compression.pruning.moves import SHAPED
from quantize.compression.pruning.trace import Trace, operation

# where a tensor is held: the module's name, the module, the tensor's name in it
Place = tuple[str, nn.Module, str]
Owners = Callable[[str], list[Place]]
HEAD_COUNTS = ("head", "group")  # an attribute of such a name counts heads ...
NOT_COUNTS = ("dim", "size", "per")  # ... unless it says that it is a width


def kept_indices(trace: Trace, groups: Iterable[Group]) -> dict[Key, Tensor]:
    """Indices that stay along every dimension that loses some."""
    removed: dict[Key, list[Tensor]] = {}
    for group in groups:
        if not len(group.removed):
            continue
        for key, places in group.places.items():
            gone = places[group.removed].flatten()
            removed.setdefault(key, []).append(gone)
    kept = {}
    for (name, dim), parts in removed.items():
        size = trace.labels.shapes[name][dim]
        stays = torch.ones(size, dtype=torch.bool)
        stays[torch.cat(parts)] = False
        kept[name, dim] = stays.nonzero().flatten()
    return kept


def owners(model: nn.Module) -> Owners:
    """Gives every place of a (possibly shared) tensor by one of its names, from one walk through a
    model that stays as it is.
    """
    places: dict[int, list[Place]] = {}
    for place, module in model.named_modules():
        for local, held in [*module._parameters.items(), *module._buffers.items()]:
            places.setdefault(id(held), []).append((place, module, local))

    def find(name: str) -> list[Place]:
        path, _, local = name.rpartition(".")
        tensor = stored(model.get_submodule(path), local)
        return places[id(tensor)]

    return find


def layers_of(holders: Owners, group: Group) -> list[str]:
    """The layers whose outputs a group cuts, by the first of their names."""
    first = [holders(name)[0] for name, _ in group.outputs]
    return [place for place, _, _ in first]


def stored(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer as it is stored: a 16-bit layer's weight reads in another dtype."""
    tensor = module._parameters.get(name)
    return module.get_buffer(name) if tensor is None else tensor


def cut(model: nn.Module, kept: dict[Key, Tensor], edits: dict[str, dict[str, Any]]) -> nn.Module:
    """Shrink `model` in place: keep these indices, then set these plain attributes (module name to
    attribute to value).
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    places: dict[str, nn.Module] = {}
    holders = owners(model)
    for name, dims in _by_name(kept).items():
        found = holders(name)
        tensor = stored(found[0][1], found[0][2]).detach()
        for dim, indices in dims.items():
            tensor = tensor.index_select(dim, indices.to(tensor.device))
        for place, module, local in found:
            tensors.setdefault(place, {})[local] = tensor.contiguous()
            places[place] = module
    for place, new in tensors.items():
        sizes = _sizes(places[place], new)
        surgery.resize(places[place], tensors=new, attributes=sizes)
        parent, _, local = place.rpartition(".")
        pair = model.get_submodule(parent)
        side = {"first": "in_", "second": "out_"}.get(local)
        if side is not None and hasattr(pair, "dense_weight"):
            # a low-rank pair notes the widths of its two layers
            outer = {name: size for name, size in sizes.items() if name.startswith(side)}
            surgery.resize(pair, tensors={}, attributes=outer)
    for place, attributes in edits.items():
        surgery.resize(model.get_submodule(place), tensors={}, attributes=attributes)
    return model


def _by_name(kept: dict[Key, Tensor]) -> dict[str, dict[int, Tensor]]:
    """What is kept of each tensor, by the dimension."""
    cuts: dict[str, dict[int, Tensor]] = {}
    for (name, dim), indices in kept.items():
        cuts.setdefault(name, {})[dim] = indices
    return cuts


def _sizes(module: nn.Module, new: dict[str, Tensor]) -> dict[str, Any]:
    """The attributes in which layers write down their widths, for new tensors."""
    weight = new.get("weight")
    attributes: dict[str, Any] = {}
    if hasattr(module, "num_features"):
        attributes["num_features"] = len(next(iter(new.values())))
    if weight is not None:
        attributes |= _widths(module, weight)
    return {name: size for name, size in attributes.items() if getattr(module, name) != size}


def _widths(module: nn.Module, weight: Tensor) -> dict[str, Any]:
    """What a layer with this weight calls its widths."""
    matrix = weight.ndim == 2
    if matrix and hasattr(module, "in_features") and hasattr(module, "out_features"):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, nn.modules.conv._ConvNd):
        outputs, inputs = weight.shape[:2]
        if module.transposed:
            outputs, inputs = inputs, outputs
        groups = module.groups
        if groups > 1:  # all of one size, as before
            groups = outputs * groups // module.out_channels
        return {"out_channels": outputs, "in_channels": inputs * groups, "groups": groups}
    if isinstance(module, nn.GroupNorm):
        groups = len(weight) * module.num_groups // module.num_channels
        return {"num_channels": len(weight), "num_groups": groups}
    if matrix and hasattr(module, "embedding_dim"):
        return {"embedding_dim": weight.shape[1]}
    if matrix and hasattr(module, "nf"):  # GPT-2's Conv1D, [in, out]
        sizes = {"nf": weight.shape[1], "nx": weight.shape[0]}
        return {name: size for name, size in sizes.items() if hasattr(module, name)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": len(weight)}
    return {}


def stale_attributes(trace: Trace, groups: Iterable[Group], model: nn.Module) -> tuple[dict, dict]:
    """Plain ints of modules that counted what is now fewer: those that surely count heads, and all
    that might matter.

    A model that writes `x.view(b, t, self.num_heads, self.head_dim)` needs `num_heads` changed.
    Which attribute fed a view can't be seen in the graph, so those of the module that made the view
    are matched by value, and the result is verified.
    """
    gone = torch.zeros(trace.labels.count, dtype=torch.bool)
    for group in groups:
        for key, places in group.places.items():
            removed = places[group.removed].flatten()
            gone[trace.labels.keys[key][removed]] = True
    changes: dict[str, dict[int, set[int]]] = {}
    for node, value in trace.values.items():
        if operation(node) not in SHAPED:
            continue
        made = [value] if isinstance(value, Value) else value
        here = changes.setdefault(trace.place(node), {})
        for v in [*trace.tensors(node.args), *made]:
            for old, new in _resized(v, gone):
                here.setdefault(old, set()).add(new)
    sure: dict[str, dict[str, int]] = {}
    might: dict[str, dict[str, int]] = {}
    for place, sizes in changes.items():
        for name, held in vars(model.get_submodule(place)).items():
            if name.startswith("_") or type(held) is not int or len(sizes.get(held, ())) != 1:
                continue
            (new,) = sizes[held]
            might.setdefault(place, {})[name] = new
            if _counts_heads(name):
                sure.setdefault(place, {})[name] = new
    return sure, might


def _counts_heads(attribute: str) -> bool:
    if any(word in attribute for word in NOT_COUNTS):
        return False
    return any(word in attribute for word in HEAD_COUNTS)


def _resized(value: Value, gone: Tensor) -> list[tuple[int, int]]:
    """Old and new size of each dimension that shrinks."""
    if value.labels is None:
        return []
    lost = (value.labels >= 0) & gone[value.labels.clamp(min=0)]
    if not lost.any():
        return []
    sizes = []
    for dim in varying(value.labels):
        size = lost.shape[dim]
        slices = lost.movedim(dim, 0).reshape(size, -1)
        left = size - int(slices.all(1).sum())
        if left != size:
            sizes.append((size, left))
    return sizes


def mask(twin: nn.Module, pruned: nn.Module, kept: dict[Key, Tensor]) -> nn.Module:
    """Fill `twin`, a copy of the original, with the pruned model's values where channels stay, and
    with zeros where they were removed. Tensors that the two share are left.

    Zeros go where a layer makes or reads the removed channels and into norms' scales; elsewhere
    (running statistics, operands of divisions) the removed channels keep their values, which no
    longer matter.
    """
    cuts = _by_name(kept)
    with torch.no_grad():
        for name, small in [*pruned.named_parameters(), *pruned.named_buffers()]:
            path, _, local = name.rpartition(".")
            full = stored(twin.get_submodule(path), local)
            if full is not small:
                _fill(full, small, local, cuts.get(name, {}))
    return twin


def _fill(full: Tensor, small: Tensor, local: str, cuts: dict[int, Tensor]) -> None:
    """Write a tensor, called `local` in its module, into the full one that it was cut from."""
    scales = full.ndim > 1 or local in ("weight", "bias")
    grid = []
    for dim, size in enumerate(full.shape):
        indices = cuts.get(dim, torch.arange(size)).to(full.device)
        shape = [1] * full.ndim
        shape[dim] = -1
        grid.append(indices.view(shape))
        if dim in cuts and scales and not local.startswith("running_"):
            gone = torch.ones(size, dtype=torch.bool, device=full.device)
            gone[indices] = False
            full.index_fill_(dim, gone.nonzero().flatten(), 0)
    if full.shape == small.shape:
        full.copy_(small)
    else:
        full[tuple(grid)] = small
