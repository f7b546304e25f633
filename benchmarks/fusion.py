"""Latency of a model as it is, as stock PyTorch fuses it, as this package does, and in other engines.

    python benchmarks/fusion.py --models mobilenet_v2 resnet --batch 1 8
    python benchmarks/fusion.py --engines eager torchscript_frozen ours --models all

Models have random weights (speed doesn't depend on them) and BatchNorm statistics of random inputs. Engines take turns
call by call in one process, with the same threads and the same allocator setting; the number is the median per call.
Rows go to benchmarks/results/fusion.csv, one per model, batch and engine, slower ones included. torch.compile needs minutes
to compile a model; onnxruntime, onnx, onnxscript and openvino have to be installed for their rows.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from quantize import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM
from quantize.calibration import call
from quantize.fusion import backends, fuse, torchscript
from quantize.fusion.equality import difference, outputs, race
from quantize.fusion.nested import flatten
from quantize.measure import keep_allocations, machine

RESULTS = Path(__file__).parent / "results" / "fusion.csv"
IMAGE = {"num_labels": 1000}
TEXT = {"use_cache": False}


def pixels(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(batch))}


def ids(batch: int, length: int = 128) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 1000, (batch, length), generator=torch.Generator().manual_seed(batch))}


def seeded(model: nn.Module, inputs: dict[str, torch.Tensor]) -> nn.Module:
    """Weights and BatchNorm statistics that keep activations in range, as after training."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    norms = [m.train() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            call(model, inputs)
    return model.eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, torch.Tensor]]]] = {
    "mobilenet_v2": (lambda: transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(**IMAGE)), pixels),
    "efficientnet_b0": (
        lambda: transformers.EfficientNetForImageClassification(
            transformers.EfficientNetConfig(
                image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, **IMAGE
            )
        ),
        pixels,
    ),
    "resnet50": (lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(**IMAGE)), pixels),
    "convnext_tiny": (lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**IMAGE)), pixels),
    "vit_small": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, **IMAGE)
        ),
        pixels,
    ),
    "bert_base": (lambda: transformers.BertModel(transformers.BertConfig()), ids),
    "gpt2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**TEXT)), ids),
    "convnet": (
        lambda: ConvNet(ConvNetConfig(in_channels=3, widths=(32, 64, 128), blocks=2)),
        lambda b: {"images": torch.randn(b, 3, 32, 32, generator=torch.Generator().manual_seed(b))},
    ),
    "decoder": (
        lambda: DecoderLM(DecoderConfig(width=512, layers=8, heads=8)),
        lambda b: {"ids": ids(b)["input_ids"] % 256},
    ),
}


class Compiled(nn.Module):
    """`torch.compile`, with inductor's freezing or without."""

    def __init__(self, model: nn.Module, inputs: Any, *, freezing: bool) -> None:
        super().__init__()
        self.fast = torch.compile(copy.deepcopy(model), options={"freezing": freezing}, dynamic=False)
        with torch.no_grad():
            call(self, inputs)

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.fast(**inputs)


def channels_last(model: nn.Module, inputs: dict[str, torch.Tensor]) -> nn.Module:
    if "pixel_values" not in inputs and "images" not in inputs:
        raise ValueError("no images")
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def external(name: str) -> Callable[[nn.Module, Any], nn.Module]:
    """The other engines get the model as exported: they have their own passes."""

    def make(model: nn.Module, inputs: Any) -> nn.Module:
        from quantize.fusion.graph import capture

        return backends.build(capture(model, inputs), name, flatten(inputs, "inputs")[0])

    return make


ENGINES: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "eager": lambda model, inputs: model,
    "eager_channels_last": channels_last,
    "torchscript_frozen": torchscript.plain_frozen,
    "ours": lambda model, inputs: fuse(model, inputs),
    "compile": lambda model, inputs: Compiled(model, inputs, freezing=False),
    "compile_frozen": lambda model, inputs: Compiled(model, inputs, freezing=True),
    "onnxruntime": external("onnxruntime"),
    "openvino": external("openvino"),
}


def bench(name: str, batch: int, engines: list[str], seconds: float) -> list[dict[str, Any]]:
    """Rows of one model at one batch size."""
    torch.manual_seed(0)
    build, example = MODELS[name]
    inputs = example(batch)
    model = seeded(build(), inputs)
    expected, models, problems, built = outputs(model, inputs), {}, {}, {}
    for engine in engines:
        start = time.perf_counter()
        try:
            models[engine] = ENGINES[engine](model, inputs)
            outputs(models[engine], inputs)
        except Exception as error:  # an engine that can't take a model gets a row that says so
            models.pop(engine, None)
            problems[engine] = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        built[engine] = time.perf_counter() - start
    times = race(models, inputs, seconds=seconds, warm_up=5)
    host = machine()
    rows = []
    for engine in engines:
        latency = times.get(engine)
        rows.append(
            {
                "model": name,
                "batch": batch,
                "engine": engine,
                "latency_ms": f"{latency:.3f}" if latency else "",
                "speedup": f"{times['eager'] / latency:.3f}" if latency and "eager" in times else "",
                "difference": f"{difference(outputs(models[engine], inputs), expected):.1e}" if latency else "",
                "build_s": f"{built[engine]:.1f}",
                "threads": torch.get_num_threads(),
                "cpu": host["cpu"],
                "torch": torch.__version__,
                "allocator": host["allocator"],
                "problem": problems.get(engine, ""),
            }
        )
        print(*(f"{rows[-1][k]!s:>18}" for k in ("model", "batch", "engine", "latency_ms", "speedup", "difference", "problem")))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["all"], choices=["all", *MODELS], help="what to measure")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES), help="who runs it")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="batch sizes")
    parser.add_argument("--threads", type=int, default=2, help="threads to compute with")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of timing per engine, at least 5 calls")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV to add the rows to")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    keep_allocations()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in MODELS if "all" in args.models else args.models:
        for batch in args.batch:
            rows = bench(name, batch, args.engines, args.seconds)
            new = not args.out.exists()
            with args.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                if new:
                    writer.writeheader()
                writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
