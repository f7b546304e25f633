"""The models of the benchmarks that compare engines: random weights, on which speed doesn't depend,
and BatchNorm statistics of random inputs.

Processes that measure call `build`, so that a model is made where it is needed and not sent there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from quantize import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM

VOCABULARY = 256
Inputs = torch.Tensor


class Main(nn.Module):
    """The main output of a model alone: what engines without dataclasses can give."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.model(x)
        return result if isinstance(result, torch.Tensor) else result[0]


def pixels(batch: int, size: int = 224) -> Inputs:
    """[batch, 3, size, size], the same on every call."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def ids(batch: int, length: int = 128) -> Inputs:
    """[batch, length], the same on every call."""
    generator = torch.Generator().manual_seed(1000 * batch + length)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def sizes(width: int, layers: int) -> dict[str, int]:
    """Of a transformer with heads of 64 channels, as the configs of transformers name them."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(1, width // 64),
    }


def classifier(kind: str, **config: Any) -> nn.Module:
    """An image classifier of transformers over 1000 classes."""
    configuration = getattr(transformers, f"{kind}Config")(num_labels=1000, **config)
    return getattr(transformers, f"{kind}ForImageClassification")(configuration)


def efficientnet_b0() -> nn.Module:
    scale = {"image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0}
    model = classifier("EfficientNet", hidden_dim=1280, **scale)
    # Its authors pool 7 x 7 pixels by a window of 1280: 277 of 290 ms in torch.compile's code, and
    # OpenVINO refuses it.
    model.efficientnet.pooler = nn.AdaptiveAvgPool2d(1)
    return model


def decoder(width: int = 512, layers: int = 8) -> nn.Module:
    """Our decoder with heads of 64 channels."""
    heads = max(1, width // 64)
    config = DecoderConfig(vocab_size=VOCABULARY, width=width, layers=layers, heads=heads)
    model = DecoderLM(config)
    for parameter in model.parameters():  # as it starts, every block is the identity
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def bert(width: int = 768, layers: int = 12, vocabulary: int = 30522) -> nn.Module:
    """BERT without a head."""
    config = transformers.BertConfig(vocab_size=vocabulary, **sizes(width, layers))
    return transformers.BertModel(config)


def small_bert(width: int, layers: int) -> nn.Module:
    """BERT over bytes, so that its size is in the blocks."""
    return bert(width, layers, VOCABULARY)


def vit(width: int = 384, layers: int = 12) -> nn.Module:
    """A classifier of 224 x 224 images in patches of 16."""
    return classifier("ViT", **sizes(width, layers))


def gpt2(width: int = 768, layers: int = 12, vocabulary: int = 50257) -> nn.Module:
    shape = {"n_embd": width, "n_layer": layers, "n_head": width // 64}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=vocabulary, use_cache=False, **shape, **special)
    return transformers.GPT2LMHeadModel(config)


def t5_encoder() -> nn.Module:
    shape = {"d_model": 256, "d_ff": 1024, "num_layers": 4, "num_heads": 4}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=VOCABULARY, **shape))


def llama(**config: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(use_cache=False, **config))


def convnet() -> nn.Module:
    return ConvNet(ConvNetConfig(in_channels=3, widths=(32, 64, 128), blocks=2))


def resnet18() -> nn.Module:
    """As in He et al., 2015."""
    widths = [64, 128, 256, 512]
    return classifier("ResNet", layer_type="basic", depths=[2] * 4, hidden_sizes=widths)


def pitch_net(widths: Sequence[int], kernels: Sequence[int], positions: int) -> nn.Module:
    """1-d convolutions over a waveform, as pitch trackers have them."""
    layers: list[nn.Module] = []
    inputs = 1
    for outputs, kernel in zip(widths, kernels, strict=True):
        stride = 4 if inputs == 1 else 1
        layers.append(nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2))
        layers += [nn.ReLU(), nn.BatchNorm1d(outputs), nn.MaxPool1d(2)]
        inputs = outputs
    head = nn.Linear(positions * inputs, 360)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(positions), nn.Flatten(), head)


# How each is made, and its inputs of a batch size.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "mobilenet_v2": (partial(classifier, "MobileNetV2"), pixels),
    "efficientnet_b0": (efficientnet_b0, pixels),
    "resnet50": (partial(classifier, "ResNet"), pixels),
    "convnext_tiny": (partial(classifier, "ConvNext"), pixels),
    "convnet": (convnet, partial(pixels, size=32)),
    "vit_small": (vit, pixels),
    "bert_base": (bert, ids),
    "gpt2": (gpt2, ids),
    "decoder": (decoder, ids),
}


def build(make: Callable[[], nn.Module], inputs: Inputs) -> nn.Module:
    """The model, the same in every process, ready to be called on tensors.

    Args:
        make: makes it.
        inputs: two examples or more, for the statistics of BatchNorms.
    """
    torch.manual_seed(0)
    model = make()
    norms = [m.train() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in model.modules():  # as after training, activations keep their range
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    for norm in norms:
        norm.momentum = 1.0
        nn.init.ones_(norm.weight)  # EfficientNet's start as noise: everything becomes denormal
    if norms:
        with torch.no_grad():
            model(inputs)
    return Main(model).eval()
