"""Show what a key-value cache does: stream text from a model, then time a token at growing lengths.

    uv run python kv_cache.py  # artifacts/model.pth; trains a tiny model first if there is none
    uv run python kv_cache.py --prompt "def load(path):"
    uv run python kv_cache.py --model artifacts/int8.pth --cache int8
    # config.json, *.safetensors, tokenizer.json
    uv run python kv_cache.py --model SmolLM2-135M --prompt "Once upon"
    # a smaller model guesses ahead; none: repeats do
    uv run python kv_cache.py --draft artifacts/student.pth

Writes kv_cache.png (time per token against length) and kv_cache.json into --out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # before torch is imported; why: quantize/host.py
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from quantize import script
from quantize.host import describe_machine
from quantize.jobs import caching, train_baseline
from quantize.run.generate.text import Text

CACHES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "none": False}


def flags() -> script.Parser:
    parser = script.Parser("kv_cache.py", __doc__)
    model_help = "a file written by this package, or a folder with config.json; none: OUT/model.pth"
    draft_help = (
        "a smaller model's file or folder that guesses ahead; none: repeats in the text itself"
    )
    length_help = "longest text to time, in tokens; none: 1024, or the model's limit"
    threads_help = "threads to compute with; none: the cores that this process may use"
    cache_help = "what the cache of the streamed text holds"
    parser.flag("--model", model_help, type=script.path)
    parser.flag("--out", "folder to write into", type=script.path, default=Path("artifacts"))
    parser.flag("--prompt", "the text to continue", default="import os\n\ndef ")
    parser.flag("--max-new-tokens", "how many tokens to stream", type=script.count, default=200)
    parser.flag("--temperature", "0 takes the most probable token", type=float, default=0.0)
    parser.flag("--seed", "seed of the sampling", type=script.seed, default=0)
    parser.flag("--draft", draft_help, type=script.path)
    parser.flag("--cache", cache_help, choices=list(CACHES), default="fp32")
    parser.flag("--max-length", length_help, type=script.count)
    parser.flag("--threads", threads_help, type=script.threads)
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.cache == "none" and arguments.draft:
        guesses = "guesses are checked against a cache, which --cache none leaves out"
        raise ValueError(f"argument --draft: {guesses}")
    out, prompt = arguments.out, arguments.prompt
    path = arguments.model or out / "model.pth"
    if arguments.model is None and not path.exists():
        path = train_baseline("tiny", out)
    model = caching.open_model(path)
    draft = caching.open_model(arguments.draft) if arguments.draft else None
    text = Text(path if path.is_dir() else None)
    limit = caching.length_limit(model, arguments.max_length)
    caching.show_text(
        model,
        text,
        prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        cache=CACHES[arguments.cache],
        draft=draft,
    )
    about = {"name": path.name, "limit": limit, "draft": draft, "out": out}
    result = caching.show_cache(model, text, prompt, **about)
    print("\n".join(describe_machine(result["machine"])))
    caching.print_tables(result["rows"], result["checks"])
    print(f"written: {out / 'kv_cache.png'}, {out / 'kv_cache.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    return script.main(flags(), argv, run)


if __name__ == "__main__":
    sys.exit(main())
