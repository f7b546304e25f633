"""Steps that remove parts of a model or round its weights, each around one public function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from quantize import surgery
from quantize.compression.blocks import drop_blocks
from quantize.compression.half import to_half
from quantize.compression.int4 import quantize_weights
from quantize.compression.int8 import quantize_dynamic, tell_distance
from quantize.compression.low_rank import factorize_low_rank
from quantize.compression.pruning import prune_ln_structured
from quantize.compression.recipe import checks
from quantize.compression.recipe.value import Given, Step
from quantize.nn.half import HALF_DTYPES
from quantize.nn.int4 import GROUP_SIZES

Share = float | Mapping[str, float]


@dataclass(frozen=True)
class Prune(Step):
    """`prune_ln_structured`: remove channels, neurons and heads.

    Args:
        amount: fraction removed, in [0, 1), or a dict to it from names and globs of layers.
        n: order of the norm, > 0.
        skip: names and globs of layers that stay.
    """

    amount: Share = field(default=0.5, hash=False)
    n: float = 2.0
    skip: Sequence[str] = ()
    removes = True
    part = "pruned"

    def __post_init__(self) -> None:
        amount = checks.shares(self, "amount", "[0, 1)")
        n = checks.number(self, "n", "(0, inf]")
        self._set(amount=amount, n=n, skip=checks.names(self, "skip"))

    def __call__(self, model: nn.Module, given: Given) -> nn.Module:
        """A smaller copy of `model`; raises what `prune_ln_structured` raises."""
        return prune_ln_structured(model, given.inputs_of(self), **vars(self), **given.seen)


@dataclass(frozen=True)
class LowRank(Step):
    """`factorize_low_rank`: a layer becomes a pair of thin ones.

    Args:
        ratio: fraction of the parameters kept, in (0, 1], or a dict to it from names and globs.
        skip: names and globs of layers that stay.
        only_faster: whether a stopwatch decides where to factorize; None: where it can.
    """

    ratio: Share = field(default=0.5, hash=False)
    skip: Sequence[str] = ()
    only_faster: bool | None = None
    removes = True
    part = "low_rank"

    def __post_init__(self) -> None:
        ratio = checks.shares(self, "ratio", "(0, 1]")
        self._set(ratio=ratio, skip=checks.names(self, "skip"))
        checks.choice(self, "only_faster", (None, True, False))

    def __call__(self, model: nn.Module, given: Given) -> nn.Module:
        """A smaller copy of `model`; raises what `factorize_low_rank` raises."""
        return factorize_low_rank(model, **vars(self), **given.seen)


@dataclass(frozen=True)
class Drop(Step):
    """`drop_blocks`: whole blocks of a residual network are left out.

    Args:
        blocks: their names.
    """

    blocks: Sequence[str]
    removes = True
    part = "dropped"

    def __post_init__(self) -> None:
        self._set(blocks=checks.names(self, "blocks"))

    def __call__(self, model: nn.Module, given: Given) -> nn.Module:
        """A copy of `model` without them; raises what `drop_blocks` raises."""
        return drop_blocks(model, self.blocks)


@dataclass(frozen=True)
class ChannelsLast(Step):
    """2-D convolutions with the channels of their weights last in memory, as torch's CPU kernels
    read them: the same numbers to rounding, and outputs in that order.
    """

    part = "channels_last"

    def __call__(self, model: nn.Module, given: Given) -> nn.Module:
        """A copy of `model` in that order; raises ValueError where it has no such convolution."""
        new = surgery.clone(model)
        found = {n: m for n, m in new.named_modules() if isinstance(m, nn.Conv2d)}
        if not found:
            raise ValueError(f"{type(model).__name__} has no nn.Conv2d to put channels last in")
        for convolution in found.values():
            convolution.to(memory_format=torch.channels_last)
        surgery.note(new, "channels_last", done=dict.fromkeys(found, "channels last"))
        return new


@dataclass(frozen=True)
class Half(Step):
    """`to_half`: parameters in 16 bits.

    Args:
        dtype: "float16" or "bfloat16".
        skip: names and globs of layers that stay.
    """

    dtype: str = "float16"
    skip: Sequence[str] = ()
    rounds = True

    def __post_init__(self) -> None:
        checks.choice(self, "dtype", tuple(HALF_DTYPES))
        self._set(skip=checks.names(self, "skip"))

    @property
    def part(self) -> str:
        return {"float16": "fp16", "bfloat16": "bf16"}[self.dtype]

    def __call__(self, model: nn.Module, given: Given) -> nn.Module:
        """A copy of `model` in 16 bits; raises what `to_half` raises."""
        return to_half(model, HALF_DTYPES[self.dtype], skip=self.skip)


@dataclass(frozen=True)
class Int8(Step):
    """`quantize_dynamic`: linear layers in int8.

    Args:
        embeddings: whether tables become int8 too.
        smooth: whether to try SmoothQuant on the calibration batches.
        prefer: "size", so that a recipe gives the same model everywhere, or "speed": a stopwatch
            keeps layers in float that int8 makes slower.
        skip: names and globs of layers that stay.
    """

    embeddings: bool = False
    smooth: bool = False
    prefer: str = "size"
    skip: Sequence[str] = ()
    rounds = True
    part = "int8"

    def __post_init__(self) -> None:
        checks.choice(self, "embeddings", (True, False))
        checks.choice(self, "smooth", (True, False))
        checks.choice(self, "prefer", ("size", "speed"))
        self._set(skip=checks.names(self, "skip"))

    def __call__(self, model: nn.Module, given: Given) -> nn.Module:
        """A copy of `model` in int8; raises what `quantize_dynamic` raises. How far the outputs of
        the first batch move is noted, and warned of above 5 percent.
        """
        if self.smooth and given.calibration is None:
            raise ValueError("Int8(smooth=True) needs calibration")
        seen = given.seen if self.smooth else {**given.seen, "calibration": None}
        how = {"embeddings": self.embeddings, "prefer": self.prefer, "skip": self.skip}
        new = quantize_dynamic(model, **how, **seen)
        batch = given.first_batch()
        if not self.smooth and batch is not None:
            tell_distance(new, model, batch)
        return new


@dataclass(frozen=True)
class Int4(Step):
    """`quantize_weights`: linear layers in 4 bits, rounded by GPTQ where there is calibration.

    Args:
        group_size: weights that share a scale: 32, 64, 128 or 256.
        skip: names and globs of layers that stay.
    """

    group_size: int = 32
    skip: Sequence[str] = ()
    rounds = True
    part = "int4"

    def __post_init__(self) -> None:
        checks.choice(self, "group_size", tuple(GROUP_SIZES))
        self._set(skip=checks.names(self, "skip"))

    def __call__(self, model: nn.Module, given: Given) -> nn.Module:
        """A copy of `model` in int4; raises what `quantize_weights` raises."""
        return quantize_weights(model, **vars(self), **given.seen)
