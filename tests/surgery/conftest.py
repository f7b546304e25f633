"""The net that the tests of surgery change."""

from __future__ import annotations

import pytest
import torch
from surgery_models import Net


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()
