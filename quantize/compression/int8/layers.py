"""Which layers of a model can become int8, why the others can't, and the change itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantize import surgery
from quantize.nn import without_fast_paths
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_conv import Int8Conv
from quantize.nn.int8_embedding import Int8Embedding, Int8EmbeddingBag
from quantize.nn.int8_experts import Int8Experts, pack_experts
from quantize.nn.int8_outliers import Int8OutlierLinear
from quantize.nn.int8_recurrent import Int8GRU, Int8LSTM
from quantize.nn.int8_transposed import Int8ConvTranspose, windows_touch

INT8 = (Int8Linear, Int8Conv, Int8ConvTranspose, Int8Embedding, Int8LSTM, Int8GRU, Int8Experts)
LARGE_TABLE = 1 << 20  # numbers of an embedding that becomes int8 by itself,
_LARGE_PART = 1 << 16  # and of one that holds a tenth of the model's
_SMALL = 32  # weights of an output of a convolution
_KINDS = "only linear layers, convolutions, LSTMs, GRUs, cells, embeddings and experts"
Report = dict[str, str]  # by layer: why it stays in float
Skipped = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Plan:
    """How a linear layer becomes int8 where some channels of its input are outliers.

    Args:
        factor: float32 [in], of the inputs that are quantized.
        channels: int64 [C], those that count in float.
    """

    factor: Tensor
    channels: Tensor

    def made(self, weight: Tensor, bias: Tensor | None) -> Int8OutlierLinear:
        """The int8 layer of a float weight [out, in]."""
        return Int8OutlierLinear.from_outliers(weight, bias, self.factor, self.channels)


@dataclass(frozen=True)
class Stored:
    """A layer whose weight is stored in int8 and which computes in float. reason: why it does."""

    reason: str


@dataclass(frozen=True)
class Rounded:
    """Weights of a recurrent layer by their names in it (`hh_l0`): int8 and scale."""

    weights: Mapping[str, tuple[Tensor, Tensor]]


# By layer, of those that don't become int8 like all others.
Plans = Mapping[str, Plan | Stored | Rounded]


@dataclass(frozen=True)
class Choice:
    """Layers by name: facts of those that become int8, and why others stay in float."""

    chosen: dict[str, surgery.Facts]
    left: Report

    def groups(self) -> list[tuple[str, ...]]:
        """The chosen layers in groups that share a weight; most are alone."""
        found = {}
        for fact in self.chosen.values():
            group = tuple(name for name in fact.holders if name in self.chosen)
            found[group] = None
        return list(found)

    def without(self, reasons: Report) -> Choice:
        """The choice less the layers in `reasons`, and less those that share a weight with one."""
        left = self.left | reasons
        chosen = {}
        for name, fact in self.chosen.items():
            holder = next((other for other in fact.holders if other in reasons), None)
            if holder is None:
                chosen[name] = fact
            elif name not in reasons:
                left[name] = _shares(holder)
        return Choice(chosen, left)


def choose(model: nn.Module, skipped: Skipped, embeddings: bool | None) -> Choice:
    """All layers that can become int8.

    Raises: ValueError: one has a weight that is not finite.
    """
    facts = surgery.facts(model)
    total = sum(p.numel() for p in model.parameters())
    chosen: dict[str, surgery.Facts] = {}
    left: Report = {}
    for name, module in model.named_modules():
        fact = facts.get(name)
        if fact is not None and _has_kind(fact):
            reason = _obstacle(name, facts, skipped, embeddings, total)
            if reason is None:
                surgery.check_finite(name, module)
                chosen[name] = fact
            else:
                left[name] = reason
        elif surgery.holds_matrix(module):
            kind = type(module).__name__
            left[name] = f"a {kind}: {_KINDS} become int8"
    return Choice(chosen, left)


def _has_kind(fact: surgery.Facts) -> bool:
    return computes(fact) or fact.table or fact.experts


def computes(fact: surgery.Facts) -> bool:
    """Is it a layer that multiplies?"""
    return fact.linear or fact.recurrent or fact.convolution or fact.transposed_convolution


def can_be_stored(fact: surgery.Facts) -> bool:
    """Is it a layer that can store int8 and compute in float?"""
    return fact.convolution or fact.transposed_convolution


def small(choice: Choice) -> Report:
    """The chosen convolutions that are slower in int8 on every machine and hold next to nothing."""
    found: Report = {}
    for name, fact in choice.chosen.items():
        module: Any = fact.module
        if not fact.convolution or is_depthwise(module):
            continue
        count = module.weight[0].numel()
        if count < _SMALL:
            found[name] = f"each of its outputs has {count} weights, too few for an int8 product"
    return found


def overlapping(choice: Choice) -> Report:
    """The chosen layers that can be stored in int8, but not computed in it."""
    return {
        name: "a transposed convolution whose windows overlap or are padded"
        for name, fact in choice.chosen.items()
        if fact.transposed_convolution and not windows_touch(fact.module)
    }


def is_depthwise(conv: Any) -> bool:
    """Does each output of a convolution look at a channel of its own?"""
    return 1 < conv.groups == conv.in_channels == conv.out_channels


def _obstacle(
    name: str,
    facts: dict[str, surgery.Facts],
    skipped: Skipped,
    embeddings: bool | None,
    total: int,
) -> str | None:
    """Why this layer stays in float, or None. total: numbers of the model."""
    fact = facts[name]
    if skipped(name, fact.module):
        return "named by skip"
    if fact.obstacle is not None:
        return fact.obstacle
    others = [other for other in fact.holders if other != name]
    tied = any(facts[other].linear for other in others if other in facts)
    if fact.table and not (tied or embeddings):
        numbers = sum(p.numel() for p in fact.module.parameters())
        large = numbers >= LARGE_TABLE or (numbers >= _LARGE_PART and 10 * numbers >= total)
        if embeddings is False or not large:
            return f"an embedding of {numbers} numbers: embeddings=True quantizes it"
    for other in others:
        held = facts.get(other)
        if held is None or not _follows(held, fact) or skipped(other, held.module):
            return _shares(other)
    return None


def _shares(other: str) -> str:
    return f"it shares its weight with {other}, which stays as it is"


def _follows(held: surgery.Facts, fact: surgery.Facts) -> bool:
    """Can the layer that holds the same weight be converted too, and to the same integers?"""
    kind = held.linear or held.table
    return kind and held.obstacle is None and held.transposed == fact.transposed


def convert(model: nn.Module, names: Collection[str], plans: Plans | None = None) -> nn.Module:
    """Put int8 layers in the places of those `names`, in place; returns the (possibly new) root.

    Args:
        model: changed in place.
        names: of the layers.
        plans: by layer, for those that have outliers or compute in float.
    """
    facts = surgery.facts(model)
    replacements: dict[nn.Module, nn.Module] = {}
    # By identity of the float weight: layers that shared it share the int8 one.
    tables: dict[int, Any] = {}
    for name in names:
        fact = facts[name]
        if fact.experts:
            pack_experts(fact.module)
            continue
        new = converted(fact, (plans or {}).get(name))
        weight = fact.module._parameters.get("weight")
        if weight is not None:
            first = tables.setdefault(id(weight), new)
            new.packed, new.scale = first.packed, first.scale
        replacements[fact.module] = new
    for old, new in replacements.items():
        surgery.take_place(old, new)
    model = surgery.replace(model, replacements)
    without_fast_paths(model)
    return model


def converted(fact: surgery.Facts, plan: Plan | Stored | Rounded | None = None) -> Any:
    """The int8 layer that takes the place of a float one."""
    module: Any = fact.module
    if fact.recurrent:
        kind = Int8LSTM if isinstance(module, nn.LSTM) else Int8GRU
        return kind.from_layer(module, plan.weights if isinstance(plan, Rounded) else None)
    if fact.transposed_convolution:
        return Int8ConvTranspose.from_layer(module, floats=isinstance(plan, Stored))
    if fact.convolution:
        return Int8Conv.from_layer(module, floats=isinstance(plan, Stored))
    if fact.table:
        bag = isinstance(module, nn.EmbeddingBag)
        return (Int8EmbeddingBag if bag else Int8Embedding).from_layer(module)
    weight = module.weight.t() if fact.transposed else module.weight
    made = plan.made if isinstance(plan, Plan) else Int8Linear.from_weight
    new = made(weight, module.bias)
    new.transposed = fact.transposed
    return new
