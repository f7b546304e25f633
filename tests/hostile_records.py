"""Files whose seal is right and whose record says what can't be."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

from hostile_parts import VALUES, sealed, whole, written


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

    return written(folder, sealed(whole(model, ".safetensors"), change))


BUILDERS = (
    "resized",
    "half",
    "Int8Linear",
    "Int8Embedding",
    "Int4Linear",
    "LowRankLinear",
    "LowRankConv1d",
    "LowRankConv2d",
    "kept_blocks",
    "Int8MultiheadAttention",
    "ProjectedCell",
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
    return written(folder, sealed(whole(model, ".safetensors"), change))


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

    return written(folder, sealed(whole(draw.choice(("plain", "int8")), ".safetensors"), change))
