"""The user's batches by step: some to train on, the others held out to judge what training has
reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from quantize.calibration import check_batches
from quantize.training import Batches, ranks

Batch = tuple[Any, Any, int]  # inputs, targets (or None), number of the batch

MOST_HELD = 4  # batches: each costs a pass of both models whenever training is judged
FEWEST = 4  # batches of which whole ones are held out; of fewer, rows of each


class Numbered:
    """A function from step to the batch to train on, and `held`, the batches that no step trains
    on.

    An eighth of a sequence is held out, at most `MOST_HELD` batches; of fewer than `FEWEST`
    batches, some rows of each (an eighth, a quarter of few); of two or three batches with few rows,
    one batch. A function from step to batch is asked for a few steps after the last. Where nothing
    can be held out (one batch of less than 4 rows, a function that ends), `held` are batches that
    are trained on too, and `about` says so.

    Args:
        batches: re-iterable sequence, or a function from step to batch.
        paired: whether a batch is a pair of inputs and targets.
        steps: how many steps there will be.
    """

    def __init__(self, batches: Iterable[Any] | Batches, *, paired: bool, steps: int) -> None:
        self.paired = paired
        self._kind = "held out"
        most = min(MOST_HELD, max(1, steps // 8))
        if callable(batches) and not isinstance(batches, Iterable):
            self._batch: Callable[[int], tuple[Any, int]] = lambda step: (batches(step), step)
            self.held = self._held_by_function(steps, most)
            return
        cycle = _Cycle(check_batches(batches, "batches"))
        self._batch = cycle
        counts = (
            [rows_of(cycle.at(index)) for index in range(cycle.count)]
            if cycle.count < FEWEST
            else []
        )
        if counts and min(counts) >= (4 if cycle.count == 1 else 8):
            self.held = self._held_rows(cycle, counts)
        elif cycle.count > 1:
            cycle.hold_out(min(most, max(1, cycle.count // 8)))
            self.held = [self._checked(batch, index) for batch, index in cycle.held()]
        else:
            self._kind = "trained on too"
            self.held = [self._checked(cycle.at(0), 0)]

    @property
    def about(self) -> str:
        """The batches of `held`, in words."""
        if self._kind == "the last rows":
            return "the last rows of each batch (held out)"
        numbers = ", ".join(str(index) for _, _, index in self.held)
        return f"batch{'es' if len(self.held) > 1 else ''} {numbers} ({self._kind})"

    def __call__(self, step: int) -> Batch:
        batch, index = self._batch(step)
        return self._checked(batch, index)

    def _checked(self, batch: Any, index: int) -> Batch:
        if not self.paired:
            return batch, None, index
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                f"with loss, a batch is a pair (inputs, targets); batch {index} is a "
                f"{type(batch).__name__}"
            )
        return batch[0], batch[1], index

    def _held_by_function(self, steps: int, most: int) -> list[Batch]:
        try:
            return [self(steps + i) for i in range(most)]
        except LookupError:  # it ends with the last step
            self._kind = "trained on too"
            return [self(i * steps // most) for i in range(most)]

    def _held_rows(self, cycle: _Cycle, counts: list[int]) -> list[Batch]:
        held = []
        for index, count in enumerate(counts):
            cycle.cut.append(count - max(count // 8, min(8, count // 4)))
            part = rows(cycle.at(index), cycle.cut[index], None)
            held.append(self._checked(part, cycle.count + index))
        self._kind = "the last rows"
        return held


def rows_of(batch: Any) -> int:
    """How many rows all tensors of a batch have; 0 where they differ or there is anything else in
    it.
    """
    leaves = pytree.tree_leaves(batch)
    counts = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim > 0 else 0 for leaf in leaves}
    return counts.pop() if len(counts) == 1 else 0


def rows(batch: Any, first: int, last: int | None) -> Any:
    """Rows first .. last - 1 of every tensor of a batch."""
    return pytree.tree_map(lambda tensor: tensor[first:last], batch)


class _Cycle:
    """Batches of a re-iterable in order, over and over; the ranks take turns."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches: Any = batches
        self.indexable = hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
        self.count = len(self.batches) if self.indexable else sum(1 for _ in batches)
        self.next, self.iterator = self.count, iter(())
        self.trained = list(range(self.count))
        self.cut: list[int] = []  # rows of each batch to train on; empty: all

    def hold_out(self, most: int) -> None:
        """Leave out `most` batches, evenly spaced."""
        spaced = {(2 * i + 1) * self.count // (2 * most) for i in range(most)}
        self.trained = [index for index in range(self.count) if index not in spaced]

    def held(self) -> list[tuple[Any, int]]:
        """The batches left out, with their numbers."""
        left = sorted(set(range(self.count)) - set(self.trained))
        return [(self.at(index), index) for index in left]

    def __call__(self, step: int) -> tuple[Any, int]:
        rank, world = ranks()
        index = self.trained[(step * world + rank) % len(self.trained)]
        batch = self.at(index)
        return (rows(batch, 0, self.cut[index]) if self.cut else batch), index

    def at(self, index: int) -> Any:
        if self.indexable:
            return self.batches[index]
        if index < self.next:
            self.next, self.iterator = 0, iter(self.batches)
        for batch in self.iterator:
            self.next += 1
            if self.next == index + 1:
                return batch
        raise ValueError(f"batches ended after {self.next}; the first time there were {self.count}")
