"""Labels: which elements of a tensor disappear together when a channel is removed.

Every index along a parameter's dimension is a label. A traced value carries an int64 tensor of
labels with as many dimensions as the value, each of full size or of size 1 (the label doesn't
change along it); -1 means: never removed. Moving data (view, permute, cat, split) is the same move
done to the labels; arithmetic that meets two labels ties them (an edge); what can't be followed
pins them, with the reason. The connected labels that are not pinned are what pruning can remove.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Key = tuple[str, int]  # a dimension of a parameter or buffer: its name and the dimension


@dataclass(frozen=True)
class Value:
    """What is known of one tensor in the graph. `source`: a parameter's name and the moves made to
    it since.
    """

    shape: tuple[int, ...]
    labels: Tensor | None = None
    source: tuple[str, tuple[Callable[[Tensor], Tensor], ...]] | None = None


def varying(labels: Tensor | None) -> set[int]:
    """Dimensions along which the labels change."""
    if labels is None:
        return set()
    return {dim for dim, size in enumerate(labels.shape) if size > 1}


def compress(index: Tensor) -> Tensor:
    """Narrow to size 1 every dimension along which nothing changes."""
    for dim, size in enumerate(index.shape):
        if size < 2:
            continue
        first = index.narrow(dim, 0, 1)
        if index.stride(dim) == 0 or bool((index == first).all()):
            index = first
    return index


class Labels:
    """The labels of all parameters of a model, the ties between them and the pins on them."""

    def __init__(self, shapes: dict[str, torch.Size]):
        self.shapes = shapes  # parameters and buffers by name
        self.keys: dict[Key, Tensor] = {}  # labels along each dimension in use
        # dimensions that are some layer's output channels, and the operation
        self.outputs: dict[Key, str] = {}
        # dimensions that are summed over, and the module whose forward does it
        self.inputs: dict[Key, str] = {}
        self.count = 0
        self.edges: list[Tensor] = []  # [N, 2] each
        self.pins: list[tuple[Tensor, str]] = []
        self.ragged: list[Tensor] = []  # labels that change along two dimensions or more

    def along(self, name: str, dim: int) -> Tensor:
        """Labels [size] along a dimension of a parameter, made on first use."""
        if (name, dim) not in self.keys:
            size = self.shapes[name][dim]
            self.keys[name, dim] = torch.arange(self.count, self.count + size)
            self.count += size
        return self.keys[name, dim]

    def tie(self, a: Tensor, b: Tensor, why: str) -> None:
        """a and b, of one shape, name the same elements: they go together; one without a label pins
        the other.
        """
        a, b = torch.broadcast_tensors(a, b)
        both = (a >= 0) & (b >= 0)
        pairs = torch.stack((a[both], b[both]), 1)
        self.edges.append(pairs.unique(dim=0))
        alone = ~both
        self.pin(torch.cat((a[alone], b[alone])), why)

    def pin(self, labels: Tensor | None, why: str) -> None:
        """These are never removed."""
        if labels is None:
            return
        real = labels[labels >= 0]
        if real.numel():
            self.pins.append((real.unique(), why))

    def collapse(self, labels: Tensor, dim: int, why: str) -> Tensor | None:
        """The operation needs `dim` whole: tie along it when the labels also change elsewhere, else
        pin.
        """
        if labels.shape[dim] == 1:
            return labels
        if varying(labels) == {dim}:
            self.pin(labels, why)
            return None
        merged = labels.amax(dim, keepdim=True)
        self.tie(labels, merged, why)
        return merged

    def collapse_all(self, value: Value, dims: Sequence[int], why: str) -> Tensor | None:
        """Collapse several dimensions (negative ones count from the end)."""
        labels = value.labels
        for dim in sorted({d % len(value.shape) for d in dims}):
            if labels is not None:
                labels = self.collapse(labels, dim, why)
        return labels

    def axes(self, value: Value) -> dict[int, Tensor]:
        """For a moved parameter: index into each of its dimensions, at every element of the
        value.
        """
        if value.source is None:
            return {}
        name, moves = value.source
        shape, found = self.shapes[name], {}
        for dim, size in enumerate(shape):
            alone = [-1 if d == dim else 1 for d in range(len(shape))]
            index = torch.arange(size).view(alone).expand(shape)
            for move in moves:
                index = move(index)
            found[dim] = compress(index)
        return found

    def weight(self, value: Value) -> tuple[str, list[int]] | None:
        """A parameter's name and which of its dimensions stands at each dimension of the value, if
        only permuted.
        """
        if value.source is None:
            return None
        name, _ = value.source
        order: list[int] = [-1] * len(value.shape)
        for dim, index in self.axes(value).items():
            size = self.shapes[name][dim]
            if not torch.equal(index.flatten(), torch.arange(size)):
                return None
            free = [p for p, n in enumerate(value.shape) if n == size and order[p] < 0]
            places = [place for place in free if varying(index) <= {place}]
            if not places:
                return None
            order[places[0]] = dim
        return None if -1 in order else (name, order)

    def settle(self, shape: Sequence[int], labels: Tensor | None, why: str = "") -> Value:
        """Make a value; a label on a whole tensor means that one channel was picked out by number,
        which pins it.
        """
        if labels is not None:
            labels = compress(labels)
            if not varying(labels):
                self.pin(labels, why)
                labels = None
        if labels is not None and len(varying(labels)) > 1:
            self.ragged.append(labels)
        return Value(tuple(shape), labels)

    def elementwise(self, values: Sequence[Value], shape: Sequence[int], why: str) -> Value:
        """Operands that meet element by element, broadcast to `shape`."""
        if len(values) == 1:
            (only,) = values
            if only.source and tuple(only.shape) == tuple(shape):
                return only
        sizes, labels = [], []
        for value in values:
            before = (1,) * (len(shape) - len(value.shape))
            sizes.append(before + tuple(value.shape))
            own = value.labels
            labels.append(None if own is None else own.view(before + own.shape))
        named: set[int] = set()
        if not any(x is not None for x in labels):
            self._label_vectors(values, sizes, labels, named)
        while self._make_room(values, sizes, labels, named, why):
            pass
        present = [x for x in labels if x is not None]
        if not present:
            return Value(tuple(shape))
        result = present[0]
        for other in present[1:]:
            self.tie(result, other, why)
            result = torch.maximum(*torch.broadcast_tensors(result, other))
        return self.settle(shape, result, why)

    def _label_vectors(
        self, values: Sequence[Value], sizes: list, labels: list, named: set[int]
    ) -> None:
        """Label parameters that have one number per channel and meet nothing but such: what a norm
        multiplies by (torchvision's FrozenBatchNorm2d) has its channels.
        """
        long = [{d for d, size in enumerate(own) if size > 1} for own in sizes]
        vectors = [i for i, dims in enumerate(long) if dims]
        first = long[vectors[0]] if vectors else set()
        alike = len(first) == 1 and all(long[i] == first for i in vectors)
        if len(vectors) > 1 and alike and all(values[i].source for i in vectors):
            for i in vectors:
                named.add(i)
                labels[i] = self._label_parameter(values[i], len(sizes[i]), first)

    def _make_room(
        self, values: Sequence[Value], sizes: list, labels: list, named: set[int], why: str
    ) -> bool:
        """One step towards operands that all shrink alike: label a parameter, or collapse what
        another needs whole.

        A parameter is labelled once (`named`), and no other step makes labels vary along more
        dimensions: the steps end.
        """
        moving = set().union(*(varying(x) for x in labels))
        for i, value in enumerate(values):
            full = {d for d in moving if sizes[i][d] > 1}
            missing = full - varying(labels[i])
            if not missing:
                continue
            if labels[i] is None and value.source and full == moving and i not in named:
                named.add(i)
                labels[i] = self._label_parameter(value, len(sizes[i]), full)
                if labels[i] is not None:
                    return True
            for j, other in enumerate(labels):
                clash = missing & varying(other)
                if clash and j != i:
                    labels[j] = self.collapse(other, min(clash), why)
                    return True
        return False

    def _label_parameter(self, value: Value, n: int, dims: set[int]) -> Tensor | None:
        """Labels of a parameter that meets labelled data along `dims` (of the n dimensions it is
        broadcast to).
        """
        assert value.source is not None
        name, _ = value.source
        for dim, index in self.axes(value).items():
            index = index.reshape((1,) * (n - index.ndim) + index.shape)
            if varying(index) == dims:
                return self.along(name, dim)[index]
        return None
