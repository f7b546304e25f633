"""Makes hostile and damaged files, each a function of its number: what `load` and `from_pretrained`
must survive.

A seal is a checksum, no signature, so most of the files are sealed as `quantize.save` would: what
they say is what is wrong with them. Used by test_hostile_files.py (a sample) and
benchmarks/hostile.py (all of them, with limits on time and memory).
"""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import quantize
from quantize.checkpoint.container import _LOCATE, _digest
from quantize.models import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM

SUFFIXES = (".pth", ".safetensors")
MARK = "RAN"  # a file that runs code leaves a file of this name in the current folder
NUMBERS = (
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**9,
    10**18,
    10**40,
    1.5,
    float("nan"),
    float("inf"),
    True,
    None,
)
VALUES = (*NUMBERS, "", "x" * 1000, [], [1], [[]], [10**9] * 3, {}, {"a": 1}, [None] * 1000)
DECODER = DecoderConfig(vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, max_length=64)


@functools.cache
def _models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    plain = DecoderLM(DECODER).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(0, 0.2)
    return {
        "plain": plain,
        "half": quantize.to_half(plain),
        "int8": quantize.quantize_dynamic(plain),
        "int4": quantize.quantize_weights(plain),
        "low rank": quantize.factorize_low_rank(plain, ratio=0.6),
        "convnet": ConvNet(ConvNetConfig(widths=(8, 8))).eval(),
    }


@functools.cache
def _whole(model: str, suffix: str) -> bytes:
    """A good file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"m{suffix}"
        quantize.save(_models()[model], path)
        return path.read_bytes()


def sealed(content: bytes, change: Callable[[dict], Any]) -> bytes:
    """A good .safetensors file with its record changed, sealed again as far as that can be done."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    record = json.loads(header["__metadata__"]["record"])
    change(record)
    header["__metadata__"]["record"] = json.dumps(record, separators=(",", ":"))
    return seal(json.dumps(header, separators=(",", ":")).encode(), content[8 + length :])


def seal(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    file = io.BytesIO(len(header).to_bytes(8, "little") + header + data)
    try:
        _, places, at = _LOCATE[".safetensors"](file)
        digest = _digest(file, places, at)
    except Exception:  # so malformed that it has no digest
        return file.getvalue()
    file.seek(at)
    file.write(digest)
    return file.getvalue()


# Each kind: (draw, folder) -> path of a file, or of a folder for from_pretrained.


def _file(folder: Path, content: bytes, suffix: str = ".safetensors") -> Path:
    path = folder / f"m{suffix}"
    path.write_bytes(content)
    return path


def _damage(draw: random.Random, content: bytes) -> bytes:
    at, damaged = draw.randrange(len(content)), bytearray(content)
    how = draw.randrange(5)
    if how == 0:
        damaged[at] ^= 1 << draw.randrange(8)
    elif how == 1:
        del damaged[at:]
    elif how == 2:
        damaged[at : at + 8] = struct.pack(
            "<Q", draw.choice((0, 2**31, 2**32 - 1, 2**40, 2**64 - 1))
        )
    elif how == 3:
        del damaged[at : at + draw.randrange(1, 300)]
    else:
        other = draw.randrange(len(content))
        damaged[at : at + 50] = content[other : other + 50]
    return bytes(damaged)


def damaged(draw: random.Random, folder: Path) -> Path:
    suffix = draw.choice(SUFFIXES)
    return _file(folder, _damage(draw, _whole(draw.choice(sorted(_models())), suffix)), suffix)


def hostile_config(draw: random.Random, folder: Path) -> Path:
    model = draw.choice(("plain", "half", "int8", "convnet"))

    def change(record: dict) -> None:
        config = record["architecture"]["config"]
        for _ in range(draw.randrange(1, 3)):
            config[draw.choice(sorted(config))] = draw.choice(VALUES)
        if draw.random() < 0.1:
            record["architecture"]["name"] = draw.choice(
                ("os.system", "ConvNet", "MLP", "x" * 10**6, "")
            )

    return _file(folder, sealed(_whole(model, ".safetensors"), change))


BUILDERS = (
    "resized",
    "half",
    "Int8Linear",
    "Int8Embedding",
    "Int4Linear",
    "LowRankLinear",
    "LowRankConv2d",
    "kept_blocks",
    "Int8MultiheadAttention",
    "folded",
    "os.system",
    "",
)
NAMES = (
    "",
    "head",
    "embedding",
    "norm",
    "blocks",
    "blocks.0",
    "blocks.0.attention",
    "blocks.0.attention.q",
    "blocks.1.ffn.down",
    "blocks.0.attention_norm",
    "blocks.9",
    "__class__",
    "a." * 1000,
)
ARGUMENTS = (
    "in_features",
    "out_features",
    "rank",
    "bias",
    "group_size",
    "heads",
    "dropout",
    "num_embeddings",
    "embedding_dim",
    "indices",
    "dtype",
    "names",
    "casts",
    "head_dim",
    "layer",
    "window",
    "shapes",
    "attributes",
)


def _attribute(draw: random.Random) -> tuple[str, Any]:
    names = (
        "in_features",
        "out_features",
        "head_dim",
        "layer",
        "window",
        "normalized_shape",
        "eps",
        "num_embeddings",
        "scale",
    )
    return draw.choice(names), draw.choice((*VALUES, 2, 16, 31, 33, 64, 128, 4096, 10**6))


def hostile_edits(draw: random.Random, folder: Path) -> Path:
    def edit() -> dict:
        builder = draw.choice(BUILDERS)
        if draw.random() < 0.5:
            shapes = (
                {draw.choice(("weight", "bias", "scale")): draw.choice(VALUES)}
                if draw.random() < 0.3
                else {}
            )
            attributes = dict(_attribute(draw) for _ in range(draw.randrange(1, 3)))
            arguments, builder = {"shapes": shapes, "attributes": attributes}, "resized"
        else:
            arguments = {
                draw.choice(ARGUMENTS): draw.choice(VALUES) for _ in range(draw.randrange(5))
            }
        return {"module": draw.choice(NAMES), "builder": builder, "arguments": arguments}

    def change(record: dict) -> None:
        known = record["structure"]
        if known and draw.random() < 0.5:  # an edit that is really there, with other arguments
            chosen = copy.deepcopy(draw.choice(known))
            for key in chosen["arguments"]:
                if draw.random() < 0.5:
                    chosen["arguments"][key] = draw.choice((*VALUES, 16, 33, 4096))
            known[draw.randrange(len(known))] = chosen
        else:
            known.extend(edit() for _ in range(draw.randrange(1, 4)))

    model = draw.choice(("plain", "half", "int8", "int4", "low rank"))
    return _file(folder, sealed(_whole(model, ".safetensors"), change))


def hostile_record(draw: random.Random, folder: Path) -> Path:
    def change(record: dict) -> None:
        names = sorted(record["tensors"])
        name = draw.choice(names)
        how = draw.randrange(6)
        if how == 0:
            record["strides"][name] = draw.choice(
                (*VALUES, [1, 1], [0, 0], [64, 1], [1, 32], [-1, 1], [2**62, 2**62])
            )
        elif how == 1:
            record["aliases"][draw.choice((name, "x", "", "head.weight"))] = draw.choice(
                (*names, "y", 3, [], None)
            )
        elif how == 2:
            key = draw.choice(("dtype", "shape", "sha256"))
            record["tensors"][name][key] = draw.choice(
                (*VALUES, "float64", "int8", "uint8", [2**62, 4], [0] * 100, [2] * 70)
            )
        elif how == 3:
            record[draw.choice(sorted(record))] = draw.choice(VALUES)
        elif how == 4:
            record[draw.choice(("notes", "metadata"))] = draw.choice(
                ({"a": VALUES[-1]}, [{}], [[1]], [{"technique": 3}])
            )
        else:
            del record["tensors"][name]

    return _file(folder, sealed(_whole(draw.choice(("plain", "int8")), ".safetensors"), change))


SIZE = 200_000  # of what is repeated, in bytes; benchmarks/hostile.py sets more


def bulk(draw: random.Random, folder: Path) -> Path:
    """Much of one thing: what costs more than linear time shows here."""
    kind = draw.choice(
        (
            "edits",
            "aliases",
            "keys",
            "nesting",
            "lists",
            "marks",
            "entries",
            "digits",
            "dimensions",
            "layers",
        )
    )
    good = _whole("plain", ".safetensors")
    edit = {"module": "head", "builder": "resized", "arguments": {"shapes": {}, "attributes": {}}}
    changes: dict[str, Callable[[dict], Any]] = {
        "edits": lambda r: r["structure"].extend([edit] * (SIZE // 90)),
        "aliases": lambda r: r["aliases"].update(
            {f"{i:x}": "norm.weight" for i in range(SIZE // 25)}
        ),
        "keys": lambda r: r["metadata"].update({f"{i:x}": 0 for i in range(SIZE // 10)}),
        "lists": lambda r: r["metadata"].update({"a": [[]] * (SIZE // 3)}),
        "dimensions": lambda r: r["tensors"]["norm.weight"].update(shape=[2**62] * (SIZE // 20)),
        "layers": lambda r: [
            r["architecture"]["config"].update(layers=10**9),
            changes["aliases"](r),
        ],
    }
    if kind in changes:
        return _file(folder, sealed(good, changes[kind]))
    if kind in ("nesting", "digits"):
        value = "[" * (SIZE // 2) + "]" * (SIZE // 2) if kind == "nesting" else "9" * SIZE
        return _file(
            folder, seal(f'{{"__metadata__":{{"sha256":"{"0" * 64}","a":{value}}}}}'.encode(), b"")
        )
    if kind == "marks":
        return _file(folder, _archive(b"\x80\x02" + b"(" * SIZE + b"."), ".pth")
    names = {f"data/{i}": b"" for i in range(SIZE // 100)}
    return _file(folder, _archive(b"\x80\x02}.", names), ".pth")


def _archive(
    pickled: bytes, more: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in (more or {}).items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


class _Call:
    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def pickles(draw: random.Random, folder: Path) -> Path:
    """Pickles that run a command, whole or spliced into one of ours, in archives, compressed,
    bare.
    """
    command = (f"touch {MARK}",)
    calls = (
        _Call(os.system, command),
        _Call(getattr, (_Call(__import__, ("os",)), "system")),
        {"a": _Call(eval, (f"open({MARK!r},'w')",))},
    )
    attack = pickle.dumps(draw.choice(calls), draw.randrange(6))
    with zipfile.ZipFile(io.BytesIO(_whole("plain", ".pth"))) as archive:
        ours = archive.read(archive.namelist()[0])
    at = draw.randrange(2, len(ours))
    pickled = draw.choice(
        (
            attack,
            ours[:-1] + attack[2:],
            ours[:at] + attack[2:],
            ours + attack,
            ours[:at] + attack[2:] + ours[at:],
        )
    )
    if draw.random() < 0.2:
        return _file(folder, pickled, draw.choice(SUFFIXES))
    more = {"data/0": bytes(8), "version": b"3\n", "byteorder": b"little"}
    compression = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    return _file(folder, _archive(pickled, more, compression), ".pth")


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
    for name, tensor in _models()["plain"].state_dict().items():
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
        kind = draw.choice(("linear", "llama3", "yarn", "dynamic", 3, None, []))
        keys = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
            "attention_factor",
            "rope_theta",
        )
        garbage = {"rope_type": kind, "factor": 2.0} | {
            draw.choice(keys): draw.choice(VALUES) for _ in range(3)
        }
        config["rope_scaling"] = draw.choice((garbage, garbage, "text", [1], 3))
    elif how == 2:
        name = draw.choice(sorted(tensors))
        changed = (
            tensors[name].to(torch.int32),
            tensors[name][:1].clone(),
            torch.empty(10**9, 0),
            None,
        )
        tensors[name] = draw.choice(changed)
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        home / "model.safetensors",
    )
    text = json.dumps(config)
    if how == 3:
        shard = draw.choice(
            (
                "../m.safetensors",
                "/dev/zero",
                "",
                "gone.safetensors",
                "model.safetensors",
                3,
                "a.bin",
            )
        )
        names = dict.fromkeys(draw.sample(sorted(tensors), 3), shard)
        index: Any = draw.choice(
            (
                {"weight_map": names},
                {"weight_map": names},
                {"weight_map": []},
                [],
                {"weight_map": {"x": shard}},
            )
        )
        (home / "model.safetensors.index.json").write_text(json.dumps(index))
    if how == 4:
        target = draw.choice(("config", "config", "tensors"))
        if target == "tensors":
            path = home / "model.safetensors"
            path.write_bytes(_damage(draw, path.read_bytes()))
        else:
            text = draw.choice(
                (
                    "",
                    "[]",
                    "3",
                    "{",
                    '{"a":1,"a":2}',
                    "[" * 10**5,
                    "\xff",
                    text + text,
                    '{"a":' + "9" * 10**5 + "}",
                    text[:-9],
                )
            )
    (home / "config.json").write_text(text, encoding="latin-1")
    return home


KINDS = (damaged, hostile_config, hostile_edits, hostile_record, bulk, pickles, folders)


def make(number: int, folder: Path) -> tuple[str, Path]:
    """The file (or folder) of this number, written into `folder`: its kind and path. The same
    number gives the same file.
    """
    kind = KINDS[number % len(KINDS)]
    return kind.__name__, kind(random.Random(number), folder)


def load(path: Path) -> torch.nn.Module:
    """What a user calls for it."""
    return DecoderLM.from_pretrained(path) if path.is_dir() else quantize.load(path)


def use(model: torch.nn.Module) -> None:
    """Run what was loaded, where C++ trusts the sizes it is told. Raises what Python raises."""
    if isinstance(model, DecoderLM):
        fast = quantize.for_decoding(model)
        quantize.generate(fast, torch.tensor([[1, 2, 3]]), max_new_tokens=3)
