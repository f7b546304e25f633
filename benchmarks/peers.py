"""Every peer, set up once, as its documentation says: what `quantize.measuring.compare` takes.

A peer is a function of a `Case`: it exports or quantizes in the calling process, if there is
something to do beforehand, and returns a file or a `Build`, which opens it in the process that
measures. Its package is imported there, so that one that is missing costs its own row only. All get
the threads of torch; `compare` gives all the same allocator. llama.cpp, which decodes instead of
being called on a tensor, is in `llama.py`.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import models
import rows
import torch
from torch import nn

import quantize
from quantize.measuring import Build, compare
from quantize.run.fusion import torchscript

Source = str | Path | Build
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """What all peers of a row get.

    Args:
        make: makes the model; called where it is needed.
        inputs: that are timed.
        folder: for what is exported; a file that is there already is used again.
        calibration: batches for static quantization.
        axes: sizes that vary, by axis; none: all are fixed.
    """

    make: Callable[[], nn.Module]
    inputs: torch.Tensor
    folder: Path
    calibration: Sequence[torch.Tensor] = field(default=())
    axes: tuple[int, ...] = ()

    def build(self) -> nn.Module:
        """The model in float32."""
        some = self.inputs[:1].repeat_interleave(2, 0) if len(self.inputs) < 2 else self.inputs
        return models.build(self.make, some)

    def file(self, name: str, export: Callable[[Path], object]) -> Path:
        """A file of this name in the folder, exported if it isn't there."""
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                export(path)
        return path


# torch itself, and what this package makes of a model in a call.


@dataclass
class Changed:
    """What a function makes of the model. The model is built while the process that measures
    starts, so that its making is not in `load_s`.
    """

    case: Case
    change: Callable[[nn.Module], Any]
    model: nn.Module | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        warnings.simplefilter("ignore")
        self.__dict__.update(state, model=state["case"].build())

    def __call__(self) -> Callable[..., Any]:
        return self.change(self.model or self.case.build())


def eager(case: Case, change: Callable[[nn.Module], Any] = lambda model: model) -> Build:
    """The model, changed by a function in the process that measures."""
    return Build(Changed(case, change))


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def legacy_int8(model: nn.Module, kinds: Collection[type[nn.Module]] = (nn.Linear,)) -> nn.Module:
    """torch.ao.quantization.quantize_dynamic, of layers of these kinds."""
    return torch.ao.quantization.quantize_dynamic(model, set(kinds), dtype=torch.qint8)


def in_bf16(
    model: nn.Module, then: Callable[[nn.Module], Callable[..., Any]] = lambda model: model
) -> Callable[[torch.Tensor], Any]:
    """In bfloat16, its inputs too; then what `then` makes of it."""
    run = then(model.bfloat16())
    return lambda x: run(x.bfloat16() if x.is_floating_point() else x)


def compiled(model: Callable[..., Any], *, freezing: bool = True) -> Callable[..., Any]:
    """torch.compile. Freezing must be set before the call: as an option of it, it comes too late
    for the weights to be constants.
    """
    torch._inductor.config.freezing = freezing
    return torch.compile(model, dynamic=False)


def torchao_int8(model: nn.Module) -> Callable[..., Any]:
    """Dynamic int8 of torchao, through torch.compile."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return compiled(model)


def torchscript_frozen(case: Case) -> Path:
    """torch.jit.trace and torch.jit.freeze."""
    model = case.build()
    return case.file("frozen.pt", lambda p: torchscript.plain_frozen(model, case.inputs).save(p))


def fused(case: Case) -> Path:
    """`quantize.fuse`, a file that loads without this package; made anew each time."""
    (case.folder / "ours.pt").unlink(missing_ok=True)
    return case.file("ours.pt", lambda path: quantize.fuse(case.build(), case.inputs).save(path))


# Other engines.


def onnxruntime(case: Case) -> Build:
    """ONNX Runtime on the exported graph."""
    return Build(_onnx_session, case.file("model.onnx", partial(_export_onnx, case)))


def onnxruntime_int8(case: Case) -> Build:
    """The same, by its dynamic quantization."""

    def export(path: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        whole = case.file("model.onnx", partial(_export_onnx, case))
        quantize_dynamic(whole, path, weight_type=QuantType.QInt8, per_channel=True)

    return Build(_onnx_session, case.file("int8.onnx", export))


def _export_onnx(case: Case, path: Path) -> None:
    sizes = dict.fromkeys(case.axes, torch.export.Dim.DYNAMIC)
    form = {"dynamo": True, "external_data": False, "verbose": False}
    inputs = case.calibration[-1] if case.axes else case.inputs
    torch.onnx.export(case.build(), (inputs,), path, dynamic_shapes=(sizes,), **form)


def _onnx_session(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    provider = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=provider)
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def openvino(case: Case) -> Build:
    """OpenVINO on the exported graph, computing in float32."""

    def export(path: Path) -> None:
        import openvino

        program = torch.export.export(case.build(), (case.inputs,))
        openvino.save_model(openvino.convert_model(program), path, compress_to_fp16=False)

    return Build(partial(_openvino_engine, "f32"), case.file("model.xml", export))


def openvino_int8(case: Case, *, transformer: bool = True, precision: str = "bf16") -> Build:
    """Static int8 of NNCF, computing in this precision around it, calibrated on `case.calibration`,
    or else on the inputs.
    """
    batches = case.calibration or [case.inputs]

    def export(path: Path) -> None:
        import nncf
        import openvino

        whole = openvino.convert_model(case.build(), example_input=batches[-1])
        data = nncf.Dataset([batch.numpy() for batch in batches])
        kind = nncf.ModelType.TRANSFORMER if transformer else None
        small = nncf.quantize(whole, data, model_type=kind)
        openvino.save_model(small, path, compress_to_fp16=False)

    return Build(partial(_openvino_engine, precision), case.file("int8.xml", export))


def _openvino_engine(precision: str, file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import openvino

    threads = torch.get_num_threads()
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    hints["PERFORMANCE_HINT"] = "LATENCY"
    engine = openvino.Core().compile_model(file, "CPU", hints)
    return lambda x: torch.from_numpy(engine(x.numpy())[0])


def side_by_side(
    engines: Mapping[str, Callable[[Case], Source]],
    case: Case,
    arguments: argparse.Namespace,
    evaluate: Callable[[Any], Any] | None = None,
) -> list[tuple[str, rows.Row]]:
    """Names of the engines, with the columns of each: its latency and the machine's, or why it
    failed.

    Args:
        engines: by name; the first one is the baseline of `speedup`.
        case: what they run.
        arguments: threads, rounds, and seconds of a turn.
        evaluate: as in `compare`; what it returns is a column.
    """
    made: dict[str, Source] = {}
    found = []
    for name, engine in engines.items():
        try:
            made[name] = engine(case)
        except Exception as error:  # a peer may fail in any way: its row says how
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            found.append((name, {"problem": why[:200]}))
    options = {"threads": arguments.threads, "rounds": arguments.rounds}
    options |= {"burst_seconds": arguments.seconds, "keep_going": True, "timeout_s": 3600.0}
    for one in compare(made, case.inputs, evaluate=evaluate, progress=print, **options):
        row = {"problem": one.failed}
        if one.latency_ms is not None:
            percentiles = {f"{name}_ms": getattr(one.latency_ms, name) for name in ("p10", "p90")}
            row |= {"latency_ms": one.latency_ms.median, **percentiles, "speedup": one.speedup}
            ready_s = one.load_s + one.first_call_ms / 1000
            row |= {"calls": one.latency_ms.calls, "load_s": ready_s}
        found.append((one.name, row | one.metrics | rows.host(one)))
    return found


def chosen(engines: Mapping[str, T], names: Sequence[str]) -> dict[str, T]:
    """The first engine, which is the baseline, and those of these names."""
    first = next(iter(engines))
    return {name: engine for name, engine in engines.items() if name == first or name in names}
