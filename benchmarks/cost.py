"""What compressing costs: time and peak memory of calibrated pruning and low rank against the width
and the depth of the model and the batches of calibration.

Each row is a fresh process: it makes the model (random weights), runs the calibration batches for
the machine's own measure, and compresses. `ratio` is the time over that of the calibration's own
forward pass, `cpu_ratio` the same in CPU seconds, which neighbours on the machine disturb less.
`peak_mb` is how far the process's peak rose while it compressed. PyTorch's exporter, which a
process loads once, is loaded before that, in `load_s` seconds. `by_block` prunes, factorizes and
quantizes a decoder whose weights are mapped from a folder, block by block, into a file; its peak
counts the pages of the mapped weights, and `kept` is the file's share of the model's bytes.

    uv run python benchmarks/cost.py
    uv run python benchmarks/cost.py --cases bert_384x6 --sweeps --techniques pruned
    uv run python benchmarks/cost.py --cases --sweeps depth batches
    uv run python benchmarks/cost.py --cases decoder_135m --sweeps
    uv run python benchmarks/cost.py --cases decoder_1b --sweeps --techniques by_block --batches 1
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decoding import SIZES
from models import bert, build, classifier, llama, pitch_net, pixels, resnet18, small_bert
from rows import Parser, Row, host, in_a_process, write
from torch import nn

from quantize import (
    Given,
    Int8,
    LowRank,
    Prune,
    factorize_low_rank,
    open_model,
    prune_ln_structured,
    write_by_block,
)
from quantize.calibration import call, distance

BATCH, LENGTH, SIZE = 8, 128, 64
BATCHES = 8
PITCH = partial(pitch_net, (512, 128, 128, 128, 256, 512), (64,) * 6, 4)
KEY = ("model", "technique", "batches", "threads", "cpu")
SIZED = """vocab_size hidden_size num_hidden_layers
    num_attention_heads num_key_value_heads intermediate_size"""


@dataclass
class Case:
    """A model, the batches of its calibration, and what of it is pruned.

    batch: gives one. amount: as `prune_ln_structured` takes it.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    amount: Any = 0.5


def encoder(make: Callable[[int, int], nn.Module], width: int, layers: int) -> Case:
    """Half of each feed-forward layer goes."""

    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(256, (BATCH, LENGTH), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Case(partial(make, width, layers), batch, amount={"*intermediate.dense": 0.5})


def decoder(*sizes: int) -> Case:
    """Llama's shape with these `decoding.SIZES` and one table for the input and the output; half of
    each feed-forward layer goes.
    """
    config = dict(zip(SIZED.split(), sizes, strict=True))

    def make() -> nn.Module:
        return llama(tie_word_embeddings=True, **config)

    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(256, (BATCH, LENGTH), generator=generator)}

    return Case(make, batch, amount={"*up_proj": 0.5})


def images(make: Callable[[], nn.Module]) -> Case:
    """A classifier whose activations keep their range, as after training."""

    def batch(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)

    return Case(partial(build, make, pixels(BATCH, SIZE)), batch)


def sounds(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(BATCH, 1, 1024, generator=generator)


CASES = {
    "bert_384x6": encoder(bert, 384, 6),
    "bert_768x12": encoder(bert, 768, 12),
    "resnet18": images(resnet18),
    "mobilenet_v2": images(partial(classifier, "MobileNetV2", image_size=SIZE)),
    "six_conv1d": Case(PITCH, sounds, amount=0.3),
}
LARGE = {
    "decoder_135m": decoder(*SIZES["135M"]),
    "decoder_350m": decoder(*SIZES["360M"]),
    "decoder_1b": decoder(32000, 2048, 22, 32, 4, 5632),  # 1.1 billion parameters
    "decoder_2048x3": decoder(32000, 2048, 3, 32, 4, 5632),  # three layers of it
}
DEEP = {f"bert_256x{depth}": encoder(small_bert, 256, depth) for depth in (4, 8, 16)}
SMALL = {"bert_128x4": encoder(small_bert, 128, 4)}
MODELS = CASES | LARGE | DEEP | SMALL
SWEEPS = {
    "depth": [(name, BATCHES) for name in DEEP],
    "batches": [("bert_128x4", batches) for batches in (8, 32, 128)],
}
TECHNIQUES = ("pruned", "low_rank")
BY_BLOCK = Prune({"*.up": 0.5}) >> LowRank(0.5) >> Int8()


def compress(technique: str, case: Case, model: nn.Module, batches: list) -> nn.Module:
    if technique == "pruned":
        return prune_ln_structured(model, batches[0], amount=case.amount, calibration=batches)
    return factorize_low_rank(model, ratio=0.5, calibration=batches)


def compress_by_block(path: Path, model: nn.Module, batches: list) -> nn.Module:
    return write_by_block(BY_BLOCK, model, path, Given(calibration=batches))


def mapped(name: str, folder: str) -> nn.Module:
    """A decoder whose weights are mapped from a folder; another process makes them."""
    subprocess.run([sys.executable, __file__, "--make", name, folder], check=True)
    return open_model(folder)


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """A result, and the seconds and CPU seconds that it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def forward(model: nn.Module, batches: list) -> None:
    for batch in batches:
        call(model, batch)


def load_exporter() -> None:
    """What it imports at its first use, which is as much for the smallest model as for any."""
    torch.export.export(nn.Identity(), (torch.zeros(1),))


def row(name: str, technique: str, count: int) -> Row:
    """One row, in this process."""
    case = MODELS[name]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    batches = [case.batch(generator) for _ in range(count)]
    with tempfile.TemporaryDirectory(prefix="cost-") as folder:
        if technique == "by_block":
            model, file = mapped(name, folder), Path(folder) / "small.safetensors"
            batches = [batch["input_ids"] for batch in batches]
            costs, result = measured(partial(compress_by_block, file), model, batches)
            kept = file.stat().st_size / (4 * parameters(model))
        else:
            model = case.make().eval()
            costs, result = measured(partial(compress, technique, case), model, batches)
            kept = parameters(result) / parameters(model)
    return {
        "model": name,
        "technique": technique,
        "batches": count,
        **costs,
        "kept": kept,
        "distance": distance(result, model, batches[:1]),
        **host(),
    }


def measured(
    work: Callable[[nn.Module, list], nn.Module], model: nn.Module, batches: list
) -> tuple[Row, nn.Module]:
    """What the work costs, and its result."""
    _, load_s, _ = timed(load_exporter)
    forward(model, batches[:2])
    _, first, first_cpu = timed(partial(forward, model, batches))
    before = peak_mb()
    result, seconds, cpu = timed(partial(work, model, batches))
    grown = peak_mb() - before
    _, second, second_cpu = timed(partial(forward, model, batches))
    own = (first + second) / 2
    costs = {
        "load_s": load_s,
        "forward_s": own,
        "seconds": seconds,
        "cpu_s": cpu,
        "ratio": seconds / own,
        "cpu_ratio": 2 * cpu / (first_cpu + second_cpu),
        "model_mb": 4 * parameters(model) / 2**20,
        "peak_mb": grown,
    }
    return costs, result


def points(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Model, technique and number of batches of every row, each once."""
    sizes = [(name, arguments.batches) for name in arguments.cases]
    for sweep in arguments.sweeps:
        sizes += SWEEPS[sweep]
    for name, batches in dict.fromkeys(sizes):
        for technique in arguments.techniques:
            yield name, technique, batches


def main() -> None:
    parser = Parser(__doc__, "cost.csv")
    parser.some("--cases", "models of their own", CASES | LARGE, CASES)
    parser.flag("--batches", "of their calibration", BATCHES)
    parser.some("--sweeps", "more models, or more batches", SWEEPS)
    parser.some("--techniques", "what to do with them", (*TECHNIQUES, "by_block"), TECHNIQUES)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse()
    if arguments.make:
        name, folder = arguments.make
        MODELS[name].make().save_pretrained(folder)
        return
    if arguments.point:
        print(json.dumps(row(*json.loads(arguments.point))))
        return
    for point in points(arguments):
        flags = ("--point", json.dumps(point), "--threads", arguments.threads)
        write(arguments.out, in_a_process(*flags), KEY)


if __name__ == "__main__":
    main()
