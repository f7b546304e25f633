"""quantize_dynamic: which layers of a model become int8, and what is said about the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from quantize import surgery
from quantize.int8.embedding import Int8Embedding
from quantize.int8.linear import Int8Linear

Report = dict[str, str]


def quantize_dynamic(
    model: nn.Module, *, skip: surgery.Skip = (), calibration: Iterable[Any] | None = None, embeddings: bool = False
) -> nn.Module:
    """Copy of `model` whose linear layers store and compute in int8, with the activations quantized as they come.

    Converted: `nn.Linear` (and subclasses that keep its forward), GPT-2 style `Conv1D`, and `nn.Embedding` tables that
    share their weight with one of these (a tied head), or all of them with `embeddings=True`. `summary(result)` says what was
    converted, what was not, and why. `skip`: see `surgery.select`.

    Raises ValueError if there is nothing to convert, or a weight is not finite.
    """
    model = surgery.clone(model)
    skipped = surgery.skip_filter(model, skip)
    users = _users(model)
    report: Report = {}
    replacements: dict[nn.Module, nn.Module] = {}
    tables: dict[int, nn.Module] = {}  # by identity of the float weight: layers that shared it share the int8 one

    for name, module in model.named_modules():
        if not (_is_linear(module) or isinstance(module, nn.Embedding)):
            continue
        tied = any(_is_linear(m) for _, m in users.get(id(module.weight), ()))
        if skipped(name, module):
            reason = "named by skip"
        elif isinstance(module, nn.Embedding) and not (tied or embeddings):
            reason = "an embedding: embeddings=True quantizes it"
        else:
            reason = _obstacle(module) or _shared_obstacle(module, users, skipped)
        if reason is not None:
            report[name] = reason
            continue
        _check_finite(name, module)
        replacements[module] = _convert(module, tables)
    if not any(isinstance(m, (Int8Linear, Int8Embedding)) for m in replacements.values()):
        already = any(isinstance(m, Int8Linear) for m in model.modules())
        detail = "; ".join(f"{n}: {r}" for n, r in report.items()) or "it has no nn.Linear or Conv1D"
        raise ValueError(
            f"{type(model).__name__} has no linear layer left to quantize"
            + (": it is already quantized" if already else "")
            + f" ({detail})"
        )
    for old, new in replacements.items():
        new.train(old.training)
        new._forward_hooks, new._forward_pre_hooks = old._forward_hooks, old._forward_pre_hooks
        new._forward_hooks_with_kwargs = old._forward_hooks_with_kwargs
        new._forward_pre_hooks_with_kwargs = old._forward_pre_hooks_with_kwargs
    model = surgery.replace(model, replacements)
    for module in model.modules():
        _disable_fast_path(module)
    model.__dict__["int8_skipped"] = report
    return model


def summary(model: nn.Module) -> dict[str, str]:
    """What `quantize_dynamic` did, by module name: `"int8"`, or the reason why the layer stayed as it is."""
    done = {n: "int8" for n, m in model.named_modules() if isinstance(m, (Int8Linear, Int8Embedding))}
    return {**done, **model.__dict__.get("int8_skipped", {})}


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer with a transposed weight; recognised by its shape, to need no import of its library."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module.weight, "ndim", 0) == 2


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _users(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Who holds each parameter, by its identity."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((name, module))
    return users


def _obstacle(module: nn.Module) -> str | None:
    """Why this layer can't be replaced by an int8 one, or None."""
    kind = type(module)
    if kind.__name__ == "NonDynamicallyQuantizableLinear":
        return "the output projection of nn.MultiheadAttention, which reads its weight itself"
    if isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward:
        return f"{kind.__name__} is a subclass of nn.Linear with a forward of its own"
    if isinstance(module, nn.Embedding):
        if kind.forward is not nn.Embedding.forward:
            return f"{kind.__name__} is a subclass of nn.Embedding with a forward of its own"
        if module.max_norm is not None:
            return "max_norm changes its weight while it runs"
    if isinstance(module.weight, nn.parameter.UninitializedTensorMixin):
        return "its weight is not initialised yet: run the model once"
    if "weight" not in module._parameters and not parametrize.is_parametrized(module, "weight"):
        return "its weight is computed by a hook (weight_norm, prune): make it permanent first"
    if not module.weight.dtype.is_floating_point or type(module.weight.data) is not torch.Tensor:
        return f"its weight is a {type(module.weight.data).__name__} of dtype {module.weight.dtype}"
    if module.weight.numel() == 0:
        return "it has no weights"
    return None


def _shared_obstacle(module: nn.Module, users: dict, skipped) -> str | None:
    for name, other in users.get(id(module.weight), ()):
        if other is module:
            continue
        plain = _is_linear(other) or isinstance(other, nn.Embedding)
        if not plain or _obstacle(other) or skipped(name, other) or _is_conv1d(other) != _is_conv1d(module):
            return f"it shares its weight with {name} ({type(other).__name__}), which stays as it is"
    return None


def _check_finite(name: str, module: nn.Module) -> None:
    for kind in ("weight", "bias"):
        tensor = getattr(module, kind, None)
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"layer {name!r} has a {kind} that is not finite: NaN or Inf can't be quantized")


def _convert(module: nn.Module, tables: dict[int, nn.Module]) -> nn.Module:
    weight = module.weight.t() if _is_conv1d(module) else module.weight
    if isinstance(module, nn.Embedding):
        new: nn.Module = Int8Embedding.from_weight(weight)
    else:
        new = Int8Linear.from_weight(weight, module.bias)
    if not parametrize.is_parametrized(module, "weight"):
        first = tables.setdefault(id(module.weight), new)
        new.weight, new.scale = first.weight, first.scale
    return new


def _disable_fast_path(module: nn.Module) -> None:
    """The fused path of nn.TransformerEncoderLayer reads float weights: the flags that it looks at first turn it off."""
    if isinstance(module, nn.TransformerEncoderLayer) and module.activation_relu_or_gelu:
        surgery.resize(module, tensors={}, attributes={"activation_relu_or_gelu": 0})
    if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
        surgery.resize(module, tensors={}, attributes={"use_nested_tensor": False})
