"""The native norm, rotation and gated unit of training, and their gradients, against PyTorch's in
float64.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quantize.models import DecoderConfig, DecoderLM, apply_rope, rope_table
from quantize.native import bfloat16

ROUNDING = 2.0**-8  # of bfloat16: half of the distance between neighbours, relative
HALF = torch.bfloat16


def random(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def rows(width: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    def native(x: Tensor, weight: Tensor) -> Tensor:
        return bfloat16.norm(x, weight, 1e-5)

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), weight, 1e-5)

    return native, exact, [random(3, 37, width), random(width, dtype=torch.float32)]


def turns(length: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    cos, sin = rope_table(torch.arange(length), 64, 1e4)
    x = random(2, length, 3, 64).detach().transpose(1, 2).requires_grad_()

    def exact(x: Tensor) -> Tensor:
        return apply_rope(x, cos.double(), sin.double())

    return lambda x: bfloat16.rotate(x, cos, sin), exact, [x]


def units(width: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    inputs = [random(5, 7, width), random(5, 7, width)]
    return bfloat16.gated, lambda gate, up: F.silu(gate) * up, inputs


@pytest.mark.parametrize("case", [rows, turns, units])
@pytest.mark.parametrize("size", [16, 48, 352])
def test_results_and_gradients_are_rounded_once(case: Callable, size: int) -> None:
    torch.manual_seed(size)
    native, exact, inputs = case(size)
    wide = [one.detach().double().requires_grad_() for one in inputs]
    found, expected = native(*inputs), exact(*wide)
    gradient = torch.randn(found.shape).to(HALF)
    found.backward(gradient)
    expected.backward(gradient.double())
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(inputs, wide, strict=True))]
    for ours, theirs in pairs:
        size_of_terms = 0.05 * theirs.abs().max().item()  # where terms cancel, they were rounded
        torch.testing.assert_close(
            ours.double(), theirs, rtol=ROUNDING, atol=ROUNDING * size_of_terms
        )


def test_infinities_and_nan_stay() -> None:
    x = torch.tensor([torch.inf, torch.nan, -torch.inf, *[1.0] * 13]).to(HALF).requires_grad_()
    y = bfloat16.gated(x, torch.ones_like(x).requires_grad_())
    assert torch.isnan(y[1]) and torch.equal(y[3:], F.silu(x[3:]))
    assert torch.equal(y[:1], torch.tensor([torch.inf], dtype=HALF))


def gradients(model: DecoderLM, ids: Tensor, half: bool = True) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=HALF, enabled=half):
        logits = model(ids[:, :-1]).float()
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_a_decoder_learns_the_same_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(width=64, layers=2, heads=2, kv_heads=1, ffn_width=80, qk_norm=True)
    model = DecoderLM(config).train()
    for parameter in model.parameters():  # no gradient is zero because a layer starts as zero
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(256, (2, 33))
    called: list[str] = []
    call = bfloat16._call

    def noting(name: str, *arguments: object, size: int) -> None:
        called.append(name)
        call(name, *arguments, size=size)

    monkeypatch.setattr(bfloat16, "_call", noting)
    ours = gradients(model, ids)
    assert called.count("norm") == called.count("norm_back") == 9
    assert called.count("rotate") == 8 and called.count("gated_back") == 2
    monkeypatch.setattr(bfloat16, "_functions", lambda: None)
    theirs = gradients(model, ids)
    assert called.count("norm") == 9
    exact = gradients(model, ids, half=False)
    for mine, torchs, one in zip(ours, theirs, exact, strict=True):
        limit = 1.5 * (torchs - one).norm() + 1e-3 * one.norm()
        assert (mine - one).norm() <= limit


def test_what_the_kernel_cant_read_is_left_to_torch() -> None:
    fits = random(4, 32)
    assert not bfloat16.takes(fits)
    with torch.autocast("cpu", dtype=HALF):
        assert bfloat16.takes(fits, fits.detach()) and bfloat16.takes(fits, parts=2)
        assert not bfloat16.takes(fits, parts=4)
        assert not bfloat16.takes(random(4, 24))
        assert not bfloat16.takes(random(4, 32, dtype=torch.float32))
        assert not bfloat16.takes(fits, random(0, 32))
        assert not bfloat16.takes(torch.empty(4, 32, dtype=HALF, device="meta"))
    with pytest.raises(ValueError, match=r"\[32\], got \[16\]"):
        bfloat16.norm(fits, torch.ones(16), 1e-5)
