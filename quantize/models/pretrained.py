"""Read published checkpoints of the Llama family: `config.json` and `*.safetensors`, as
transformers writes them.

`read_config` turns a config into the fields of `models.DecoderConfig`, `read_tensors` gives the
weights under the names of `models.DecoderLM`, mapped into memory from the file rather than read
twice. Families: Llama (SmolLM2 among them), Mistral, Qwen2 and 2.5, Qwen3.

What a config asks for and this package doesn't do is refused by name, unknown keys included: a
checkpoint computed without one of its parts gives text that looks almost right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantize.checkpoint.opening import CheckpointError, blaming, from_json, open_regular

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
MAX_JSON = 2**24  # bytes; an index of ten thousand tensors has 1 MB
_SHARD = re.compile(r"\w[\w.-]*\.safetensors")
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
_READ = {
    *_REQUIRED,
    "model_type",
    "architectures",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "eos_token_id",
}
# Keys that must have this value, because nothing else is supported.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "quantization_config": None,
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "auto_map": None,
}
# Keys that change no logit: training, bookkeeping, and how transformers samples.
_IDLE = re.compile(
    r"_.*|transformers.*|torch_dtype|dtype|use_cache|initializer_range|attention_dropout|\w+_token_id|is_llama_config"
    r"|id2label|label2id|task_specific_params|problem_type|return_dict|output_\w+|chunk_size_feed_forward|torchscript"
    r"|tokenizer_class|prefix|finetuning_task|is_decoder|unsloth_\w+|max_length|min_length|do_sample|temperature|top_[kp]"
)

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


def read_config(folder: Path) -> dict[str, Any]:
    """Keyword arguments for `DecoderConfig` from `config.json` (and the end-of-text id from
    `generation_config.json`).

    Nothing is computed before every size was compared with those of the tensors in the folder.
    Raises CheckpointError for a file that is missing, isn't JSON, or asks for sizes that no tensor
    has; ValueError, naming key and value, for what isn't supported.
    """
    raw = read_json(folder / "config.json")
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type is {family!r}; supported: {', '.join(FAMILIES)}")
    architecture = raw.get("architectures") or [FAMILIES[family]]
    if architecture != [FAMILIES[family]]:
        raise ValueError(
            f"architectures is {architecture!r}; supported for {family}: {FAMILIES[family]}"
        )
    for key, value in raw.items():
        if key in _FIXED and value != _FIXED[key] and value is not None:
            raise ValueError(f"{key} is {value!r}; supported: {_FIXED[key]!r}")
        if (
            key not in _READ
            and key not in _FIXED
            and not _IDLE.fullmatch(key)
            and value not in (None, False, [], {})
        ):
            raise ValueError(f"config.json asks for {key}={value!r}, which isn't supported")
    for key in _REQUIRED:
        if not isinstance(raw.get(key), int) or isinstance(raw.get(key), bool) or raw[key] < 1:
            raise ValueError(f"config.json: {key} is {raw.get(key)!r}; allowed: an integer >= 1")
    _compare_sizes(folder, raw, read_shapes(folder))

    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or (128 if family == "qwen3" else raw["hidden_size"] // heads)
    theta, frequencies, scale = _rope(raw, head_dim)
    generation = folder / "generation_config.json"
    ends = read_json(generation).get("eos_token_id") if generation.is_file() else None
    return {
        "vocab_size": raw["vocab_size"],
        "width": raw["hidden_size"],
        "layers": raw["num_hidden_layers"],
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "ffn_width": raw["intermediate_size"],
        "max_length": raw.get("max_position_embeddings", 2048),
        "rope_theta": theta,
        "rope_frequencies": frequencies,
        "rope_scale": scale,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "tied_head": raw.get("tie_word_embeddings", False),
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "window": _windows(raw),
        "eos_token_id": raw.get("eos_token_id") if ends is None else ends,
    }


def _compare_sizes(folder: Path, raw: Mapping[str, Any], held: Mapping[str, Sequence[int]]) -> None:
    """Refuse a config that describes a larger model than the tensors make, before any of it is
    built.
    """
    layers = {
        name.split(".")[2]
        for name in held
        if name.startswith("model.layers.") and name.count(".") > 2
    }
    asked = raw["num_hidden_layers"]
    if asked > len(layers) + 100:  # what differs by less is told tensor by tensor
        raise CheckpointError(
            f"{folder}: config.json asks for {_short(asked)} layers, the files hold {len(layers)}"
        )
    widest = max((max(shape, default=0) for shape in held.values() if math.prod(shape)), default=0)
    for key in (
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    ):
        value = raw.get(key)
        if type(value) is int and value > max(widest, 2**16):
            raise CheckpointError(
                f"{folder}: config.json has {key}={_short(value)}, but no tensor is wider than "
                f"{widest}"
            )


def _short(number: int) -> str:
    return str(number) if number < 10**18 else "over 10^18"


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
                if not name.endswith(
                    "rotary_emb.inv_freq"
                ):  # old files hold what is computed from the config
                    tensors[name] = _as_float(path, name, file.get_tensor(name), dtype)
    if tied_head and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        embedding = tensors.setdefault(
            "model.embed_tokens.weight", head
        )  # files may hold one tensor under either name
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


def _windows(raw: Mapping[str, Any]) -> int | list[int | None] | None:
    """The sliding window of all layers, or one per layer, as each family's config puts it."""
    window = raw.get("sliding_window", 4096 if raw["model_type"] == "mistral" else None)
    layers = raw["num_hidden_layers"]
    if raw["model_type"] == "llama" and window is not None:
        raise ValueError(f"sliding_window is {window!r}; llama models have none")
    if raw["model_type"].startswith("qwen"):
        if not raw.get("use_sliding_window", False) or window is None:
            return None
        first = raw.get("max_window_layers", 28)
        kinds = raw.get("layer_types") or [
            "full_attention" if i < first else "sliding_attention" for i in range(layers)
        ]
    else:
        kinds = raw.get("layer_types") or ["sliding_attention"] * layers
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types is {kinds!r}; supported: full_attention and sliding_attention for "
            f"{layers} layers"
        )
    if window is None or set(kinds) == {"full_attention"}:
        return None
    if set(kinds) == {"sliding_attention"}:
        return window
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _rope(raw: Mapping[str, Any], head_dim: int) -> tuple[float, list[float] | None, float]:
    """theta; frequencies [head_dim / 2] if they are scaled; the factor on cosines and sines."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor of RoPE is {raw.get('rope_parameters')!r}; supported: 1.0"
        )
    if kind == "default":
        return theta, None, 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"RoPE scaling is of type {kind!r}; supported: default, linear, llama3, yarn"
        )
    if "factor" not in rope:
        raise ValueError(f"RoPE scaling {kind!r} lacks its factor: {rope!r}")
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    trained = rope.get("original_max_position_embeddings") or raw.get(
        "max_position_embeddings", 2048
    )
    if kind == "linear":
        return theta, (frequencies / rope["factor"]).tolist(), 1.0
    if kind == "llama3":
        return theta, _llama3(frequencies, trained, rope).tolist(), 1.0
    return theta, _yarn(theta, head_dim, trained, rope).tolist(), _yarn_scale(rope)


def _llama3(frequencies: Tensor, trained: int, rope: Mapping[str, float]) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between mixed."""
    turns = trained * frequencies / (2 * math.pi)  # over the length the model was trained on
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope["factor"]


def _yarn(theta: float, head_dim: int, trained: int, rope: Mapping[str, float]) -> Tensor:
    """YaRN (Peng et al., arXiv 2309.00071): kept above `beta_fast` turns, slowed below `beta_slow`,
    mixed between.
    """

    def pair(
        turns: float,
    ) -> float:  # the pair of dimensions that turns so often over the trained length
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    slowed = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return frequencies * (1 - slowed) + frequencies / rope["factor"] * slowed


def _yarn_scale(rope: Mapping[str, float]) -> float:
    def length(mscale: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * mscale * math.log(rope["factor"]) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return length(rope["mscale"]) / length(rope["mscale_all_dim"])
    return length(1.0)
