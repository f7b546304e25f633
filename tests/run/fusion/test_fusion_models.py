"""Fusing architectures that no pass was written for, and every compressed form of a model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fusion_models import in_integers, same_at_other_sizes
from helpers import in_int8, zoo
from torch import nn
from torch.nn import functional as F

import quantize
from quantize.run.fusion import fuse, torchscript
from quantize.run.fusion.equality import difference, outputs

pytestmark = pytest.mark.usefixtures("no_clock")


class UNet(nn.Module):
    """Down by pooling, up by transposed convolutions, skips by concatenation; GroupNorm as
    diffusion models have it.
    """

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32)) -> None:
        super().__init__()

        def block(inputs: int, out: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inputs, out, 3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.LeakyReLU(0.1),
                nn.Conv2d(out, out, 3, padding=1),
                nn.GroupNorm(4, out),
                nn.SiLU(),
            )

        self.down = nn.ModuleList(block(i, o) for i, o in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(o, i, 2, stride=2) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(i) for i in widths[:-1])
        self.join = nn.ModuleList(block(2 * i, i) for i in widths[:-1])
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for i in range(len(self.up) - 1, -1, -1):
            x = self.join[i](torch.cat([F.relu(self.norms[i](self.up[i](x))), skips[i]], dim=1))
        return self.head(x)


class Recurrent(nn.Module):
    """Embedding, a two-layer bidirectional LSTM, a GRU and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(48, 20, batch_first=True)
        self.head = nn.Linear(20, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(self.embedding(ids))
        return self.head(self.gru(y)[0])


class Separable(nn.Module):
    """One-dimensional and three-dimensional convolutions with padding by name, spectral and weight
    norm, PReLU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.utils.parametrizations.weight_norm(
            nn.Conv1d(2, 8, 5, padding="same", dilation=2)
        )
        self.norm = nn.BatchNorm1d(8)
        self.mix = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.act = nn.PReLU(8)
        self.volume = nn.Conv3d(1, 4, 3, padding="valid")

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.act(self.norm(self.wave(x)))
        y = self.mix(y.transpose(1, 2))
        return {
            "features": y,
            "volume": self.volume(y[:, None, :, :, None].expand(-1, -1, -1, -1, 4)),
        }


def _swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=24,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
        num_labels=10,
    )
    return transformers.SwinForImageClassification(config)


def _mobilevit() -> nn.Module:
    """Two transformer layers in the first stage that has some, and one in the second, where the
    config always makes up to four, and a third stage.
    """
    config = transformers.MobileViTConfig(
        image_size=64,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 16, 24, 32, 40, 40, 160],
        num_attention_heads=2,
        num_labels=10,
    )
    model = transformers.MobileViTForImageClassification(config)
    encoder = model.mobilevit.encoder
    encoder.layer = encoder.layer[:4]
    for stage, layers in zip(encoder.layer[2:], (2, 1), strict=True):
        stage.transformer.layer = stage.transformer.layer[:layers]
    return model


_TEXT = {"vocab_size": 96, "max_position_embeddings": 64}


_IDS = torch.arange(24).reshape(2, 12) * 3 % 96


_MASK = torch.ones_like(_IDS).index_fill_(1, torch.tensor([10, 11]), 0)


def _pixels(size: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    }


def _efficientnet() -> nn.Module:
    """Three stages of seven; the second has a block with a residual."""
    config = transformers.EfficientNetConfig(
        image_size=64,
        width_coefficient=0.25,
        depth_coefficient=1.0,
        kernel_sizes=[3, 3, 5],
        in_channels=[32, 16, 24],
        out_channels=[16, 24, 40],
        strides=[1, 2, 2],
        num_block_repeats=[1, 2, 1],
        expand_ratios=[1, 6, 6],
        hidden_dim=320,
        num_labels=10,
        depth_divisor=8,
    )
    return transformers.EfficientNetForImageClassification(config)


def _regnet() -> nn.Module:
    config = transformers.RegNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8, num_labels=10
    )
    return transformers.RegNetForImageClassification(config)


def _segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
        num_labels=5,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def _distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(**_TEXT, dim=32, n_layers=1, n_heads=4, hidden_dim=64)
    return transformers.DistilBertForSequenceClassification(config)


def _gemma() -> nn.Module:
    config = transformers.Gemma2Config(
        **_TEXT,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        use_cache=False,
        attn_implementation="eager",
    )
    return transformers.Gemma2ForCausalLM(config)


def _clip() -> nn.Module:
    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**text, max_position_embeddings=32, eos_token_id=95)
    )


FOREIGN: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "efficientnet": (_efficientnet, _pixels(64)),
    "regnet": (_regnet, _pixels(48)),
    "segformer": (_segformer, _pixels(64)),
    "swin": (_swin, _pixels(32)),
    "mobilevit": (_mobilevit, _pixels(64)),
    "distilbert": (_distilbert, {"input_ids": _IDS, "attention_mask": _MASK}),
    "gemma2": (_gemma, {"input_ids": _IDS, "attention_mask": _MASK}),
    "clip_text": (_clip, {"input_ids": _IDS, "attention_mask": _MASK}),
    "unet": (UNet, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))),
    "recurrent": (Recurrent, torch.arange(14).reshape(2, 7)),
    "separable": (Separable, torch.randn(2, 2, 9, generator=torch.Generator().manual_seed(0))),
}


QUICK = ("separable",)


def build(name: str) -> tuple[nn.Module, Any]:
    make, inputs = FOREIGN[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = make()
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:  # as after training: statistics of real activations
            norm.train().momentum = 1.0
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        outputs(model, inputs)
    return model.eval(), inputs


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FOREIGN]
)
def test_foreign_architectures_are_equal_at_every_size(name: str) -> None:
    """The fused model answers like eager within 1e-5, at other batch sizes and lengths within 2e-5,
    or refuses the size.
    """
    model, inputs = build(name)
    fused = fuse(model, inputs)
    assert isinstance(fused, torch.jit.ScriptModule)
    assert difference(outputs(fused, inputs), outputs(model, inputs)) <= 1e-5
    same_at_other_sizes(fused, model, inputs, refusal="must be")


# Compressed models.
def compressed(kind: str) -> tuple[nn.Module, Any]:
    """A small BERT of one layer in one of this package's forms."""
    model, inputs = zoo("bert", shallow=True)
    if kind == "half":
        return quantize.to_half(model), inputs
    if kind == "int8":
        return in_int8(model), inputs
    if kind == "low_rank":
        return quantize.factorize_low_rank(model, ratio=0.5), inputs
    pruned = quantize.prune_ln_structured(
        model, inputs, amount=0.5, skip=["*query*", "*key*", "*value*", "*embed*"]
    )
    return (in_int8(pruned) if kind == "pruned+int8" else pruned), inputs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "half", "low_rank", "pruned", "pruned+int8"])
def test_compressed_models_fuse_and_stay_compressed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each form gives its own answers from the fused file, int8 layers multiply in int8 where that
    is fast, and the file stays small.
    """
    in_integers(monkeypatch)
    model, inputs = compressed(kind)
    original = sum(p.numel() * p.element_size() for p in zoo("bert", shallow=True)[0].parameters())
    fuse(model, inputs).save(tmp_path / "fused.pt")
    fused = torchscript.load(str(tmp_path / "fused.pt"))
    assert difference(outputs(fused, inputs), outputs(model, inputs)) <= (
        1e-2 if kind == "half" else 1e-5
    )
    assert (tmp_path / "fused.pt").stat().st_size < 0.95 * original + 150_000
    if "int8" in kind:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            outputs(fused, inputs)
        ran = {e.key: e.count for e in profile.key_averages()}
        layers = sum(type(m).__name__ == "Int8Linear" for m in model.modules())
        assert ran.get("aten::_int_mm", 0) + ran.get("onednn::qlinear_pointwise", 0) >= layers
        assert not {"aten::linear", "aten::addmm", "mkldnn::_linear_pointwise"} & ran.keys()


def test_inputs_of_the_wrong_form_are_refused() -> None:
    """What `fold` returns, and with it every other engine, names a wrong size, a missing and an
    extra argument.
    """
    folded = quantize.fold(nn.Sequential(nn.Linear(4, 3)).eval(), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"input 0 has shape \[2, 5\]"):
        folded(torch.zeros(2, 5))
    with pytest.raises(TypeError, match="got none"):
        folded()
    with pytest.raises(TypeError, match="takes 1 arguments"):
        folded(torch.zeros(2, 4), torch.zeros(2, 4))


def test_sizes_that_would_lead_another_way_are_refused() -> None:
    """Python that decides on a size is taken as it went: sizes for which it would go another way
    are refused by name.
    """

    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, ::2] if x.shape[1] % 4 == 0 else x[:, 1::2]

    model, x = Halves().eval(), torch.arange(24.0).reshape(3, 8)
    for fused, error in ((fuse(model, x), torch.jit.Error), (quantize.fold(model, x), ValueError)):
        assert torch.equal(fused(x[:1, :4]), x[:1, :4:2])
        with pytest.raises(error, match=r"sizes must be so that .*size\(1\) % 4"):
            fused(x[:, :6])
