"""Published checkpoints against transformers, which wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import run
from safetensors.torch import load_file, save_file

from quantize.checkpoint import CheckpointError
from quantize.models import DecoderLM
from quantize.run.generate import generate

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen2.5 yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def write(folder, family: str = "llama", **changes):
    """A tiny random transformers model saved in `folder`, every weight made to matter."""
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | options | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


IDS = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(family, tmp_path):
    """Each family's logits equal those of transformers to 1e-4, in one pass and through a cache."""
    reference = write(tmp_path, family)
    model = DecoderLM.from_pretrained(tmp_path)
    expected = run(reference, IDS)
    assert (run(model, IDS) - expected).abs().max() < 1e-4
    assert not model.training
    ids = generate(model, IDS[:, :20], max_new_tokens=8, stop_tokens=())
    assert torch.equal(ids, generate(reference, IDS[:, :20], max_new_tokens=8, stop_tokens=()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_widened(dtype, tmp_path):
    """A 16-bit file gives fp32 weights of the same values, or stays 16 bits if asked."""
    reference = write(tmp_path)
    reference.to(dtype).save_pretrained(tmp_path)
    model = DecoderLM.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (run(model, IDS) - run(reference.eval(), IDS)).abs().max() < 1e-4
    assert {p.dtype for p in DecoderLM.from_pretrained(tmp_path, dtype=dtype).parameters()} == {
        dtype
    }


def test_shards(tmp_path):
    """A checkpoint in several files is read like one; a missing shard is named."""
    reference = write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert (run(DecoderLM.from_pretrained(tmp_path), IDS) - run(reference, IDS)).abs().max() < 1e-4
    shard = min(tmp_path.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}: missing, though"):
        DecoderLM.from_pretrained(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_weights_are_mapped_not_copied(tmp_path):
    """fp32 weights are the file's pages, and writing to them leaves the file as it is."""
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    model = DecoderLM.from_pretrained(tmp_path)
    maps = [
        line.split()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    for parameter in model.parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in spans)
    with torch.no_grad():
        model.embedding.weight.add_(1.0)
    assert path.read_bytes() == content


def test_tied_head_is_one_tensor_and_ends_are_read(tmp_path):
    """A tied head stays tied, and the end-of-text ids of generation_config.json win."""
    write(tmp_path, "smollm2", eos_token_id=7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    model = DecoderLM.from_pretrained(tmp_path)
    assert model.head.weight is model.embedding.weight
    assert model.config.eos_token_id == (3, 5)


def test_tied_weight_under_the_name_of_the_head_only(tmp_path):
    """safetensors.save_model keeps the first of two names of one tensor, whichever that is;
    different tensors are refused.
    """
    reference = write(tmp_path, "smollm2")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path)
    model = DecoderLM.from_pretrained(tmp_path)
    assert model.head.weight is model.embedding.weight
    assert (run(model, IDS) - run(reference, IDS)).abs().max() < 1e-4
    save_file({**tensors, "model.embed_tokens.weight": tensors["lm_head.weight"] + 1}, path)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from the embedding"):
        DecoderLM.from_pretrained(tmp_path)


def test_old_configs(tmp_path):
    """Configs from before transformers 5 (rope_theta and rope_scaling at the top, no layer_types)
    mean the same.
    """
    expected = run(write(tmp_path, "llama 3.1"), IDS)
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope,
        "is_llama_config": True,
        "rope_interleaved": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert (run(DecoderLM.from_pretrained(tmp_path), IDS) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "RoPE scaling is of type 'dynamic'",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"final_logit_softcapping": 30.0}, "asks for final_logit_softcapping=30.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "kv_heads is 3"),
        (
            {"vocab_size": 62},
            r"embedding.weight has shape \[61, 32\], where config.json asks for \[62, 32\]",
        ),
        ({"num_hidden_layers": 2}, "blocks.2.attention.k.weight has no place"),
        ({"num_hidden_layers": 4}, "no tensor for blocks.3.attention.k.weight"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from the embedding"),
    ],
)
def test_what_is_not_supported_is_refused(changes, message, tmp_path):
    """Anything in the config that would be ignored, or that the weights contradict, is refused by
    name.
    """
    write(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        DecoderLM.from_pretrained(tmp_path)


def test_broken_files_are_named(tmp_path):
    """Missing, truncated and foreign files give a CheckpointError with the path."""
    with pytest.raises(CheckpointError, match=r"config.json: No such file"):
        DecoderLM.from_pretrained(tmp_path)
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(
            CheckpointError, match=r"model.safetensors: not a readable safetensors file"
        ):
            DecoderLM.from_pretrained(tmp_path)
    path.write_bytes(content)
    tensors = load_file(path)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.int32)}, path)
    with pytest.raises(CheckpointError, match=r"model.norm.weight is torch.int32"):
        DecoderLM.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor"):
        DecoderLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not JSON"):
        DecoderLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3 * 10**8},
        {"num_hidden_layers": 10**40},
        {"head_dim": 10**9},
        {"head_dim": 10**9, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"hidden_size": 10**12},
        {"hidden_size": True},
        {"rope_scaling": "garbage"},
        {"rope_scaling": {"rope_type": "llama3", "factor": 0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": "x"}},
        {"rope_theta": 10**400},
        {"rope_theta": [1]},
        {"rms_norm_eps": float("nan")},
        {"max_position_embeddings": -1},
        {"sliding_window": 5},
        {"layer_types": [[]]},
        {"model_type": ["llama"]},
    ],
)
def test_configs_that_ask_for_what_is_not_there(changes, tmp_path):
    """Sizes beyond the tensors', numbers of the wrong kind and garbage are each a CheckpointError
    with the folder's name.
    """
    write(tmp_path)
    edit(tmp_path, rope_parameters=None, **changes)
    with pytest.raises(CheckpointError, match=tmp_path.name):
        DecoderLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "..", "", "model.bin", 3])
def test_index_that_names_other_files(shard, tmp_path):
    """An index may name .safetensors files of its own folder, nothing else."""
    write(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": shard}})
    )
    with pytest.raises(CheckpointError, match=r"isn't the name of a .safetensors file"):
        DecoderLM.from_pretrained(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    """Which of two would be used isn't said anywhere: refused."""
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    norm = load_file(path)["model.norm.weight"]
    save_file({"model.norm.weight": norm}, tmp_path / "second.safetensors")
    held = {
        "model.layers.0.mlp.up_proj.weight": path.name,
        "model.norm.weight": "second.safetensors",
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
    with pytest.raises(
        CheckpointError, match=r"holds 'model.norm.weight', which another shard holds too"
    ):
        DecoderLM.from_pretrained(tmp_path)
