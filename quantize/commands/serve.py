"""Serve models over HTTP.

    quantize serve artifacts/int8.pth                       # tensors, and texts of its decoder
    quantize serve SmolLM2-135M-int8 --name smol            # a folder with its tokenizer
    quantize serve encoder/ reranker/ --workers 2
    quantize serve fused.pt --inputs image.npy              # what its inputs look like

PATH is a .pth or .safetensors of this package, a .pt that fuse(...).save wrote, a folder of
save_folder or of transformers. Protocols: Open Inference Protocol v2 (/v2/...), OpenAI's (/v1/...),
/rerank, /metrics; a page to try it at /. The environment variable QUANTIZE_TOKEN, if it is set, is
the bearer token that every request must bring. A model whose file changes is loaded again. SIGTERM
and Ctrl-C end the server once it has answered what it accepted.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantize import script
from quantize.host import default_threads, with_waiting
from quantize.measuring.command import read_inputs

PROG, TOKEN = "quantize serve", "QUANTIZE_TOKEN"
NEEDED = ("starlette", "uvicorn", "jinja2", "tokenizers")  # of the group `serve`


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    Args:
        argv: the arguments; None: those of the process.
    """
    return script.main(_flags(), argv, _serve, stopped="stopped")


def _flags() -> script.Parser:
    parser = script.Parser(PROG, __doc__)
    parser.add_argument("path", nargs="+", type=script.path, help="what to serve")
    names_help = "one for each PATH (default: the name of the file or folder)"
    parser.add_argument("--name", nargs="+", default=[], help=names_help)
    parser.flag("--host", "address to listen on; 0.0.0.0 for every one", default="127.0.0.1")
    parser.flag("--port", "port to listen on; 0 for a free one", type=_port, default=8000)
    workers_help = "processes that answer requests; none: one per core, one in all for decoders"
    parser.flag("--workers", workers_help, type=script.count)
    threads_help = "of torch, in each worker; none: the cores shared among those that compute"
    parser.flag("--threads", threads_help, type=script.threads)
    tokens_help = "tokens of one call of a model, padding included"
    parser.flag("--max-batch-tokens", tokens_help, type=script.count, default=4096)
    queue_help = "requests that wait for a model; the next one gets 503"
    parser.flag("--max-queue", queue_help, type=script.count, default=256)
    inputs_help = "example inputs of models that have none: .npy, or .safetensors of arguments"
    parser.flag("--inputs", inputs_help, type=Path)
    ray_help = "deploy on Ray Serve, --workers replicas of it, instead of on this machine"
    parser.add_argument("--ray", action="store_true", help=ray_help)
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not in 0 .. 65535")
    return int(text)


def _serve(arguments: argparse.Namespace) -> None:
    _check_installed(NEEDED, "serve")
    _wait_as_others_do()
    from quantize.run.serve import Settings
    from quantize.run.serve.served import default_name
    from quantize.run.serve.workers import Supervisor, listen

    names = arguments.name or [default_name(path) for path in arguments.path]
    if len(names) != len(arguments.path) or len(set(names)) != len(names):
        raise ValueError(f"--name gives {names} for {len(arguments.path)} models")
    settings = Settings(
        max_batch_tokens=arguments.max_batch_tokens,
        max_queue=arguments.max_queue,
        threads=arguments.threads,
        token=os.environ.pop(TOKEN, None) or None,
    )
    if arguments.ray:
        _serve_on_ray(arguments, names, settings)
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads don't survive a fork
    listener = listen(arguments.host, arguments.port)
    load = partial(_load, arguments.path, names, arguments.inputs)
    supervisor = Supervisor(load, arguments.path, listener, settings, arguments.workers)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    line = f"serving {', '.join(names)} on http://{shown}:{port}"
    supervisor.run(lambda: print(line, flush=True))


def _check_installed(needed: Sequence[str], extra: str) -> None:
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"serving needs {', '.join(missing)}: uv sync --extra {extra}")


def _serve_on_ray(arguments: argparse.Namespace, names: list[str], settings: Any) -> None:
    _check_installed(("ray",), "ray --extra serve")
    from quantize.run.serve import ray

    paths = [path.resolve() for path in arguments.path]
    count = arguments.workers or 1
    settings = replace(settings, threads=settings.threads or max(1, default_threads() // count))
    application = ray.deployment(paths, names, settings, (count, count), settings.most_active)
    ray.run(application, arguments.host, arguments.port)


def _load(paths: Sequence[Path], names: Sequence[str], inputs: Path | None) -> list[Any]:
    from quantize.run.serve import open_served

    torch.set_num_threads(default_threads())
    examples = None if inputs is None else read_inputs(inputs)
    pairs = zip(paths, names, strict=True)
    return [open_served(path, name, examples) for path, name in pairs]


def _wait_as_others_do() -> None:
    """Start this process again where OpenMP's threads would spin for long: they would keep the
    cores from the event loop, and read how long only once. See `quantize.host`.
    """
    environment = with_waiting(os.environ)
    is_command = sys.argv[1:2] == ["serve"]  # else somebody called `main`
    if is_command and environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, "-m", "quantize", *sys.argv[1:]], environment)
