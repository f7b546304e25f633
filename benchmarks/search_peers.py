"""Other tools beside `quantize.compress`, each by its one call for int8, on models of `search.py`.

    uv run --group bench python benchmarks/search_peers.py --folder search-benchmark

The folder is that of a run of `search.py`. `loss` is what the metric lost, `ours` the speed of the
fastest point of all searches of that model that lost no more, give or take noise, and `ratio` how
many times as fast as the tool that is. Each tool gets the batch that it is timed on; its model is
judged on the same held-out examples.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import models
import peers
import rows
import torch
from search_models import TASKS
from torch import Tensor, nn

import quantize
from quantize.calibration import main_output
from quantize.compression.search.judge import Evaluated

ENGINES = {
    "eager": peers.eager,
    "onnxruntime_int8": peers.onnxruntime_int8,
    "openvino_int8": peers.openvino_int8,
    "torchao_compiled": partial(peers.eager, change=peers.torchao_int8),
}


@dataclass(frozen=True)
class Trained(peers.Case):
    """Of a model with weights of its own."""

    def build(self) -> nn.Module:
        return models.Main(self.make()).eval()


def loaded(name: str, folder: Path) -> nn.Module:
    """The model as `search.py` has trained it."""
    return quantize.open_model(folder / f"{name}.pth", TASKS[name]().build())


def in_batches(model: Any, size: int, x: Tensor) -> Tensor:
    """The outputs of a graph that takes batches of this size alone; the last one is filled up."""
    filled = torch.cat([x, x[:1].repeat_interleave(-len(x) % size, 0)])
    parts = [main_output(model(part)) for part in filled.split(size)]
    return torch.cat(parts)[: len(x)]


def fastest(folder: Path, most: float) -> float:
    """The speed-up of the fastest point of a model's searches that lost no more than `most`."""
    known = json.loads((folder / "search.json").read_text())["rows"]
    return max(row["speedup"] for row in known if row["file"] and row["loss"] <= most)


def measured(name: str, options: Any) -> list[rows.Row]:
    """A row for each tool, the original first."""
    task = TASKS[name]()
    size = len(task.inputs[0])
    judge = Evaluated(task.evaluate, loaded(name, options.folder))
    case = Trained(
        partial(loaded, name, options.folder),
        task.inputs[0],
        options.folder / f"{name}-peers",
        task.inputs,
    )

    metric = judge.name

    def evaluate(model: Any) -> float:
        return task.evaluate(partial(in_batches, model, size))[metric]

    found = []
    for peer, columns in peers.side_by_side(ENGINES, case, options, evaluate):
        row = {"model": name, "peer": peer} | columns
        value = columns.get("metric")
        if value is not None:
            row["loss"] = judge.value - value if judge.higher else value - judge.value
            row["ours"] = fastest(options.folder / f"{name}-search", row["loss"] + judge.noise)
            row["ratio"] = row["ours"] / columns["speedup"]
        found.append(row)
    return found


def main() -> None:
    parser = rows.Parser(__doc__, "search_peers.csv")
    parser.some("--models", "which", ("text", "cnn"))
    parser.flag("--folder", "of a run of search.py", "search-benchmark")
    parser.flag("--rounds", "turns of each", 9)
    parser.flag("--seconds", "of a turn", 0.2)
    options = parser.parse()
    options.folder = Path(options.folder)
    for name in options.models:
        rows.write(Path(options.out), measured(name, options), key=("model", "peer"))


if __name__ == "__main__":
    main()
