"""The transforms of the contract, by name: what each is called with and what it promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from helpers import in_int8
from torch import nn

import quantize
from quantize import surgery

Apply = Callable[[nn.Module, Any, Sequence[Any]], nn.Module]


@dataclass(frozen=True)
class Transform:
    """`apply(model, example inputs, batches)` and the largest relative distance of the result's
    outputs (None: any).
    """

    apply: Apply
    bound: float | None
    technique: str  # its name in the summary
    layers: bool = True  # the summary names each layer
    runs: bool = False  # it runs the model on inputs, so that a distance is known
    script: bool = False  # the result is TorchScript
    saved: bool = True  # `quantize.save` takes the result
    evaluates: bool = False  # the result is in eval mode, whatever the model was in


def _half(dtype: torch.dtype) -> Apply:
    return lambda model, inputs, batches: quantize.to_half(model, dtype)


def _int8(model: nn.Module, inputs: Any, batches: Sequence[Any]) -> nn.Module:
    return in_int8(model)


def _int8_smooth(model: nn.Module, inputs: Any, batches: Sequence[Any]) -> nn.Module:
    return in_int8(model, calibration=batches, embeddings=True)


def _int4(model: nn.Module, inputs: Any, batches: Sequence[Any]) -> nn.Module:
    return quantize.quantize_weights(model)


def _int4_calibrated(model: nn.Module, inputs: Any, batches: Sequence[Any]) -> nn.Module:
    return quantize.quantize_weights(model, calibration=batches)


def _pruned(model: nn.Module, inputs: Any, batches: Sequence[Any]) -> nn.Module:
    return quantize.prune_ln_structured(model, inputs)


def _pruned_calibrated(model: nn.Module, inputs: Any, batches: Sequence[Any]) -> nn.Module:
    return quantize.prune_ln_structured(model, inputs, calibration=batches)


def _low_rank(model: nn.Module, inputs: Any, batches: Sequence[Any]) -> nn.Module:
    return quantize.factorize_low_rank(model, ratio=0.7)


def _low_rank_calibrated(model: nn.Module, inputs: Any, batches: Sequence[Any]) -> nn.Module:
    return quantize.factorize_low_rank(model, ratio=0.7, calibration=batches, only_faster=False)


def _student(model: nn.Module, inputs: Any, batches: Sequence[Any]) -> nn.Module:
    return quantize.make_student(model, width=0.5, example_inputs=inputs)


def noisy(model: nn.Module) -> nn.Module:
    """A copy with each weight changed by about a twentieth: what `recover` starts from here."""
    student = surgery.clone(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            if not nn.parameter.is_lazy(parameter):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(
                    parameter.dtype
                )
                parameter.mul_(1 + 0.05 * noise)
    return student


def _recovered(model: nn.Module, inputs: Any, batches: Sequence[Any]) -> nn.Module:
    student = noisy(model)
    return quantize.recover(student, model, batches, steps=2)


def _fused(model: nn.Module, inputs: Any, batches: Sequence[Any]) -> nn.Module:
    return quantize.fuse(model, inputs)


def _folded(model: nn.Module, inputs: Any, batches: Sequence[Any]) -> nn.Module:
    return quantize.fold(model, inputs)


TRANSFORMS: dict[str, Transform] = {
    "half fp16": Transform(_half(torch.float16), 5e-3, "half"),
    "half bf16": Transform(_half(torch.bfloat16), 4e-2, "half"),
    "int8": Transform(_int8, 0.05, "int8"),
    "int8 smooth": Transform(_int8_smooth, 0.05, "int8", runs=True),
    "int4": Transform(_int4, 0.35, "int4"),
    "int4 calibrated": Transform(_int4_calibrated, 0.35, "int4", runs=True),
    "pruned": Transform(_pruned, None, "pruned", runs=True, evaluates=True),
    "pruned calibrated": Transform(_pruned_calibrated, None, "pruned", runs=True, evaluates=True),
    "low rank": Transform(_low_rank, None, "low rank", evaluates=True),
    "low rank calibrated": Transform(
        _low_rank_calibrated, None, "low rank", runs=True, evaluates=True
    ),
    "student": Transform(_student, None, "student", runs=True, evaluates=True),
    "recovered": Transform(_recovered, None, "recover", layers=False, runs=True, evaluates=True),
    "fused": Transform(_fused, 1e-4, "fuse", layers=False, runs=True, script=True, saved=False),
    "folded": Transform(_folded, 1e-4, "fold", layers=False, runs=True, saved=False),
}
