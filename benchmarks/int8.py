"""Dynamic int8 side by side with its peers: one process per variant, all alive, taking turns.

    # every model and shape, writes the CSV and the plot
    uv run --group bench python benchmarks/int8.py
    uv run --group bench python benchmarks/int8.py --models decoder --widths 512 \
        --variants int8 torchao

A row of benchmarks/results/int8.csv is one variant at one shape: median, 10th and 90th percentile
of the latency over the rounds, and the speed-up over float32 eager in the same rounds. A variant
whose package is missing, or that fails, gets a row that says so. `int8` is
`quantize.quantize_dynamic` of all layers, `int8_bf16` the same with everything between its layers
in bfloat16, `int8_compiled` that through torch.compile (with freezing, as `torchao` has it), and
`int8_speed` leaves the layers in float that int8 makes slower; `legacy` is
torch.ao.quantization.quantize_dynamic; `torchao` is dynamic int8 + torch.compile, compiled for the
shape; `onnxruntime` its dynamic int8; `openvino` is NNCF's static int8 with bfloat16 around it
(calibrated on the very inputs that are timed, which flatters it).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import models
import peers
import rows
import torch
from torch import nn

from quantize import quantize_dynamic

in_int8 = partial(quantize_dynamic, prefer="size")


def int8_bf16(model: nn.Module) -> Callable[[torch.Tensor], Any]:
    return peers.in_bf16(in_int8(model))


def int8_compiled(model: nn.Module) -> Callable[[torch.Tensor], Any]:
    return peers.in_bf16(in_int8(model), then=peers.compiled)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "bf16": peers.in_bf16,
    "int8": in_int8,
    "int8_speed": quantize_dynamic,
    "int8_bf16": int8_bf16,
    "int8_compiled": int8_compiled,
    "legacy": peers.legacy_int8,
    "torchao": peers.torchao_int8,
}
VARIANTS = {
    "fp32": peers.eager,
    **{name: partial(peers.eager, change=change) for name, change in CHANGES.items()},
    "onnxruntime": peers.onnxruntime_int8,
    "openvino": peers.openvino_int8,
}
# How a model is made of a width and a depth, its inputs of a batch and a length, the axes that vary
# and the shapes that are timed.
MODELS = {
    "decoder": (models.decoder, models.ids, (0, 1), ((1, 1), (1, 32), (1, 256), (8, 256))),
    "bert": (models.small_bert, models.ids, (0, 1), ((1, 16), (1, 32), (1, 128), (8, 128))),
    "vit": (models.vit, lambda batch, _: models.pixels(batch), (0,), ((1, 197), (8, 197))),
}
KEY = ("model", "width", "layers", "batch", "length", "variant", "threads")


def rows_of(
    name: str, width: int, batch: int, length: int, arguments: argparse.Namespace, folder: Path
) -> list[rows.Row]:
    """A row per variant, at one shape of one model."""
    make, example, axes, shapes = MODELS[name]
    layers = arguments.layers
    case = peers.Case(
        partial(make, width, layers),
        example(batch, length),
        folder / f"{name}-{width}-{layers}",
        calibration=[example(*shape) for shape in shapes],
        axes=axes,
    )
    about = {"model": name, "width": width, "layers": layers, "batch": batch, "length": length}
    about["threads"] = arguments.threads
    found = []
    for variant, row in peers.side_by_side(
        peers.chosen(VARIANTS, arguments.variants), case, arguments
    ):
        note = row.pop("problem")
        found.append({**about, "variant": variant, **row, "note": note})
    return found


def main() -> None:
    parser = rows.Parser(__doc__, "int8.csv")
    parser.some("--models", "which architectures", MODELS)
    parser.flag("--widths", "multiples of 64", [128, 256, 512, 768])
    parser.flag("--layers", "blocks of each model", 8)
    parser.add_argument("--shapes", nargs="+", help="only these, as BATCHxLENGTH")
    parser.some("--variants", "which to compare with fp32", VARIANTS)
    arguments = parser.parse_engines()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.cache or Path(temporary)
        for name, width in product(arguments.models, arguments.widths):
            for batch, length in MODELS[name][3]:
                if not arguments.shapes or f"{batch}x{length}" in arguments.shapes:
                    found = rows_of(name, width, batch, length, arguments, folder)
                    rows.write(arguments.out, found, KEY)
    labels = ("width: batch x length", "times as fast as float32 eager")
    rows.chart(arguments.out, "model", "variant", place, "speedup", labels, 1)


def place(row: rows.Row) -> str:
    return f"{row['width']}: {row['batch']} x {row['length']}"


if __name__ == "__main__":
    main()
