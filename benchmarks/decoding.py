"""Tokens per second of cached decoding, beside transformers and llama.cpp on the same random
weights.

    uv run python benchmarks/decoding.py  # the 135M shape, batch 1, short
    uv run python benchmarks/decoding.py --shapes 30M 135M 360M --lengths 128 1024 4096 \
        --batches 1 4 16 --peers transformers
    # needs gguf and llama-cpp-python or xllamacpp
    uv run python benchmarks/decoding.py --peers transformers llama.cpp
    # one's own build, by its own benchmark program
    uv run python benchmarks/decoding.py --peers llama.cpp --llama-bench PATH

Every way reads `length` tokens, then writes `--new` more, greedy, and the median time of one is
taken (peers: of the whole run, without the first), after a warm-up. `ceiling_share` is the bytes of
weights and cache that a token must read, over its time, as a share of the memory bandwidth measured
in the same process. Rows are appended to benchmarks/results/decoding.csv.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from quantize.compression.half import to_half
from quantize.compression.int4 import quantize_weights
from quantize.compression.int8 import quantize_dynamic
from quantize.host import keep_allocations, machine
from quantize.models import DecoderConfig, DecoderLM
from quantize.models.pretrained import our_name
from quantize.run.decoding import for_decoding
from quantize.run.generate import decode, generate_stream, prefill
from quantize.run.kv_cache import KVCache

SHAPES = {
    "30M": DecoderConfig(
        vocab_size=16384, width=384, layers=8, heads=6, kv_heads=2, ffn_width=1024, max_length=8192
    ),
    "135M": DecoderConfig(
        vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, ffn_width=1536, max_length=8192
    ),
    "360M": DecoderConfig(
        vocab_size=49152,
        width=960,
        layers=32,
        heads=15,
        kv_heads=5,
        ffn_width=2560,
        max_length=8192,
    ),
    "500M": DecoderConfig(
        vocab_size=151936,
        width=896,
        layers=24,
        heads=14,
        kv_heads=2,
        ffn_width=4864,
        max_length=8192,
    ),
}
OURS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fp32": lambda model: model,
    "bf16": lambda model: model.to(torch.bfloat16),
    "fp16": to_half,
    "int8": quantize_dynamic,
    "int4": quantize_weights,
}
RESULTS = Path(__file__).parent / "results" / "decoding.csv"


def build(shape: str) -> DecoderLM:
    """A decoder of random weights, a tied head as in the published models of these shapes; the same
    on every call.
    """
    torch.manual_seed(0)
    model = DecoderLM(SHAPES[shape])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.03)
    return model.eval()


def bandwidth_gb_s() -> float:
    """Bytes per second of reading a tensor larger than the caches (sum of 512 MB of float32), best
    of 5.
    """
    data = torch.ones(1 << 27)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - started)
    return data.numel() * 4 / min(times) / 1e9


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


# --------------------------------------------------------------------------------------------------
# the ways


def ours(
    model: nn.Module, ids: Tensor, new: int, dtype: torch.dtype | None
) -> tuple[float, float, int]:
    """ms of the prompt, ms per token, bytes of the cache."""
    cache = KVCache.for_model(model, batch=ids.shape[0], limit=ids.shape[1] + new + 4, dtype=dtype)
    with torch.no_grad():
        prefill(model, ids[:, :512], cache)  # kernels are chosen and weights packed the first time
        cache.reset()
        started = time.perf_counter()
        token = prefill(model, ids, cache).argmax(-1)
        prompt_ms = 1000 * (time.perf_counter() - started)
        times = []
        for i in range(new + 3):
            started = time.perf_counter()
            token = decode(model, token, cache).argmax(-1)
            if i >= 3:  # the first ones allocate, trace and optimize
                times.append(1000 * (time.perf_counter() - started))
    return prompt_ms, statistics.median(times), cache.nbytes_at(ids.shape[1])


def ours_lookup(model: nn.Module, ids: Tensor, new: int) -> tuple[float, float]:
    """As `ours`, guessing by look-up over the second half of 8 x `new` tokens: a greedy random
    model repeats itself by then.
    """
    run = generate_stream(model, ids[:1], max_new_tokens=8 * new, draft="lookup", stop_tokens=())
    started = time.perf_counter()
    next(run)
    prompt_ms = 1000 * (time.perf_counter() - started)
    for _ in range(4 * new):
        next(run)
    started = time.perf_counter()
    count = sum(1 for _ in run)
    ms = 1000 * (time.perf_counter() - started) / count
    print(f"look-up: {run.accepted} of {run.drafted} guesses were right", flush=True)
    return prompt_ms, ms


def as_transformers(model: DecoderLM) -> nn.Module:
    """The same weights as a transformers Llama."""
    import transformers

    config = model.config
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            head_dim=config.head_dim,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            intermediate_size=config.ffn_width,
            max_position_embeddings=config.max_length,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    ours = model.state_dict()
    llama.load_state_dict({name: ours[our_name(name)] for name in llama.state_dict()})
    return llama.eval()


def transformers_ms(llama: nn.Module, ids: Tensor, new: int, cache: str) -> tuple[float, float]:
    """ms of the prompt and per token of `transformers.generate`."""

    def run(count: int) -> float:
        started = time.perf_counter()
        llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            cache_implementation=cache,
            eos_token_id=None,
            disable_compile=True,
        )
        return 1000 * (time.perf_counter() - started)

    run(2)
    first = run(1)
    return first, (run(new + 1) - first) / new


def write_gguf(model: DecoderLM, path: Path, kind: str) -> None:
    """The same weights as a GGUF file for llama.cpp: kind f32, f16, q8_0 or q4_0."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    # A byte-level vocabulary of made-up tokens: nothing is tokenized here, but the file must have
    # one.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    kinds = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
    target = getattr(gguf.GGMLQuantizationType, kinds[kind])
    names = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
    parts = {
        "attention_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "attention.q": "attn_q",
        "attention.k": "attn_k",
        "attention.v": "attn_v",
        "attention.out": "attn_output",
        "ffn.gate": "ffn_gate",
        "ffn.up": "ffn_up",
        "ffn.down": "ffn_down",
    }
    for layer in range(config.layers):
        names |= {
            f"blocks.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()
        }
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.endswith(
            (".q", ".k")
        ):  # llama.cpp turns neighbours (2i, 2i + 1), not (i, i + D / 2)
            tensor = (
                tensor.view(-1, 2, config.head_dim // 2, tensor.shape[1])
                .transpose(1, 2)
                .reshape(tensor.shape)
            )
        array = tensor.float().numpy()
        if tensor.dim() == 2 and kind != "f32":
            data = array.astype("float16") if kind == "f16" else gguf.quants.quantize(array, target)
            writer.add_tensor(f"{names[stem]}.weight", data, raw_dtype=target)
        else:
            writer.add_tensor(f"{names[stem]}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_ms(path: Path, ids: Tensor, new: int) -> tuple[float, float]:
    """ms of the prompt and per token of llama.cpp, by its own clock."""
    tokens, threads = ids[0].tolist(), torch.get_num_threads()
    try:
        import llama_cpp
    except ImportError:
        return _xllamacpp_ms(path, tokens, new, threads)
    llama = llama_cpp.Llama(
        str(path),
        n_ctx=len(tokens) + new + 8,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=512,
        verbose=False,
    )
    started = time.perf_counter()
    llama.eval(tokens)
    prompt_ms, times = 1000 * (time.perf_counter() - started), []
    for i in range(new):
        started = time.perf_counter()
        llama.eval([i % 100])
        times.append(1000 * (time.perf_counter() - started))
    return prompt_ms, statistics.median(times)


def llama_bench_ms(program: Path, path: Path, length: int, new: int) -> tuple[float, float]:
    """ms of a prompt, and per token after one, by llama.cpp's benchmark program (5 runs each,
    mean).
    """

    def run(*flags: str) -> float:
        command = [program, "-m", path, "-t", str(torch.get_num_threads()), "-o", "json", *flags]
        return json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )[0]["avg_ts"]

    return 1000 * length / run("-p", str(length), "-n", "0"), 1000 / run(
        "-p", "0", "-n", str(new), "-d", str(length)
    )


def _xllamacpp_ms(path: Path, tokens: list[int], new: int, threads: int) -> tuple[float, float]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_batch, params.n_parallel, params.warmup = (
        len(tokens) + new + 8,
        512,
        1,
        True,
    )
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    request = {
        "prompt": tokens,
        "n_predict": new,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    answer = server.handle_completions(request)
    timings = answer["timings"]
    return timings["prompt_ms"], timings["predicted_per_token_ms"]


#
# -------------------------------------------------------------------------------------------------
# rows


def rows(arguments: argparse.Namespace) -> Iterator[dict]:
    bandwidth = bandwidth_gb_s()
    for shape in arguments.shapes:
        for name in arguments.ours:
            model = OURS[name](build(shape))
            fast = for_decoding(model)
            traced = (
                for_decoding(model, backend="torchscript")
                if "torchscript" in arguments.ways
                else None
            )
            weights = read_bytes(model)
            for batch, length in [(b, n) for b in arguments.batches for n in arguments.lengths]:
                ids = torch.randint(SHAPES[shape].vocab_size, (batch, length))
                for way in arguments.ways:
                    if way == "lookup":
                        yield _row(
                            f"quantize {name}",
                            way,
                            shape,
                            1,
                            length,
                            *ours_lookup(fast, ids, arguments.new),
                        )
                        continue
                    module = {"plain": model, "torchscript": traced}.get(way, fast)
                    dtype = torch.int8 if way == "int8 cache" else None
                    prompt_ms, token_ms, cache = ours(module, ids, arguments.new, dtype)
                    share = (weights + cache) / (token_ms / 1000) / 1e9 / bandwidth
                    yield _row(
                        f"quantize {name}",
                        way,
                        shape,
                        batch,
                        length,
                        prompt_ms,
                        token_ms,
                        weights + cache,
                        share,
                    )
            del model, fast, traced
            gc.collect()
        if "transformers" in arguments.peers:
            llama = as_transformers(build(shape))
            for batch, length in [(b, n) for b in arguments.batches for n in arguments.lengths]:
                ids = torch.randint(SHAPES[shape].vocab_size, (batch, length))
                for cache in ("dynamic", "static"):
                    times = transformers_ms(llama, ids, arguments.new, cache)
                    yield _row("transformers fp32", cache, shape, batch, length, *times)
            del llama
        if "llama.cpp" in arguments.peers:
            for kind in arguments.gguf:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / f"{kind}.gguf"
                    write_gguf(build(shape), path, kind)
                    for length in arguments.lengths:
                        ids = torch.randint(SHAPES[shape].vocab_size, (1, length))
                        if arguments.llama_bench:
                            times = llama_bench_ms(
                                arguments.llama_bench, path, length, arguments.new
                            )
                        else:
                            times = llama_cpp_ms(path, ids, arguments.new)
                        yield _row(
                            f"llama.cpp {arguments.llama_build}".strip(),
                            kind,
                            shape,
                            1,
                            length,
                            *times,
                        )


def _row(
    engine: str, way: str, shape: str, batch: int, length: int, prompt_ms: float, token_ms: float,
    bytes_read: int | None = None, share: float | None = None,
) -> dict:  # fmt: skip
    return {
        "engine": engine,
        "way": way,
        "shape": shape,
        "batch": batch,
        "length": length,
        "prefill_tokens_s": round(1000 * batch * length / prompt_ms, 1),
        "ms_per_token": round(token_ms, 3),
        "tokens_s": round(1000 * batch / token_ms, 1),
        "bytes_per_token": bytes_read,
        "ceiling_share": None if share is None else round(share, 3),
        "threads": torch.get_num_threads(),
        "cpu": machine()["cpu"],
        "torch": torch.__version__,
    }


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="decoding.py", description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["135M"], help="(default: 135M)"
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[128], help="prompt lengths (default: 128)"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="rows (default: 1)")
    parser.add_argument(
        "--ours", nargs="*", choices=OURS, default=list(OURS), help="(default: all)"
    )
    ways = ["plain", "for_decoding", "torchscript", "int8 cache", "lookup"]
    parser.add_argument(
        "--ways", nargs="+", choices=ways, default=ways[:3], help="(default: the first three)"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=["transformers", "llama.cpp"], default=["transformers"]
    )
    parser.add_argument(
        "--gguf", nargs="+", choices=["f32", "f16", "q8_0", "q4_0"], default=["f16", "q8_0", "q4_0"]
    )
    parser.add_argument(
        "--llama-bench", type=Path, help="llama.cpp's benchmark program; none: its Python package"
    )
    parser.add_argument("--llama-build", default="", help="how llama.cpp was built, for the table")
    parser.add_argument("--new", type=int, default=32, help="tokens timed (default: 32)")
    parser.add_argument("--threads", type=int, help="(default: torch's own choice)")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help="CSV to append to (default: benchmarks/results/decoding.csv)",
    )
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_allocations()
    arguments.out.parent.mkdir(exist_ok=True)
    fresh = not arguments.out.exists()
    with arguments.out.open("a", newline="", encoding="utf-8") as file:
        writer = None
        for row in rows(arguments):
            if writer is None:
                writer = csv.DictWriter(file, row)
                if fresh:
                    writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(
                {k: v for k, v in row.items() if k not in ("cpu", "torch", "threads")}, flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
