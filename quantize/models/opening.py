"""A model from wherever people have it, and back into a folder that opens again.

`open_model` takes our files, folders of transformers, state dicts and pickled modules;
`save_folder` writes a folder for it. A compressed model's weights lie in a file of our own name:
under the name that transformers looks for, they would be read back as missing ones and filled with
random numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from quantize import checkpoint, surgery
from quantize.checkpoint import CheckpointError, blaming
from quantize.checkpoint.foreign import filled, read_state_dict
from quantize.models.decoder import DecoderLM
from quantize.models.pretrained import FAMILIES
from quantize.models.published import read_json
from quantize.surgery.folder import unlike_its_config

ABOUT = "quantize.json"  # beside the weights in a folder that save_folder wrote
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "generation_config.json",
)
_SOURCE = "_opened_from"  # on a model: the folder whose tokenizer belongs to it


def open_model(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model in a file or folder, on the CPU and in eval mode. No code of the file runs.

    Args:
        path: one of
            - a `.pth` or `.safetensors` that `quantize.save` wrote;
            - a folder that `save_folder` wrote;
            - a folder of transformers (`config.json` with weights, sharded or not): a `DecoderLM`
              where its family is Llama, Mistral, Qwen2 or Qwen3 and this package computes all that
              its config asks for, otherwise the class that the config names, through transformers;
            - what `torch.save` wrote of a state dict or of a module, or a plain `.safetensors`.
        model: a fresh instance of the class that was saved, for a class that is neither built in
            nor one of transformers. It stays as it is.

    Returns:
        The model; a built-in one, one of transformers, or a copy of `model`.

    Raises:
        CheckpointError: naming the path and the reason, for what is missing, damaged, incomplete,
            of another architecture, or needs `model` or transformers.
        TypeError: for a `model` that is no nn.Module.

    Source: `transformers.PreTrainedModel.from_pretrained` for folders of its own.
    """
    path = Path(path)
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, a fresh instance, got {model!r}")
    if path.is_dir():
        return _open_folder(path, model)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.name == checkpoint.IN_FOLDER and model is None:
        return _open_folder(path.parent, None)
    if _is_ours(path):
        return checkpoint.load(path, model)
    tensors, class_name = read_state_dict(path)
    if model is None:
        held = f"a pickled {class_name}" if class_name else "a state dict"
        raise CheckpointError(f"{path}: holds {held}: {_needed(class_name or 'Net')}")
    with blaming(path):
        return filled(surgery.clone(model), tensors)


def _needed(class_name: str) -> str:
    return f"pass model=, a fresh instance ({class_name}()), or --model to a command"


def _is_ours(path: Path) -> bool:
    """Whether `quantize.save` wrote the file; a damaged one of ours is ours."""
    if path.suffix not in (".pth", ".safetensors"):
        return False
    try:
        checkpoint.read_record(path)
    except CheckpointError as error:
        return "not written by quantize.save" not in str(error)
    return True


def _open_folder(folder: Path, model: nn.Module | None) -> nn.Module:
    if (folder / checkpoint.IN_FOLDER).is_file():
        file = folder / checkpoint.IN_FOLDER
        opened = checkpoint.load(file, fresh_for(file) if model is None else model)
    elif not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: holds neither {checkpoint.IN_FOLDER} nor config.json")
    else:
        opened = _open_published(folder)
    opened.__dict__[_SOURCE] = str(folder)
    return opened


def _open_published(folder: Path) -> nn.Module:
    """A model of the folder's config and weights: ours where it computes the same, else theirs."""
    config = read_json(folder / "config.json")
    family = config.get("model_type")
    unsupported: ValueError | None = None
    if config.get("architectures") == [FAMILIES.get(str(family))]:
        try:
            return DecoderLM.from_pretrained(folder)
        except ValueError as error:  # damaged, or it asks for what DecoderLM doesn't do
            unsupported = error
    transformers = _transformers()
    if transformers is None:
        reason = unsupported or f"a {family!r} needs transformers, which isn't installed"
        raise CheckpointError(f"{folder}: {reason}")
    names = config.get("architectures") or ["AutoModel"]
    cls = getattr(transformers, str(names[0]), None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise CheckpointError(f"{folder}: transformers has no {str(names[0])[:80]!r}")
    with blaming(folder), _quiet(transformers):
        opened, info = cls.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told by name below
            output_loading_info=True,
        )
        _refuse_gaps(info)
    return opened.eval()


def _refuse_gaps(info: dict[str, Any]) -> None:
    """Raise CheckpointError where weights were missing and would be random numbers."""
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise CheckpointError(f"the weights of {missing[0]!r} are missing ({len(missing)} in all)")
    mismatched: list[Any] = sorted(info.get("mismatched_keys") or ())
    if mismatched:
        name, found, wanted = mismatched[0]
        raise CheckpointError(
            f"{name!r} has shape {list(found)}, where config.json asks for {list(wanted)}"
        )


def fresh_for(file: Path) -> nn.Module | None:
    """What `checkpoint.load` fills with a file of ours that lies in a folder: an instance of the
    config beside it; None for a built-in model.

    Raises CheckpointError where the config doesn't say, or needs transformers.
    """
    architecture = checkpoint.read_record(file)["architecture"]
    if architecture["config"] is not None:
        return None
    return _from_config(file.parent, architecture["name"])


def _from_config(folder: Path, class_name: str) -> nn.Module:
    """A fresh instance of a class of transformers, of the config in the folder."""
    transformers = _transformers()
    cls = getattr(transformers, class_name, None) if transformers else None
    if cls is None or not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds a {class_name}, which is neither built in nor one of the installed "
            f"transformers: {_needed(class_name)}"
        )
    with blaming(folder), _quiet(transformers):
        return cls(cls.config_class.from_pretrained(folder, local_files_only=True))


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        return None


@contextlib.contextmanager
def _quiet(transformers: Any):
    """Without its progress bars and its table of missing weights, which we tell ourselves."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.ERROR + 10)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def save_folder(model: nn.Module, path: str | Path) -> None:
    """Write a folder from which `open_model(path)` gives the model again, whole or not at all.

    A model of transformers that its config describes, pruned ones among them, is written by its own
    `save_pretrained`, so that transformers opens it too. Any other is written as
    `quantize.safetensors`, with the config beside it where there is one. The tokenizer's files of
    the folder that the model was opened from come along, and `quantize.json` says what was done.

    Args:
        model: any nn.Module that `quantize.save` takes.
        path: the folder; it is made, or replaced if an earlier call wrote it.

    Raises:
        ValueError: the folder exists and something else is in it.
        TypeError: state that no file can hold, as `quantize.save` says it.
        OSError: it can't be written; what was there before stays.
    """
    path = Path(path)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} exists and is not a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / ABOUT).is_file():
        raise ValueError(f"{path} isn't empty, and save_folder didn't write what is in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    temporary.mkdir()
    try:
        _write_folder(model, temporary)
        _flush(temporary)
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def weights_of(folder: Path) -> Path:
    """The file of the weights in a folder that `save_folder` wrote, or of the first of them."""
    found = [folder / checkpoint.IN_FOLDER, *sorted(folder.glob("model*.safetensors"))]
    return next((file for file in found if file.is_file()), found[0])


def _write_folder(model: Any, folder: Path) -> None:
    config: Any = getattr(model, "config", None)
    transformers = _transformers()
    # another class around one of theirs may have its config, and no way back from a folder
    is_theirs = getattr(transformers, type(model).__name__, None) is type(model)
    if is_theirs and unlike_its_config(model) is None:
        with _quiet(transformers):
            model.save_pretrained(folder)
    else:
        if callable(getattr(config, "save_pretrained", None)):
            config.save_pretrained(folder)
        checkpoint.save(model, folder / checkpoint.IN_FOLDER)
    _copy_tokenizer(model, folder)
    steps = [dataclasses.asdict(step) for step in checkpoint.summary(model).steps]
    about = {"format": "quantize folder", "class": type(model).__name__, "steps": steps}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def _copy_tokenizer(model: nn.Module, folder: Path) -> None:
    named = getattr(getattr(model, "config", None), "_name_or_path", None)
    source = model.__dict__.get(_SOURCE) or named
    if not source or not Path(source).is_dir():
        return
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file() and not (folder / name).exists():
            shutil.copyfile(Path(source) / name, folder / name)


def _flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def _put_in_place(new: Path, path: Path) -> None:
    """Rename `new` to `path`; what was there is removed after that, and back if it fails."""
    if not path.exists():
        new.rename(path)
        return
    old = path.with_name(f".{path.name}.{secrets.token_hex(6)}.old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
