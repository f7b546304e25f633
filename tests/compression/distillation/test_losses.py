"""The losses of distillation against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from quantize.compression.distillation import hidden_loss, soft_kl
from quantize.compression.distillation.losses import remoteness


def test_kl_by_hand():
    """At T = 2, logits [2 ln 3, 0] against [0, 0] give 4 (3/4 ln(3/2) + 1/4 ln(1/2))."""
    value = soft_kl(torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]]), temperature=2.0)
    assert value.item() == pytest.approx(
        4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-6
    )


def test_kl_of_equal_logits_is_zero_with_zero_gradient():
    """Nothing to learn where student and teacher agree, to the last bit."""
    logits = torch.randn(3, 7, 11, requires_grad=True)
    value = soft_kl(logits, logits.detach().clone(), 3.0)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == 0
    assert torch.count_nonzero(gradient) == 0


def test_kl_and_its_gradient_are_torchs():
    """The written-out gradient is that of `kl_div` through `log_softmax`."""
    s, t = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9)
    ours = soft_kl(s, t, 2.5)
    theirs = 2.5**2 * F.kl_div(
        (s / 2.5).log_softmax(-1), (t / 2.5).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(3 * ours, s)[0], torch.autograd.grad(3 * theirs, s)[0])


def test_masked_rows_do_not_count():
    """The mean over kept rows is that of a batch without the others; -inf logits of a teacher are
    fine.
    """
    s, t = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    t[..., 0] = -math.inf
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    assert_close(soft_kl(s, t, 2.0, mask), soft_kl(s[mask == 1], t[mask == 1], 2.0))


def test_hidden_loss_is_zero_for_equal_states_and_free_of_the_teachers_scale():
    """0 when equal; scaling both models' states changes nothing; a mask of all rows is none."""
    s, t = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    assert hidden_loss(t, t).item() == pytest.approx(0, abs=1e-6)
    assert_close(hidden_loss(100 * s, 100 * t), hidden_loss(s, t))
    assert_close(hidden_loss(s, t, torch.ones(4, 6)), hidden_loss(s, t))


@pytest.mark.parametrize("kind", ["logits", "values"])
def test_remoteness_is_0_for_the_same_answers_and_1_for_the_mean_answer(kind):
    """A student that only knows the mean answer is at 1, one that says the opposite beyond; never
    below 0.

    Where the teacher's rows are alike, the distance is relative to its mean square or to
    log(classes).
    """
    t = 2 * torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    mean = t.softmax(-1).mean(0).log() if kind == "logits" else t.mean(0)
    assert remoteness(t, t, kind) == pytest.approx(0, abs=1e-5)
    assert remoteness(mean.expand_as(t), t, kind) == pytest.approx(1, rel=1e-4)
    assert remoteness(-t, t, kind) > 1
    assert 0 <= remoteness(t + 1e-7 * torch.randn(30, 7), t, kind) < 1e-9
    alike = t[:1].expand_as(t)
    expected = soft_kl(-alike, alike).item() / math.log(7) if kind == "logits" else 4.0
    assert remoteness(-alike, alike, kind) == pytest.approx(expected, rel=1e-4)
    assert remoteness(torch.zeros(3, 7), torch.zeros(3, 7), kind) == 0
