"""Random models from a seed: ordinary graphs, and with `odd=True` what people write that a compiler
has not thought of.

    sample = random_model(7)                 # convolutions, linears, norms in odd places,
    attention, recurrence, joins sample = random_model(7, odd=True)       # and state, writes in
    place, chance, control flow, aliases, odd outputs sample.model, sample.inputs, sample.fresh(),
    sample.traits

A model is a list of steps; each takes one or two earlier values. It is built by running it: a step
that doesn't fit the shapes is left out. `traits` names what is in it, so that a test can pick
(`{"stateful"} & sample.traits`). Every class is at the top of this file: the models can be pickled.
"""

from __future__ import annotations

import copy
import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from random_modules import Stateful
from random_steps import ANY, BOTH, IMAGE, NORMED, ODD, SEQUENCE, Apply, layer
from torch import nn
from transformers.utils import ModelOutput

Pair = namedtuple("Pair", ("first", "second"))


@dataclass
class Answer:
    """An output as people write them."""

    logits: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    loss: torch.Tensor | None = None


@dataclass
class HubAnswer(ModelOutput):
    """An output as transformers has them."""

    logits: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


# Inputs, outputs, and the model.


class RandomModel(nn.Module):
    """Steps on earlier values; `sources[i]` are the places of the values that step i takes."""

    def __init__(self, ids: bool, output: str, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width) if ids else None
        self.steps, self.sources, self.output = nn.ModuleList(), [], output

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None, flag: bool = True) -> Any:
        values = [x if self.embedding is None else self.embedding(x)]
        if other is not None:
            values.append(values[0] + other if flag else values[0] * other)
        for step, source in zip(self.steps, self.sources, strict=True):
            values.append(step(*[values[i] for i in source]))
        return OUTPUTS[self.output](self, x, values)


OUTPUTS: dict[str, Callable[[RandomModel, torch.Tensor, list[torch.Tensor]], Any]] = {
    "tensor": lambda m, x, v: v[-1],
    "tuple": lambda m, x, v: (v[-1], v[len(v) // 2]),
    "list": lambda m, x, v: [v[-1], v[-1] * 2],
    "dict": lambda m, x, v: {"a": v[-1], "b": v[0]},
    "named": lambda m, x, v: Pair(v[-1], v[-1].sum()),
    "dataclass": lambda m, x, v: Answer(v[-1], (v[0], v[-1].mean(0))),
    "model output": lambda m, x, v: HubAnswer(logits=v[-1], hidden_states=tuple(v[-2:])),
    "none in it": lambda m, x, v: (None, v[-1]),
    "nested": lambda m, x, v: {"a": (v[-1], [v[0]]), "b": {"c": v[-1].argmax(-1)}},
    "the input": lambda m, x, v: (x, v[-1]),
    "twice": lambda m, x, v: (v[-1], v[-1]),
    "view": lambda m, x, v: (v[-1], v[-1].flatten(1)[:, :2], v[-1].transpose(0, 1)),
    "parameter": lambda m, x, v: (v[-1], next(m.parameters())[:1] if list(m.parameters()) else x),
    "number": lambda m, x, v: (v[-1], 3, "text"),
    "size": lambda m, x, v: (v[-1], x.shape[0]),
}
PLAIN_OUTPUTS = ("tensor", "tuple", "list", "dict")


@dataclass
class Sample:
    """A model, example inputs, and how to make more of them."""

    model: nn.Module
    inputs: Any
    make: Callable[[random.Random, int], Any]
    traits: set[str] = field(default_factory=set)
    seed: int = 0

    def fresh(self, seed: int, batch: int = 4) -> Any:
        """Other values of the same kind; the layout (views, strides, sharing) is that of the
        example.
        """
        return self.make(random.Random(f"{self.seed} {seed}"), batch)

    @staticmethod
    def call(model: Callable[..., Any], inputs: Any) -> Any:
        """Run a model on copies of inputs of any of the forms, without gradients."""
        inputs = copy.deepcopy(inputs)
        with torch.no_grad():
            if isinstance(inputs, dict):
                return model(**inputs)
            return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _tensor(
    rng: random.Random, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    if layout == "expanded":
        return torch.randn(1, *shape[1:], generator=generator).to(dtype).expand(shape)
    if layout == "transposed":
        return (
            torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator)
            .to(dtype)
            .transpose(-1, -2)
        )
    if layout == "sliced":
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1, generator=generator).to(dtype)[..., 1::2]
    x = torch.randn(*shape, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def _inputs(
    rng: random.Random, odd: bool, dtype: torch.dtype, scale: int
) -> tuple[Callable[[random.Random, int], Any], bool, set[str]]:
    """How to make inputs, whether they are ids, and their traits."""
    shape = rng.choice([(8,), (5, 8), (5, 8), (4, 6, 6), (4, 6, 8)])
    ids = len(shape) == 2 and rng.random() < 0.3
    if not ids:
        wide = 0 if len(shape) == 3 else -1
        shape = tuple(
            size * scale if i == wide % len(shape) else size for i, size in enumerate(shape)
        )
    layouts = ["dense", "dense", "transposed", "sliced", "expanded"] + ["channels_last"] * (
        len(shape) == 3
    )
    layout = rng.choice(layouts) if odd else "dense"
    form = rng.choice(
        ("tensor", "tuple", "dict", "two", "shared", "flag") if odd else ("tensor", "tuple", "dict")
    )

    def make(rng: random.Random, batch: int) -> Any:
        if ids:
            generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
            x = torch.randint(0, 16, (batch, shape[0]), generator=generator)
        else:
            x = _tensor(rng, (batch, *shape), layout, dtype)
        second = x if form == "shared" else _tensor(rng, (1,), "dense", dtype)
        second = second.to(dtype)[..., None] if ids and form == "shared" else second
        forms = {
            "tensor": x,
            "tuple": (x,),
            "dict": {"x": x},
            "two": (x, second),
            "shared": {"x": x, "other": second},
        }
        return forms.get(form, {"x": x, "other": second, "flag": False})

    return make, ids, {f"{layout} inputs", f"inputs: {form}"} | ({"ids"} if ids else set())


def _step(rng: random.Random, x: torch.Tensor, odd: bool, scale: int) -> tuple[nn.Module, int, str]:
    """A step, how many values it takes, and its trait."""
    roll = rng.random()
    if odd and roll < 0.25:
        kind = rng.choice(("stateful", "stateful", "normed", "odd", "odd"))
        if kind == "stateful":
            kind = rng.choice(Stateful.KINDS)
            return Stateful(kind, x), 1, f"stateful: {kind}"
        if kind == "normed":
            name = rng.choice(list(NORMED))
            return NORMED[name](nn.Linear(x.shape[-1], 6)), 1, name
        name = rng.choice(list(ODD))
        return Apply(name), 1, name
    if roll < 0.4:
        own = {3: SEQUENCE, 4: IMAGE}.get(x.dim(), {})
        return Apply(rng.choice([*ANY, *own, *own])), 1, ""
    if roll < 0.5:
        return Apply(rng.choice(list(BOTH))), 2, ""
    return layer(rng, x, scale), 1, ""


def random_model(seed: int, *, odd: bool = False, steps: int = 7, scale: int = 1) -> Sample:
    """The model of a seed, in eval mode, with example inputs of batch 4 (or 1) that it can run on.

    scale: widths are that many times larger; at 8 or more they suit techniques that need layers of
        32 and up.
    """
    for attempt in range(20):
        sample = _attempt(random.Random(f"{seed} {attempt}"), seed, odd, steps, scale)
        try:
            for inputs in (sample.fresh(0), sample.inputs):
                sample.call(copy.deepcopy(sample.model), inputs)
        except RuntimeError:  # a write into expanded memory; a size that the data decides
            continue
        return sample
    raise AssertionError(f"no model for seed {seed}")


def _attempt(rng: random.Random, seed: int, odd: bool, steps: int, scale: int) -> Sample:
    dtype = (
        rng.choice([torch.float32] * 6 + [torch.float64, torch.bfloat16]) if odd else torch.float32
    )
    make, ids, traits = _inputs(rng, odd, dtype, scale)
    output = rng.choice(list(OUTPUTS)) if odd else rng.choice(PLAIN_OUTPUTS)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(rng.randrange(1 << 30))
        model = RandomModel(ids, output, 6 if scale == 1 else 8 * scale).to(dtype).eval()
        _grow(rng, model, make(random.Random(0), 4), steps, odd, dtype, traits, scale)
    example = make(random.Random(f"{seed} example"), 1 if rng.random() < 0.2 else 4)
    return Sample(model.eval(), example, make, traits | {str(dtype), f"output: {output}"}, seed)


def _grow(
    rng: random.Random,
    model: RandomModel,
    inputs: Any,
    steps: int,
    odd: bool,
    dtype: torch.dtype,
    traits: set[str],
    scale: int,
) -> None:
    """Append steps that fit, and what they are to `traits`."""
    arguments = inputs if isinstance(inputs, (dict, tuple)) else (inputs,)
    first, *others = arguments.values() if isinstance(arguments, dict) else arguments
    values = [first if model.embedding is None else model.embedding(first)]
    if others:
        values.append(values[0] + others[0] if others[-1] is not False else values[0] * others[0])
    for _ in range(4 * steps):
        if len(model.steps) == steps:
            return
        last = len(values) - 1
        step, count, trait = _step(rng, values[last], odd, scale)
        sources = [last] if count == 1 else [last, rng.randrange(len(values))]
        if trait.startswith("input written"):
            sources = [0]
        step = step.to(dtype).eval()
        _settle(step)
        try:
            result = copy.deepcopy(step)(*[values[i].clone() for i in sources])
        except (
            RuntimeError,
            ValueError,
            IndexError,
            TypeError,
            AssertionError,
            NotImplementedError,
        ):
            continue
        fits = result.dim() in (2, 3, 4) and 0 < result.numel() < 20_000 and result.dtype == dtype
        if (
            not fits
            or not torch.isfinite(result).all()
            or result.abs().max() > 50
            or result.shape[0] != 4
        ):
            continue
        model.steps.append(step)
        model.sources.append(sources)
        values.append(result)
        traits.update({trait} - {""})


def _settle(step: nn.Module) -> None:
    """BatchNorm statistics as after training."""
    for module in step.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.4)
            module.running_var.uniform_(0.4, 2)
            if module.weight is not None:
                module.weight.normal_(1, 0.4)
                module.bias.normal_(0, 0.4)
