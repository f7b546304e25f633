"""Random models are the same for the same seed, and different from their neighbours."""

from __future__ import annotations

import pytest
import torch
from random_models import random_model


@pytest.mark.parametrize("odd", [False, True])
def test_a_seed_gives_one_model_and_one_input(odd: bool) -> None:
    """Twice the same seed: the same tensors and traits; the next seed gives others."""
    first, again, other = (random_model(seed, odd=odd) for seed in (3, 3, 4))
    tensors = first.model.state_dict()
    assert tensors.keys() == again.model.state_dict().keys()
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in tensors.items())
    assert first.traits == again.traits
    assert repr(first.model) != repr(other.model)
    assert repr(first.fresh(1)) == repr(again.fresh(1)) != repr(first.fresh(2))
