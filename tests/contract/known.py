"""Cells that don't work: those that are refused by name, and (while engineers mend) those that
break a promise.

A refusal is a row (transforms, models, a part of the message). A cell that is in no table works. A
change from one to the other fails a test, whichever way it goes.
"""

from __future__ import annotations

from contract.broken import BROKEN as BROKEN
from contract.broken import BROKEN_PAIRS as BROKEN_PAIRS
from quantize.host import native_bf16

HALF = ("half fp16", "half bf16")
INT8 = ("int8", "int8 smooth")
INT4 = ("int4", "int4 calibrated")
LOW_RANK = ("low rank", "low rank calibrated")
PRUNING = ("pruned", "pruned calibrated", "student")
FUSION = ("fused", "folded")
COMPUTED = (
    "weight_norm",
    "spectral_norm",
    "prune mask",
    "weight_norm after a step",
    "spectral_norm after a step",
    "prune mask after a step",
    "parametrized weight_norm",
    "parametrized spectral_norm",
    "parametrized orthogonal",
)

EVERY = (*HALF, *INT8, *INT4, *LOW_RANK, *PRUNING, "recovered", *FUSION)

REFUSALS: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (EVERY, ("uncopyable",), "can't be copied"),
    (EVERY, ("lazy",), "run the model once"),
    (FUSION, ("training", "partly training"), "is in training mode"),
    (FUSION, ("counts calls", "lists calls", "counting hook"), "its forward changes the attribute"),
    (FUSION, ("keeps activation",), "its forward assigns to last"),
    (("folded", *PRUNING), ("data dependent",), "data-dependent"),
    (PRUNING, ("bare linear",), "it is an output of the model"),
    (PRUNING, ("lstm", "gru", "merging lora", "mamba", "experts"), "can be pruned"),
    (INT4, ("group norm",), "no multiple of group_size"),
    (("recovered",), ("float16", "bfloat16"), "too coarse for small steps"),
)

REFUSED: dict[str, dict[str, str]] = {transform: {} for transform in EVERY}
for transforms, models, part in REFUSALS:
    for transform in transforms:
        REFUSED[transform] |= dict.fromkeys(models, part)

# Orders in which two transforms are not applied, whatever the model, and a part of the message.
PACKED = ("int8", "int8 smooth", "int4 calibrated")
REFUSED_ORDERS: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (HALF, HALF, "stored in 16 bits already"),
    # elsewhere its layers compute in float32, and are trained in it
    (("half bf16",) if native_bf16() else (), ("recovered",), "too coarse for small steps"),
    (PACKED, ("pruned calibrated", "student"), "holds integers: prune before quantizing"),
    (PACKED, ("recovered",), "holds integers, which can't be trained"),
    (("fused",), (*EVERY,), "TorchScript module"),
    (
        ("folded",),
        ("pruned calibrated", "student"),
        "is a graph: prune the model that it was made of",
    ),
    (("folded",), FUSION, "is folded already"),
    (("folded",), ("recovered",), "no parameter that requires a gradient"),
    (("folded",), (*HALF, *INT8, *INT4, *LOW_RANK), "Folded has no"),
)


# Orders in which nothing is left to do on these models.
NOTHING_LEFT: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], str], ...] = (
    (PACKED, HALF, ("mlp",), "no floating-point parameter"),
    (PACKED, INT8, ("mlp",), "no layer left to quantize"),
    (INT8, INT8, ("conv net",), "no layer left to quantize"),
    (PACKED, ("int8",), ("decoder",), "no layer left to quantize"),
    (("int8 smooth",), ("int8 smooth",), ("decoder",), "no layer left to quantize"),
    (
        PACKED,
        ("int4 calibrated",),
        ("mlp", "decoder", "conv net"),
        "no linear layer to store in 4 bits",
    ),
    (PACKED, ("low rank calibrated",), ("mlp", "decoder"), "no layer to factorize"),
)


def refused_pair(before: str, after: str, model: str) -> str:
    """What the message says where this order is refused, "" where it works."""
    for first, second, part in REFUSED_ORDERS:
        if before in first and after in second:
            return part
    for first, second, models, part in NOTHING_LEFT:
        if before in first and after in second and model in models:
            return part
    return ""
