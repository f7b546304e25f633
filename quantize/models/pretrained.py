"""The config of a published checkpoint of the Llama family, as transformers writes it, turned into
the fields of `models.DecoderConfig`.

Families: Llama (SmolLM2 among them), Mistral, Qwen2 and 2.5, Qwen3. The folder's files are read in
published.py, scaled rotary frequencies are computed in scaled_rope.py.

What a config asks for and this package doesn't do is refused by name, unknown keys included: a
checkpoint computed without one of its parts gives text that looks almost right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize import check
from quantize.checkpoint.opening import CheckpointError
from quantize.models.published import read_json, read_shapes
from quantize.models.scaled_rope import rope_of

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
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
_FULL, _SLIDING = "full_attention", "sliding_attention"  # kinds of layers
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
        check.count(f"config.json: {key}", raw.get(key))
    _compare_sizes(folder, raw, read_shapes(folder))

    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or (128 if family == "qwen3" else raw["hidden_size"] // heads)
    theta, frequencies, scale = rope_of(raw, head_dim)
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


def _windows(raw: Mapping[str, Any]) -> int | list[int | None] | None:
    """The sliding window of all layers, or one per layer, as each family's config puts it."""
    family, layers = raw["model_type"], raw["num_hidden_layers"]
    window = raw.get("sliding_window", 4096 if family == "mistral" else None)
    if family == "llama" and window is not None:
        raise ValueError(f"sliding_window is {window!r}; llama models have none")
    first = 0  # of the layers with a window
    if family.startswith("qwen"):
        first = raw.get("max_window_layers", 28)
        if not raw.get("use_sliding_window", False) or window is None:
            return None
    kinds = raw.get("layer_types") or [_FULL if i < first else _SLIDING for i in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {_FULL, _SLIDING}:
        raise ValueError(
            f"layer_types is {kinds!r}; supported: {_FULL} and {_SLIDING} for {layers} layers"
        )
    windows = [window if kind == _SLIDING else None for kind in kinds]
    return windows[0] if len(set(windows)) == 1 else windows
