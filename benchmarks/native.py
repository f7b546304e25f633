"""int8 layers against float32 ones where int8 used to lose: narrow layers, and small encoders.

    uv run python benchmarks/native.py
    QUANTIZE_ISA=avx2 uv run python benchmarks/native.py --widths 64 --encoders

A row of benchmarks/results/native.csv is a layer [width, width] at a number of rows, or a BERT
encoder at batch x length: the median milliseconds in float32 eager and in int8, taking turns in
this process, and how many times as fast int8 is. `isa` is the instruction set that the native
kernel is compiled for (QUANTIZE_ISA caps it). `int8.py` has the peers.
"""

from __future__ import annotations

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
KEY = ("what", "rows", "isa", "threads")


def compared(what: str, count: str, plain: nn.Module, small: nn.Module, x: Tensor) -> rows.Row:
    """The row of a float32 module and its int8 copy."""
    calls = [partial(plain, x), partial(small, x)]
    fp32, int8 = clock.race(calls, seconds=0.5, least=7, burst_s=0.03, warm_up=3)
    about = {"what": what, "rows": count, "isa": isa.levels()[-1]}
    times = {"fp32_ms": 1000 * fp32, "int8_ms": 1000 * int8, "speedup": fp32 / int8}
    return {**about, **times, **rows.host()}


def main() -> None:
    parser = rows.Parser(__doc__, "native.csv")
    parser.flag("--widths", "of narrow layers", [64, 128, 256])
    parser.flag("--rows", "of a narrow layer's input", [1, 16, 256])
    parser.add_argument("--encoders", nargs="*", choices=ENCODERS, default=list(ENCODERS))
    arguments = parser.parse()
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
    rows.write(arguments.out, found, KEY)


if __name__ == "__main__":
    main()
