"""llama.cpp as a peer of decoding: our weights as a GGUF file, timed by its own clock.

Needs gguf, and xllamacpp or a build's own benchmark program. `llama.py FILE SLOTS TOKENS` is its
server, with so many tokens for each of so many texts.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize import DecoderConfig, DecoderLM, clock

KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
TOP = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
PARTS = {
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
SPARE_TOKENS = 8  # of the context, beyond what is read and written
PROMPT_BATCH = 512

Times = tuple[float, float]  # ms of the prompt, ms per token


def write_gguf(model: DecoderLM, path: Path, kind: str) -> None:
    """Write the weights as a GGUF file of a Llama.

    Args:
        model: an untied decoder.
        path: of the file.
        kind: of the matrices, one of KINDS.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    _write_facts(writer, model.config)
    target = getattr(gguf.GGMLQuantizationType, KINDS[kind])
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        array = _in_their_order(stem, tensor, model.config.head_dim).float().numpy()
        if tensor.dim() == 1 or kind == "f32":
            writer.add_tensor(f"{_their_name(stem)}.weight", array)
            continue
        small = array.astype("float16") if kind == "f16" else gguf.quants.quantize(array, target)
        writer.add_tensor(f"{_their_name(stem)}.weight", small, raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_facts(writer: Any, config: DecoderConfig) -> None:
    facts = {
        "context_length": config.max_length,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.ffn_width,
        "head_count": config.heads,
        "head_count_kv": config.kv_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope_theta,
        "layer_norm_rms_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        # nothing is tokenized here, but the file must have a vocabulary
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "default",
        "token_list": [f"t{i}" for i in range(config.vocab_size)],
        "token_types": [1] * config.vocab_size,
        "token_merges": ["t 0"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    for name, value in facts.items():
        getattr(writer, f"add_{name}")(value)


def _their_name(stem: str) -> str:
    """`blocks.3.ffn.up` is `blk.3.ffn_up` there."""
    if stem in TOP:
        return TOP[stem]
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{PARTS[part]}"


def _in_their_order(stem: str, weight: Tensor, head_dim: int) -> Tensor:
    """llama.cpp turns neighbours (2i, 2i + 1) of a query or key, not (i, i + D / 2)."""
    if not stem.endswith((".q", ".k")):
        return weight
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def times(path: Path, ids: Tensor, new: int, program: Path | None = None) -> Times:
    """Milliseconds of the prompts, and per token of each row after them.

    Args:
        path: a GGUF file.
        ids: [B, T] the prompts.
        new: how many tokens are written.
        program: llama.cpp's benchmark program, for one row; None: the package xllamacpp.
    """
    if program:
        return _times_of_program(program, path, ids.shape[1], new)
    if len(ids) > 1:
        return _times_of_rows(path, ids, new)
    return _times_of_xllamacpp(path, ids[0].tolist(), new)


def _times_of_program(program: Path, path: Path, length: int, new: int) -> Times:
    """Means of 5 runs each."""

    def tokens_s(prompt: int, written: int, depth: int) -> float:
        flags = {"-m": path, "-t": torch.get_num_threads(), "-o": "json"}
        flags |= {"-p": prompt, "-n": written, "-d": depth}
        command = [str(program)]
        for flag, value in flags.items():
            command += [flag, str(value)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)[0]["avg_ts"]

    return 1000 * length / tokens_s(length, 0, 0), 1000 / tokens_s(0, new, length)


def _times_of_xllamacpp(path: Path, tokens: list[int], new: int) -> Times:
    server = _server(path, 1, len(tokens) + new)
    timings = server.handle_completions(_request(tokens, new))["timings"]
    return timings["prompt_ms"], timings["predicted_per_token_ms"]


def _times_of_rows(path: Path, ids: Tensor, new: int) -> Times:
    """By the clock around all rows at once: with one token each, and with `new` more."""
    batch, length = ids.shape
    server = _server(path, batch, length + new + 1)

    def all_ms(count: int) -> float:
        requests = [_request(tokens, count) for tokens in ids.tolist()]
        with ThreadPoolExecutor(batch) as pool:
            answers = pool.map(server.handle_completions, requests)
            return 1000 * clock.timed(lambda: list(answers))[1]

    all_ms(1)
    first = all_ms(1)
    return first, (all_ms(new + 1) - first) / new


def _server(path: Path, rows: int, length: int) -> Any:
    """xllamacpp's, with room for `length` tokens in each of so many rows."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = rows * (length + SPARE_TOKENS)
    params.n_batch, params.n_parallel, params.warmup = PROMPT_BATCH, rows, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    return xllamacpp.Server(params)


def _request(tokens: list[int], new: int) -> dict[str, Any]:
    return {
        "prompt": tokens,
        "n_predict": new,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
    }


if __name__ == "__main__":  # a server, until it is stopped
    file, slots, tokens = sys.argv[1:]
    running = _server(Path(file), int(slots), int(tokens))
    print(running.listening_address, flush=True)
    signal.pause()
