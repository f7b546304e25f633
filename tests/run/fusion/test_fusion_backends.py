"""Other back ends, where they are installed, answer like eager."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import zoo

from quantize.run.fusion import backends, fuse
from quantize.run.fusion.equality import difference, outputs

pytestmark = pytest.mark.usefixtures("no_clock")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "onnxruntime", "openvino"])
def test_other_back_ends_answer_like_eager(backend: str, tmp_path: Path) -> None:
    """The module gives what the model gives at another batch size too; its file gives the same
    tensors in order.
    """
    if reason := backends.missing(backend):
        pytest.skip(reason)
    model, inputs = zoo("mobilenet_v2")
    fused = fuse(model, inputs, backend=backend)
    for batch in (2, 3):
        pixels = torch.randn(
            batch, *inputs["pixel_values"].shape[1:], generator=torch.Generator().manual_seed(batch)
        )
        expected = outputs(model, {"pixel_values": pixels})
        assert difference(outputs(fused, {"pixel_values": pixels}), expected) <= 2e-5
    file = tmp_path / {"inductor": "m.pt2", "onnxruntime": "m.onnx", "openvino": "m.xml"}[backend]
    fused.save(file)
    answer = [torch.as_tensor(t) for t in backends.open_file(backend, file)(inputs["pixel_values"])]
    assert difference(answer, outputs(model, inputs)) <= 2e-5
    assert type(fused(**inputs)) is type(model(**inputs))
