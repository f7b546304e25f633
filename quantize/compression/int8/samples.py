"""Random inputs that a model runs on, where no calibration says what it is given.

They are what the first of its layers of each kind reads: images, ids, sequences or rows. So a layer
is seen at the sizes that it gets in the model, which it can't tell by itself: the convolutions of a
squeeze-and-excitation see one pixel, those before them thousands.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import calibration as calibrating
from quantize import surgery

# Of random images: the first one or two sides of which the model takes one.
_SIDES = ((112, 224), (64, 32), (28,), (48, 24), (96, 128))
_GRAIN = 8  # pixels from one random number to the next
_TEXTS = (64, 8)  # ids of random texts
_STEPS = (64, 512, 1024)  # of random features and signals; voice detectors take 512 alone
_LIBRARIES = ("torch", "transformers")
_READERS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.LSTM, nn.GRU, nn.Linear)
Made = tuple[str, Tensor]  # in words and in numbers


@dataclass(frozen=True)
class Sample:
    """Random inputs that the model runs on.

    Args:
        what: they are, in words.
        inputs: two images, texts or sequences, or rows.
        shapes: of what each convolution gets for the first of them, by its name.
    """

    what: str
    inputs: Tensor
    shapes: Mapping[str, set[tuple[int, ...]]]

    @property
    def first(self) -> Tensor:
        """The first of the inputs alone."""
        return self.inputs[:1]


def find_samples(model: nn.Module, most: int = 2) -> list[Sample]:
    """One sample, or one of a smaller and one of a larger size; none of a model that runs on no
    such inputs, or that somebody's hooks watch. It runs as a copy, which leaves no trace. most: so
    many at most.
    """
    readers: dict[type, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, _READERS):
            readers.setdefault(type(layer), layer)
    if not readers or any(map(_is_watched, model.modules())):
        return []
    copy = surgery.shell(model)
    convolutions = {name: layer for name, layer in copy.named_modules() if _convolves(layer)}
    for sizes in itertools.chain.from_iterable(map(_inputs, readers.values())):
        found = []
        for what, inputs in sizes:
            try:
                shapes = calibrating.input_shapes(copy, [inputs[:1]], convolutions)
            except Exception:  # a forward may raise anything about inputs it isn't made for
                continue
            found.append(Sample(what, inputs, shapes))
            if len(found) == most:
                break
        if found:
            return found
    return []


def shapes_of(samples: list[Sample]) -> dict[str, set[tuple[int, ...]]]:
    """By layer, the shapes of all its inputs."""
    found: dict[str, set[tuple[int, ...]]] = {}
    for sample in samples:
        for name, shapes in sample.shapes.items():
            found.setdefault(name, set()).update(shapes)
    return found


def _convolves(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd)


def _is_watched(module: nn.Module) -> bool:
    """Has a module forward hooks, other than those of libraries that belong to its forward?"""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    libraries = [str(getattr(hook, "__module__", "")).partition(".")[0] for hook in hooks]
    return any(library not in _LIBRARIES for library in libraries)


def _inputs(layer: Any) -> Iterator[list[Made]]:
    """What a layer reads and what a model of it may be given, in one or two sizes."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Embedding):
        for steps in _TEXTS:
            ids = torch.randint(layer.num_embeddings, (2, steps), generator=generator)
            yield [(f"ids of shape {tuple(ids.shape)}", ids.to(layer.weight.device))]
    elif isinstance(layer, nn.Conv2d):
        for sides in _SIDES:
            yield [_images(layer, side, generator) for side in sides]
    else:
        for shapes in _shapes(layer):
            yield [_numbers(layer, shape, generator) for shape in shapes]


def _shapes(layer: Any) -> Iterator[list[tuple[int, ...]]]:
    """Of inputs with numbers, in one or two sizes."""
    if isinstance(layer, nn.Linear):
        yield [(16, layer.in_features)]
        yield [(2, _STEPS[0], layer.in_features)]
    elif isinstance(layer, nn.RNNBase):
        first = (2, _STEPS[0]) if layer.batch_first else (_STEPS[0], 2)
        yield [(*first, layer.input_size)]
    else:
        yield [(2, layer.in_channels, steps) for steps in _STEPS]
        yield [(2, steps, layer.in_channels) for steps in _STEPS]
        yield [(2, steps) for steps in _STEPS]


def _numbers(layer: nn.Module, shape: tuple[int, ...], generator: torch.Generator) -> Made:
    numbers = torch.randn(shape, generator=generator)
    return f"inputs of shape {shape}", numbers.to(next(layer.parameters()))


def _images(conv: nn.Conv2d, side: int, generator: torch.Generator) -> Made:
    """Two smooth images that a convolution takes."""
    coarse = side // _GRAIN
    numbers = torch.randn(2, conv.in_channels, coarse, coarse, generator=generator)
    images = F.interpolate(numbers, size=(side, side), mode="bilinear")
    return f"images of {side} x {side}", images.to(conv.weight)
