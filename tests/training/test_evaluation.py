"""Bits per byte: every byte scored once, in context, in eval mode."""

import pytest
import torch
from torch import nn

from quantize.models import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM
from quantize.training import (
    evaluate_images,
    evaluate_text,
)


class Copycat(nn.Module):
    """Predicts that the next byte equals the present one, with probability 1/2, and all others
    evenly.
    """

    def forward(self, ids):
        logits = torch.full((*ids.shape, 256), 1 / 255.0).log()
        return logits.scatter(-1, ids[..., None], 0.0)


@pytest.mark.parametrize(
    "length, overlap", [(16, 0), (16, 8), (16, 15), (7, 3), (499, 100), (4000, 3000)]
)
@pytest.mark.parametrize("size", [2, 31, 500])
def test_every_byte_is_scored_once(size, length, overlap):
    """For a model without memory, any windows give the exact entropy and accuracy, first byte at 8
    bits.
    """
    text = torch.randint(3, (size,), generator=torch.Generator().manual_seed(size)).to(torch.uint8)
    repeats = int((text[1:] == text[:-1]).sum())
    result = evaluate_text(Copycat(), text, length=length, overlap=min(overlap, length - 1))
    other = (2 * torch.tensor(255.0)).log2().item()
    expected = (8 + repeats + (size - 1 - repeats) * other) / size
    assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert result["accuracy"] == repeats / (size - 1)
    assert result["bytes"] == size


def test_overlapping_windows_equal_a_context_of_their_own():
    """With the largest overlap, each byte is predicted from all that a window holds: the
    sliding-window oracle.
    """
    torch.manual_seed(0)
    model = DecoderLM(DecoderConfig(width=16, layers=1, heads=2)).eval()
    nn.init.normal_(model.head.weight)
    text = torch.randint(256, (40,)).to(torch.uint8)
    bits = 8.0
    with torch.no_grad():
        for i in range(1, 40):
            context = text[max(0, i - 10) : i].long()[None]
            bits -= (
                model(context)[0, -1].log_softmax(-1)[int(text[i])].item()
                / torch.tensor(2.0).log().item()
            )
    assert evaluate_text(model, text, length=10, overlap=9)["bits_per_byte"] == pytest.approx(
        bits / 40, rel=1e-5
    )


def test_a_limit_scores_a_spread_of_the_text():
    """max_bytes scores about that many bytes, from all over the text, and counts them."""
    text = torch.cat([torch.zeros(5000), torch.arange(5000) % 2]).to(torch.uint8)
    result = evaluate_text(Copycat(), text, length=64, overlap=32, max_bytes=1000)
    assert 900 <= result["bytes"] <= 1064
    assert result["accuracy"] == pytest.approx(0.5, abs=0.05)


def test_evaluation_restores_flags():
    """Evaluating a training model leaves each module's flag as it was."""
    model = ConvNet(ConvNetConfig(widths=(4,)))
    model.stem.eval()
    flags = [module.training for module in model.modules()]
    result = evaluate_images(model, torch.randn(5, 1, 8, 8), torch.arange(5))
    assert [module.training for module in model.modules()] == flags
    assert result["images"] == 5 and 0 <= result["accuracy"] <= 1
