"""Continue a text with a language model: a file of ours, or a folder with its tokenizer.

quantize generate artifacts/int8.pth --prompt "import os"
quantize generate ./SmolLM2-135M --prompt "Once upon a time" --temperature 0.8 --top-p 0.95
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from quantize import script
from quantize.jobs.caching import show_text
from quantize.jobs.samples import tokenizer_of
from quantize.models.opening import open_model

CACHES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "none": False}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: the arguments; None: those of the process.
    """
    return script.main(_flags(), argv, _generate)


def _flags() -> script.Parser:
    parser = script.Parser("quantize generate", __doc__)
    parser.add_argument("file", type=script.path, help="a file of ours, or a folder")
    parser.flag("--prompt", "the text to continue", default="import os\n\ndef ")
    parser.flag("--max-new-tokens", "how many tokens at most", type=script.count, default=200)
    parser.flag("--temperature", "0 takes the most probable token", type=float, default=0.0)
    parser.flag("--top-k", "only the so many most probable tokens", type=script.count)
    parser.flag("--top-p", "only the most probable tokens of this share", type=float)
    parser.flag("--seed", "seed of the sampling", type=script.seed, default=0)
    parser.flag("--draft", "a smaller model that guesses ahead", type=script.path)
    parser.flag("--cache", "what the cache holds", choices=list(CACHES))
    parser.flag("--threads", "torch threads; none: the cores that are usable", type=script.threads)
    return parser


def _generate(arguments: argparse.Namespace) -> None:
    model = open_model(arguments.file)
    text = tokenizer_of(model, arguments.file)
    options = script.given(arguments, ("top_k", "top_p"))
    if arguments.cache is not None:
        options["cache"] = CACHES[arguments.cache]
    if arguments.draft is not None:
        options["draft"] = open_model(arguments.draft)
    show_text(
        model,
        text,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        **options,
    )
