"""What 8- and 4-bit weights cost a trained decoder, in every form.

    uv run python train.py                  # writes artifacts/model.pth
    uv run python benchmarks/int8_quality.py --model artifacts/model.pth

A row of benchmarks/results/int8_quality.csv is one form: bits per byte on held-out text, the change
against float32, and the mean cosine of its logits to float32's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import peers
import rows
import torch
from torch import nn

from quantize import load, quantize_dynamic, quantize_weights
from quantize.nn import int8_kernels, int8_stock
from quantize.nn.int8_rows import Rows
from quantize.training import data, evaluate_text

WINDOW = 256


def per_tensor(x: torch.Tensor) -> Rows:
    """In the place of a step per row: one for all rows."""
    x = x.float()
    step = (x.abs().amax() / 127).clamp_min(1e-30).expand(len(x), 1)
    return Rows((x / step).round_().to(torch.int8), step, torch.zeros_like(step, dtype=torch.int32))


in_int8 = partial(quantize_dynamic, prefer="size")


@contextmanager
def one_scale() -> Iterator[None]:
    """Int8 layers are stock operations that quantize their inputs by `per_tensor`."""
    names = ("quantize_rows", "quantize_many_rows")
    patched = mock.patch.multiple(int8_stock, **dict.fromkeys(names, per_tensor))
    with int8_kernels.kernel("reference"), patched:
        yield


def forms(batches: list[torch.Tensor]) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """What is made of the decoder; batches [B, T] to calibrate on."""
    calibrated = {"calibration": batches}
    return {
        "fp32": lambda model: model,
        "int8": in_int8,
        "int8, bfloat16 between": lambda model: in_int8(model).bfloat16(),
        "int8, one scale per tensor": in_int8,
        "int8, calibrated": partial(in_int8, **calibrated),
        "legacy": peers.legacy_int8,
        "int4, groups of 32": quantize_weights,
        "int4, groups of 32, calibrated": partial(quantize_weights, **calibrated),
        "int4, groups of 64, calibrated": partial(quantize_weights, group_size=64, **calibrated),
    }


def main() -> None:
    parser = rows.Parser(__doc__, "int8_quality.csv")
    parser.flag("--model", "a trained decoder", Path("artifacts/model.pth"))
    parser.flag("--max-bytes", "held-out bytes that are scored", 60_000)
    arguments = parser.parse()
    warnings.simplefilter("ignore")
    model, text = load(arguments.model), data.load_text()
    stream = data.TextBatches(text.train, batch=4, length=WINDOW)
    batches = [stream(step)[0] for step in range(4)]
    windows = text.validation[: len(text.validation) // WINDOW * WINDOW].long().view(-1, WINDOW)
    windows = windows[:: max(1, len(windows) // 16)]
    found: list[rows.Row] = []
    with torch.no_grad():
        expected = model(windows)
        for name, make in forms(batches).items():
            with one_scale() if "tensor" in name else nullcontext():
                small = make(model)
                cosine = nn.functional.cosine_similarity(small(windows).float(), expected, dim=-1)
                score = evaluate_text(small, text.validation, max_bytes=arguments.max_bytes)[
                    "bits_per_byte"
                ]
            found.append({"variant": name, "bits_per_byte": score, "cosine": cosine.mean().item()})
            found[-1]["change"] = score - found[0]["bits_per_byte"]
            print(found[-1], flush=True)
    rows.write(arguments.out, found)


if __name__ == "__main__":
    main()
