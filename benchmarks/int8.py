"""Dynamic int8 side by side with its peers: one process per variant, all alive, taking turns shape
by shape.

    # every model and shape, writes the CSV and the plot
    uv run --group bench python benchmarks/int8.py
    uv run --group bench python benchmarks/int8.py --models decoder --widths 512 \
        --variants fp32 int8 torchao
    # accuracy instead of time: results/int8_quality.csv
    uv run python benchmarks/int8.py --quality artifacts/model.pth

A row of benchmarks/results/int8.csv is one variant at one shape: median, 10th and 90th percentile
of the latency over the rounds, and the speed-up over float32 eager in the same rounds. A variant
whose package is missing, or that fails, gets a row that says so. glibc keeps freed blocks in every
process (as `quantize.host.keep_allocations` does), the peers' too. `int8` is
`quantize.quantize_dynamic`, `int8_bf16` the same with everything between its layers in bfloat16,
`int8_compiled` that through torch.compile (with freezing, as `torchao` has it), and `int8_speed`
leaves the layers in float that int8 makes slower; `legacy` is
torch.ao.quantization.quantize_dynamic; `torchao` is dynamic int8 + torch.compile; `onnxruntime` its
dynamic int8; `openvino` is NNCF's static int8 with bfloat16 around it (calibrated on the very
inputs that are timed, which flatters it).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

VARIANTS = (
    "fp32",
    "bf16",
    "int8",
    "int8_speed",
    "int8_bf16",
    "int8_compiled",
    "legacy",
    "torchao",
    "onnxruntime",
    "openvino",
)
KEEP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
SHAPES = {
    "decoder": [(1, 1), (1, 32), (1, 256), (8, 256)],
    "bert": [(1, 16), (1, 128), (8, 128)],
    "vit": [(1, 197), (8, 197)],
}
_KEY = ("model", "width", "layers", "batch", "length", "variant")
WIDTHS = (128, 256, 512, 768)
VOCABULARY = 256


class Logits(nn.Module):
    """The main output of a transformers model as a plain tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x, return_dict=False)[0]


def build(name: str, width: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    if name == "decoder":
        from quantize.models import DecoderConfig, DecoderLM

        model: nn.Module = DecoderLM(
            DecoderConfig(
                vocab_size=VOCABULARY, width=width, layers=layers, heads=max(1, width // 64)
            )
        )
        for (
            parameter
        ) in model.parameters():  # its blocks start as the identity: give them something to do
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return model.eval()
    import transformers

    heads = max(1, width // 64)
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    if name == "bert":
        config = transformers.BertConfig(vocab_size=VOCABULARY, attn_implementation="sdpa", **sizes)
        return Logits(transformers.BertModel(config)).eval()
    config = transformers.ViTConfig(
        image_size=224, patch_size=16, attn_implementation="sdpa", **sizes
    )
    return Logits(transformers.ViTModel(config)).eval()


def example(name: str, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    if name == "vit":
        return torch.randn(batch, 3, 224, 224, generator=generator)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def prepare(variant: str, name: str, width: int, layers: int) -> Callable[[torch.Tensor], object]:
    """A callable on torch inputs; what it needs to be fast (export, compile, calibrate) is done
    here or on its first call.
    """
    model = build(name, width, layers)
    if variant == "fp32":
        return model
    if variant == "bf16":
        return _in_bf16(model)
    if variant.startswith("int8"):
        from quantize.compression import int8

        small = int8.quantize_dynamic(model, prefer="speed" if variant == "int8_speed" else "size")
        if variant == "int8_compiled":
            torch._inductor.config.freezing = True
            small.compile()
        return small if variant in ("int8", "int8_speed") else _in_bf16(small)
    if variant == "legacy":
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    if variant == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        torch._inductor.config.freezing = True
        return torch.compile(model)
    if variant == "onnxruntime":
        return _onnxruntime(model, name)
    if variant == "openvino":
        return _openvino(model, name)
    raise ValueError(f"unknown variant {variant!r}; known: {VARIANTS}")


def _in_bf16(model: nn.Module) -> Callable[[torch.Tensor], object]:
    model = model.bfloat16()
    return lambda x: model(x.bfloat16() if x.is_floating_point() else x)


def _onnxruntime(model: nn.Module, name: str) -> Callable[[torch.Tensor], object]:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path, small = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        axes = (
            {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
            if name != "vit"
            else {0: torch.export.Dim.DYNAMIC},
        )
        torch.onnx.export(
            model,
            (example(name, 2, 16),),
            path,
            dynamo=True,
            dynamic_shapes=axes,
            external_data=False,
            verbose=False,
        )
        quantize_dynamic(path, small, weight_type=QuantType.QInt8, per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            small.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    feed = session.get_inputs()[0].name
    return lambda x: session.run(None, {feed: x.numpy()})


def _openvino(model: nn.Module, name: str) -> Callable[[torch.Tensor], object]:
    import nncf
    import openvino

    converted = openvino.convert_model(model, example_input=example(name, 2, 16))
    data = nncf.Dataset([example(name, *shape).numpy() for shape in SHAPES[name]])
    small = nncf.quantize(converted, data, model_type=nncf.ModelType.TRANSFORMER)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16",
    }
    compiled = openvino.Core().compile_model(small, "CPU", settings)
    return lambda x: compiled([x.numpy()])


def worker(variant: str, name: str, width: int, layers: int, threads: int) -> None:
    """Answers each line "batch length rounds-in-seconds" on standard input with a JSON list of
    latencies in ms.
    """
    warnings.simplefilter("ignore")
    out, sys.stdout = sys.stdout, sys.stderr  # peers print
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    call, warm = None, set()
    for line in sys.stdin:
        batch, length, seconds = line.split()
        try:
            if call is None:
                call = prepare(variant, name, width, layers)
            x = example(name, int(batch), int(length))
            if (batch, length) not in warm:
                call(x)
                warm.add((batch, length))
            times = []
            while len(times) < 3 or sum(times) < 1000 * float(seconds):
                start = time.perf_counter()
                call(x)
                times.append(1000 * (time.perf_counter() - start))
            answer: object = times
        except Exception as error:  # a peer may fail in any way: its row says how
            answer = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(json.dumps(answer), file=out, flush=True)


def measure(args: argparse.Namespace, name: str, width: int) -> list[dict[str, object]]:
    command = [
        sys.executable,
        __file__,
        "--threads",
        str(args.threads),
        "--layers",
        str(args.layers),
    ]
    workers = {
        v: subprocess.Popen(
            [*command, "--worker", v, name, str(width)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
            env={**os.environ, **KEEP},
            text=True,
        )
        for v in args.variants
    }

    def ask(variant: str, batch: int, length: int, seconds: float) -> list[float] | str:
        process = workers[variant]
        try:
            process.stdin.write(f"{batch} {length} {seconds}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline() or '"the process died"')
        except BrokenPipeError:
            return "the process died"

    rows, deadline = [], time.monotonic() + args.limit
    try:
        for batch, length in SHAPES[name]:
            if args.shapes and f"{batch}x{length}" not in args.shapes:
                continue
            times: dict[str, list[float]] = {v: [] for v in workers}
            failed: dict[str, str] = {}
            for turn in range(args.rounds + 1):  # the first round warms up
                if turn > 1 and time.monotonic() > deadline:
                    break
                for variant in workers:
                    if variant in failed:
                        continue
                    answer = ask(variant, batch, length, args.seconds if turn else 0)
                    if isinstance(answer, str):
                        failed[variant] = answer
                    elif turn:
                        times[variant] += answer
            for variant in workers:
                row = {
                    "model": name,
                    "width": width,
                    "layers": args.layers,
                    "batch": batch,
                    "length": length,
                    "variant": variant,
                }
                if variant in failed:
                    rows.append({**row, "note": failed[variant]})
                elif times[variant]:
                    ordered = sorted(times[variant])
                    p10, p90 = (round(ordered[int(q * (len(ordered) - 1))], 4) for q in (0.1, 0.9))
                    median = round(statistics.median(ordered), 4)
                    base = statistics.median(times["fp32"]) if times.get("fp32") else float("nan")
                    numbers = {
                        "latency_ms": median,
                        "p10_ms": p10,
                        "p90_ms": p90,
                        "speedup": round(base / median, 3),
                    }
                    rows.append({**row, **numbers})
                if rows:
                    print(*(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    finally:
        for process in workers.values():
            process.kill()
            process.wait()
    return rows


def quality(path: Path, out: Path, max_bytes: int) -> None:
    """Bits per byte of a saved decoder in every 8- and 4-bit form, and the mean cosine of its
    logits to float32.
    """
    from quantize import load, quantize_weights
    from quantize.compression import int8
    from quantize.nn import int8_kernels as kernels
    from quantize.training import evaluate
    from quantize.training.data import load_text

    model, data = load(path), load_text()
    train = data.train.long()
    starts = torch.randint(
        len(train) - 256, (16,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    batches = [
        torch.stack([train[s : s + 256] for s in starts[i : i + 4]]) for i in range(0, 16, 4)
    ]
    held_out = data.validation.long()
    windows = held_out[: len(held_out) // 256 * 256].view(-1, 256)[
        :: max(1, len(held_out) // 256 // 16)
    ]
    expected = model(windows)

    def per_tensor(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (x.abs().amax() / 127).clamp_min(1e-30).expand(len(x), 1)
        return (x / scale).round_().to(torch.int8), scale

    by_row = kernels.quantize_rows, kernels._quantize_many_rows
    variants: dict[str, Callable[[], nn.Module]] = {
        "fp32": lambda: model,
        "int8": lambda: int8.quantize_dynamic(model),
        "int8, bfloat16 between": lambda: int8.quantize_dynamic(model).bfloat16(),
        "int8, one scale per tensor": lambda: int8.quantize_dynamic(model),
        "int8, calibrated": lambda: int8.quantize_dynamic(model, calibration=batches),
        "legacy": lambda: torch.ao.quantization.quantize_dynamic(
            model, {nn.Linear}, dtype=torch.qint8
        ),
        "int4, groups of 32": lambda: quantize_weights(model),
        "int4, groups of 32, calibrated": lambda: quantize_weights(model, calibration=batches),
        "int4, groups of 64, calibrated": lambda: quantize_weights(
            model, group_size=64, calibration=batches
        ),
    }
    rows = []
    for name, make in variants.items():
        per = (per_tensor, per_tensor) if "tensor" in name else by_row
        kernels.quantize_rows, kernels._quantize_many_rows = per
        small = make()
        cosine = (
            nn.functional.cosine_similarity(small(windows).float(), expected, dim=-1).mean().item()
        )
        bits = evaluate(small, data, max_bytes=max_bytes)["bits_per_byte"]
        rows.append({"variant": name, "bits_per_byte": round(bits, 5), "cosine": round(cosine, 7)})
        rows[-1]["change"] = round(rows[-1]["bits_per_byte"] - rows[0]["bits_per_byte"], 5)
        print(
            *(f"{k}={v}" for k, v in rows[-1].items()),
            getattr(small, "int8_calibration", ""),
            flush=True,
        )
    kernels.quantize_rows, kernels._quantize_many_rows = by_row
    with out.with_name("int8_quality.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write(rows: list[dict[str, object]], out: Path) -> None:
    """Replace the rows of the same model, width, shape and variant in the CSV; keep the others."""
    fields = [*_KEY, "latency_ms", "p10_ms", "p90_ms", "speedup", "note"]
    kept = list(csv.DictReader(out.open())) if out.exists() else []
    new = {tuple(str(r[k]) for k in _KEY): r for r in rows}
    merged = {tuple(str(r[k]) for k in _KEY): r for r in kept} | new
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())


def plot(out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in csv.DictReader(out.open()) if r["speedup"]]
    shapes = list(dict.fromkeys((r["model"], r["width"], r["batch"], r["length"]) for r in rows))
    figure, axes = pyplot.subplots(figsize=(max(6, 0.9 * len(shapes)), 5))
    for variant in VARIANTS[1:]:
        points = [
            (i, float(r["speedup"]))
            for i, s in enumerate(shapes)
            for r in rows
            if r["variant"] == variant and (r["model"], r["width"], r["batch"], r["length"]) == s
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                "o-" if variant.startswith("int8") else "x",
                label=variant,
            )
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xticks(
        range(len(shapes)),
        [f"{m} {w}\n{b} x {n}" for m, w, b, n in shapes],
        rotation=60,
        fontsize=7,
    )
    axes.set_ylabel("speed-up over float32 eager")
    axes.set_yscale("log", base=2)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=list(SHAPES), choices=SHAPES, help="which architectures"
    )
    parser.add_argument(
        "--widths", nargs="+", type=int, default=list(WIDTHS), help="model widths (multiples of 64)"
    )
    parser.add_argument("--layers", type=int, default=8, help="blocks of each model")
    parser.add_argument("--shapes", nargs="+", help="only these, as BATCHxLENGTH")
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="which to compare"
    )
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every variant"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns that each variant gets at a shape"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=3600.0,
        help="seconds per model, then a shape gets one round only",
    )
    parser.add_argument(
        "--seconds", type=float, default=0.3, help="length of a turn (at least 3 calls)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "int8.csv",
        help="where the rows go",
    )
    parser.add_argument(
        "--quality",
        type=Path,
        metavar="MODEL",
        help="no timing: bits per byte of this decoder in each form",
    )
    parser.add_argument(
        "--max-bytes", type=int, default=60_000, help="held-out bytes that --quality scores"
    )
    parser.add_argument("--verbose", action="store_true", help="show what the peers print")
    parser.add_argument(
        "--worker", nargs=3, metavar=("VARIANT", "MODEL", "WIDTH"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.worker:
        variant, name, width = args.worker
        worker(variant, name, int(width), args.layers, args.threads)
        return
    if args.quality:
        torch.set_grad_enabled(False)
        torch.set_num_threads(args.threads)
        warnings.simplefilter("ignore")
        quality(args.quality, args.out, args.max_bytes)
        return
    for name in args.models:
        for width in args.widths:
            if not args.rounds:  # exports and compiles, for the caches
                measure(args, name, width)
                continue
            write(measure(args, name, width), args.out)
            plot(args.out)


if __name__ == "__main__":
    main()
