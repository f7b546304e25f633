"""Fuse a trained model into one TorchScript file that gives the same answers faster, and show what it gained.

    uv run python fusion.py                                   # artifacts/model.pth -> artifacts/model_fused.pt
    uv run python fusion.py --model artifacts/int8.pth        # any artifact of train.py
    uv run python fusion.py --batch 1 --threads 1

Without a model.pth it trains the tiny preset first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import quantize
from quantize.checkpoint import CheckpointError
from quantize.fusion import fuse
from quantize.fusion.check import difference, outputs
from quantize.measure import keep_allocations
from quantize.models import ConvNet, DecoderLM


def example(model: nn.Module, batch: int) -> torch.Tensor:
    """Inputs of the kind the model takes."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, DecoderLM):
        return torch.randint(0, model.config.vocab_size, (batch, 128), generator=generator)
    if isinstance(model, ConvNet):
        return torch.rand(batch, model.config.in_channels, 8, 8, generator=generator)
    return torch.rand(batch, model.config.in_features, generator=generator)


@torch.no_grad()
def latencies(models: dict[str, nn.Module], inputs: torch.Tensor, rounds: int = 20) -> dict[str, float]:
    """Median milliseconds per call, the models taking turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for i in range(rounds + 3):
        for name, model in models.items():
            start = time.perf_counter()
            model(inputs)
            if i >= 3:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    path = Path(args.model) if args.model else out / "model.pth"
    if args.model is None and not path.exists():
        print(f"{path} is not there: training the {args.preset} preset first")
        import train

        if train.main(["--preset", args.preset, "--out", args.out]):
            raise ValueError("training failed")
    torch.set_num_threads(args.threads)
    keep_allocations()
    model = quantize.load(path)
    inputs = example(model, args.batch)
    fused = fuse(model, inputs, backend=args.backend)
    out.mkdir(parents=True, exist_ok=True)
    target, part = out / "model_fused.pt", out / ".model_fused.pt.part"
    fused.save(str(part))
    part.replace(target)
    for batch in sorted({1, args.batch}):
        x = example(model, batch)
        off = difference(outputs(fused, x), outputs(model, x))
        times = latencies({"eager": model, args.backend: fused}, x)
        print(f"batch {batch}: " + ", ".join(f"{n} {t:.2f} ms" for n, t in times.items()) + f", difference {off:.1e}")
    print(f"{target}: {target.stat().st_size} bytes")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint to fuse; default: model.pth in --out, trained first if missing")
    parser.add_argument("--out", default="artifacts", help="folder to write into")
    parser.add_argument("--preset", default="tiny", help="what to train if there is no model.pth")
    parser.add_argument("--backend", default="torchscript", help="back end")
    parser.add_argument("--batch", type=int, default=8, help="batch to fuse and measure at, beside 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads to compute with")
    args = parser.parse_args(argv)
    try:
        if args.batch < 1 or args.threads < 1:
            raise ValueError("--batch and --threads must be at least 1")
        run(args)
    except (CheckpointError, ValueError, TypeError, OSError) as error:
        print(f"fusion.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
