"""The model that a command is given: a file, a folder, or a Python file that makes one."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from quantize import script
from quantize.checkpoint import atomic_write
from quantize.compression.search.points import ORIGINAL, SUFFIX
from quantize.jobs.samples import read_samples
from quantize.models.opening import open_model

ASKED = "asked.json"  # in the folder of a search
SHAPES = ("batch", "batches", "length", "image_size")  # flags that say what is read of the data


def add_flags(parser: script.Parser) -> None:
    """The positional argument `source`, `--model`, and what is asked of it."""
    source_help = (
        "a folder of transformers or of quantize, a .pth or .safetensors, or a .py with "
        "model = ... in it"
    )
    model_help = (
        "module:callable that makes a fresh instance of your own class, for a file that holds "
        "only its weights"
    )
    parser.add_argument("source", type=script.path, help=source_help)
    parser.flag("--model", model_help)
    evaluate_help = "module:function, called with a model; gives the metric, or a dict of them"
    parser.flag("--evaluate", evaluate_help)
    parser.flag("--batch", "examples in a call; none: 8", type=script.count)
    parser.flag("--batches", "how many; none: 32, or what the data has", type=script.count)
    parser.flag("--length", "tokens of an example; none: 128 or the limit", type=script.count)
    parser.flag("--image-size", "height and width; none: the model's own", type=script.count)
    parser.flag("--threads", "torch threads; none: the cores that are usable", type=script.threads)


def opened(arguments: argparse.Namespace) -> nn.Module:
    """The model of `source`, in eval mode.

    Raises:
        CheckpointError: a file or folder that can't be opened; it says where `--model` helps.
        ValueError: a `--model` or a Python file that gives no nn.Module.
    """
    path, fresh = arguments.source, instance(arguments.model)
    if path.suffix != ".py":
        return open_model(path, fresh)
    if fresh is not None:
        raise ValueError(f"argument --model: {path} makes its model itself")
    return _of_script(path)


def samples(arguments: argparse.Namespace, model: nn.Module) -> list[Any]:
    """Batches of `--data`, as the model of `source` reads them; raises as `read_samples`."""
    asked = script.given(arguments, SHAPES)
    return read_samples(arguments.data, model, arguments.source, **asked)


def search_of(out: Path) -> Path:
    """The folder beside `out` that holds every point of the search that wrote it."""
    return out.with_name(f"{out.name}.search")


def write_asked(arguments: argparse.Namespace, search: Path) -> None:
    """Keep what a search was given in its folder, which stays on this machine, for `read_asked`."""
    asked: dict[str, Any] = {name: getattr(arguments, name) for name in SHAPES}
    asked["baseline"] = str(arguments.source.resolve())
    asked["data"] = [str(path.resolve()) for path in arguments.data]
    with atomic_write(search / ASKED) as file:
        file.write(json.dumps(asked, indent=1).encode())


def read_asked(arguments: argparse.Namespace) -> None:
    """Set `baseline`, and `data` with its SHAPES, to what the search that wrote `source` was given,
    where they aren't given here and are still there.

    Raises ValueError for a file that no search wrote.
    """
    folder = arguments.source.resolve()
    path = search_of(folder if folder.is_dir() else folder.parent) / ASKED
    if not path.is_file():
        return
    try:
        asked = json.loads(path.read_text())
        baseline, data = Path(asked["baseline"]), [Path(name) for name in asked["data"]]
        shapes = {name: asked[name] for name in SHAPES}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} isn't what `quantize compress` wrote: remove it") from error
    if baseline.suffix == ".py":  # no code runs that isn't named here: what it made is there
        baseline = path.parent / f"{ORIGINAL}{SUFFIX}"
    if arguments.baseline is None and baseline.exists():
        arguments.baseline = baseline
    if arguments.data is None and all(each.exists() for each in data):
        arguments.data = data
        for name, value in shapes.items():
            if getattr(arguments, name) is None:
                setattr(arguments, name, value)


def instance(spec: str | None) -> nn.Module | None:
    """What `--model` makes; None where it isn't given. Raises ValueError."""
    make = script.imported(spec)
    if make is None:
        return None
    return _module(make(), f"argument --model: {spec}")


def _of_script(path: Path) -> nn.Module:
    """What a Python file calls `model`: a module, or a function that makes one."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path}: no such Python file")
    sys.path.insert(0, str(path.parent.resolve()))  # the measuring processes import it too
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = loaded
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:  # of somebody's code
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    found: Any = getattr(loaded, "model", None)
    if not isinstance(found, nn.Module) and callable(found):
        found = found()
    return _module(found, f"{path}: model")


def _module(found: Any, where: str) -> nn.Module:
    if not isinstance(found, nn.Module):
        raise ValueError(f"{where} must give an nn.Module, got {type(found).__name__}")
    return found.eval()
