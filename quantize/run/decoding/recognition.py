"""Which models step.cpp can stand for, and what in a model it doesn't know."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from quantize.host import native_bf16
from quantize.models import Attention, DecoderBlock, DecoderLM, FeedForward, RMSNorm
from quantize.native import int8
from quantize.nn import Operands, operands, own_class
from quantize.nn.half import HalfLinear
from quantize.nn.int4 import Int4Linear
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_outliers import Int8OutlierLinear
from quantize.nn.low_rank import LowRankLinear
from quantize.run.decoding import lazy
from quantize.run.decoding.sizes import blocks_of, contradictions
from quantize.run.decoding.structs import KERNELS, LINEARS
from quantize.run.kv_cache import KVCache

KINDS = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int8: 3,
    torch.uint8: 4,
}  # as in structs.h
NOT_YET = "compiling step.cpp doesn't pay yet"


def obstacle(model: DecoderLM, *, compile_now: bool = True) -> str | None:
    """Why `Step` can't run `model`; None if it can. compile_now: as in `Kernels.find`."""
    try:
        found = next(_odd_parts(model), None)
    except AttributeError as error:
        # parts of somebody else's that don't have what a DecoderLM's have
        return f"it isn't made as a DecoderLM is: {error}"
    if found is not None:
        return found
    try:
        compiled = KERNELS.find(compile_now=compile_now)
        if any(isinstance(module, Int8Linear) for module in model.modules()):
            int8.functions()  # which pack the weights
    except OSError as error:
        return str(error)
    return NOT_YET if compiled is None else None


def is_plain(value: Any) -> TypeGuard[Tensor]:
    """Whether `value` is a tensor of torch's own, with its numbers in memory where `data_ptr`
    says.
    """
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout is torch.strided
        and value.device.type != "meta"
    )


def _odd_parts(model: DecoderLM) -> Iterator[str]:
    yield from _changed_code(model)
    config = model.config
    for index, block in enumerate(blocks_of(model)):
        attention = block.attention
        if (attention.layer, attention.head_dim) != (index, config.head_dim):
            yield f"blocks.{index}.attention isn't layer {index} of heads {config.head_dim} wide"
    norms = [module for module in model.modules() if type(module) is RMSNorm]
    if any(norm.eps != config.norm_eps for norm in norms):
        yield "its norms have another eps than its config"
    places: list[tuple[type, Any]] = [(RMSNorm, model.norm)]
    for block in blocks_of(model):
        places += [(DecoderBlock, block), (Attention, block.attention), (FeedForward, block.ffn)]
        places += [(RMSNorm, block.attention_norm), (RMSNorm, block.ffn_norm)]
        norm = RMSNorm if config.qk_norm else nn.Identity
        places += [(norm, block.attention.q_norm), (norm, block.attention.k_norm)]
    for kind, part in places:
        if own_class(part) is not kind:
            yield f"a {type(part).__name__} stands where a {kind.__name__} should"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            yield f"{name or 'the model'} has hooks or a forward of its own"
        tensors = lazy.held(module)
        if any(tensor.device.type != "cpu" for tensor in tensors):
            yield f"{name or 'the model'} isn't on the CPU"
        if not all(map(is_plain, tensors)):
            yield (
                f"{name or 'the model'} holds a tensor of another layout or class than torch's own"
            )
    yield from contradictions(model)
    if getattr(model.embedding, "embedding_dim", config.width) != config.width:
        yield f"its embedding isn't {config.width} wide, as its config says"
    layers = [model.head]
    for block in blocks_of(model):
        layers += linears(block).values()
    for layer in layers:
        parts = parts_of(layer)
        for part in parts:
            with_outliers = type(part) is Int8OutlierLinear and len(parts) == 1
            known = with_outliers or type(part) in (nn.Linear, HalfLinear, Int8Linear, Int4Linear)
            stored = stored_in(part) if known else None
            if stored is None:
                yield f"it has a {type(part).__name__}"
            elif stored.weight.dtype not in KINDS:
                yield f"it has a {type(part).__name__} of {stored.weight.dtype}"
            elif isinstance(part, Int8Linear) and part.in_features > int8.MOST_INPUTS:
                yield f"it has an Int8Linear of {part.in_features} inputs"


_OWN_CODE = {
    (kind, name): getattr(kind, name)
    for kind, name in (
        (DecoderLM, "forward"),
        (DecoderLM, "rope_frequencies"),
        (DecoderBlock, "forward"),
        (Attention, "forward"),
        (Attention, "attend"),
        (FeedForward, "forward"),
        (RMSNorm, "forward"),
        (KVCache, "attend"),
        (nn.Linear, "forward"),
        (HalfLinear, "forward"),
        (Int8Linear, "forward"),
        (Int8OutlierLinear, "forward"),
        (Int4Linear, "forward"),
        (LowRankLinear, "forward"),
        (nn.Module, "__call__"),
    )
}


def _changed_code(model: DecoderLM) -> Iterator[str]:
    """Methods that step.cpp stands for and that somebody replaced, in a subclass or in the class
    itself.
    """
    kind = own_class(model)
    for name in ("forward", "rope_frequencies", "__call__"):
        if getattr(kind, name) is not getattr(DecoderLM, name):
            yield f"{kind.__name__} has a {name} of its own"
    for (kind, name), function in _OWN_CODE.items():
        if getattr(kind, name) is not function:
            yield f"{kind.__name__}.{name} was replaced"


def linears(block: Any) -> dict[str, Any]:
    """The linear layers of a block, by their names in `Layer`."""
    attention, ffn = block.attention, block.ffn
    projections = attention.q, attention.k, attention.v, attention.out
    return dict(zip(LINEARS, (*projections, ffn.gate, ffn.up, ffn.down), strict=True))


def parts_of(layer: Any) -> tuple[Any, ...]:
    """The layers that multiply, one after the other."""
    return (layer.first, layer.second) if type(layer) is LowRankLinear else (layer,)


def stored_in(part: nn.Module) -> Operands | None:
    """What a layer that multiplies stores; of one with outliers, its integers. The weight has no
    data where only panels hold it.
    """
    if lazy.panels_of(part) is not None and isinstance(part, Int8Linear | Int4Linear):
        if getattr(part, "activation", None) is not None:
            return None
        own = lazy.shown(part)
        group = getattr(part, "group_size", 0)
        return Operands(own["packed"], own["bias"], own["scale"], group=group)
    return Int8Linear.operands(part) if type(part) is Int8OutlierLinear else operands(part)


def multiplies_integers(model: DecoderLM) -> bool:
    """Whether a linear layer of the blocks multiplies integers. Native code then reads prompts too:
    its integer products of many rows are the faster ones, and every way to read a text rounds
    alike.
    """
    return any(isinstance(part, Int8Linear | Int4Linear) for part in _parts(model))


def reads_prompts(model: DecoderLM) -> bool:
    """Whether native code reads prompts too: of a model that multiplies integers, and of one in
    bfloat16 on a CPU without instructions for it, where PyTorch's products are the slower ones.
    """
    if multiplies_integers(model):
        return True
    return not native_bf16() and any(map(_is_bfloat16, _parts(model)))


def _is_bfloat16(part: nn.Module) -> bool:
    return type(part) is nn.Linear and part.weight.dtype is torch.bfloat16


def _parts(model: DecoderLM) -> list[Any]:
    """The layers of the blocks that multiply; none of a model that isn't made as a DecoderLM is."""
    try:
        blocks = map(linears, blocks_of(model))
        layers = chain.from_iterable(block.values() for block in blocks)
        return list(chain.from_iterable(map(parts_of, layers)))
    except AttributeError:
        return []
