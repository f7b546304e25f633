"""Do a module's attributes agree with its tensors?

Layers write down their widths beside the tensors that have them. Files can set both, and compiled
code trusts what it is told, so whatever comes from a file, or goes to compiled code, is compared
here first. A layer of this package says itself what it expects, in a method `contradiction`;
torch's own layers are described below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]

_GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "LSTM": 4}


def contradiction(module: nn.Module) -> str | None:
    """What `module` says of itself and its own tensors deny, in words; None if nothing is known."""
    own = getattr(type(module), "contradiction", None)
    if own is not None:
        return own(module)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        # transformers', for GPT-2: [in, out]
        return _conv1d(module)
    for kind, describe in _KNOWN.items():
        if isinstance(module, kind):
            wrong = _uneven(module)
            return wrong or mismatch(module, describe(module))
    return None


def mismatch(
    module: nn.Module, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype] | None = None
) -> str | None:
    """The first own tensor of `module` that has another shape (or dtype) than it should have, in
    words.
    """
    # by dict's own method, which computes no buffer that isn't held
    tensors = module._parameters | dict(dict.items(module._buffers))
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            return f"its {name} is {list(tensor.shape)}, where its attributes ask for {list(shape)}"
        dtype = (dtypes or {}).get(name)
        if dtype is not None and tensor.dtype != dtype:
            return f"its {name} is {tensor.dtype}, where {dtype} belongs"
    return None


def parameter_count(module: nn.Module) -> int:
    """Numbers in its parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def unlike(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that only one of the two has, or in other shapes; sorted."""
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in (found, wanted)]
    names = shapes[0] | shapes[1]
    return sorted(name for name in names if shapes[0].get(name) != shapes[1].get(name))


def widths(module: nn.Module) -> dict[str, int]:
    """The widths that a replacement must have in common with `module`, as far as it has attributes
    for them.
    """
    names = (
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "num_embeddings",
        "embedding_dim",
    )
    found = {
        name: getattr(module, name) for name in names if type(getattr(module, name, None)) is int
    }
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2:
        found["in_features"], found["out_features"] = weight.shape
    return found


def _uneven(module: nn.Module) -> str | None:
    """Counts that must divide another one."""
    if isinstance(module, nn.modules.conv._ConvNd):
        parts, wholes = "groups", ("in_channels", "out_channels")
    elif isinstance(module, nn.GroupNorm):
        parts, wholes = "num_groups", ("num_channels",)
    elif isinstance(module, nn.MultiheadAttention):
        parts, wholes = "num_heads", ("embed_dim",)
    else:
        return None
    count = getattr(module, parts)
    for name in wholes:
        whole = getattr(module, name)
        if type(count) is not int or type(whole) is not int or count < 1 or whole % count:
            return f"its {parts}={count!r} doesn't divide {name}={whole!r}"
    return None


def _linear(module: Any) -> dict[str, Shape]:
    return {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}


def _bilinear(module: Any) -> dict[str, Shape]:
    weight = (module.out_features, module.in1_features, module.in2_features)
    return {"weight": weight, "bias": (module.out_features,)}


def _conv(module: Any) -> dict[str, Shape]:
    first, second = module.out_channels, module.in_channels
    if module.transposed:
        first, second = second, first
    weight = (first, second // module.groups, *module.kernel_size)
    return {"weight": weight, "bias": (module.out_channels,)}


def _conv1d(module: Any) -> str | None:
    weight = module._parameters.get("weight")
    inputs = getattr(module, "nx", weight.shape[0] if weight is not None and weight.ndim else 0)
    return mismatch(module, {"weight": (inputs, module.nf), "bias": (module.nf,)})


def _embedding(module: Any) -> dict[str, Shape]:
    return {"weight": (module.num_embeddings, module.embedding_dim)}


def _running_norm(module: Any) -> dict[str, Shape]:
    return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (module.num_features,))


def _shaped_norm(module: Any) -> dict[str, Shape]:
    return dict.fromkeys(("weight", "bias"), tuple(module.normalized_shape))


def _group_norm(module: Any) -> dict[str, Shape]:
    return dict.fromkeys(("weight", "bias"), (module.num_channels,))


def _prelu(module: Any) -> dict[str, Shape]:
    return {"weight": (module.num_parameters,)}


def _attention(module: Any) -> dict[str, Shape]:
    width = module.embed_dim
    return {
        "in_proj_weight": (3 * width, width),
        "q_proj_weight": (width, width),
        "k_proj_weight": (width, module.kdim),
        "v_proj_weight": (width, module.vdim),
        "in_proj_bias": (3 * width,),
    }


def _recurrent(module: Any) -> dict[str, Shape]:
    gates = _GATES[module.mode] * module.hidden_size
    out = module.proj_size or module.hidden_size
    sides = ("", "_reverse") if module.bidirectional else ("",)
    shapes: dict[str, Shape] = {}
    for name in module._parameters:
        first = "_l0" in name
        inputs = module.input_size if first else out * len(sides)
        if name.startswith("weight_ih"):
            shapes[name] = (gates, inputs)
        elif name.startswith("weight_hh"):
            shapes[name] = (gates, out)
        elif name.startswith("weight_hr"):
            shapes[name] = (module.proj_size, module.hidden_size)
        else:
            shapes[name] = (gates,)
    return shapes


_KNOWN: dict[type[nn.Module], Callable[[Any], dict[str, Shape]]] = {
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    nn.modules.conv._ConvNd: _conv,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding,
    nn.modules.batchnorm._NormBase: _running_norm,
    nn.LayerNorm: _shaped_norm,
    nn.RMSNorm: _shaped_norm,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _prelu,
    nn.MultiheadAttention: _attention,
    nn.RNNBase: _recurrent,
}
