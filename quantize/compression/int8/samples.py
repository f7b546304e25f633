"""Random inputs that a model runs on, where no calibration says what it is given.

They are what the first of its layers of each kind reads: images, clips, ids, sequences or rows, or
images that the model brings into another form before it (a space-to-depth). So a layer is seen at
the sizes that it gets in the model, which it can't tell by itself: the convolutions of a
squeeze-and-excitation see one pixel, those before them thousands.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import calibration as calibrating
from quantize import surgery

_COLORS = (3, 1)  # channels of images, where the first layer reads another form of them
# Of random images and clips: the first one or two sides of which the model takes one.
_SIDES = ((112, 224), (64, 32), (28,), (48, 24), (96, 128), (256, 384), (240, 336), (160, 192))
_CLIP_SIDES = ((112,), (224,), (64,), (32,))
_FRAMES = 16  # of random clips
_GRAIN = 8  # pixels from one random number to the next
_TEXTS = (64, 8)  # ids of random texts
_STEPS = (64, 512, 1024)  # of random features and signals; voice detectors take 512 alone
_LIBRARIES = ("torch", "transformers")
_READERS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LSTM, nn.GRU, nn.Linear)
Made = tuple[str, Tensor]  # in words and in numbers


@dataclass(frozen=True)
class Sample:
    """Random inputs that the model runs on.

    Args:
        what: they are, in words.
        inputs: two images, texts or sequences, or rows, for each argument that the model needs.
        shapes: of what each convolution gets for the first of them, by its name.
    """

    what: str
    inputs: tuple[Tensor, ...]
    shapes: Mapping[str, set[tuple[int, ...]]]

    @property
    def first(self) -> tuple[Tensor, ...]:
        """The first of the inputs alone."""
        return _first(self.inputs)


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
    needed = _needed(model)
    for sizes in itertools.chain.from_iterable(map(_inputs, readers.values())):
        found = []
        for what, numbers in sizes:
            inputs = numbers, *(numbers.flip(0) for _ in range(needed - 1))
            try:
                shapes = calibrating.input_shapes(copy, [_first(inputs)], convolutions)
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


def _first(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(numbers[:1] for numbers in inputs)


def _needed(model: nn.Module) -> int:
    """How many arguments the model's forward can't do without; one where nobody can tell."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    places = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(one.kind in places and one.default is one.empty for one in parameters)


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
    elif isinstance(layer, (nn.Conv2d, nn.Conv3d)):
        every = _SIDES if isinstance(layer, nn.Conv2d) else _CLIP_SIDES
        for channels in dict.fromkeys((layer.in_channels, *_COLORS)):
            for sides in every:
                yield [_images(layer, channels, side, generator) for side in sides]
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


def _images(layer: Any, channels: int, side: int, generator: torch.Generator) -> Made:
    """Two smooth images that a convolution takes, or clips of frames that are alike."""
    coarse = side // _GRAIN
    numbers = torch.randn(2, channels, coarse, coarse, generator=generator)
    images = F.interpolate(numbers, size=(side, side), mode="bilinear").to(layer.weight)
    if isinstance(layer, nn.Conv2d):
        return f"images of {side} x {side}", images
    clips = images[:, :, None].repeat(1, 1, _FRAMES, 1, 1)
    return f"clips of {_FRAMES} x {side} x {side}", clips
