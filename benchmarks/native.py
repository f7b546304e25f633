"""int8 layers against float32 ones where int8 used to lose: narrow layers, and small models.

    uv run python benchmarks/native.py
    QUANTIZE_ISA=avx2 uv run python benchmarks/native.py --widths 64 --encoders --small

A row of benchmarks/results/native.csv is a layer [width, width] at a number of rows, a BERT encoder
of which all layers are int8 at batch x length, or a small model as `quantize_dynamic` with
calibration leaves it at a batch size: the median milliseconds in float32 eager and in int8, taking
turns in this process, and how many times as fast int8 is. `isa` is the instruction set that the
native kernel is compiled for (QUANTIZE_ISA caps it). `int8.py` has the peers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import models
import rows
import torch
from torch import Tensor, nn

from quantize import clock, quantize_dynamic
from quantize.native import isa
from quantize.nn.int8 import Int8Linear

ENCODERS = {"384x6": (384, 6), "768x12": (768, 12)}
SHAPES = ((1, 32), (1, 128), (8, 128))
BATCHES = (1, 8)
KEY = ("what", "rows", "isa", "threads")


class MixerBlock(nn.Module):
    """One block of an MLP-Mixer (Tolstikhin et al., 2021): along the patches, then the channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.along_patches = self.feed_forward(patches, width // 2)
        self.along_channels = self.feed_forward(width, 4 * width)

    @staticmethod
    def feed_forward(width: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.along_patches(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.along_channels(self.norms[1](x))


def mixer() -> nn.Module:
    """Over 224 x 224 images in patches of 16."""
    stem = nn.Sequential(nn.Conv2d(3, 256, 16, 16), nn.Flatten(2))
    blocks = [MixerBlock(196, 256) for _ in range(4)]
    return nn.Sequential(stem, Transposed(), *blocks, nn.LayerNorm(256), nn.Linear(256, 1000))


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


SMALL: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "bert 64x4": (partial(models.small_bert, 64, 4), models.ids),
    "bert 128x4": (partial(models.small_bert, 128, 4), models.ids),
    "bert 256x4": (partial(models.small_bert, 256, 4), models.ids),
    "gpt2 256x4": (partial(models.gpt2, 256, 4, models.VOCABULARY), models.ids),
    "t5 256x4": (models.t5_encoder, models.ids),
    "vit 192x4": (partial(models.vit, 192, 4), models.pixels),
    "mixer 256x4": (mixer, models.pixels),
}


def compared(what: str, count: str, plain: nn.Module, small: nn.Module, x: Tensor) -> rows.Row:
    """The row of a float32 module and its int8 copy."""
    calls = [partial(plain, x), partial(small, x)]
    fp32, int8 = clock.race(calls, seconds=0.5, least=7, burst_s=0.03, warm_up=3)
    about = {"what": what, "rows": count, "isa": isa.levels()[-1]}
    times = {"fp32_ms": 1000 * fp32, "int8_ms": 1000 * int8, "speedup": fp32 / int8}
    return {**about, **times, **rows.host()}


def small_rows(name: str) -> list[rows.Row]:
    """A small model at each batch size."""
    make, inputs = SMALL[name]
    model = make().eval()
    small = quantize_dynamic(model, calibration=[inputs(batch) for batch in BATCHES])
    return [compared(name, f"batch {b}", model, small, inputs(b)) for b in BATCHES]


def main() -> None:
    parser = rows.Parser(__doc__, "native.csv")
    parser.flag("--widths", "of narrow layers", [64, 128, 256])
    parser.flag("--rows", "of a narrow layer's input", [1, 16, 256])
    parser.add_argument("--encoders", nargs="*", choices=ENCODERS, default=list(ENCODERS))
    parser.some("--small", "small models", of=SMALL)
    arguments = parser.parse()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    found = []
    for width in arguments.widths:
        layer = nn.Linear(width, width).eval()
        small = Int8Linear.from_weight(layer.weight, layer.bias)
        for count in arguments.rows:
            x = torch.randn(count, width)
            found.append(compared(f"linear {width}", str(count), layer, small, x))
    for name in arguments.encoders:
        model = models.small_bert(*ENCODERS[name]).eval()
        small = quantize_dynamic(model, prefer="size")
        for batch, length in SHAPES:
            x = models.ids(batch, length)
            found.append(compared(f"bert {name}", f"{batch}x{length}", model, small, x))
    for name in arguments.small:
        found += small_rows(name)
    rows.write(arguments.out, found, KEY)


if __name__ == "__main__":
    main()
