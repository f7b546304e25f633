"""Does every part of a `DecoderLM` have the sizes that its neighbours count on? Compiled code reads
as far as it is told to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from quantize import surgery
from quantize.models import DecoderLM

MAX_WINDOW = 2**31 - 1


def contradictions(model: DecoderLM) -> Iterator[str]:
    """What attributes, tensors and neighbours in `model` deny of each other, in words."""
    for name, module in model.named_modules():
        reason = surgery.contradiction(module)
        if reason is None and isinstance(module, nn.Linear):
            own = module._parameters.get("weight")
            weight = module.weight if own is None else own
            if not weight.is_floating_point():
                reason = f"its weight is {weight.dtype}"
        if reason is not None:
            yield f"{name or 'the model'}: {reason}"
    head_dim = model.config.head_dim
    width = getattr(model.embedding, "embedding_dim", model.config.width)
    for index, block in enumerate(blocks_of(model)):
        for part, reason in _of_block(block, width, head_dim):
            yield f"blocks.{index}.{part} {reason}"
    yield from _differs("head", getattr(model.head, "in_features", None), width, "inputs")
    yield from _differs("norm", _length(model.norm), width, "weights")
    yield from _differs("rope_frequencies", len(model.rope_frequencies()), head_dim // 2, "values")


def blocks_of(model: DecoderLM) -> Iterable[Any]:
    """The model's blocks; their parts may be compressed layers of any kind."""
    return model.blocks


def _of_block(block: Any, width: int, head_dim: int) -> Iterator[tuple[str, str]]:
    attention, ffn = block.attention, block.ffn
    window = attention.window
    if window is not None and (type(window) is not int or not 1 <= window <= MAX_WINDOW):
        yield "attention", f"has window={window!r}"
    queries, keys, hidden = (
        getattr(layer, "out_features", None) for layer in (attention.q, attention.k, ffn.gate)
    )
    if (
        queries is not None
        and keys is not None
        and (keys < 1 or keys % head_dim or queries < 1 or queries % keys)
    ):
        yield "attention", f"has {queries} and {keys} outputs of q and k, for heads of {head_dim}"
    expected = {
        "attention.q": (attention.q, width, None),
        "attention.k": (attention.k, width, None),
        "attention.v": (attention.v, width, keys),
        "attention.out": (attention.out, queries, width),
        "ffn.gate": (ffn.gate, width, None),
        "ffn.up": (ffn.up, width, hidden),
        "ffn.down": (ffn.down, hidden, width),
    }
    for name, (layer, inputs, outputs) in expected.items():
        for reason in _differs("", getattr(layer, "in_features", None), inputs, "inputs"):
            yield name, reason.strip()
        for reason in _differs("", getattr(layer, "out_features", None), outputs, "outputs"):
            yield name, reason.strip()
    norms = {"attention_norm": (block.attention_norm, width), "ffn_norm": (block.ffn_norm, width)}
    norms |= {
        "attention.q_norm": (attention.q_norm, head_dim),
        "attention.k_norm": (attention.k_norm, head_dim),
    }
    for name, (norm, length) in norms.items():
        for reason in _differs("", _length(norm), length, "weights"):
            yield name, reason.strip()


def _length(norm: nn.Module) -> int | None:
    weight = norm._parameters.get("weight")
    return None if weight is None else weight.numel()


def _differs(name: str, found: int | None, expected: int | None, what: str) -> Iterator[str]:
    """None: nothing is known, as of a layer of somebody else's."""
    if found is not None and expected is not None and found != expected:
        yield f"{name} has {found} {what}, its neighbours count on {expected}"
