"""Show what a key-value cache does: stream text from a model, then time a token at growing lengths with and without one.

    uv run python kv_cache.py                    # artifacts/model.pth; trains a tiny model first if there is none
    uv run python kv_cache.py --prompt "def load(path):"
    uv run python kv_cache.py --model artifacts/int8.pth --cache int8
    uv run python kv_cache.py --model SmolLM2-135M --prompt "Once upon"   # a folder: config.json, *.safetensors, tokenizer.json
    uv run python kv_cache.py --draft artifacts/student.pth     # a smaller model guesses ahead; none: the text's own repeats do

Writes kv_cache.png (time per token against length) and kv_cache.json into --out.
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # before torch is imported; why: quantize/host.py
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import quantize
import train
from quantize import script
from quantize.checkpoint import atomic_write
from quantize.decoding import for_decoding
from quantize.generation import decode, generate, generate_stream, prefill
from quantize.generation.reader import takes_cache
from quantize.host import default_threads, describe_machine, keep_allocations, machine
from quantize.kv_cache import KVCache
from quantize.models import DecoderLM

CACHES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "none": None}
TIMED_TOKENS = 24  # per length and way; the median is shown
SLOW_TOKENS = 3  # without a cache, where every token is a pass over the whole text


class Text:
    """Between text and token ids: bytes for models trained here, tokenizer.json for a folder."""

    def __init__(self, folder: Path | None):
        self.tokenizer = None
        if folder is not None:
            try:
                from tokenizers import Tokenizer
            except ImportError:
                raise ValueError("reading tokenizer.json needs the tokenizers package: uv sync --extra tokenizers") from None
            if not (folder / "tokenizer.json").is_file():
                raise ValueError(f"{folder} has no tokenizer.json")
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        return list(text.encode()) if self.tokenizer is None else self.tokenizer.encode(text).ids

    def printer(self) -> Callable[[int], str]:
        """A function from each next id to the text that it completes."""
        if self.tokenizer is None:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            return lambda token: decoder.decode(bytes([token]))
        ids, shown = [], [0]

        def more(token: int) -> str:
            ids.append(token)
            text = self.tokenizer.decode(ids)
            new = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[shown[0] :]
            shown[0] += len(new)
            return new

        return more


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script.Parser(prog="kv_cache.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag: str, text: str, **options: object) -> None:
        parser.add_argument(flag, help=f"{text} (default: %(default)s)", **options)

    add("--model", "a file written by this package, or a folder with config.json; none: OUT/model.pth", type=script.path)
    add("--out", "folder of the model and of what is written", type=script.path, default=Path("artifacts"))
    add("--prompt", "the text to continue", default="import os\n\ndef ")
    add("--max-new-tokens", "how many tokens to stream", type=script.count, default=200)
    add("--temperature", "0 always takes the most probable token", type=float, default=0.0)
    add("--seed", "seed of the sampling", type=script.seed, default=0)
    add("--draft", "a smaller model's file or folder that guesses ahead; none: repeats in the text itself", type=script.path)
    add("--cache", "what the cache of the streamed text holds", choices=list(CACHES), default="fp32")
    add("--max-length", "longest text to time, in tokens; none: 1024, or the model's limit", type=script.count)
    add("--threads", "threads to compute with; none: the cores that this process may use", type=script.threads)
    arguments = parser.parse_args(argv)
    if arguments.cache == "none" and arguments.draft:
        parser.error("argument --draft: guesses are checked against a cache, which --cache none leaves out")
    return arguments


def open_model(path: Path | None, out: Path) -> tuple[nn.Module, Path]:
    """The model to show, a tiny one trained now if there is none; and the path it came from."""
    if path is None:
        path = out / "model.pth"
        if not path.exists():
            print(f"there is no {path}: training the tiny preset first", flush=True)
            if code := train.main(
                ["--preset", "tiny", "--variants", "fp32", "--threads", str(torch.get_num_threads()), "--out", str(out)]
            ):
                raise SystemExit(code)
            print()
    return read_model(path), path


def read_model(path: Path) -> nn.Module:
    model = DecoderLM.from_pretrained(path) if path.is_dir() else quantize.load(path)
    if not takes_cache(model):
        raise ValueError(f"{path} holds a {type(model).__name__}, which has no attention to cache")
    return model


def show_text(model: nn.Module, text: Text, ids: Tensor, arguments: argparse.Namespace, draft: nn.Module | None) -> None:
    """Stream the continuation of the prompt to standard output, as it comes."""
    printer, started = text.printer(), time.perf_counter()
    cache = CACHES[arguments.cache]
    sampling = {"temperature": arguments.temperature, "seed": arguments.seed}
    run = generate_stream(
        model, ids, max_new_tokens=arguments.max_new_tokens, cache=cache or False, draft=draft, **sampling
    )  # fmt: skip
    print(arguments.prompt, end="", flush=True)
    for token in run:
        print(printer(int(token)), end="", flush=True)
    new, seconds = run.ids.shape[1] - ids.shape[1], time.perf_counter() - started
    print(f"\n\n[{ids.shape[1]} tokens read, {new} written in {seconds:.2f} s]\n")


# ------------------------------------------------------------------------------------------------ measurements


def ms_without_cache(model: nn.Module, ids: Tensor) -> list[float]:
    """Milliseconds of passes over all of ids [1, T], as each new token needs one without a cache."""
    return _timed(lambda: model(ids, logits_to_keep=1), SLOW_TOKENS)


def ms_with_cache(model: nn.Module, ids: Tensor, dtype: torch.dtype) -> tuple[list[float], int]:
    """Milliseconds per token after ids [1, T], greedy, and the bytes that the cache of T tokens takes."""
    cache = KVCache.for_model(model, limit=ids.shape[1] + TIMED_TOKENS + 1, dtype=dtype)
    state = {"token": prefill(model, ids, cache).argmax(-1)}

    def step() -> None:
        state["token"] = decode(model, state["token"], cache).argmax(-1)

    return _timed(step, TIMED_TOKENS), cache.nbytes_at(ids.shape[1])


def ms_speculative(model: nn.Module, ids: Tensor, draft: nn.Module | str) -> tuple[list[float], float]:
    """Milliseconds per token with a draft (mean over a run), and the share of guesses that were right."""
    run = generate_stream(model, ids, max_new_tokens=2 * TIMED_TOKENS + 1, draft=draft, stop_tokens=())
    next(run)  # the prompt is read
    started = time.perf_counter()
    count = sum(1 for _ in run)
    return [1000 * (time.perf_counter() - started) / count], run.accepted / max(1, run.drafted)


def _timed(step: Callable[[], object], count: int) -> list[float]:
    times = []
    with torch.no_grad():
        step()
        for _ in range(count):
            started = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - started))
    return times


def measure_all(models: dict[str, nn.Module], ids: Tensor, lengths: Sequence[int], draft: nn.Module | str) -> list[dict]:
    """One row per way to decode and length."""
    rows = []
    for length in lengths:
        text = ids[:, :length]

        def add(way: str, times: list[float], length: int = length, **extra: object) -> None:
            rows.append({"way": way, "length": length, "ms_per_token": statistics.median(times), **extra})

        plain = models["fp32"]
        add("no cache", ms_without_cache(plain, text))
        times, size = ms_with_cache(plain, text, torch.float32)
        add("cache", times, cache_bytes=size)
        for way, name in (("cache + int8 weights", "int8"), ("the same, for_decoding", "ready")):
            if name in models:
                times, size = ms_with_cache(models[name], text, torch.float32)
                add(way, times, cache_bytes=size)
        times, size = ms_with_cache(plain, text, torch.int8)
        add("int8 cache", times, cache_bytes=size)
        times, right = ms_speculative(plain, text, draft)
        add("cache + speculative", times, guesses_right=right)
    return rows


def check_all(models: dict[str, nn.Module], ids: Tensor, new: int, draft: nn.Module | str) -> list[dict]:
    """Does each way give the tokens that the same weights give without a cache, and how far off are its logits?"""
    cases = [("cache", "fp32", {}), ("cache + int8 weights", "int8", {}), ("int8 cache", "fp32", {"cache": torch.int8})]
    cases.insert(2, ("the same, for_decoding", "ready", {}))
    cases.append(("cache + speculative", "fp32", {"draft": draft}))
    rows, expected = [], {}
    for way, weights, options in cases:
        if weights not in models:
            continue
        model = models[weights]
        common = {"max_new_tokens": new, "stop_tokens": ()}
        if weights not in expected:
            expected[weights] = generate(model, ids, cache=False, **common)
        got = generate(model, ids, **options, **common)
        same = (got == expected[weights])[:, ids.shape[1] :].cumprod(1).sum().item()
        rows.append({"way": way, "same_tokens": same, "of": new, "logits_off": _logits_off(model, expected[weights], options)})
    return rows


def _logits_off(model: nn.Module, ids: Tensor, options: dict) -> float:
    """Largest difference to the logits of one pass without a cache, reading one token at a time through one."""
    cache = KVCache.for_model(model, limit=ids.shape[1], dtype=options.get("cache"))
    with torch.no_grad():
        pieces = torch.cat([model(token, cache) for token in ids.split(1, dim=1)], dim=1)
        return (pieces - model(ids)).abs().max().item()


# ------------------------------------------------------------------------------------------------ presentation


def print_tables(rows: list[dict], checks: list[dict]) -> None:
    console = Console()
    lengths = sorted({row["length"] for row in rows})
    table = Table(title="ms per token, and tokens/s, after a text of so many tokens (median)", show_lines=True)
    table.add_column("")
    for length in lengths:
        table.add_column(str(length), justify="right")
    table.add_column(f"cache at {lengths[-1]}", justify="right")
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        size = mine[-1].get("cache_bytes")
        cells = [f"{row['ms_per_token']:.2f}\n{1000 / row['ms_per_token']:,.0f}/s" for row in mine]
        table.add_row(way, *cells, "" if size is None else f"{size / 1e6:.2f} MB")
    console.print(table)
    right = [row["guesses_right"] for row in rows if "guesses_right" in row]
    console.print(f"speculative: {100 * statistics.mean(right):.0f}% of the guesses were right")
    table = Table(title="against the same weights without a cache")
    for name in ("", "equal tokens", "largest difference of logits"):
        table.add_column(name, justify="left" if not name else "right")
    for row in checks:
        equal = "all" if row["same_tokens"] == row["of"] else "first"
        table.add_row(row["way"], f"{equal} {row['same_tokens']} of {row['of']}", f"{row['logits_off']:.1e}")
    console.print(table)


def plot(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        axes.plot([row["length"] for row in mine], [row["ms_per_token"] for row in mine], "o-", label=way)
    axes.set(xscale="log", yscale="log", xlabel="tokens before the new one", ylabel="ms per new token")
    lengths = sorted({row["length"] for row in rows})
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))  # 0.5, 1, 2, not 5 x 10^-1
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads or default_threads())
    keep_allocations()
    model, path = open_model(arguments.model, arguments.out)
    draft = read_model(arguments.draft) if arguments.draft else None
    text = Text(path if path.is_dir() else None)
    ids = torch.tensor([text.encode(arguments.prompt)], dtype=torch.int64)
    limit = min(getattr(model.config, "max_length", 2**31), arguments.max_length or 1024)
    longest = limit - 2 * TIMED_TOKENS - 1
    if longest < 8:
        raise ValueError(f"the longest text is {limit} tokens; timing needs at least {2 * TIMED_TOKENS + 9}")
    show_text(model, text, ids, arguments, draft)

    lengths = [n for n in (64, 128, 256, 512, 1024, 2048, 4096) if n < longest] + [longest]
    source = text.encode(Path(__file__).read_text(encoding="utf-8"))
    long = torch.tensor([(source * (longest // len(source) + 1))[:longest]])
    models = {"fp32": model}
    if any(type(m) is nn.Linear for m in model.modules()):
        models["int8"] = quantize.quantize_dynamic(model)
        if isinstance(model, DecoderLM):
            models["ready"] = for_decoding(models["int8"])
    new = min(64, limit - ids.shape[1])
    checks = check_all(models, ids, new, draft or "lookup") if new > 0 else []
    rows = measure_all(models, long, lengths, draft or "lookup")

    print("\n".join(describe_machine(machine())))
    print_tables(rows, checks)
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(rows, arguments.out / "kv_cache.png")
    result = {"machine": machine(), "model": path.name, "rows": rows, "checks": checks}
    with atomic_write(arguments.out / "kv_cache.json") as file:
        file.write(json.dumps(result, indent=1).encode())
    print(f"written: {arguments.out / 'kv_cache.png'}, {arguments.out / 'kv_cache.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    arguments = parse(argv)
    return script.exit_code("kv_cache.py", lambda: run(arguments), "stopped; nothing was half written, run it again")


if __name__ == "__main__":
    sys.exit(main())
