"""Other back ends answer like eager: the real ones where they are installed, and else what stands
for them, with the few names that this package uses of each.
"""

from __future__ import annotations

import importlib
import io
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fusion_models import Image, randomized
from helpers import randn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput

from quantize.run.fusion import backends, fuse
from quantize.run.fusion.equality import difference, outputs

pytestmark = pytest.mark.usefixtures("no_clock")
SUFFIXES = {"inductor": "pt2", "onnxruntime": "onnx", "openvino": "xml"}


class Classifier(Image):
    """Takes pixels by name and answers as a model of transformers does."""

    def __init__(self) -> None:
        super().__init__(F.relu6)

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=super().forward(pixel_values))


def pixels(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": randn(batch, 3, 16, 16, seed=batch)}


class Program:
    """An exported program in a file; takes and gives arrays, and writes each answer over the last
    one of that shape, as OpenVINO does.
    """

    def __init__(self, file: str, *_options: object, **_more: object) -> None:
        self.run_flat = torch.export.load(io.BytesIO(Path(file).read_bytes())).module()
        self.outputs = ["logits"]
        self._held: dict[tuple[int, ...], np.ndarray] = {}

    def __call__(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        answers = [t.numpy() for t in self.run_flat(*map(torch.from_numpy, arrays))]
        held = [self._held.setdefault(answer.shape, answer) for answer in answers]
        for place, answer in zip(held, answers, strict=True):
            place[...] = answer
        return held

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="pixels")]

    def run(self, _names: None, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [answer.copy() for answer in self([arrays["pixels"]])]


class Exported:
    """What is to be saved as an engine's file."""

    def __init__(self, program: torch.export.ExportedProgram, **_options: object) -> None:
        self.program = program

    def save(self, path: str, **_options: object) -> None:
        content = io.BytesIO()
        torch.export.save(self.program, content)
        Path(path).write_bytes(content.getvalue())


def save_with_weights(model: Exported, path: str, **_options: object) -> None:
    """As OpenVINO: a second file beside the first."""
    model.save(path)
    Path(path).with_suffix(".bin").write_bytes(b"weights")


def pretend(patch: pytest.MonkeyPatch, backend: str) -> None:
    """Put modules in the place of absent packages."""
    engine: dict[str, Any] = {}
    if backend == "onnxruntime":
        engine = {"SessionOptions": SimpleNamespace, "InferenceSession": Program}
        patch.setattr("torch.onnx.export", Exported)
    if backend == "openvino":
        core = SimpleNamespace(compile_model=Program)
        engine = {"convert_model": Exported, "save_model": save_with_weights, "Core": lambda: core}
    for name in backends.NEEDS[backend]:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(engine)
        patch.setitem(sys.modules, name, module)


def compile_once(patch: pytest.MonkeyPatch) -> None:
    """Let Inductor compile one program as it stands: by default it first compiles two headers, 300
    MB for the programs that come later, and a program for each instruction set, to see if it can.
    """
    options = importlib.import_module("torch._inductor.config")
    patch.setattr(options.aot_inductor, "precompile_headers", False)
    patch.setattr(options.aot_inductor, "compile_wrapper_opt_level", "O0")
    patch.setattr(options.cpp, "vec_isa_ok", True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", SUFFIXES)
def test_other_back_ends_answer_like_eager(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module gives what the model gives at another batch size too; its file gives the same
    tensors in order.
    """
    if backends.missing(backend):
        pretend(monkeypatch, backend)
    compile_once(monkeypatch)
    model, inputs = randomized(Classifier()), pixels(2)
    fused = fuse(model, inputs, backend=backend)
    answers = {batch: outputs(fused, pixels(batch)) for batch in (2, 3)}
    again = outputs(fused, {"pixel_values": -inputs["pixel_values"]})
    for batch, answer in answers.items():
        assert difference(answer, outputs(model, pixels(batch))) <= 2e-5
    assert difference(again, answers[2]) > 1e-2  # no answer is written over by the next
    file = tmp_path / f"m.{SUFFIXES[backend]}"
    fused.save(file)
    answer = [torch.as_tensor(t) for t in backends.open_file(backend, file)(inputs["pixel_values"])]
    assert difference(answer, outputs(model, inputs)) <= 2e-5
    assert type(fused(**inputs)) is type(model(**inputs))
    assert file.with_suffix(".bin").is_file() is (backend == "openvino")
