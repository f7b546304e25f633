"""What `kv_cache.py` shows: text streamed from a model, and what a token costs at growing lengths.

Each way to decode is timed after the same texts, and its tokens are compared with those that the
same weights give without a cache.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from quantize import checkpoint, clock
from quantize.checkpoint import atomic_write
from quantize.compression.int8 import quantize_dynamic
from quantize.host import machine
from quantize.measuring.plot import line_chart
from quantize.models import DecoderLM
from quantize.run.decoding import for_decoding
from quantize.run.generate import decode, generate, generate_stream, prefill
from quantize.run.generate.reader import takes_cache
from quantize.run.generate.text import Text
from quantize.run.kv_cache import KVCache

TIMED_TOKENS = 24  # per length and way; the median is shown
SLOW_TOKENS = 3  # without a cache, where every token is a pass over the whole text
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
LEAST_LENGTH = 8
MOST_LENGTH = 1024  # unless asked for more
CHECKED_TOKENS = 64

Row = dict[str, Any]
Draft = nn.Module | str


@dataclass(frozen=True)
class Way:
    """One way to decode.

    Args:
        name: of its row.
        model: with float or int8 weights, as it is or after `for_decoding`.
        weights: ways of equal weights should give equal tokens.
        cache: what the cache holds; None: the model's own dtype.
        draft: what guesses ahead; None: nothing.
    """

    name: str
    model: nn.Module
    weights: str
    cache: torch.dtype | None = None
    draft: Draft | None = None


def open_model(path: Path) -> nn.Module:
    """The model in a file or folder. Raises ValueError for one that can't use a cache."""
    model = DecoderLM.from_pretrained(path) if path.is_dir() else checkpoint.load(path)
    if not takes_cache(model):
        raise ValueError(f"{path} holds a {type(model).__name__}, which has no attention to cache")
    return model


def length_limit(model: nn.Module, max_length: int | None) -> int:
    """The longest text to time, in tokens. Raises ValueError where that is too short for timing."""
    limit = min(getattr(model.config, "max_length", 2**31), max_length or MOST_LENGTH)
    least = LEAST_LENGTH + 2 * TIMED_TOKENS + 1
    if limit < least:
        raise ValueError(f"the longest text is {limit} tokens; timing needs at least {least}")
    return limit


def show_text(model: nn.Module, text: Text, prompt: str, **options: Any) -> None:
    """Stream the continuation of the prompt to standard output, as it comes.

    Args:
        options: of `generate_stream`.
    """
    ids = torch.tensor([text.encode(prompt)], dtype=torch.int64)
    printer = text.printer()
    stream = generate_stream(model, ids, **options)

    def show() -> None:
        before = prompt  # with the first token: of a model that writes none only its error is told
        for token in stream:
            print(before + printer(int(token)), end="", flush=True)
            before = ""

    _, seconds = clock.timed(show)
    read = ids.shape[1]
    new = stream.ids.shape[1] - read
    print(f"\n\n[{read} tokens read, {new} written in {seconds:.2f} s]\n")


def show_cache(
    model: nn.Module,
    text: Text,
    prompt: str,
    *,
    name: str,
    limit: int,
    draft: nn.Module | None,
    out: Path,
) -> dict[str, Any]:
    """Time and check every way to decode, and write kv_cache.png and kv_cache.json.

    Args:
        model: a decoder that takes a cache.
        text: its tokens.
        prompt: the text that the ways are checked on.
        name: of the model, for the file.
        limit: longest text to time, in tokens.
        draft: a smaller model that guesses ahead; None: the text's own repeats do.
        out: folder to write into.

    Returns:
        What kv_cache.json holds.

    Raises:
        OSError: a file can't be written.
    """
    longest = limit - 2 * TIMED_TOKENS - 1
    lengths = [length for length in LENGTHS if length < longest] + [longest]
    source = text.encode(Path(__file__).read_text(encoding="utf-8"))
    ids = torch.tensor([(source * (longest // len(source) + 1))[:longest]])
    short = torch.tensor([text.encode(prompt)], dtype=torch.int64)
    new = min(CHECKED_TOKENS, limit - short.shape[1])

    ways = ways_of(model, draft or "lookup")
    checks = check_all(ways, short, new) if new > 0 else []
    rows = measure_all(model, ways, ids, lengths)
    result = {"machine": machine(), "model": name, "rows": rows, "checks": checks}
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "kv_cache.png") as file:
        file.write(chart(rows))
    with atomic_write(out / "kv_cache.json") as file:
        file.write(json.dumps(result, indent=1).encode())
    return result


def ways_of(model: nn.Module, draft: Draft) -> list[Way]:
    """With a cache: as it is, with int8 weights, these ready for decoding, an int8 cache, a
    draft.
    """
    ways = [Way("cache", model, "float")]
    if any(type(module) is nn.Linear for module in model.modules()):
        int8: Any = quantize_dynamic(model, prefer="size")
        ways.append(Way("cache + int8 weights", int8, "int8"))
        if isinstance(model, DecoderLM):
            ways.append(Way("the same, for_decoding", for_decoding(int8), "ready"))
    ways.append(Way("int8 cache", model, "float", cache=torch.int8))
    ways.append(Way("cache + speculative", model, "float", draft=draft))
    return ways


# Measurements.


def measure_all(
    model: nn.Module, ways: Sequence[Way], ids: Tensor, lengths: Sequence[int]
) -> list[Row]:
    """Milliseconds per token, one row per way and length of text."""
    rows = []
    for length in lengths:
        print(f"timing after {length} tokens", file=sys.stderr, flush=True)
        text = ids[:, :length]
        rows.append({"way": "no cache", "length": length, **_without_cache(model, text)})
        for way in ways:
            timed = _speculative(way, text) if way.draft else _with_cache(way, text)
            rows.append({"way": way.name, "length": length, **timed})
    return rows


def _without_cache(model: nn.Module, ids: Tensor) -> Row:
    """Passes over all of ids [1, T], as each new token needs one without a cache."""
    return _timed(lambda: model(ids, logits_to_keep=1), SLOW_TOKENS)


def _with_cache(way: Way, ids: Tensor) -> Row:
    """Greedy tokens after ids [1, T], and the bytes that the cache of T tokens takes."""
    length = ids.shape[1]
    dtype = way.cache or torch.float32
    cache = KVCache.for_model(way.model, limit=length + TIMED_TOKENS + 1, dtype=dtype)
    token = prefill(way.model, ids, cache).argmax(-1)

    def step() -> None:
        nonlocal token
        token = decode(way.model, token, cache).argmax(-1)

    timed = _timed(step, TIMED_TOKENS)
    return {**timed, "cache_bytes": cache.nbytes_at(length)}


def _speculative(way: Way, ids: Tensor) -> Row:
    """The mean over a run with a draft, and the share of guesses that were right."""
    new = 2 * TIMED_TOKENS + 1
    stream = generate_stream(way.model, ids, max_new_tokens=new, draft=way.draft, stop_tokens=())
    next(stream)  # the prompt is read
    count, seconds = clock.timed(lambda: sum(1 for _ in stream))
    return {
        "ms_per_token": 1000 * seconds / count,
        "guesses_right": stream.accepted / max(1, stream.drafted),
    }


def _timed(step: Callable[[], object], count: int) -> Row:
    (median,) = clock.race([step], least=count)
    return {"ms_per_token": 1000 * median}


def check_all(ways: Sequence[Way], ids: Tensor, new: int) -> list[Row]:
    """How many tokens each way has in common with the same weights without a cache, and how far off
    its logits are."""
    rows = []
    expected: dict[str, Any] = {}
    common = {"max_new_tokens": new, "stop_tokens": ()}
    for way in ways:
        if way.weights not in expected:
            expected[way.weights] = generate(way.model, ids, cache=False, **common)
        whole = expected[way.weights]
        options = {} if way.cache is None else {"cache": way.cache}
        found: Any = generate(way.model, ids, draft=way.draft, **options, **common)
        same = (found == whole)[:, ids.shape[1] :].cumprod(1).sum().item()
        off = _logits_off(way, whole)
        rows.append({"way": way.name, "same_tokens": same, "of": new, "logits_off": off})
    return rows


def _logits_off(way: Way, ids: Tensor) -> float:
    """Largest difference to the logits of one pass, reading one token at a time through a cache."""
    cache = KVCache.for_model(way.model, limit=ids.shape[1], dtype=way.cache)
    with torch.no_grad():
        pieces = [way.model(token, cache) for token in ids.split(1, dim=1)]
        return (torch.cat(pieces, dim=1) - way.model(ids)).abs().max().item()


# Presentation.


def print_tables(rows: Sequence[Row], checks: Sequence[Row]) -> None:
    """Times by length, and how the tokens compare with those without a cache."""
    console = Console()
    lengths = sorted({row["length"] for row in rows})
    headings = [*map(str, lengths), f"cache at {lengths[-1]}"]
    title = "ms per token, and tokens/s, after a text of so many tokens (median)"
    cells: dict[str, list[str]] = {}
    for way, times in _by_way(rows).items():
        shown = [f"{ms:.2f}\n{1000 / ms:,.0f}/s" for ms in times.values()]
        cells[way] = [*shown, _cache_size(rows, way)]
    console.print(_table(title, headings, cells, show_lines=True))
    right = [row["guesses_right"] for row in rows if "guesses_right" in row]
    console.print(f"speculative: {100 * statistics.mean(right):.0f}% of the guesses were right")
    found: dict[str, list[str]] = {}
    for row in checks:
        equal = "all" if row["same_tokens"] == row["of"] else "first"
        tokens = f"{equal} {row['same_tokens']} of {row['of']}"
        found[row["way"]] = [tokens, f"{row['logits_off']:.1e}"]
    headings = ["equal tokens", "largest difference of logits"]
    console.print(_table("against the same weights without a cache", headings, found))


def _table(title: str, headings: Sequence[str], cells: dict[str, list[str]], **how: Any) -> Table:
    """A row for each name."""
    table = Table("", title=title, **how)
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, texts in cells.items():
        table.add_row(name, *texts)
    return table


def chart(rows: Sequence[Row]) -> bytes:
    """PNG bytes: time per token against the length of the text, a line for each way."""
    return line_chart(_by_way(rows), "tokens before the new one", "ms per new token")


def _by_way(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        times.setdefault(row["way"], {})[row["length"]] = row["ms_per_token"]
    return times


def _cache_size(rows: Sequence[Row], way: str) -> str:
    sizes = [row["cache_bytes"] for row in rows if row["way"] == way and "cache_bytes" in row]
    return f"{sizes[-1] / 1e6:.2f} MB" if sizes else ""
