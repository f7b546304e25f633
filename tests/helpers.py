"""What the tests share: one closeness check with a tolerance per dtype, random inputs and small
models from a seed, and a zoo of models that others wrote.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from fresh import ROOT as ROOT
from torch import nn

from quantize import quantize_dynamic
from quantize.measuring.result import Latency, Measurement
from quantize.models import DecoderConfig, DecoderLM

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    factor: float = 1.0,
) -> None:
    """Equal within the tolerance of `dtype` (default: the coarser of the two), relative to the
    largest expected value.
    """
    dtypes = [dtype] if dtype else [actual.dtype, expected.dtype]
    tolerance = factor * max(TOLERANCE[d] for d in dtypes)
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, (
        f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    )
    scale = expected.abs().max().item() if expected.numel() else 0.0
    worst = (actual - expected).abs().max().item() if expected.numel() else 0.0
    assert worst <= tolerance * max(scale, 1e-6), (
        f"differs by {worst:.3g} where the largest value is {scale:.3g}"
    )


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean cosine over the last axis."""
    return (
        nn.functional.cosine_similarity(a.detach().double(), b.detach().double(), dim=-1)
        .mean()
        .item()
    )


def in_a_fork(work: Callable[[], int]) -> int:
    """The exit code that `work` gives in a forked process; 255 where it raises."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal random numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, vocabulary: int = 61, seed: int = 0) -> torch.Tensor:
    """Random token ids below `vocabulary`, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, shape, generator=generator)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The model that `build` makes with weights drawn from `seed`, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def linear(inputs: int, outputs: int, bias: bool = True, seed: int = 0) -> nn.Module:
    """A linear layer with weights from a seed."""
    return seeded(lambda: nn.Linear(inputs, outputs, bias=bias), seed)


def mlp(first: int, hidden: int, last: int) -> nn.Sequential:
    """Two linear layers with GELU between them."""
    layers = linear(first, hidden), nn.GELU(), linear(hidden, last, seed=1)
    return nn.Sequential(*layers).eval()


def in_int8(model: nn.Module, **options: Any) -> nn.Module:
    """`quantize_dynamic` of all layers, whatever a stopwatch says."""
    return quantize_dynamic(model, prefer="size", **options)


def decoder(seed: int = 0, noise: float = 0.3, **changes: Any) -> DecoderLM:
    """A tiny decoder with `noise` on all its weights, so that tokens differ."""
    config = {
        "vocab_size": 61,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "ffn_width": 48,
        "max_length": 64,
    }

    def build() -> DecoderLM:
        model = DecoderLM(DecoderConfig(**config | changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        return model

    return seeded(build, seed)


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Run a model on example inputs: a tensor, a tuple of positional or a dict of keyword
    arguments.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def first_tensor(output: Any) -> torch.Tensor:
    """The main output: a tensor itself, or the first tensor of a tuple, dict or dataclass."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


def run(model: nn.Module, inputs: Any) -> torch.Tensor:
    """Main output of `model` on example inputs, without gradients."""
    with torch.no_grad():
        return first_tensor(call(model, inputs))


_TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_GQA = dict(**_TEXT, num_key_value_heads=2, max_position_embeddings=64)
_IDS = {"input_ids": torch.arange(24).reshape(2, 12) * 3 % 96}


def _pixels(channels: int, size: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": randn(2, channels, size, size)}


def _t5(layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.T5Config(
        vocab_size=96,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=layers,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return transformers.T5ForConditionalGeneration(config), dict(
        **_IDS, decoder_input_ids=_IDS["input_ids"][:, :6]
    )


def _whisper(layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.WhisperConfig(
        vocab_size=96,
        d_model=64,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        use_cache=False,
    )
    return transformers.WhisperForConditionalGeneration(config), {
        "input_features": randn(2, 16, 40),
        "decoder_input_ids": _IDS["input_ids"][:, :6],
    }


def _mobilenet(layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Four blocks, where the config always makes sixteen: with a stride, with a residual, with a
    stride and more channels, with more channels alone.
    """
    config = transformers.MobileNetV2Config(image_size=64, depth_multiplier=0.5, num_labels=10)
    model = transformers.MobileNetV2ForImageClassification(config)
    body, head = model.mobilenet_v2, model.classifier
    body.layer = nn.ModuleList(body.layer[i] for i in (0, 1, 5, 9))
    channels = body.layer[-1].reduce_1x1.convolution.out_channels
    body.conv_1x1 = type(body.conv_1x1)(config, channels, head.in_features, kernel_size=1)
    return model, _pixels(3, 64)


_ZOO: dict[str, Callable[[int], tuple[nn.Module, dict[str, torch.Tensor]]]] = {
    "bert": lambda layers: (
        transformers.BertModel(
            transformers.BertConfig(**_TEXT, num_hidden_layers=layers, max_position_embeddings=64)
        ),
        _IDS,
    ),
    "gpt2": lambda layers: (
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=96,
                n_embd=64,
                n_layer=layers,
                n_head=4,
                n_positions=64,
                use_cache=False,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        _IDS,
    ),
    "llama": lambda layers: (
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**_GQA, num_hidden_layers=layers, use_cache=False)
        ),
        _IDS,
    ),
    "qwen2": lambda layers: (
        transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**_GQA, num_hidden_layers=layers, use_cache=False)
        ),
        _IDS,
    ),
    "mistral": lambda layers: (
        transformers.MistralForCausalLM(
            transformers.MistralConfig(**_GQA, num_hidden_layers=layers, use_cache=False)
        ),
        _IDS,
    ),
    "t5": _t5,
    "vit": lambda layers: (
        transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=64,
                num_hidden_layers=layers,
                num_attention_heads=4,
                intermediate_size=128,
                image_size=32,
                patch_size=8,
                num_labels=10,
            )
        ),
        _pixels(3, 32),
    ),
    "resnet": lambda layers: (
        transformers.ResNetForImageClassification(
            transformers.ResNetConfig(
                embedding_size=32,
                hidden_sizes=[32, 96],
                depths=[1, 2],
                layer_type="bottleneck",
                num_labels=10,
            )
        ),
        _pixels(3, 64),
    ),
    "mobilenet_v2": _mobilenet,
    "convnext": lambda layers: (
        transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(
                num_stages=2, hidden_sizes=[32, 64], depths=[1, 2], image_size=64, num_labels=10
            )
        ),
        _pixels(3, 64),
    ),
    "whisper": _whisper,
}
ZOO = tuple(_ZOO)


def zoo(
    name: str, seed: int = 0, *, shallow: bool = False
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small randomly initialised model of `ZOO` in eval mode and keyword inputs for it; the same
    for the same seed. Transformers have two layers, of which a shallow one has the first, but for
    the decoder of T5, whose second one has other inputs; CNNs have a block of each kind.
    """
    model, inputs = _built(name, seed, 1 if shallow else 2)
    return copy.deepcopy(model), dict(inputs)


@functools.cache
def _built(name: str, seed: int, layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """What `zoo` copies, built once in a process."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model, inputs = _ZOO[name](layers)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        # as after training: statistics of real activations, else a deep network's output vanishes
        for norm in norms:
            norm.train().momentum = 1.0
        if norms:
            model(torch.randn(32, *inputs["pixel_values"].shape[1:]))
    return model.eval(), inputs


def file_bytes(path: Path) -> int:
    return path.stat().st_size


def tensor_bytes(path: Path) -> int:
    """Of a .safetensors file: without what is noted of the model."""
    with path.open("rb") as file:
        return file_bytes(path) - 8 - int.from_bytes(file.read(8), "little")


def measured_by_bytes(
    files: dict[str, Path],
    *_args: object,
    size_of: Callable[[Path], int] = file_bytes,
    **_options: object,
) -> list:
    """As `compare`: a nanosecond per byte of each file, and no processes."""
    sizes = {name: size_of(Path(path)) for name, path in files.items()}
    first = next(iter(sizes.values()))
    measured = []
    for name, size in sizes.items():
        latency = Latency(size / 1e6, size / 1e6, size / 1e6)
        facts = (name, str(files[name]), size, size // 4, latency, first / size)
        measured.append(Measurement(*facts, {}, 0.1, 1.0, 50.0, "", 1, ""))
    return measured
