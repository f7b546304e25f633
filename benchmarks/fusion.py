"""Latency of a model as it is, as stock PyTorch fuses it, as this package does, and in other
engines.

    uv run --group bench python benchmarks/fusion.py --models mobilenet_v2 --batch 1 8
    uv run python benchmarks/fusion.py --models convnet --engines ours compile

Models have random weights (speed doesn't depend on them) and BatchNorm statistics of random inputs.
Each engine runs in a process of its own, and they take turns (`quantize.measuring.compare`); the
number is the median per call, `difference` how far the output is from eager's, as a share of the
largest value, `load_s` the seconds from the file or the model to the first answer. Peers
(`peers.py`) have all sizes fixed; ours keeps batch and length free. Rows go to
benchmarks/results/fusion.csv, one per model, batch and engine, slower ones included; a new run of a
model, batch and engine replaces its row. The chart lies beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import models
import peers
import rows
import torch

from quantize.run.fusion.equality import difference

ENGINES = {
    "eager": peers.eager,
    "eager_channels_last": partial(peers.eager, change=peers.channels_last),
    "torchscript_frozen": peers.torchscript_frozen,
    "ours": peers.fused,
    "compile": partial(peers.eager, change=partial(peers.compiled, freezing=False)),
    "compile_frozen": partial(peers.eager, change=peers.compiled),
    "onnxruntime": peers.onnxruntime,
    "openvino": peers.openvino,
}
KEY = ("model", "batch", "engine")


def away(x: torch.Tensor, expected: torch.Tensor, model: Any) -> tuple[str, float]:
    return "difference", difference([model(x)], [expected])


def rows_of(name: str, batch: int, arguments: argparse.Namespace, folder: Path) -> list[rows.Row]:
    """A row per engine, of one model at one batch size."""
    make, example = models.MODELS[name]
    case = peers.Case(make, example(batch), folder / f"{name}-{batch}")
    engines = peers.chosen(ENGINES, arguments.engines)
    if case.inputs.dim() != 4:
        engines.pop("eager_channels_last", None)
    with torch.no_grad():
        expected = case.build()(case.inputs)
    evaluate = partial(away, case.inputs, expected)
    found = peers.side_by_side(engines, case, arguments, evaluate)
    return [{"model": name, "batch": batch, "engine": engine, **row} for engine, row in found]


def main() -> None:
    parser = rows.Parser(__doc__, "fusion.csv")
    parser.some("--models", "what to measure", models.MODELS)
    parser.some("--engines", "who runs it, beside eager", ENGINES)
    parser.flag("--batch", "batch sizes", [1, 8])
    arguments = parser.parse_engines()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.cache or Path(temporary)
        for name, batch in product(arguments.models, arguments.batch):
            rows.write(arguments.out, rows_of(name, batch, arguments, folder), KEY)
    labels = ("model", "times as fast as eager")
    rows.chart(arguments.out, "batch", "engine", itemgetter("model"), "speedup", labels, 1)


if __name__ == "__main__":
    main()
