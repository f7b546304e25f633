"""Tokens per second of cached decoding, beside transformers and llama.cpp on the same random
weights.

    uv run python benchmarks/decoding.py  # the 135M shape, batch 1, short
    uv run python benchmarks/decoding.py --shapes 30M 135M 360M --lengths 128 1024 4096 \
        --batches 1 4 16 --peers transformers
    uv run --group bench python benchmarks/decoding.py --peers transformers llama.cpp
    # one's own build, by its own benchmark program
    uv run python benchmarks/decoding.py --peers llama.cpp --llama-bench PATH

Every way reads `length` tokens, then writes `--new` more, greedy, and the median time of one is
taken (peers: of the whole run, without the first), after a warm-up. `ceiling_share` is the bytes of
weights and cache that a token must read, over its time, as a share of the memory bandwidth measured
in the same process. A row of benchmarks/results/decoding.csv is an engine's way at a shape, batch
and length; a new run of it replaces the row.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import llama
import rows
import torch
from torch import Tensor, nn

from quantize import (
    DecoderConfig,
    DecoderLM,
    KVCache,
    clock,
    quantize_dynamic,
    quantize_weights,
    to_half,
)
from quantize.models.published import our_name
from quantize.run.decoding import for_decoding
from quantize.run.generate import decode, generate, generate_stream, prefill

SIZES = {  # vocabulary, width, layers, heads, heads of keys and values, width between
    "30M": (16384, 384, 8, 6, 2, 1024),
    "135M": (49152, 576, 30, 9, 3, 1536),
    "360M": (49152, 960, 32, 15, 5, 2560),
    "500M": (151936, 896, 24, 14, 2, 4864),
}
NAMES = ("vocab_size", "width", "layers", "heads", "kv_heads", "ffn_width")
OURS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fp32": lambda model: model,
    "bf16": lambda model: model.to(torch.bfloat16),
    "fp16": to_half,
    "int8": partial(quantize_dynamic, prefer="size"),
    "int4": quantize_weights,
}
WAYS = ("plain", "for_decoding", "torchscript", "int8 cache", "generate", "lookup")
TURNS = 3
KEY = ("engine", "way", "shape", "batch", "length")


def build(shape: str) -> DecoderLM:
    """A decoder of random weights, the same on every call."""
    torch.manual_seed(0)
    sizes = dict(zip(NAMES, SIZES[shape], strict=True))
    model = DecoderLM(DecoderConfig(max_length=8192, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.03)
    return model.eval()


def prompt(shape: str, batch: int, length: int) -> Tensor:
    return torch.randint(SIZES[shape][0], (batch, length))


def bandwidth_gb_s() -> float:
    """Gigabytes per second of reading 512 MB, more than the caches hold."""
    data = torch.ones(1 << 27)
    (seconds,) = clock.race([data.sum])
    return data.nbytes / seconds / 1e9


def read_bytes(model: nn.Module) -> int:
    """Bytes of weights that a token reads: all but the embedding, of which it reads a row; float16
    ones as they are stored.
    """
    seen = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "embedding" not in name:
            module = model.get_submodule(name.rpartition(".")[0])
            halved = "_half" in module.__dict__ and tensor.dtype is torch.float32
            seen[tensor.data_ptr()] = tensor.nbytes // (2 if halved else 1)
    return sum(seen.values())


# Ways to decode: ms of the prompt, ms per token.


@torch.no_grad()
def ours(model: nn.Module, ids: Tensor, new: int, cache: KVCache) -> llama.Times:
    prefill(model, ids[:, :512], cache)  # kernels are chosen and weights packed the first time
    cache.reset()
    logits, prompt_s = clock.timed(lambda: prefill(model, ids, cache))
    token = logits.max(-1).indices  # takes a third of argmax's time

    def step() -> None:
        nonlocal token
        token = decode(model, token, cache).max(-1).indices

    (token_s,) = clock.race([step], least=new, warm_up=3)  # which allocates, traces and optimizes
    return 1000 * prompt_s, 1000 * token_s


def ours_generate(model: nn.Module, ids: Tensor, new: int) -> llama.Times:
    """By one call of `generate`, for all that a token costs."""

    def run(count: int) -> float:
        options = {"max_new_tokens": count, "stop_tokens": ()}
        return 1000 * clock.timed(lambda: generate(model, ids, **options))[1]

    run(2)
    times = [(run(1), run(new + 1)) for _ in range(TURNS)]
    token = statistics.median((whole - first) / new for first, whole in times)
    return statistics.median(first for first, _ in times), token


def ours_lookup(model: nn.Module, ids: Tensor, new: int) -> llama.Times:
    """Guessing by look-up, over the second half of 8 x `new` tokens: a greedy random model repeats
    itself by then.
    """
    run = generate_stream(model, ids[:1], max_new_tokens=8 * new, draft="lookup", stop_tokens=())
    _, prompt_s = clock.timed(lambda: next(run))
    for _ in range(4 * new):
        next(run)
    count, seconds = clock.timed(lambda: sum(1 for _ in run))
    print(f"look-up: {run.accepted} of {run.drafted} guesses were right", flush=True)
    return 1000 * prompt_s, 1000 * seconds / count


def as_transformers(model: DecoderLM) -> nn.Module:
    """The same weights as a transformers Llama."""
    import transformers

    config = model.config
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "head_dim": config.head_dim,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    weights = model.state_dict()
    theirs.load_state_dict({name: weights[our_name(name)] for name in theirs.state_dict()})
    return theirs.eval()


def transformers_ms(theirs: nn.Module, ids: Tensor, new: int, cache: str) -> llama.Times:
    """By `transformers.generate` with a "dynamic" or "static" cache."""
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    options |= {"cache_implementation": cache, "disable_compile": True}

    def run(count: int) -> float:
        tokens = {"max_new_tokens": count, "min_new_tokens": count}
        return 1000 * clock.timed(lambda: theirs.generate(ids, **tokens, **options))[1]

    run(2)
    first = run(1)
    return first, (run(new + 1) - first) / new


# Rows.


def row(engine: str, way: str, shape: str, ids: Tensor, times: llama.Times) -> rows.Row:
    batch, length = ids.shape
    prompt_ms, token_ms = times
    return {
        "engine": engine,
        "way": way,
        "shape": shape,
        "batch": batch,
        "length": length,
        "prefill_tokens_s": 1000 * batch * length / prompt_ms,
        "ms_per_token": token_ms,
        "tokens_s": 1000 * batch / token_ms,
        **rows.host(),
    }


def rows_of_ours(
    name: str, shape: str, places: list[tuple[int, int]], arguments: argparse.Namespace
) -> Iterator[rows.Row]:
    model = OURS[name](build(shape))
    weights, bandwidth = read_bytes(model), bandwidth_gb_s()
    made = {"plain": model, "for_decoding": for_decoding(model)}
    if "torchscript" in arguments.ways:
        made["torchscript"] = for_decoding(model, backend="torchscript")
    for batch, length in places:
        ids = prompt(shape, batch, length)
        for way in arguments.ways:
            engine = made.get(way, made["for_decoding"])
            if way == "generate":
                times = ours_generate(engine, ids, arguments.new)
                yield row(f"quantize {name}", way, shape, ids, times)
                continue
            if way == "lookup":
                times = ours_lookup(engine, ids, arguments.new)
                yield row(f"quantize {name}", way, shape, ids[:1], times)
                continue
            dtype = torch.int8 if way == "int8 cache" else None
            limit = length + arguments.new + 4
            cache = KVCache.for_model(engine, batch=batch, limit=limit, dtype=dtype)
            times = ours(engine, ids, arguments.new, cache)
            read = weights + cache.nbytes_at(length)
            share = read / (times[1] / 1000) / 1e9 / bandwidth
            found = row(f"quantize {name}", way, shape, ids, times)
            yield found | {"bytes_per_token": read, "ceiling_share": share}


def rows_of_transformers(shape: str, places: list[tuple[int, int]], new: int) -> Iterator[rows.Row]:
    theirs = as_transformers(build(shape))
    for batch, length in places:
        ids = prompt(shape, batch, length)
        for cache in ("dynamic", "static"):
            times = transformers_ms(theirs, ids, new, cache)
            yield row("transformers fp32", cache, shape, ids, times)


def rows_of_llama(
    kind: str, shape: str, places: list[tuple[int, int]], arguments: argparse.Namespace
) -> Iterator[rows.Row]:
    engine = f"llama.cpp {arguments.llama_build}".strip()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.gguf_folder or Path(temporary)
        path = folder / f"{shape}-{kind}.gguf"
        if not path.exists():
            llama.write_gguf(build(shape), path, kind)
        for batch, length in places:
            ids = prompt(shape, batch, length)
            times = llama.times(path, ids, arguments.new, arguments.llama_bench)
            yield row(engine, kind, shape, ids, times)


def found_rows(arguments: argparse.Namespace) -> Iterator[rows.Row]:
    places = list(itertools.product(arguments.batches, arguments.lengths))
    for shape in arguments.shapes:
        for name in arguments.ours:
            yield from rows_of_ours(name, shape, places, arguments)
        if "transformers" in arguments.peers:
            yield from rows_of_transformers(shape, places, arguments.new)
        if "llama.cpp" in arguments.peers:
            for kind in arguments.gguf:
                yield from rows_of_llama(kind, shape, places, arguments)


def main() -> None:
    parser = rows.Parser(__doc__, "decoding.csv")
    parser.some("--shapes", "parameters", SIZES, ["135M"])
    parser.flag("--lengths", "prompt lengths", [128])
    parser.flag("--batches", "prompts at a time", [1])
    parser.some("--ours", "weights", OURS)
    parser.some("--ways", "how ours decode", WAYS, WAYS[:3])
    parser.some("--peers", "other engines", ["transformers", "llama.cpp"], ["transformers"])
    parser.some("--gguf", "llama.cpp's weights", llama.KINDS, ["f16", "q8_0", "q4_0"])
    parser.file("--llama-bench", "llama.cpp's own benchmark program")
    parser.file("--gguf-folder", "where llama.cpp's files are kept for the next run")
    parser.flag("--llama-build", "how llama.cpp was built, for the table", "")
    parser.flag("--new", "tokens timed", 32)
    arguments = parser.parse()
    for found in found_rows(arguments):
        rows.write(arguments.out, [found], KEY)


if __name__ == "__main__":
    main()
