"""What compressing costs: time and peak memory of calibrated pruning and low rank against the width
and the depth of the model and the batches of calibration.

Each row is a fresh process: it makes the model (random weights), runs the calibration batches for
the machine's own measure, and compresses. `ratio` is the time over that of the calibration's own
forward pass, `cpu_ratio` the same in CPU seconds, which neighbours on the machine disturb less.
`peak_mb` is how far the process's peak rose while it compressed.

    uv run python benchmarks/cost.py
    uv run python benchmarks/cost.py --cases bert_384x6 --sweeps --techniques pruned
    uv run python benchmarks/cost.py --cases --sweeps depth batches
    uv run python benchmarks/cost.py --cases decoder_135m --sweeps
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from models import bert, classifier, small_bert
from rows import Parser, Row, host, write
from torch import nn

from quantize import factorize_low_rank, prune_ln_structured
from quantize.calibration import call, distance

BATCH, LENGTH, SIZE = 8, 128, 64
BATCHES = 8
WIDTHS = [64, 128, 256, 512]  # of ResNet-18's stages
KEY = ("model", "technique", "batches")


@dataclass
class Case:
    """A model, the batches of its calibration, and what of it is pruned.

    batch: gives one. amount: as `prune_ln_structured` takes it. low_rank: has it layers for that?
    """

    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    amount: Any = 0.5
    low_rank: bool = True


def encoder(make: Callable[[int, int], nn.Module], width: int, layers: int) -> Case:
    """Half of each feed-forward layer goes."""

    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(256, (BATCH, LENGTH), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Case(partial(make, width, layers), batch, amount={"*intermediate.dense": 0.5})


def decoder(**config: Any) -> Case:
    """Llama's shape, with one table for the input and the output; half of each feed-forward layer
    goes.
    """

    def make() -> nn.Module:
        sizes = transformers.LlamaConfig(tie_word_embeddings=True, use_cache=False, **config)
        return transformers.LlamaForCausalLM(sizes)

    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(256, (BATCH, LENGTH), generator=generator)}

    return Case(make, batch, amount={"*up_proj": 0.5})


def images(kind: str, **config: Any) -> Case:
    def batch(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)

    return Case(partial(classifier, kind, **config), batch)


def six_convolutions() -> nn.Module:
    """Six 1-d convolutions with kernels of 64, as in nets that follow a pitch."""
    widths = [1, 512, 128, 128, 128, 256, 512]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        stride = 4 if before == 1 else 1
        layers.append(nn.Conv1d(before, after, 64, stride=stride, padding=32))
        layers += [nn.ReLU(), nn.BatchNorm1d(after), nn.MaxPool1d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(2048, 360))


def sounds(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(BATCH, 1, 1024, generator=generator)


CASES = {
    "bert_384x6": encoder(bert, 384, 6),
    "bert_768x12": encoder(bert, 768, 12),
    "resnet18": images("ResNet", layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=WIDTHS),
    "mobilenet_v2": images("MobileNetV2", image_size=SIZE),
    "six_conv1d": Case(six_convolutions, sounds, amount=0.3, low_rank=False),
}
LARGE = {
    "decoder_135m": decoder(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
    "decoder_350m": decoder(
        vocab_size=49152,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
    ),
}
DEEP = {f"bert_256x{depth}": encoder(small_bert, 256, depth) for depth in (4, 8, 16)}
SMALL = {"bert_128x4": encoder(small_bert, 128, 4)}
MODELS = CASES | LARGE | DEEP | SMALL
SWEEPS = {
    "depth": [(name, BATCHES) for name in DEEP],
    "batches": [("bert_128x4", batches) for batches in (8, 32, 128)],
}
TECHNIQUES = ("pruned", "low_rank")


def compress(technique: str, case: Case, model: nn.Module, batches: list) -> nn.Module:
    if technique == "pruned":
        return prune_ln_structured(model, batches[0], amount=case.amount, calibration=batches)
    return factorize_low_rank(model, ratio=0.5, calibration=batches)


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


def row(name: str, technique: str, count: int) -> Row:
    """One row, in this process."""
    case = MODELS[name]
    torch.manual_seed(0)
    model = case.make().eval()
    generator = torch.Generator().manual_seed(1)
    batches = [case.batch(generator) for _ in range(count)]
    forward(model, batches[:2])
    _, first, first_cpu = timed(partial(forward, model, batches))
    before = peak_mb()
    result, seconds, cpu = timed(partial(compress, technique, case, model, batches))
    grown = peak_mb() - before
    _, second, second_cpu = timed(partial(forward, model, batches))
    own = (first + second) / 2
    return {
        "model": name,
        "technique": technique,
        "batches": count,
        "forward_s": own,
        "seconds": seconds,
        "cpu_s": cpu,
        "ratio": seconds / own,
        "cpu_ratio": 2 * cpu / (first_cpu + second_cpu),
        "model_mb": 4 * parameters(model) / 2**20,
        "peak_mb": grown,
        "kept": parameters(result) / parameters(model),
        "distance": distance(result, model, batches[:1]),
        **host(),
    }


def points(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Model, technique and number of batches of every row, each once."""
    sizes = [(name, BATCHES) for name in arguments.cases]
    for sweep in arguments.sweeps:
        sizes += SWEEPS[sweep]
    for name, batches in dict.fromkeys(sizes):
        for technique in arguments.techniques:
            if technique == "pruned" or MODELS[name].low_rank:
                yield name, technique, batches


def in_a_fresh_process(point: tuple[str, str, int], threads: int) -> Row:
    flags = ["--point", json.dumps(point), "--threads", str(threads)]
    command = [sys.executable, __file__, *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = Parser(__doc__, "cost.csv")
    parser.some("--cases", "models at 8 batches", CASES | LARGE, CASES)
    parser.some("--sweeps", "more models, or more batches", SWEEPS)
    parser.some("--techniques", "what to do with them", TECHNIQUES)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse()
    if arguments.point:
        print(json.dumps(row(*json.loads(arguments.point))))
        return
    for point in points(arguments):
        write(arguments.out, [in_a_fresh_process(point, arguments.threads)], KEY)


if __name__ == "__main__":
    main()
