"""May a layer be replaced? Facts about every layer of a model, one table for all techniques; each
adds what it alone asks.

The policies, for all techniques: hooks follow the layer that takes another's place, and so does its
training flag (`take_place`). A weight that several modules hold is shared by their replacements, or
the layer stays and is named. A weight that a parametrization or a hook of torch's computes
(weight_norm, spectral_norm, pruning masks) is read once. A forward that computes something else
than torch's, a weight that is no floating tensor, and a model that asks of what class the layer is
make it stay. A weight that is not finite is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from quantize.surgery.asked import bound_layers
from quantize.surgery.computed import computing_hooks, recompute_weights
from quantize.surgery.experts import expert_weights
from quantize.surgery.forwards import computes_as

_OPAQUE = "NonDynamicallyQuantizableLinear"
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_RECURRENT = (nn.LSTM, nn.GRU)
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_UPWARDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (nn.Linear, *_TABLES, *_CONVOLUTIONS, *_UPWARDS, *_RECURRENT)


@dataclass(frozen=True)
class Facts:
    """What a technique has to know of a linear layer, an embedding, a convolution, a recurrent
    layer or a module of experts before it replaces it.
    """

    module: nn.Module
    holders: tuple[str, ...]  # names of all modules that hold one of its weights, itself among them
    transposed: bool  # its weight is [in, out]
    obstacle: str | None  # why no technique can replace it

    @property
    def linear(self) -> bool:
        return self.transposed or isinstance(self.module, nn.Linear)

    @property
    def table(self) -> bool:
        return isinstance(self.module, _TABLES)

    @property
    def recurrent(self) -> bool:
        return isinstance(self.module, _RECURRENT)

    @property
    def convolution(self) -> bool:
        return isinstance(self.module, _CONVOLUTIONS)

    @property
    def transposed_convolution(self) -> bool:
        return isinstance(self.module, _UPWARDS)

    @property
    def experts(self) -> bool:
        return bool(expert_weights(self.module))


def facts(model: nn.Module) -> dict[str, Facts]:
    """Of every linear layer, embedding, convolution (transposed ones too), LSTM, GRU and module of
    experts of `model`, by name, each once. Weights that hooks compute are brought up to date, in
    place.
    """
    recompute_weights(model)
    bound = bound_layers(model)
    known = holders(model)
    found: dict[str, Facts] = {}
    for name, module in model.named_modules():
        if isinstance(module, _PLAIN) or is_transposed(module) or expert_weights(module):
            names: dict[str, None] = {}
            for parameter in module._parameters.values():
                if parameter is not None and parameter.ndim > 1:
                    names |= dict.fromkeys(known[id(parameter)])
            found[name] = Facts(
                module,
                tuple(names) or (name,),
                is_transposed(module),
                obstacle(module) or bound.get(module),
            )
    return found


def holders(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by the parameter's identity."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(name)
    return names


def holds_matrix(module: nn.Module) -> bool:
    """Has it a parameter of two dimensions or more, had a technique a layer for its kind?"""
    return any(p is not None and p.ndim > 1 for p in module._parameters.values())


def obstacle(module: nn.Module) -> str | None:
    """Why no technique can put another layer in the place of this one; None if one can."""
    kind = type(module)
    if kind.__name__ == _OPAQUE:
        return "the output projection of nn.MultiheadAttention, which reads its weight itself"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    experts = expert_weights(module)
    if experts:
        return _experts_obstacle(module, experts)
    base = next((plain for plain in _PLAIN if isinstance(module, plain)), None)
    # a layer of this package that computes what its base does
    stands_in = getattr(kind, "stands_in", False)
    if base is not None and not stands_in and not computes_as(module, base):
        return f"{kind.__name__} is a subclass of nn.{base.__name__} with a forward of its own"
    if isinstance(module, _TABLES) and module.max_norm is not None:
        return "max_norm changes its weight while it runs"
    if isinstance(module, _RECURRENT):
        return _recurrent_obstacle(module)
    return _weight_obstacle(module)


def _recurrent_obstacle(module: nn.RNNBase) -> str | None:
    names = set(module._flat_weights_names)
    if parametrize.is_parametrized(module) or not names <= module._parameters.keys():
        return "one of its weights is computed: make it permanent first"
    if module._parameters.keys() - names:
        return "it has parameters besides those of its layers"
    for name in module._flat_weights_names:
        found = _tensor_obstacle(name, module._parameters[name])
        if found is not None:
            return found
    return None


def _experts_obstacle(module: nn.Module, names: tuple[str, ...]) -> str | None:
    if type(module).__reduce_ex__ is not object.__reduce_ex__:
        return f"{type(module).__name__} says itself how it is copied"
    found = [_tensor_obstacle(name, module._parameters[name]) for name in names]
    return next(filter(None, found), None)


def _weight_obstacle(module: Any) -> str | None:
    parametrized = parametrize.is_parametrized(module)
    hooked = "weight" in computing_hooks(module).values()
    weight = module._parameters.get("weight")
    if weight is None and not hooked and not (parametrized and "weight" in module.parametrizations):
        return "its weight is computed by other code: make it permanent first"
    sources = ("weight_g", "weight_v", "weight_orig") if hooked else ()
    if any(name not in ("weight", "bias", *sources) for name in module._parameters):
        return "it has parameters besides weight and bias"
    if weight is not None and is_lazy(weight):
        return "its weight is not initialised yet: run the model once"
    return _tensor_obstacle("weight", module.weight if weight is None else weight)


def _tensor_obstacle(name: str, weight: Any) -> str | None:
    if not weight.dtype.is_floating_point or type(weight.data) is not torch.Tensor:
        return f"its {name} is a {type(weight.data).__name__} of dtype {weight.dtype}"
    if weight.numel() == 0:
        return "it has no weights"
    if weight.is_meta:
        return f"it has no numbers, only shapes: its {name} is on the meta device"
    return None


def is_transposed(module: nn.Module) -> bool:
    """Does its `weight` read as [in, out], like that of transformers' Conv1D (which need not be
    installed)?
    """
    if type(module).__module__.startswith("quantize."):  # a compressed layer knows what it replaced
        return getattr(module, "transposed", False) or hasattr(module, "nf")
    weight = module._parameters.get("weight")
    return (
        type(module).__name__ == "Conv1D"
        and weight is not None
        and weight.ndim == 2
        and getattr(module, "nf", 0) == weight.shape[1]
    )


def check_finite(name: str, module: nn.Module) -> None:
    """Raise ValueError naming a tensor of `module`, or one that a parametrization computes, that is
    not finite.
    """
    tensors = dict(module._parameters)
    tensors |= {kind: getattr(module, kind) for kind in computing_hooks(module).values()}
    if parametrize.is_parametrized(module):
        computed: Any = module.parametrizations
        tensors |= {kind: getattr(module, kind) for kind in computed}
    for kind, tensor in tensors.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(
                f"layer {name!r} has a {kind} that is not finite: NaN or Inf can't be quantized"
            )


def check_initialised(model: nn.Module) -> None:
    """Raise ValueError naming a module whose parameters have no shape yet."""
    for name, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and nn.parameter.is_lazy(tensor):
                raise ValueError(
                    f"module {name!r} ({type(module).__name__}) has no shape yet: run the model "
                    f"once"
                )


def take_place(old: nn.Module, new: nn.Module) -> None:
    """Give `new` what stays of `old` when it takes its place: the training flag and the hooks, but
    for those that compute a weight.
    """
    new.train(old.training)
    for kind in _HOOKS:
        setattr(new, kind, getattr(old, kind))
    new._forward_pre_hooks = old._forward_pre_hooks.copy()
    for key in computing_hooks(old):
        del new._forward_pre_hooks[key]


@torch.no_grad()
def round_stored(model: nn.Module) -> None:
    """Round again what a file holds in 16 bits, after a step that changed it: a model in memory is
    as its file says.
    """
    for module in model.modules():
        dtype, names = module.__dict__.get("_half", (None, ()))
        for parameter in (module._parameters[name] for name in names):
            if parameter is not None and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def stays_float(model: nn.Module) -> dict[str, int]:
    """Bytes of floating parameters that modules hold themselves, by name, each tensor once; the
    largest first.
    """
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        half = module.__dict__.get("_half", (None, ()))
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or not parameter.is_floating_point():
                continue
            if nn.parameter.is_lazy(parameter):
                continue
            seen.add(id(parameter))
            each = 2 if key in half[1] else parameter.element_size()
            sizes[name] = sizes.get(name, 0) + each * parameter.numel()
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
