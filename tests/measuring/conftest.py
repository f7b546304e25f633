"""The files that the tests of measuring measure."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from measuring_models import INPUTS

from quantize.checkpoint import save
from quantize.models import MLP, MLPConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint, a TorchScript file of the same model, and the model."""
    folder = tmp_path_factory.mktemp("artifacts")
    torch.manual_seed(0)
    model = MLP(MLPConfig(in_features=16, classes=4, hidden=(32,))).eval()
    paths = {"mlp": folder / "mlp.pth", "script": folder / "script.pt", "model": model}
    save(model, paths["mlp"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.freeze(torch.jit.trace(model, INPUTS)).save(str(paths["script"]))
    return paths
