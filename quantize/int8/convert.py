"""quantize_dynamic: which layers of a model become int8, and what is said about the others."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from quantize import surgery
from quantize.calibration import check_batches
from quantize.int8 import smooth
from quantize.int8.attention import Int8MultiheadAttention
from quantize.int8.embedding import Int8Embedding
from quantize.int8.linear import Int8Linear

Report = dict[str, str]


def quantize_dynamic(
    model: nn.Module,
    *,
    skip: surgery.Skip = (),
    calibration: Iterable[Any] | None = None,
    embeddings: bool = False,
    prefer: str = "size",
) -> nn.Module:
    """Copy of `model` whose linear layers store and compute in int8, with the activations quantized as they come.

    Converted: `nn.Linear` (and subclasses that keep its forward), GPT-2 style `Conv1D`, `nn.MultiheadAttention`, and
    `nn.Embedding` tables that share their weight with a linear layer (a tied head), or all of them with `embeddings=True`.
    `summary(result)` says what was converted, what was not, and why. `skip`: see `surgery.select`.

    `calibration` (batches as `calibration.collect` takes) tries SmoothQuant, and keeps it if the outputs on these batches come
    at least a tenth closer to the float model's. `prefer="speed"` leaves layers in float that a stopwatch finds slower in int8
    at any of 1, 16 and 256 rows (narrow layers: below a width of about 256, quantizing an input costs more than it saves); then
    the result depends on the machine.

    Raises ValueError if there is nothing to convert, if a weight is not finite, and for calibration without batches.
    """
    if prefer not in ("size", "speed"):
        raise ValueError(f"prefer must be 'size' or 'speed', got {prefer!r}")
    source = surgery.clone(model)
    new = _converted(surgery.clone(source), skip, embeddings, prefer)
    if calibration is None:
        return new
    check_batches(calibration)
    layers = {n: m for n, m in source.named_modules() if isinstance(m, nn.Linear) and _became(new, n, Int8Linear)}
    expected = smooth.outputs(source, calibration)
    norms = smooth.smooth(source, layers, calibration)
    errors = {"plain": smooth.relative_error(smooth.outputs(new, calibration), expected)}
    if norms:
        slower = tuple(n for n, reason in new.int8_skipped.items() if reason.startswith(_SLOWER))
        folded = _converted(source, (*skip, *slower), embeddings, "size")
        folded.int8_skipped.update({n: new.int8_skipped[n] for n in slower})
        errors["smoothed"] = smooth.relative_error(smooth.outputs(folded, calibration), expected)
        new = folded if errors["smoothed"] < _CLEARLY * errors["plain"] else new
    new.__dict__["int8_calibration"] = {"norms": norms, "errors": errors}
    return new


def _converted(model: nn.Module, skip: surgery.Skip, embeddings: bool, prefer: str) -> nn.Module:
    """Convert `model` in place."""
    replacements, report = _plan(model, skip, embeddings, prefer)
    if not replacements:
        already = any(isinstance(m, Int8Linear) for m in model.modules())
        detail = "; ".join(f"{n}: {r}" for n, r in report.items()) or "it has no nn.Linear or Conv1D"
        raise ValueError(
            f"{type(model).__name__} has no linear layer left to quantize"
            + (": it is already quantized" if already else "")
            + f" ({detail})"
        )
    for old, new in replacements.items():
        new.train(old.training)
        for hooks in _HOOKS:
            setattr(new, hooks, getattr(old, hooks))
    model = surgery.replace(model, replacements)
    for module in model.modules():
        _disable_fast_path(module)
    model.__dict__["int8_skipped"] = report
    return model


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def _plan(model: nn.Module, skip: surgery.Skip, embeddings: bool, prefer: str) -> tuple[dict[nn.Module, nn.Module], Report]:
    """What becomes what, and why the rest stays."""
    skipped = surgery.skip_filter(model, skip)
    users = _users(model)
    report: Report = {}
    replacements: dict[nn.Module, nn.Module] = {}
    known: dict[tuple[Any, ...], str | None] = {}
    tables: dict[int, nn.Module] = {}  # by identity of the float weight: layers that shared it share the int8 one
    inside: set[nn.Module] = set()  # parts of a module that is converted as a whole
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, nn.MultiheadAttention):
            reason = _attention_obstacle(name, module, users, skipped)
            if reason is None:
                for part, child in module.named_modules():
                    _check_finite(f"{name}.{part}".strip("."), child)
                    inside.add(child)
                replacements[module] = Int8MultiheadAttention.from_attention(module)
        elif _is_linear(module) or isinstance(module, nn.Embedding):
            tied = any(_is_linear(m) for _, m in users.get(id(module.weight), ()))
            if skipped(name, module):
                reason = "named by skip"
            elif isinstance(module, nn.Embedding) and not (tied or embeddings):
                reason = "an embedding: embeddings=True quantizes it"
            else:
                reason = _obstacle(module) or _shared_obstacle(module, users, skipped)
            if reason is None:
                _check_finite(name, module)
                new = _convert(module, tables)
                if prefer == "speed" and isinstance(module, nn.Linear) and len(users.get(id(module.weight), ())) < 2:
                    reason = _slower(module, new, known)
                if reason is None:
                    replacements[module] = new
        elif any(p is not None and p.ndim > 1 for p in module._parameters.values()):
            reason = f"a {type(module).__name__}: only linear layers and embeddings become int8"
        else:
            continue
        if reason is not None:
            report[name] = reason
    return replacements, report


def _became(model: nn.Module, name: str, kind: type[nn.Module]) -> bool:
    try:
        return isinstance(model.get_submodule(name), kind)
    except AttributeError:  # inside a module that was converted as a whole
        return False


_CLEARLY = 0.9  # smaller gains are not seen again on other data
_SLOWER = "int8 is slower here"


def _slower(layer: nn.Linear, new: Int8Linear, known: dict[tuple[Any, ...], str | None]) -> str | None:
    """Why the float layer stays, if it is the faster one on this machine over 1, 16 or 256 rows. `known`: by shape."""
    key = (layer.weight.shape, layer.weight.dtype, layer.bias is None)
    if key not in known:
        found = []
        for m in (1, 16, 256):
            x = torch.randn(m, layer.in_features).to(layer.weight.dtype)
            slow, fast = _microseconds(layer, x), _microseconds(new, x)
            if fast > slow:
                found.append(f"{fast:.0f} us against {slow:.0f} for {m} rows")
        known[key] = f"{_SLOWER}: {', '.join(found)}" if found else None
    return known[key]


def _microseconds(layer: nn.Module, x: torch.Tensor) -> float:
    """The median time of a call. Copies take turns, so that the weights are not in the nearest cache, as in a whole model."""
    size = layer.in_features * layer.out_features * 4
    copies = [copy.deepcopy(layer) for _ in range(min(32, max(1, (32 << 20) // size)))]
    times = []
    for _ in range(max(3, 32 // len(copies))):
        for one in copies:
            fresh = x.clone()  # else the second call would find its input quantized
            start = time.perf_counter()
            one(fresh)
            times.append(time.perf_counter() - start)
    return statistics.median(times[len(copies) :]) * 1e6


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
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
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


def _attention_obstacle(name: str, module: nn.MultiheadAttention, users: dict, skipped) -> str | None:
    if any(skipped(f"{name}.{part}".strip("."), child) for part, child in module.named_modules()):
        return "it or a part of it is named by skip"
    if type(module).forward is not nn.MultiheadAttention.forward:
        return f"{type(module).__name__} is a subclass of nn.MultiheadAttention with a forward of its own"
    if module.bias_k is not None or module.add_zero_attn:
        return "bias_k, bias_v and add_zero_attn are not handled"
    if type(module.out_proj).forward is not nn.Linear.forward or "weight" not in module.out_proj._parameters:
        return f"its out_proj is a {type(module.out_proj).__name__} that computes its weight, or not a plain linear"
    if any(len(users[id(p)]) > 1 for p in module.parameters()):
        return "it shares its weights with another module"
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
    tensors = dict(module._parameters)
    if parametrize.is_parametrized(module):
        tensors |= {kind: getattr(module, kind) for kind in module.parametrizations}
    for kind, tensor in tensors.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"layer {name!r} has a {kind} that is not finite: NaN or Inf can't be quantized")


def _convert(module: nn.Module, tables: dict[int, nn.Module]) -> nn.Module:
    weight = module.weight.t() if _is_conv1d(module) else module.weight
    if isinstance(module, nn.Embedding):
        new: nn.Module = Int8Embedding.from_weight(weight, module.padding_idx)
    else:
        new = Int8Linear.from_weight(weight, module.bias)
        new.transposed = _is_conv1d(module)
    if not parametrize.is_parametrized(module, "weight"):
        first = tables.setdefault(id(module.weight), new)
        new.packed, new.scale = first.packed, first.scale
    return new


def _disable_fast_path(module: nn.Module) -> None:
    """The fused path of nn.TransformerEncoderLayer reads float weights: the flags that it looks at first turn it off."""
    if isinstance(module, nn.TransformerEncoderLayer) and module.activation_relu_or_gelu:
        surgery.resize(module, tensors={}, attributes={"activation_relu_or_gelu": 0})
    if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
        surgery.resize(module, tensors={}, attributes={"use_nested_tensor": False})
