"""Back ends other than TorchScript, none of them needed: AOTInductor, ONNX Runtime, OpenVINO.

Each takes a simplified `Program` (before oneDNN kernels go in: these back ends have their own) and
gives a module that is called like the model and can be saved. Their files take the input tensors in
order and return the output tensors in order.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.run.fusion.folded import Folded
from quantize.run.fusion.graph import Program, lines_of
from quantize.run.fusion.nested import unflatten

NEEDS = {
    "inductor": (),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino",),
}


class External(Folded):
    """A program that another engine runs; `engine` takes flat tensors and returns flat tensors."""

    def __init__(
        self, program: Program, engine: Callable[..., Sequence[Any]], file: Path, keep: object
    ) -> None:
        super().__init__(program)
        *_, output = program.graph.nodes
        dtypes = [node.meta["val"].dtype for node in output.args[0]]

        def run(*tensors: Tensor) -> list[Tensor]:
            results = zip(engine(*tensors), dtypes, strict=True)
            return [torch.as_tensor(y).to(dtype) for y, dtype in results]

        self.engine = run
        self.file, self.keep = file, keep  # `keep` holds the temporary folder
        self.run = self.prepare = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return unflatten(self.output, self.engine(*self._bind(args, kwargs)))

    def save(self, path: str | Path) -> None:
        """Copy the engine's file to `path`; OpenVINO's weights go beside it with the suffix
        .bin.
        """
        shutil.copyfile(self.file, path)
        weights = self.file.with_suffix(".bin")
        if self.file.suffix == ".xml":
            shutil.copyfile(weights, Path(path).with_suffix(".bin"))


def missing(backend: str) -> str | None:
    """Why this back end can't be used here, or None."""
    absent = [p for p in NEEDS[backend] if importlib.util.find_spec(p) is None]
    if absent:
        be = "is" if len(absent) == 1 else "are"
        return f"back end {backend!r} needs {', '.join(absent)}, which {be} not installed"
    if backend == "inductor" and not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
        return "back end 'inductor' needs a C++ compiler"
    return None


def build(program: Program, backend: str, tensors: list[Tensor]) -> nn.Module:
    """`program` for this back end. Raises ValueError if the back end is absent or can't take the
    model.
    """
    reason = missing(backend)
    if reason:
        raise ValueError(reason)
    folder = tempfile.TemporaryDirectory(prefix="fused-")
    try:
        with torch.no_grad():
            file = _WRITERS[backend](program, tensors, Path(folder.name))
            engine = open_file(backend, file)
    except Exception as error:  # another project's compiler: it may raise anything
        why = f"{type(error).__name__}: {lines_of(error)[0]}"
        raise ValueError(f"back end {backend!r} can't take this model: {why}") from error
    return External(program, engine, file, folder)


def _exported(program: Program, tensors: list[Tensor]) -> torch.export.ExportedProgram:
    """The program exported again, with the same sizes free."""
    wide = [torch.cat([t, t]) if program.widened == 2 and t.dim() else t for t in tensors]
    auto, fixed = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    dynamic = tuple(
        tuple(fixed if isinstance(s, int) else auto for s in sizes) for sizes in program.sizes
    )
    return torch.export.export(_Run(program), tuple(wide), dynamic_shapes=(dynamic,), strict=False)


class _Run(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.run = Folded(program).run

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.run(*tensors)


def open_file(backend: str, file: Path) -> Callable[..., list[Any]]:
    """The engine for a file of this back end: takes the input tensors in order, gives arrays or
    tensors in order.
    """
    return _OPENERS[backend](file)


def _inductor(program: Program, tensors: list[Tensor], folder: Path) -> Path:
    file = folder / "model.pt2"
    options = {"freezing": True}
    torch._inductor.aoti_compile_and_package(
        _exported(program, tensors), package_path=str(file), inductor_configs=options
    )
    return file


def _open_inductor(file: Path) -> Callable[..., list[Any]]:
    loaded = torch._inductor.aoti_load_package(str(file))

    def engine(*inputs: Tensor) -> list[Tensor]:
        out = loaded(*inputs)
        return [out] if isinstance(out, Tensor) else list(out)

    return engine


def _onnx(program: Program, tensors: list[Tensor], folder: Path) -> Path:
    file = folder / "model.onnx"
    exported: Any = torch.onnx.export(
        _exported(program, tensors), dynamo=True, verbose=False, optimize=True
    )
    exported.save(str(file), external_data=False)
    return file


def _open_onnxruntime(file: Path) -> Callable[..., list[Any]]:
    import onnxruntime  # type: ignore[import-not-found]  # left to the user to install

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def engine(*inputs: Tensor) -> list[Any]:
        arrays = {n: t.detach().contiguous().numpy() for n, t in zip(names, inputs, strict=True)}
        return list(session.run(None, arrays))

    return engine


def _openvino(program: Program, tensors: list[Tensor], folder: Path) -> Path:
    import openvino  # type: ignore[import-not-found]  # left to the user to install

    file = folder / "model.xml"
    openvino.save_model(
        openvino.convert_model(_exported(program, tensors)), str(file), compress_to_fp16=False
    )
    return file


def _open_openvino(file: Path) -> Callable[..., list[Any]]:
    import openvino  # type: ignore[import-not-found]  # left to the user to install

    hints = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(str(file), "CPU", hints)

    def engine(*inputs: Tensor) -> list[Any]:
        result = compiled([t.detach().contiguous().numpy() for t in inputs])
        # the engine writes into the same arrays again
        return [result[i].copy() for i in range(len(compiled.outputs))]

    return engine


_WRITERS = {"inductor": _inductor, "onnxruntime": _onnx, "openvino": _openvino}
_OPENERS = {
    "inductor": _open_inductor,
    "onnxruntime": _open_onnxruntime,
    "openvino": _open_openvino,
}
