"""What random inputs say of an int8 model that was made without calibration.

The errors of its layers, which weights and the statistics of BatchNorm give, say less: they add up
or fade on the way to the outputs, and a recurrent layer carries them from step to step.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import calibration as calibrating
from quantize import surgery

_FAR = 0.1  # a relative error of the outputs above it comes with a warning
_SIDES = (64, 224, 32, 28, 48, 24, 96, 128)  # of random images: the first that the model takes
_GRAIN = 8  # pixels from one random number to the next
_TEXTS = (64, 8)  # ids of random texts
_STEPS = (64, 1024)  # of random features and signals
_LIBRARIES = ("torch", "transformers")
_READERS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.LSTM, nn.GRU, nn.Linear)


def warn_of_noise(small: nn.Module, model: nn.Module) -> dict[str, str]:
    """A UserWarning and a setting to note where the outputs of an int8 model are far from the float
    model's on random inputs: what the first of its layers of each kind reads, the first that it
    runs on.

    Both run as copies: a run leaves kernels' forms of weights behind. Says nothing of models that
    run on no such inputs, or that somebody's hooks watch.
    """
    readers: dict[type, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, _READERS):
            readers.setdefault(type(layer), layer)
    if not readers or any(map(_is_watched, model.modules())):
        return {}
    copies = surgery.clone(small), surgery.shell(model)
    for what, inputs in itertools.chain.from_iterable(map(_inputs, readers.values())):
        try:
            distance = calibrating.distance(*copies, [inputs])
        except Exception:  # a forward may raise anything about inputs that it isn't made for
            continue
        if distance <= _FAR:
            return {}
        kind = type(model).__name__
        warnings.warn(
            f"int8: the outputs of {kind} moved by {distance:.0%} on random {what}; calibration on "
            f"your own shows how far they move there, and max_error puts layers back into float",
            stacklevel=3,
        )
        return {"on_random_inputs": f"{distance:.0%} on {what}"}
    return {}


def _is_watched(module: nn.Module) -> bool:
    """Has a module forward hooks, other than those of libraries that belong to its forward?"""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    libraries = [str(getattr(hook, "__module__", "")).partition(".")[0] for hook in hooks]
    return any(library not in _LIBRARIES for library in libraries)


def _inputs(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """What a layer reads, in words and as numbers, and what a model of it may be given."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Embedding):
        for steps in _TEXTS:
            ids = torch.randint(layer.num_embeddings, (2, steps), generator=generator)
            yield f"ids of shape {tuple(ids.shape)}", ids.to(layer.weight.device)
    elif isinstance(layer, nn.Conv2d):
        for side in _SIDES:
            yield f"images of {side} x {side}", _images(layer, side, generator)
    else:
        for shape in _shapes(layer):
            numbers = torch.randn(shape, generator=generator)
            yield f"inputs of shape {shape}", numbers.to(next(layer.parameters()))


def _shapes(layer: Any) -> Iterator[tuple[int, ...]]:
    """Of inputs with numbers."""
    if isinstance(layer, nn.Linear):
        yield 16, layer.in_features
        yield 2, _STEPS[0], layer.in_features
    elif isinstance(layer, nn.RNNBase):
        first = (2, _STEPS[0]) if layer.batch_first else (_STEPS[0], 2)
        yield *first, layer.input_size
    else:
        for steps in _STEPS:
            yield 2, layer.in_channels, steps
            yield 2, steps, layer.in_channels
            yield 2, steps


def _images(conv: nn.Conv2d, side: int, generator: torch.Generator) -> Tensor:
    """Two smooth images that a convolution takes."""
    coarse = side // _GRAIN
    numbers = torch.randn(2, conv.in_channels, coarse, coarse, generator=generator)
    images = F.interpolate(numbers, size=(side, side), mode="bilinear")
    return images.to(conv.weight)
