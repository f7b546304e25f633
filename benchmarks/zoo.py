"""Is int8 ever slower than float? Many kinds of models, as they come out of `quantize_dynamic`.

    uv run python benchmarks/zoo.py                      # all, about ten minutes
    uv run python benchmarks/zoo.py --models lstm_256 resnet18
    uv run python benchmarks/zoo.py --lengths 600 --models bert_4x256 t5_encoder llama_4x256
    uv run --group bench python benchmarks/zoo.py --models resnet50 --peers onnxruntime openvino

A row of benchmarks/results/zoo.csv is one model at one batch size and number of threads, eager
float32 beside eager int8 in one process, in turns, after the first calls: the median milliseconds
of a call, the ratio, the relative error of the output, the bytes of both files, and how many layers
became int8 or stayed. Recurrent layers alone have PyTorch's legacy int8 beside them. Calibration is
a batch of each size. Weights are random; speed doesn't depend on them. With --peers each of these
engines runs in a process of its own, in turns with the int8 model: its median milliseconds stand in
a column of its name. With --trained, models are trained on digits in the place of all this, and
what int8 and one TorchScript file of it cost them goes to zoo_digits.csv. With --lengths, models
read one text after the other, each of 8 to 128 tokens, and the mean of each fourth of these calls,
the first ones and their recordings among them, goes to zoo_lengths.csv.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import models
import peers
import rows
import tasks
import torch
import transformers
import zoo_models as own
from torch import nn

import quantize
from quantize import calibration, clock
from quantize.measuring import Build

FIRST_CALLS = 8  # in which int8 models record what their modules do
Maker = tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]


def steps(batch: int, length: int = 100, width: int = 256) -> torch.Tensor:
    """[batch, length, width], the same on every call."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, length, width, generator=generator)


def whisper_encoder() -> nn.Module:
    sizes = {"d_model": 256, "encoder_layers": 4, "encoder_attention_heads": 4}
    sizes |= {"decoder_attention_heads": 4, "decoder_layers": 1, "max_source_positions": 100}
    config = transformers.WhisperConfig(encoder_ffn_dim=1024, **sizes)
    return transformers.WhisperModel(config).encoder


def wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(conv_dim=[256] * 7, **models.sizes(256, 4))
    return transformers.Wav2Vec2Model(config)


def recurrent(kind: type[nn.RNNBase], units: int, **options: Any) -> Maker:
    make = partial(kind, units, units, num_layers=2, batch_first=True, **options)
    return make, partial(steps, width=units)


FUSED = ("resnet50", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "convnet")  # in fusion.py
MODELS: dict[str, Maker] = {
    "bert_4x256": (partial(models.small_bert, 256, 4), models.ids),
    "bert_6x384": (partial(models.small_bert, 384, 6), models.ids),
    "decoder_4x256": (partial(models.decoder, 256, 4), models.ids),
    "llama_4x256": (
        partial(models.llama, vocab_size=models.VOCABULARY, **models.sizes(256, 4)),
        models.ids,
    ),
    "t5_encoder": (models.t5_encoder, models.ids),
    "vit_6x192": (partial(models.vit, 192, 6), models.pixels),
    "whisper_encoder": (whisper_encoder, lambda batch: steps(batch, 80, 200)),
    "wav2vec2": (wav2vec2, lambda batch: steps(batch, 1, 8000)[:, 0]),
    **{name: models.MODELS[name] for name in FUSED},
    "resnet18": (models.resnet18, models.pixels),
    "digits": (own.digits, lambda batch: models.pixels(batch, 8)[:, :1]),
    "vgg_small": (own.vgg, partial(models.pixels, size=64)),
    "unet": (own.UNet, partial(models.pixels, size=128)),
    "pitch_net": (
        partial(models.pitch_net, (128, 64, 64, 128), (64, 32, 32, 32), 64),
        lambda batch: steps(batch, 1, 4096),
    ),
    "text_cnn": (own.TextCnn, models.ids),
    "crnn": (own.Crnn, lambda batch: models.pixels(batch, 64)),
    "speaker_encoder": (own.SpeakerEncoder, lambda batch: steps(batch, 160, 40)),
    "tagger": (own.Tagger, models.ids),
    "mlp": (own.mlp, lambda batch: steps(batch, 1, 512)[:, 0]),
    "lstm_256": recurrent(nn.LSTM, 256),
    "lstm_512": recurrent(nn.LSTM, 512),
    "gru_256": recurrent(nn.GRU, 256, bidirectional=True),
}


def made(name: str, batches: list[int]) -> tuple[nn.Module, nn.Module]:
    """A model, and what `quantize_dynamic` makes of it."""
    make, inputs = MODELS[name]
    model = models.build(make, inputs(2))
    calibration = [inputs(batch) for batch in batches]
    return model, quantize.quantize_dynamic(model, calibration=calibration)


def compared(name: str, batches: list[int], model: nn.Module, small: nn.Module) -> list[rows.Row]:
    """The rows of one model."""
    inputs = MODELS[name][1]
    told = quantize.summary(small)
    about = {"bytes": _bytes(model), "int8_bytes": _bytes(small)}
    about |= {"int8_layers": len(told.done), "float_layers": len(told.left)}
    found = []
    for batch in batches:
        x = inputs(batch)
        with torch.no_grad():
            error = calibration.relative_error([small(x)], [model(x)])
        contenders = [model, small]
        row = {"model": name, "batch": batch, "error": error, **about}
        if isinstance(model.model, nn.RNNBase):
            contenders.append(peers.legacy_int8(model, {nn.LSTM, nn.GRU}))
            with torch.no_grad():
                row["legacy_error"] = calibration.relative_error([contenders[-1](x)], [model(x)])
        calls = [partial(one, x) for one in contenders]
        times = clock.race(calls, least=5, seconds=0.6, warm_up=FIRST_CALLS)
        names = ("ms", "int8_ms", "legacy_ms")
        row |= {key: 1e3 * seconds for key, seconds in zip(names, times, strict=False)}
        found.append(row | {"speedup": times[0] / times[1]})
    return found


def over_lengths(name: str, lengths: list[int]) -> list[rows.Row]:
    """The rows of a model that reads texts of ever other lengths, one at a time: a row for each
    fourth of the calls, from the first one on.
    """
    model, small = made(name, [1, 8])
    ids = MODELS[name][1](1)
    times: list[tuple[float, float]] = []
    with torch.no_grad():
        for length in lengths:
            x = ids[:, :length].contiguous()
            int8_s = clock.timed(partial(small, x))[1]
            times.append((clock.timed(partial(model, x))[1], int8_s))
    found = []
    part = len(times) // 4
    for first in range(0, 4 * part, part):
        means = [1e3 * statistics.mean(each) for each in zip(*times[first:][:part], strict=True)]
        row = {"model": name, "calls": f"{first + 1} to {first + part}"}
        found.append(row | {"ms": means[0], "int8_ms": means[1], "speedup": means[0] / means[1]})
    return found


def fused_int8(case: peers.Case) -> peers.Source:
    """One TorchScript file of the int8 model."""

    def export(path: Path) -> None:
        small = quantize.quantize_dynamic(case.build(), calibration=[case.inputs])
        quantize.fuse(small, case.inputs).save(path)

    return case.file("int8.pt", export)


PEERS: dict[str, Callable[[peers.Case], peers.Source]] = {
    "fused_fp32": peers.fused,
    "fused_int8": fused_int8,
    "onnxruntime": peers.onnxruntime,
    "openvino": peers.openvino,
    "openvino_static": partial(peers.openvino_int8, transformer=False, precision="f32"),
}


def beside(name: str, batch: int, small: nn.Module, arguments: argparse.Namespace) -> rows.Row:
    """The columns of the engines that run a model beside ours."""
    make, inputs = MODELS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.cache or Path(temporary)) / f"{name}-{batch}"
        case = peers.Case(make, inputs(batch), folder)
        own = Path(temporary) / "int8.model"
        torch.save(small, own)
        others = {engine: PEERS[engine] for engine in arguments.peers}
        engines = {"int8": lambda _: Build(_opened, own), **others}
        found = peers.side_by_side(engines, case, arguments)
    row: rows.Row = {}
    for engine, told in found:
        row[f"{engine}_own_ms"] = told.get("latency_ms", told.get("problem"))
    return row


TRAINED: dict[str, Callable[[], tasks.Task]] = {
    "digits": lambda: tasks.image_task(own.digits(), 300),
    "resnet": tasks.resnet,
    "mobilenet_v2": tasks.mobilenet_v2,
}


def trained(name: str) -> list[rows.Row]:
    """The rows of a model that is trained on digits: held-out accuracy and cross-entropy."""
    torch.manual_seed(0)
    task = TRAINED[name]()
    model = tasks.fit(task.model, task.batches, task.loss, task.steps, task.rate)
    images = [task.batches(step)[0] for step in range(4)]
    small = quantize.quantize_dynamic(model, calibration=images, prefer="size")
    variants = {"fp32": model, "int8": small, "fused_int8": quantize.fuse(small, images[0])}
    scores = {variant: task.score(made) for variant, made in variants.items()}
    return [{"model": name, "variant": key} | one._asdict() for key, one in scores.items()]


def _opened(path: Path) -> nn.Module:
    return torch.load(path, weights_only=False)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def main() -> None:
    parser = rows.Parser(__doc__, "zoo.csv")
    parser.some("--models", "which models", of=MODELS)
    parser.flag("--batches", "batch sizes", [1, 8])
    parser.add_argument("--peers", help="other engines too", nargs="*", choices=PEERS, default=[])
    parser.add_argument("--trained", help="on digits instead", nargs="*", choices=TRAINED)
    parser.flag("--lengths", "calls with texts of random lengths instead", 0)
    arguments = parser.parse_engines()
    warnings.simplefilter("ignore")
    if arguments.lengths:
        lengths = random.Random(0).choices(range(8, 129), k=arguments.lengths)
        out = arguments.out.with_name("zoo_lengths.csv")
        for name in arguments.models:
            found = [row | rows.host() for row in over_lengths(name, lengths)]
            rows.write(out, found, key=("model", "calls", "threads"))
        return
    for name in arguments.trained or ():
        out = arguments.out.with_name("zoo_digits.csv")
        rows.write(out, trained(name), key=("model", "variant"))
    if arguments.trained:
        return
    for name in arguments.models:
        model, small = made(name, arguments.batches)
        found = compared(name, arguments.batches, model, small)
        found = [row | rows.host() for row in found]
        for row in found if arguments.peers else ():
            row |= beside(name, row["batch"], small, arguments)
        rows.write(arguments.out, found, key=("model", "batch", "threads"))


if __name__ == "__main__":
    main()
