"""Find modules in a copy of a model and replace them.

`clone` (a transform never touches its input), `select` (which modules), `replace` (one tree walk
for every swap), `rebuild` (the same swaps on a fresh model). What was done is noted in the
structure record (record.py); resizing.py gives a module other shapes.
"""

from __future__ import annotations

import copy
import fnmatch
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantize.surgery.candidates import take_place
from quantize.surgery.folder import guard_folders
from quantize.surgery.kept import Swap, copy_closures
from quantize.surgery.record import BUILDERS, check_count, edits_of, join, record
from quantize.surgery.sizes import widths

Skip = Sequence[str | type[nn.Module]]
_CONTAINERS = (OrderedDict, dict, set)


def clone(model: nn.Module, *, sharing: Iterable[Tensor] = ()) -> nn.Module:
    """Deep copy: tensors that modules share stay shared, hooks and training flags stay.

    Args:
        sharing: tensors that the copy holds too, in place of copies of them.

    Raises:
        TypeError: for a TorchScript module, or one inside: they can't be edited.
    """
    check_editable(model)
    copied = deepcopy(uncompiled(model), {id(tensor): tensor for tensor in sharing})
    guard_folders(copied)
    return copied


def device_of(model: nn.Module) -> torch.device:
    """That of the first of its tensors; the CPU if it has none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def at(device: torch.device | str, model: nn.Module) -> nn.Module:
    """`model` if it is on this device or has no data, else a `clone` that is there."""
    has, wanted = device_of(model), torch.device(device)
    is_there = has.type == wanted.type and wanted.index in (None, has.index)
    return model if is_there or has.type == "meta" else clone(model).to(wanted)


def shell(model: nn.Module) -> nn.Module:
    """A `clone` that holds the model's own parameters: to look at, in other modes and with other
    hooks, while nobody writes to them. Parameters that have no shape yet are copied, and those made
    in inference mode, which take no gradients.
    """
    check_editable(model)
    own = [p for p in model.parameters() if nn.parameter.is_lazy(p) or p.is_inference()]
    copied = {id(parameter) for parameter in own}
    return clone(model, sharing=[p for p in model.parameters() if id(p) not in copied])


def is_eager(model: object) -> TypeGuard[nn.Module]:
    """Whether `model` is an nn.Module that Python runs, and no TorchScript."""
    return isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule)


def check_editable(model: nn.Module) -> None:
    """Raise TypeError for what is no module, and for a TorchScript module, which it names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            which = f"module {name!r}" if name else "model"
            raise TypeError(
                f"{which} is a TorchScript module, which can't be edited: take what it was "
                f"made from in its place"
            )


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what `torch.compile(model)` gives, or `model` itself: compile the result
    again.
    """
    inner = model._modules.get("_orig_mod")
    if type(model).__name__ == "OptimizedModule" and inner is not None:
        return inner
    return model


def deepcopy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy`, also of models that keep results of a computation (activations, normalized
    weights), as values. Modules that make themselves anew when they are copied (einops' layers)
    stay in their mode.

    Raises TypeError naming the module that holds something that can't be copied.
    """
    memo = {} if memo is None else memo
    _note_empty(model, memo)
    try:
        with _ResultsAsValues():
            copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{_uncopiable(model)} can't be copied: {error}") from error
    copy_closures(copied, memo)
    for module in model.modules():
        twin = memo.get(id(module))
        if isinstance(twin, nn.Module) and twin.training != module.training:
            twin.training = module.training
    return copied


def _note_empty(model: nn.Module, memo: dict[int, Any]) -> None:
    """Put new ones for the empty dictionaries and sets of all modules into the memo of a deep copy:
    each module has a dozen, mostly for hooks, and half of the time went into copying them.
    """
    values = itertools.chain.from_iterable(vars(module).values() for module in model.modules())
    empty = [value for value in values if type(value) in _CONTAINERS and not value]
    for value in empty:
        memo.setdefault(id(value), type(value)())
    memo.setdefault(id(memo), []).extend(empty)  # as `copy` does, so that no other gets their ids


class _ResultsAsValues(TorchFunctionMode):
    """Inside, a deep copy of a tensor with a history is one without: `Tensor.__deepcopy__` refuses
    those.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = tensor.detach().clone()
        return memo[id(tensor)]


def _uncopiable(model: nn.Module) -> str:
    """The innermost module whose own attributes can't be copied, in words."""
    for name, module in reversed(list(model.named_modules())):
        own = {key: value for key, value in module.__dict__.items() if key != "_modules"}
        try:
            with _ResultsAsValues():
                copy.deepcopy(own)
        except (TypeError, RuntimeError):
            return f"module {name!r} ({type(module).__name__})" if name else type(module).__name__
    return type(model).__name__


def skip_filter(model: nn.Module, skip: Skip) -> Callable[[str, nn.Module], bool]:
    """Predicate over (name, module): is it, or a module around it, named by `skip`?"""
    if isinstance(skip, (str, type)):
        raise TypeError(
            f"skip must be a sequence of names and types, got {skip!r}; write skip=({skip!r},)"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    patterns = [entry for entry in skip if isinstance(entry, str)]
    kinds = tuple(s for s in skip if isinstance(s, type) and issubclass(s, nn.Module))
    for entry in skip:
        if entry not in patterns and entry not in kinds:
            raise TypeError(f"skip takes names, globs and nn.Module types, got {entry!r}")
    for name in patterns:
        if not set(name) & set("*?[") and name not in modules:
            raise ValueError(
                f"skip names {name!r}, which is not a module of {type(model).__name__}"
            )

    def skipped(name: str, module: nn.Module) -> bool:
        parts = name.split(".")
        around = [".".join(parts[: end + 1]) for end in range(len(parts))]
        if any(isinstance(part, kinds) for part in (module, *map(modules.get, around))):
            return True
        pairs = itertools.product(around, patterns)
        return any(fnmatch.fnmatchcase(place, pattern) for place, pattern in pairs)

    return skipped


def replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put each value where its key stands in `model`, in place and at every place, also where an
    attribute keeps it (see `kept`); returns the (possibly new) root.

    Edits recorded on the old module, or inside it, go over to the new one: they come first when a
    file repeats them.
    """
    for old, new in replacements.items():
        if new is not old:
            _inherit(old, new)
    return exchange(model, replacements)


def exchange(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """`replace`, for modules that have all edits of what they replace already."""
    swap = Swap(replacements)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
        swap(parent)
    return replacements.get(model, model)


def _inherit(old: nn.Module, new: nn.Module) -> None:
    """Give the edits of `old`, and of all in it, to what stands in its place."""
    own = list(edits_of(old))
    inherited = []
    for name, module in old.named_modules():
        inherited += [
            (kind, arguments, join(name, inner)) for kind, arguments, inner in edits_of(module)
        ]
    for module in old.modules():  # the new module may hold the old one
        module.__dict__.pop("_structure", None)
    if inherited:
        copied = list(edits_of(new)[: len(own)]) == own
        new.__dict__["_structure"] = [*inherited, *edits_of(new)[len(own) if copied else 0 :]]


def rebuild(model: nn.Module, edits: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Apply a structure record to a fresh `model`, in place; returns the (possibly new) root.

    Raises ValueError naming the module for an edit that doesn't fit the model.
    """
    check_count(edits)
    places = _Places(model)
    for edit in edits:
        name = edit["module"]
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"the model ({type(model).__name__}) has no module {name[:200]!r}"
            ) from None
        new = _built(name, module, edit["builder"], edit["arguments"])
        if new is not module:
            places.replace(module, new)
            model = new if module is model else model
        places.note(new, deep=new is not module)
    places.finish(model)
    guard_folders(model)
    return model


def _built(
    name: str, module: nn.Module, builder_name: str, arguments: Mapping[str, Any]
) -> nn.Module:
    """What one edit makes of `module`, recorded."""
    if builder_name not in BUILDERS:
        raise ValueError(
            f"module {name!r}: unknown kind of edit {builder_name[:200]!r}; known: "
            f"{sorted(BUILDERS)}"
        )
    before, sizes = list(edits_of(module)), widths(module)
    try:
        new = BUILDERS[builder_name](module, **arguments)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"module {name!r} can't become {builder_name}: {str(error)[:300]}"
        ) from error
    if new is not module:
        take_place(module, new)
        for key, size in widths(new).items():
            if sizes.get(key, size) != size:
                raise ValueError(
                    f"module {name!r} can't become {builder_name}: {key} is {sizes[key]}, the "
                    f"edit says {size}"
                )
    if list(edits_of(new)) in ([], before):  # the builder didn't record it itself
        record(new, builder_name, **arguments)
    return new


class _Places:
    """Where each module of a model stands: a swap then costs no walk through the model."""

    def __init__(self, model: nn.Module) -> None:
        self.parents: dict[nn.Module, dict[tuple[int, str], nn.Module]] = {}
        self.swaps: list[tuple[nn.Module, nn.Module]] = []  # in their order
        self.note(model, deep=True)

    def note(self, module: nn.Module, deep: bool) -> None:
        """Write down where the children of `module` stand, and with `deep` those of all in it."""
        for parent in module.modules() if deep else (module,):
            for key, child in parent._modules.items():
                if child is not None:
                    self.parents.setdefault(child, {})[id(parent), key] = parent

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """As `replace` does it for one module."""
        _inherit(old, new)
        here = self.parents.pop(old, {})
        for (_, key), parent in here.items():
            if parent._modules.get(key) is old:
                parent._modules[key] = new
        self.parents.setdefault(new, {}).update(here)
        self.swaps.append((old, new))

    def finish(self, model: nn.Module) -> None:
        """Replace in plain attributes, too."""
        newest: dict[nn.Module, nn.Module] = {}
        for old, new in reversed(self.swaps):
            newest[old] = newest.get(new, new)
        made = {new for _, new in self.swaps}
        swap = Swap(newest)
        for module in model.modules():
            if module not in made:
                swap(module)
