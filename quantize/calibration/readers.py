"""Which module alone reads what another one gives, seen while the model runs.

Every torch function that is given such an output is seen, and so is whoever keeps it; likewise
those that are given a weight of a module that isn't at work. Left out: code that reads memory
without torch.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from quantize.calibration.inputs import call, watching


@torch.no_grad()  # a graph would hold the outputs
def followers(
    model: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module]
) -> dict[str, str]:
    """For each of `layers` that runs once a batch, in eval mode, and whose output goes into one
    other module and nowhere else: the name of that module. On all batches. Left out where that
    module runs more than once, or where something else computes with a tensor of the two.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, set[str]] = {name: set() for name in layers}
    for batch in batches:
        seen = _Seen(layers, names)
        with watching(seen.handles(model), model):
            with seen:
                result = call(model, batch)
            seen.note_uses(tree_leaves(result))
            del result
            for name in layers:  # before the model's attributes are what they were
                found[name].add(seen.reader(name))
    single = {name: readers.pop() for name, readers in found.items() if len(readers) == 1}
    return {name: reader for name, reader in single.items() if reader}


class _Seen(TorchFunctionMode):
    """What happens to the outputs of layers during one call of the model."""

    def __init__(self, layers: Mapping[str, nn.Module], names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.layers, self.names = layers, names
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # by identity
        self.readers: dict[str, list[str]] = {name: [] for name in layers}
        self.calls: Counter[str] = Counter()  # of modules that hold no others
        self.holders: dict[int, str] = {}  # by identity of a tensor
        for module, name in names.items():
            own = (*module._parameters.values(), *module._buffers.values())
            self.holders |= {id(tensor): name for tensor in own if tensor is not None}
        self.shown: set[str] = set()  # modules with whose tensors others compute
        self.working: list[str] = []
        self.reading: list[Any] = []  # outputs that modules at work were given

    def handles(self, model: nn.Module) -> list[Any]:
        """Hooks that see modules at work."""
        made = []
        for module in model.modules():
            if not module._modules:  # only those without modules inside
                made.append(module.register_forward_pre_hook(self._before))
                made.append(module.register_forward_hook(self._after, always_call=True))
        return made

    def _before(self, module: nn.Module, args: Any) -> None:
        given = args[0] if len(args) == 1 else None
        known = self.outputs.get(id(given))
        if known is not None:
            self.readers[known[0]].append(self.names[module])
        self.reading.append(given if known is not None else None)
        self.working.append(self.names[module])

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.working.pop()
        if self.reading.pop() is output:  # changed in place: from here on it is this module's
            self.outputs.pop(id(output), None)
        name = self.names[module]
        self.calls[name] += 1
        if name in self.layers and isinstance(output, Tensor):
            self.outputs[id(output)] = name, output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = tree_leaves((args, kwargs or {}))
        self.note_uses([value for value in values if not self._is_being_read(value)])
        result = func(*args, **(kwargs or {}))
        held = [self.holders[id(value)] for value in values if id(value) in self.holders]
        if held and any(isinstance(part, Tensor) for part in tree_leaves(result)):
            self.shown.update(name for name in held if name not in self.working)
        return result

    def _is_being_read(self, value: Any) -> bool:
        return any(value is given for given in self.reading)

    def note_uses(self, values: list[Any]) -> None:
        """These are used by something that is no module."""
        for value in values:
            known = self.outputs.get(id(value))
            if known is not None:
                self.readers[known[0]].append("")

    def reader(self, name: str) -> str:
        """Of this layer's output: the only one, or "" where there are others, or none."""
        readers = self.readers[name]
        both = {name, *readers}
        if len(readers) != 1 or both & self.shown or any(self.calls[one] != 1 for one in both):
            return ""
        for known, output in self.outputs.values():
            # this variable, the tuple, and the argument of the call hold it
            if known == name and sys.getrefcount(output) > 3:
                return ""
        return readers[0]
