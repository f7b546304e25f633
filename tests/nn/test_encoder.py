"""PaddedEncoder gives zeros where torch's `nn.TransformerEncoder` leaves padding out."""

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import randn
from torch import Tensor, nn

import quantize
from quantize.nn.encoder import PaddedEncoder, padded_encoder

AT_END = torch.arange(10) >= torch.tensor([[10], [4], [6]])
AT_START = torch.arange(10) < torch.tensor([[0], [1], [1]])
MASKS = {"end": AT_END, "start": AT_START, "both": AT_END | AT_START, "none": None}


class Averaged(nn.Module):
    """Its result depends on what padding gives."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor, pads: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, mask, pads).mean(1))


class Doubled(nn.TransformerEncoder):
    """With a forward of its own around torch's."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(src, *args, **kwargs)


def _averaged(norm: nn.Module | None = None, kind: Any = nn.TransformerEncoder) -> Averaged:
    torch.manual_seed(0)
    model = Averaged(norm).eval()
    model.encoder.__class__ = kind
    return model


@pytest.mark.parametrize("pads", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("mask", [None, torch.eye(10).bool()], ids=["all", "others"])
@pytest.mark.parametrize("grad", [False, True])
def test_equals_torchs_encoder(pads: Tensor | None, mask: Tensor | None, grad: bool):
    """For padding at either side or both, alone and beside a mask, with and without gradients."""
    model, x = _averaged(nn.LayerNorm(32)), randn(3, 10, 32)
    other = _averaged(nn.LayerNorm(32))
    padded_encoder(other.encoder)
    other.encoder.use_nested_tensor = False
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(other(x, pads, mask), model(x, pads, mask))
        if pads is not None:
            given = torch.zeros(3, 10).masked_fill(pads, -torch.inf)
            torch.testing.assert_close(other(x, given, mask), model(x, given, mask))


@pytest.mark.parametrize("kind", [nn.TransformerEncoder, Doubled])
def test_int8_encoders_leave_out_padding(tmp_path, kind: type[nn.Module]):
    """Again when the file is loaded, in copies, and in what is recorded of later calls."""
    model, x = _averaged(kind=kind), randn(3, 10, 32)
    small = quantize.quantize_dynamic(model, prefer="size")
    quantize.save(small, tmp_path / "small.pth")
    loaded = quantize.load(tmp_path / "small.pth", model=_averaged(kind=kind))
    assert isinstance(loaded.encoder, PaddedEncoder)
    pickled = pickle.loads(pickle.dumps(small))
    with torch.no_grad():
        expected = model(x, AT_END)
        for _ in range(4):
            actual = small(x, AT_END)
            assert (actual - expected).norm() < 0.03 * expected.norm()
            for other in (loaded, pickled, copy.deepcopy(small)):
                assert torch.equal(other(x, AT_END), actual)


@pytest.mark.slow
@pytest.mark.usefixtures("no_clock")
def test_fused_encoders_leave_out_padding():
    """`fuse` compares with the model in eval mode."""
    model, x = _averaged(), randn(3, 10, 32)
    fused = quantize.fuse(model, (x, AT_END))
    with torch.no_grad():
        for pads in (AT_END, AT_START):
            torch.testing.assert_close(fused(x, pads), model(x, pads))
