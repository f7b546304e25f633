"""Folders of published models that are not what they should be."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import torch
from hostile_parts import VALUES, damage, models
from safetensors.torch import save_file

_PUBLISHED = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "head_dim": 8,
    "eos_token_id": 1,
}


@functools.cache
def _published() -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in models()["plain"].state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            owner = {"attention": "self_attn", "ffn": "mlp"}.get(parts[2], parts[2])
            owner = {
                "attention_norm": "input_layernorm",
                "ffn_norm": "post_attention_layernorm",
            }.get(owner, owner)
            inner = {"out": "o_proj", "weight": "weight"}.get(parts[3], f"{parts[3]}_proj")
            tail = [inner, "weight"] if len(parts) == 5 else ["weight"]
            tensors[".".join(["model.layers", parts[1], owner, *tail])] = tensor
        else:
            theirs = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}[
                parts[0]
            ]
            tensors[f"{theirs}.weight"] = tensor
    return tensors


def folders(draw: random.Random, folder: Path) -> Path:
    """A published model with another config, index or shard than it should have."""
    home = folder / "published"
    home.mkdir(exist_ok=True)
    for old in home.iterdir():
        old.unlink()
    config, tensors = dict(_PUBLISHED), dict(_published())
    how = draw.randrange(5)
    if how == 0:
        for _ in range(draw.randrange(1, 3)):
            config[draw.choice(sorted(config))] = draw.choice(VALUES)
    elif how == 1:
        config["rope_scaling"] = _rope_scaling(draw)
    elif how == 2:
        name = draw.choice(sorted(tensors))
        tensors[name] = _other_tensor(draw, tensors[name])
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(present, home / "model.safetensors")
    text = json.dumps(config)
    if how == 3:
        index = _index(draw, sorted(tensors))
        (home / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == 4:
        text = _damaged(draw, home / "model.safetensors", text)
    (home / "config.json").write_text(text, encoding="latin-1")
    return home


def _rope_scaling(draw: random.Random) -> Any:
    kind = draw.choice(("linear", "llama3", "yarn", "dynamic", 3, None, []))
    keys = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "attention_factor",
        "rope_theta",
    )
    others = {draw.choice(keys): draw.choice(VALUES) for _ in range(3)}
    garbage = {"rope_type": kind, "factor": 2.0} | others
    return draw.choice((garbage, garbage, "text", [1], 3))


def _other_tensor(draw: random.Random, tensor: torch.Tensor) -> torch.Tensor | None:
    """Of another dtype or shape, or none."""
    narrow, first = tensor.to(torch.int32), tensor[:1].clone()
    return draw.choice((narrow, first, torch.empty(10**9, 0), None))


def _index(draw: random.Random, names: list[str]) -> Any:
    """An index of shards that aren't there, or none at all."""
    shards = ("../m.safetensors", "/dev/zero", "", "gone.safetensors", "model.safetensors", 3)
    shard = draw.choice((*shards, "a.bin"))
    known = {"weight_map": dict.fromkeys(draw.sample(names, 3), shard)}
    others = {"weight_map": []}, [], {"weight_map": {"x": shard}}
    return draw.choice((known, known, *others))


def _damaged(draw: random.Random, file: Path, text: str) -> str:
    """The text of the config, or something else in its place; or the tensors' file is damaged."""
    if draw.choice(("config", "config", "tensors")) == "tensors":
        file.write_bytes(damage(draw, file.read_bytes()))
        return text
    twice, digits = '{"a":1,"a":2}', '{"a":' + "9" * 10**5 + "}"
    short = ("", "[]", "3", "{", twice)
    return draw.choice((*short, "[" * 10**5, "\xff", text + text, digits, text[:-9]))
