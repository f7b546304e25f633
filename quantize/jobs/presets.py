"""The models of `train.py`, how they are trained, and the recipes that are made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantize import training
from quantize.compression.recipe import Half, Int8, LowRank, Prune, Recipe, Recover, Student
from quantize.models import ConvNetConfig, DecoderConfig


@dataclass(frozen=True)
class Preset:
    """A model, how it is trained, and on what it is measured.

    Args:
        model: the configuration of the baseline.
        training: how the baseline is trained; recoveries and the student get a fifth of its steps.
        batch: of the inputs that latency is measured on: (rows, tokens) of text, (rows,) of images.
        validation: bytes of held-out text that each row is evaluated on; None: all of it.
        rounds: in which the files take turns for timing.
        depth: share of the blocks of each stage that the student keeps; None: all of them.
    """

    model: DecoderConfig | ConvNetConfig
    training: training.TrainConfig
    batch: tuple[int, ...]
    validation: int | None = None
    rounds: int = 7
    depth: float | None = 0.5


_DECODER = DecoderConfig(width=128, layers=6, heads=2, qk_norm=True, max_length=1024)
_WIDE = DecoderConfig(width=512, layers=8, heads=8, qk_norm=True, max_length=2048)
_FAST = training.TrainConfig(steps=30, length=128, batch=4, lr=1e-2, muon_lr=0.02)
_IMAGES = training.TrainConfig(steps=60, batch=64)

PRESETS = {
    "text": {
        "tiny": Preset(
            replace(_DECODER, layers=2, ffn_width=1024),
            _FAST,
            (4, 128),
            validation=2**12,
            rounds=2,
        ),
        "small": Preset(
            _DECODER,
            replace(_FAST, steps=600, length=256, batch=8, short=0.6),
            (8, 256),
            validation=2**15,
            rounds=5,
        ),
        "base": Preset(
            _WIDE,
            replace(_FAST, steps=8000, length=512, batch=16, short=0.6, lr=5e-3),
            (8, 256),
            validation=2**16,
        ),
    },
    "image": {
        "tiny": Preset(ConvNetConfig(widths=(32, 64)), _IMAGES, (64,), rounds=3, depth=None),
        "small": Preset(
            ConvNetConfig(widths=(64, 128), blocks=2),
            replace(_IMAGES, steps=300),
            (64,),
        ),
        "base": Preset(
            ConvNetConfig(widths=(64, 128, 256), blocks=2),
            replace(_IMAGES, steps=3000, batch=128),
            (64,),
        ),
    },
}


def recipes(preset: Preset) -> dict[str, Recipe]:
    """What `train.py` makes of the baseline, by name of the row.

    Half of the feed-forward neurons of a decoder are pruned, half of the channels of a network for
    images. The student has half the blocks (where a stage has more than one) and half the inner
    widths, about a quarter of the parameters.
    """
    steps = max(1, preset.training.steps // 5)
    int8 = Int8(embeddings=True, prefer="size")
    prune, recover = Prune(0.5), Recover(steps)
    if isinstance(preset.model, DecoderConfig):
        blocks = tuple(f"blocks.{index}" for index in range(preset.model.layers))
        prune = Prune({"blocks.*.ffn.up": 0.5})
        recover = Recover(steps, hidden=blocks)
    # Ranks that depend on a moment's timing would keep a resumed run from going on.
    low_rank = LowRank(0.5, skip=("head",), only_faster=False)
    recover_more = replace(recover, joined=2)
    student = Student(steps, depth=preset.depth, width=0.5)
    made = (
        Recipe((Half("float16"),)),
        Recipe((Half("bfloat16"),)),
        Recipe((int8,)),
        Recipe((prune,)),
        prune >> recover,
        prune >> recover >> int8,
        Recipe((low_rank,)),
        low_rank >> recover_more,
        low_rank >> recover_more >> int8,
        Recipe((student,)),
        student >> int8,
    )
    return {recipe.name: recipe for recipe in made}


VARIANTS = tuple(recipes(PRESETS["text"]["tiny"]))
