"""The files in the folder of a published checkpoint: JSON objects, and tensors in `*.safetensors`,
mapped into memory rather than read twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantize.checkpoint.opening import CheckpointError, blaming, from_json, open_regular

MAX_JSON = 2**24  # bytes; an index of ten thousand tensors has 1 MB
_SHARD = re.compile(r"\w[\w.-]*\.safetensors")
# Names of transformers' modules, and ours.
_NAMES = {
    "model.embed_tokens": "embedding",
    "model.norm": "norm",
    "lm_head": "head",
    "model.layers": "blocks",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.out",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn.gate",
    "mlp.up_proj": "ffn.up",
    "mlp.down_proj": "ffn.down",
}


def read_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors in the folder by the names they have there; reads headers only. Raises
    CheckpointError.
    """
    shapes: dict[str, list[int]] = {}
    for path, names in _files(folder).items():
        with _reading(path) as file:
            held = set(file.keys())
            if names is not None and not names <= held:
                raise CheckpointError(
                    f"{path}: lacks {sorted(names - held)[0]!r}, which the index says it holds"
                )
            for name in held:
                if name in shapes:
                    raise CheckpointError(f"{path}: holds {name!r}, which another shard holds too")
                shapes[name] = file.get_slice(name).get_shape()
    return shapes


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def read_tensors(folder: Path, tied_head: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights by the names of `DecoderLM`, in `dtype`; those stored in it are views of the mapped
    file.

    Reads `model.safetensors`, or the shards that `model.safetensors.index.json` names. Raises
    CheckpointError, naming the file, for a file that is missing, truncated or altered in its
    header, and for a tensor that doesn't belong to the architecture.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        with _reading(path) as file:
            for name in sorted(file.keys()):
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # old files hold what is computed from the config
                tensors[name] = _as_float(path, name, file.get_tensor(name), dtype)
    if tied_head and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        # files may hold one tensor under either name
        embedding = tensors.setdefault("model.embed_tokens.weight", head)
        if head is not embedding and not torch.equal(head, embedding):
            raise CheckpointError(
                f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from the "
                f"embedding"
            )
    return {our_name(name): tensor for name, tensor in tensors.items()}


def check_tensors(
    folder: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Raises CheckpointError for the first tensor that is missing, left over or of another shape
    than the config says.
    """
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{folder}: no tensor for {name}")
        if name not in expected:
            raise CheckpointError(
                f"{folder}: tensor {name} has no place in the architecture that config.json "
                f"describes"
            )
        if found[name].shape != expected[name].shape:
            shapes = (
                f"{list(found[name].shape)}, where config.json asks for "
                f"{list(expected[name].shape)}"
            )
            raise CheckpointError(f"{folder}: {name} has shape {shapes}")


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Files to read, each with the names that the index promises."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise CheckpointError(
                f"{folder}: has neither model.safetensors nor model.safetensors.index.json"
            )
        return {folder / "model.safetensors": None}
    files: dict[Path, Any] = {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{index}: {str(shard)[:80]!r} isn't the name of a .safetensors file"
            )
        files.setdefault(folder / shard, set()).add(name)
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though model.safetensors.index.json names it")
    return files


def _as_float(path: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype}; supported: float64, float32, float16, bfloat16"
        )
    return tensor.to(dtype)


def our_name(name: str) -> str:
    """The name in `DecoderLM` of a tensor that transformers calls `name`."""
    for theirs, ours in _NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\g<1>{ours}.", name)
    return name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, naming the path, for anything else."""
    with blaming(path):
        with open_regular(path) as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise CheckpointError(f"over {MAX_JSON} bytes")
        try:
            content = from_json(text)
        except CheckpointError:
            raise
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"not JSON ({error})") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"holds a {type(content).__name__}, not an object")
        return content
