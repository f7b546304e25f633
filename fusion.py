"""Fuse a trained model into one file that gives the same answers faster, and show what was fused and what it gained.

    uv run python fusion.py                                   # artifacts/model.pth -> artifacts/model_fused.pt
    uv run python fusion.py --model artifacts/int8.pth        # any artifact of train.py
    uv run python fusion.py --backend auto                    # the fastest of the back ends that are installed
    uv run python fusion.py --batch 1 --threads 1

Without a model.pth it trains the tiny preset first. Beside the file it writes model_fused.json and model_fused.png. Latencies
of eager and of the chosen file are of the files, loaded again in fresh processes that take turns; the other back ends race
in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

if "OMP_WAIT_POLICY" not in os.environ:  # before torch is imported; why: quantize/host.py
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import nn

import quantize
from quantize import script
from quantize.checkpoint import atomic_write
from quantize.fusion import BACKENDS, Contender, compare
from quantize.fusion.backends import open_file
from quantize.fusion.equality import difference, outputs, race
from quantize.host import default_threads, describe_machine, keep_allocations, machine
from quantize.measure import Measurement
from quantize.measure import compare as measure_files
from quantize.models import ConvNet, DecoderLM

SUFFIXES = {"torchscript": ".pt", "inductor": ".pt2", "onnxruntime": ".onnx", "openvino": ".xml"}


def example(model: nn.Module, batch: int) -> torch.Tensor:
    """Random inputs of the kind the model takes: ids [B, 128], images [B, C, 28, 28] or vectors [B, in_features]."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, DecoderLM):
        length = min(128, model.config.max_length)
        return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
    if isinstance(model, ConvNet):
        return torch.rand(batch, model.config.in_channels, 28, 28, generator=generator)
    return torch.rand(batch, model.config.in_features, generator=generator)


def kernel_calls(model: nn.Module, inputs: torch.Tensor) -> Counter[str]:
    """Operators that run during one forward pass, by name, as the profiler sees them."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it complains of the GPU that isn't there
    outputs(model, inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outputs(model, inputs)
    return Counter({e.key: e.count for e in profile.key_averages() if "::" in e.key and not e.key.startswith("profiler")})


def write(fused: nn.Module, folder: Path, backend: str) -> Path:
    """Save elsewhere first: each file that stands in `folder` is replaced whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "model_fused" + SUFFIXES[backend]
    with tempfile.TemporaryDirectory() as temporary:
        fused.save(str(Path(temporary) / name))
        for file in sorted(Path(temporary).iterdir(), key=lambda f: f.name == name):
            with atomic_write(folder / file.name) as target, file.open("rb") as source:
                shutil.copyfileobj(source, target)
    return folder / name


def chart(latencies: dict[str, dict[str, float]], path: Path) -> None:
    """Bars: milliseconds per call, a group per batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(latencies), figsize=(4.5 * len(latencies), 3.2), squeeze=False)
    for axis, (title, values) in zip(axes[0], latencies.items(), strict=True):
        bars = axis.barh(list(values), list(values.values()), color=["#999999"] + ["#3b7dd8"] * (len(values) - 1))
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.set(title=title, xlabel="ms per call", xlim=(0, 1.2 * max(values.values())))
        axis.invert_yaxis()
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def common(counts: Counter[str], most: int = 8) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.most_common(most)) + (" ..." if len(counts) > most else "")


def report(model: nn.Module, path: Path, rows: list[Contender], best: Contender, args: argparse.Namespace) -> dict[str, Any]:
    """Write the file, measure it, print and return what there is to say."""
    target = write(best.model, args.out, best.backend)
    inputs = example(model, args.batch)
    result: dict[str, Any] = {
        "machine": machine(),
        "model": path.name,
        "file": target.name,
        "backend": best.backend,
        "bytes": {path.name: path.stat().st_size, target.name: target.stat().st_size},
        "left_out": {r.backend: r.reason for r in rows if r.reason},
        "kernel_calls": {
            "eager": sum(kernel_calls(model, inputs).values()),
            "fused": sum(kernel_calls(best.model, inputs).values()),
        },
    }
    print("\n".join(describe_machine(result["machine"])))
    if best.plan:
        before, after = best.plan.before, best.plan.after
        result |= {
            "operators_before": dict(before),
            "operators_after": dict(after),
            "fused": best.plan.notes,
            "way": best.plan.way,
        }
        print(f"\noperators before: {before.total():4}  {common(before)}")
        print(f"operators after:  {after.total():4}  {common(after)}")
        print("\n".join(f"  - {note}" for note in best.plan.notes))
    print("kernel calls per forward (profiler): {eager} eager, {fused} fused".format(**result["kernel_calls"]))
    latencies: dict[str, dict[str, float]] = {}
    result["difference"], result["cold_start_s"] = {}, {}
    for batch in sorted({1, args.batch}):
        inputs = example(model, batch)
        result["difference"][f"batch {batch}"] = difference(outputs(best.model, inputs), outputs(model, inputs))
        times = {"eager": 0.0, **race({r.backend: r.model for r in rows if r.model is not None}, inputs)}
        if best.backend == "torchscript":
            eager, fused = measure_files({"eager": path, best.backend: target}, inputs, threads=args.threads)
            for measured in (eager, fused):
                times[measured.name] = measured.latency_ms.median
                for note in measured.notes:
                    print(f"batch {batch}, {measured.name}: {note}")
            result["cold_start_s"] = {m.name: cold_start(m) for m in (eager, fused)}
        elif not result["cold_start_s"]:
            result["cold_start_s"] = {best.backend: engine_cold_start(best.backend, target, inputs)}
        latencies[f"batch {batch}"] = times
        speedup = times["eager"] / times[best.backend]
        print(f"batch {batch}: " + ", ".join(f"{n} {t:.3g} ms" for n, t in times.items()) + f" ({best.backend} {speedup:.2f}x)")
    result["latency_ms"] = latencies
    print(f"largest difference, relative to the largest output: {max(result['difference'].values()):.1e}")
    for name, seconds in result["cold_start_s"].items():
        print(f"cold start, {name}: {seconds:.2f} s from the file to the first answer")
    for name, reason in result["left_out"].items():
        print(f"not used: {name}: {reason}")
    chart(latencies, target.with_suffix(".png"))
    with atomic_write(target.with_suffix(".json")) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    print(f"{target}: {target.stat().st_size:,} bytes ({path.name}: {path.stat().st_size:,})")
    return result


def cold_start(measured: Measurement) -> float:
    return (measured.load_s or 0.0) + (measured.first_call_ms or 0.0) / 1000


def engine_cold_start(backend: str, file: Path, inputs: torch.Tensor) -> float:
    """Seconds from the file of another engine to its first answer, in this process, which has imported the engine."""
    start = time.perf_counter()
    open_file(backend, file)(inputs)
    return time.perf_counter() - start


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    path = args.model or args.out / "model.pth"
    if args.model is None and not path.exists():
        print(f"{path} is not there: training the {args.preset} preset first", flush=True)
        import train

        training = ["--preset", args.preset, "--variants", "fp32", "--threads", str(args.threads)]
        if code := train.main([*training, "--out", str(args.out)]):
            raise SystemExit(code)
    keep_allocations()
    model = quantize.load(path)
    names = BACKENDS if args.backend == "auto" else (args.backend,)
    rows = compare(model, example(model, args.batch), names=names)
    present = [r for r in rows[1:] if r.model is not None]
    if not present:
        raise ValueError("; ".join(r.reason for r in rows[1:]))
    report(model, path, rows, min(present, key=lambda r: r.latency_ms), args)


def main(argv: list[str] | None = None) -> int:
    parser = script.Parser(
        prog="fusion.py",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    model_help = "checkpoint to fuse; left out: model.pth in --out, trained first if it isn't there"
    parser.add_argument("--model", type=script.path, help=model_help)
    parser.add_argument("--out", default=Path("artifacts"), type=script.path, help="folder to write into")
    parser.add_argument(
        "--preset", default="tiny", choices=["tiny", "small", "base"], help="what to train if there is no model.pth"
    )
    parser.add_argument("--backend", default="torchscript", choices=["auto", *BACKENDS], help="who runs the fused model")
    parser.add_argument("--batch", type=script.count, default=8, help="batch size to fuse for and to measure at, beside 1")
    parser.add_argument("--threads", type=script.threads, default=default_threads(), help="threads to compute with")
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    return script.exit_code("fusion.py", lambda: run(args), "stopped; nothing was half written, run it again")


if __name__ == "__main__":
    sys.exit(main())
