"""A network and the batches that it is shown."""

from __future__ import annotations

import pytest
import torch
from calibration_models import TwoInputs


@pytest.fixture
def model() -> TwoInputs:
    torch.manual_seed(0)
    return TwoInputs()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 4, 6, generator=generator) + 1 for n in (3, 2, 2)]
