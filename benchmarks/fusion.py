"""Latency of a model as it is, as stock PyTorch fuses it, as this package does, and in other
engines.

    # compile and export; not timed
    python benchmarks/fusion.py --prepare --models mobilenet_v2 --batch 1 8
    python benchmarks/fusion.py --models mobilenet_v2 --batch 1 8  # time what is prepared
    python benchmarks/fusion.py --plot

Models have random weights (speed doesn't depend on them) and BatchNorm statistics of random inputs.
Each engine runs in a process of its own, with the same threads and the same allocator setting, and
they take turns: bursts of a quarter second, so that no engine's spinning threads run beside
another's work. The number is the median per call. Peers get the model as its authors wrote it, with
all sizes fixed, exported or compiled as their documentation says; ours keeps batch and length free.
Rows go to benchmarks/results/fusion.csv, one per model, batch and engine, slower ones included; a
new run of a model, batch and engine replaces its row. onnxruntime, onnx, onnxscript and openvino
have to be installed for their rows.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from quantize import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM
from quantize.host import keep_allocations, machine
from quantize.run.fusion import fuse, torchscript
from quantize.run.fusion.equality import difference, outputs

RESULTS = Path(__file__).parent / "results" / "fusion.csv"
IMAGE = {"num_labels": 1000}
BURST_S = 0.25


def pixels(batch: int, size: int = 224) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def ids(batch: int, length: int = 128) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(batch))


def seeded(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """Weights and BatchNorm statistics that keep activations in range, as after training."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    norms = [m.train() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.ones_(
            norm.weight
        )  # EfficientNet's authors start with noise, which shrinks everything to denormals
    if norms:
        with torch.no_grad():
            model(inputs)
    return model.eval()


def mobilenet_v2() -> nn.Module:
    return MobileNetV2ForImageClassification(MobileNetV2Config(**IMAGE))


def efficientnet_b0() -> nn.Module:
    config = EfficientNetConfig(
        image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, **IMAGE
    )
    model = EfficientNetForImageClassification(config)
    # Its authors pool 7 x 7 pixels by a window of 1280: 277 of 290 ms in torch.compile's code, and
    # OpenVINO refuses it.
    model.efficientnet.pooler = nn.AdaptiveAvgPool2d(1)
    return model


def resnet50() -> nn.Module:
    return ResNetForImageClassification(ResNetConfig(**IMAGE))


def convnext_tiny() -> nn.Module:
    return ConvNextForImageClassification(ConvNextConfig(**IMAGE))


def vit_small() -> nn.Module:
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, **IMAGE)
    return ViTForImageClassification(config)


def bert_base() -> nn.Module:
    return BertModel(BertConfig())


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(use_cache=False))


def convnet() -> nn.Module:
    return ConvNet(ConvNetConfig(in_channels=3, widths=(32, 64, 128), blocks=2))


def decoder() -> nn.Module:
    model = DecoderLM(DecoderConfig(width=512, layers=8, heads=8))
    with torch.no_grad():  # as it starts, every block is the identity and the head zero
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "mobilenet_v2": (mobilenet_v2, pixels),
    "efficientnet_b0": (efficientnet_b0, pixels),
    "resnet50": (resnet50, pixels),
    "convnext_tiny": (convnext_tiny, pixels),
    "convnet": (convnet, lambda batch: pixels(batch, 32)),
    "vit_small": (vit_small, pixels),
    "bert_base": (bert_base, ids),
    "gpt2": (gpt2, ids),
    "decoder": (decoder, ids),
}


class Main(nn.Module):
    """The model's main output alone, from its first argument: what engines without dataclasses can
    give.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.model(x)
        return result if isinstance(result, torch.Tensor) else result[0]


def build(name: str, batch: int) -> tuple[nn.Module, torch.Tensor]:
    """Model and inputs, the same in every process."""
    torch.manual_seed(0)
    make, example = MODELS[name]
    inputs = example(batch)
    return Main(seeded(make(), example(2))).eval(), inputs


# Engines: what is done beforehand, if anything, and what is loaded to be timed.


def compiled(model: nn.Module, x: torch.Tensor, *, freezing: bool) -> Callable[..., Any]:
    torch._inductor.config.freezing = (
        freezing  # as an option of the call, it comes too late for the weights to be constants
    )
    fast = torch.compile(model, dynamic=False)
    with torch.no_grad():
        fast(x)
    return fast


def ours(model: nn.Module, x: torch.Tensor, file: Path) -> Callable[..., Any]:
    """What is timed is the file."""
    fuse(model, x).save(str(file))
    return torchscript.load(str(file))


def export_onnx(model: nn.Module, x: torch.Tensor, file: Path) -> None:
    torch.onnx.export(model, (x,), str(file), dynamo=True, verbose=False, external_data=False)


def onnxruntime(file: Path) -> Callable[..., Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def export_openvino(model: nn.Module, x: torch.Tensor, file: Path) -> None:
    import openvino

    openvino.save_model(
        openvino.convert_model(torch.export.export(model, (x,))), str(file), compress_to_fp16=False
    )


def openvino(file: Path) -> Callable[..., Any]:
    import openvino as ov

    hints = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    engine = ov.Core().compile_model(str(file), "CPU", hints)
    return lambda x: torch.from_numpy(engine(x.numpy())[0])


def save_frozen(model: nn.Module, x: torch.Tensor, file: Path) -> None:
    torchscript.plain_frozen(model, x).save(str(file))


PREPARE: dict[str, tuple[str, Callable[..., Any]]] = {  # file name, how it is made
    "torchscript_frozen": ("frozen.pt", save_frozen),
    "compile": (
        "",
        lambda model, x, _: compiled(model, x, freezing=False),
    ),  # fills the compiler's own cache
    "compile_frozen": ("", lambda model, x, _: compiled(model, x, freezing=True)),
    "onnxruntime": ("model.onnx", export_onnx),
    "openvino": ("model.xml", export_openvino),
}
LOAD: dict[str, Callable[[nn.Module, torch.Tensor, Path], Callable[..., Any]]] = {
    "eager": lambda model, x, _: model,
    "eager_channels_last": lambda model, x, _: model.to(memory_format=torch.channels_last),
    "torchscript_frozen": lambda model, x, folder: torchscript.load(str(folder / "frozen.pt")),
    "ours": lambda model, x, folder: ours(model, x, folder / "ours.pt"),
    "compile": lambda model, x, _: compiled(model, x, freezing=False),
    "compile_frozen": lambda model, x, _: compiled(model, x, freezing=True),
    "onnxruntime": lambda model, x, folder: onnxruntime(folder / "model.onnx"),
    "openvino": lambda model, x, folder: openvino(folder / "model.xml"),
}
IMAGES_ONLY = {"eager_channels_last"}


def start(threads: int, cache: Path) -> None:
    warnings.filterwarnings("ignore")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
    torch.set_num_threads(threads)
    keep_allocations()


def serve(pipe: Connection, engine: str, name: str, batch: int, threads: int, cache: Path) -> None:
    """A process with one engine: says how far it is from eager and its load time, then times bursts
    until told to stop.
    """
    start(threads, cache)
    try:
        model, x = build(name, batch)
        expected = outputs(model, x)
        began = time.perf_counter()
        run = LOAD[engine](model, x, cache / f"{name}-{batch}")
        with torch.no_grad():
            for _ in range(3):
                result = run(x)
            pipe.send(
                {
                    "difference": difference([result], expected),
                    "load_s": time.perf_counter() - began,
                }
            )
            while (seconds := pipe.recv()) is not None:
                run(x)  # after a pause caches are cold
                times: list[float] = []
                while len(times) < 2 or sum(times) < 1000 * seconds:
                    began = time.perf_counter()
                    run(x)
                    times.append(1000 * (time.perf_counter() - began))
                pipe.send(times)
    except Exception as error:  # an engine that can't take a model gets a row that says so
        pipe.send(
            {"problem": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"}
        )


def bench(
    name: str, batch: int, engines: list[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one model at one batch size."""
    context = multiprocessing.get_context(
        "fork"
    )  # this process has imported torch and runs none of it
    pipes, answers, children = {}, {}, []
    for engine in engines:
        pipes[engine], theirs = context.Pipe()
        arguments = (theirs, engine, name, batch, args.threads, args.cache)
        children.append(context.Process(target=serve, args=arguments, daemon=True))
        children[-1].start()
        theirs.close()
        try:
            answers[engine] = pipes[engine].recv()  # one after the other: ours times its choices
        except EOFError:
            answers[engine] = {"problem": "its process died"}
    running = [e for e in engines if "problem" not in answers[e]]
    times: dict[str, list[float]] = {e: [] for e in running}
    for turn in range(max(1, round(args.seconds / BURST_S))):
        for engine in running if turn % 2 else running[::-1]:
            pipes[engine].send(BURST_S)
            times[engine] += pipes[engine].recv()
    for engine in running:
        pipes[engine].send(None)
    for child in children:
        child.join()
    host = machine()
    eager = statistics.median(times["eager"]) if "eager" in times else None
    rows = []
    for engine in engines:
        latency = statistics.median(times[engine]) if engine in times else None
        rows.append(
            {
                "model": name,
                "batch": batch,
                "engine": engine,
                "latency_ms": f"{latency:.3f}" if latency else "",
                "calls": len(times.get(engine, [])),
                "speedup": f"{eager / latency:.3f}" if latency and eager else "",
                "difference": f"{answers[engine]['difference']:.1e}" if latency else "",
                "load_s": f"{answers[engine]['load_s']:.1f}" if latency else "",
                "threads": args.threads,
                "cpu": host["cpu"],
                "torch": torch.__version__,
                "allocator": host["allocator"],
                "problem": answers[engine].get("problem", ""),
            }
        )
        print(
            *(f"{rows[-1][k]!s:>18}" for k in list(rows[-1])[:8]), rows[-1]["problem"], flush=True
        )
    return rows


def merge(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows into the CSV, in the order of MODELS and LOAD; those of the same model, batch and
    engine are replaced.
    """
    kept: dict[tuple[str, str, str], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {(r["model"], r["batch"], r["engine"]): r for r in csv.DictReader(file)}
    kept |= {(r["model"], str(r["batch"]), r["engine"]): r for r in rows}
    models, engines = list(MODELS), list(LOAD)
    order = sorted(kept, key=lambda k: (models.index(k[0]), int(k[1]), engines.index(k[2])))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept[k] for k in order)


def plot(path: Path) -> None:
    """A chart beside the CSV: speed relative to eager, a panel per batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["speedup"] and r["engine"] != "eager"]
    batches, models = (
        sorted({int(r["batch"]) for r in rows}),
        [m for m in MODELS if any(r["model"] == m for r in rows)],
    )
    engines = [e for e in LOAD if any(r["engine"] == e for r in rows)]
    figure, axes = pyplot.subplots(len(batches), 1, figsize=(11, 3.4 * len(batches)), squeeze=False)
    for axis, batch in zip(axes[:, 0], batches, strict=True):
        for i, engine in enumerate(engines):
            found = {
                r["model"]: float(r["speedup"])
                for r in rows
                if r["engine"] == engine and int(r["batch"]) == batch
            }
            left = [m + (i - len(engines) / 2) * 0.8 / len(engines) for m in range(len(models))]
            heights = [found.get(m, 0.0) for m in models]
            axis.bar(
                left,
                heights,
                0.8 / len(engines),
                label=engine,
                align="edge",
                color="black" if engine == "ours" else None,
            )
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(title=f"batch {batch}", ylabel="times as fast as eager")
        axis.set_xticks(range(len(models)), models)
    axes[0, 0].legend(ncols=4, fontsize="small")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["all"], choices=["all", *MODELS], help="what to measure"
    )
    parser.add_argument(
        "--engines", nargs="+", default=list(LOAD), choices=list(LOAD), help="who runs it"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="batch sizes")
    parser.add_argument("--threads", type=int, default=2, help="threads to compute with")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of timing per engine")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "fusion-benchmark",
        help="prepared files",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV to write the rows into")
    parser.add_argument(
        "--prepare", action="store_true", help="only export and compile, for a later run to time"
    )
    parser.add_argument("--plot", action="store_true", help="only draw the chart of the CSV")
    args = parser.parse_args(argv)
    if args.plot:
        plot(args.out)
        return 0
    keep_allocations()  # as every engine's process does; the rows state it
    for name in MODELS if "all" in args.models else args.models:
        for batch in args.batch:
            engines = [
                e for e in args.engines if e not in IMAGES_ONLY or MODELS[name][1](1).dim() == 4
            ]
            if args.prepare:
                prepare(name, batch, engines, args)
            else:
                merge(bench(name, batch, engines, args), args.out)
    return 0


def prepare(name: str, batch: int, engines: list[str], args: argparse.Namespace) -> None:
    start(args.threads, args.cache)
    folder = args.cache / f"{name}-{batch}"
    folder.mkdir(parents=True, exist_ok=True)
    for engine in engines:
        if engine in PREPARE:
            file, make = PREPARE[engine]
            model, x = build(name, batch)
            began = time.perf_counter()
            try:
                make(model, x, folder / file)
                print(f"{name} {batch} {engine}: {time.perf_counter() - began:.1f} s", flush=True)
            except Exception as error:
                print(
                    f"{name} {batch} {engine}: {type(error).__name__}: "
                    f"{str(error).splitlines()[:1]}",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
