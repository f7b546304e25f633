"""Cells that don't work: those that are refused by name, and (while engineers mend) those that break a promise.

A refusal is a row (transforms, models, a part of the message). A cell that is in no table works. A change from one to the
other fails a test, whichever way it goes.
"""

from __future__ import annotations

from contract.broken import BROKEN as BROKEN
from contract.broken import BROKEN_PAIRS as BROKEN_PAIRS
from contract.broken import NOT_NOTED as NOT_NOTED

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

REFUSALS: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    ((*HALF, *INT8, *INT4, *LOW_RANK, *PRUNING, "recovered", *FUSION), ("uncopyable",), "can't be copied"),
    ((*INT8, *INT4, *LOW_RANK), ("lazy",), "run the model once"),
    (FUSION, ("training", "partly training"), "is in training mode"),
    (("folded",), ("changes buffer", "running mean"), "its forward changes"),
    (("folded", *PRUNING), ("data dependent",), "data-dependent"),
    (PRUNING, ("bare linear",), "it is an output of the model"),
    (PRUNING, ("lstm", "gru", "merging lora", "mamba"), "can be pruned"),
    (INT4, ("group norm",), "no multiple of group_size"),
    (("recovered",), ("float16", "bfloat16"), "too coarse for small steps"),
)

REFUSED = {
    transform: {model: part for transforms, models, part in REFUSALS if transform in transforms for model in models}
    for transform in (*HALF, *INT8, *INT4, *LOW_RANK, *PRUNING, "recovered", *FUSION)
}

REFUSED_PAIRS: dict[tuple[str, str], dict[str, str]] = {}
