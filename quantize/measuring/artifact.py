"""One artifact in the process that measures it: load it, time it, evaluate it, say what it holds.

`Artifact` is what both sides use: a worker process wraps one (see `process.py`), and the calling
process uses one directly for a model in memory. TorchScript files are known by their content,
everything else goes through `quantize.checkpoint.load`.
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantize import clock, surgery
from quantize.allocator import peak_rss_mb
from quantize.calibration import call
from quantize.checkpoint import CheckpointError, load

# After the first call: TorchScript still rewrites its graph in the second and third one.
_WARM_UP_CALLS = 2


class MeasurementError(RuntimeError):
    """A measurement that could not be made: a model that fails on the inputs, a process that died
    or ran out of time.
    """


@dataclass(frozen=True)
class Build:
    """An artifact that the fresh process builds: another engine, or a model too large to send.

    Args:
        make: called without arguments in the fresh process, or with `file` if there is one; returns
            what is called on the inputs: a module, or any function around an engine's session. It
            is sent by cloudpickle, so it may be a lambda or a `functools.partial` of the running
            script.
        file: what `make` opens, whose size is measured; None: the size is that of the tensors of
            the module that `make` returns, and unknown if it is no module.
    """

    make: Callable[..., Callable[..., Any]]
    file: str | Path | None = None

    def __call__(self) -> Callable[..., Any]:
        return self.make() if self.file is None else self.make(Path(self.file))


class Artifact:
    """A file or a model in memory, with what it is to be called with. Methods are run in the order
    they stand here.

    `model` is what `quantize.load(path, model=...)` takes for an architecture that isn't built in:
    a fresh instance, or a function that makes one.
    """

    def __init__(
        self,
        source: str | Path | nn.Module | Callable[..., Any] | Build,
        example_inputs: Any,
        *,
        evaluate: Callable[[Any], Any] | None = None,
        model: nn.Module | Callable[[], nn.Module] | None = None,
    ):
        self.path = Path(source) if isinstance(source, (str, Path)) else None
        self.build = source if isinstance(source, Build) else None
        built = self.build.file if self.build else None
        self.file = Path(built) if built else self.path
        self.in_memory = not (self.path or self.build)
        self.module: Any = source if self.in_memory else None
        self.name = str(self.file) if self.file else type(source).__name__
        self.example_inputs, self._evaluate, self._fresh = example_inputs, evaluate, model

    def load(self) -> dict[str, Any]:
        """Make the model usable; `bytes`, `parameters`, and `load_s` for what isn't in memory (its
        file may be in the page cache).
        """
        load_s = None
        if self.path:
            self.module, load_s = clock.timed(partial(load_artifact, self.path, self._instance()))
        elif self.build:
            self.module, load_s = clock.timed(partial(self._guard, "building it", self.build))
            if isinstance(self.module, nn.Module):
                self.module.eval()
        elif surgery.is_eager(self.module):
            # eval mode and packed weights must not reach the caller's
            self.module = surgery.clone(self.module).eval()
        if self.example_inputs is None:
            make = getattr(self.module, "example_inputs", None)
            self.example_inputs = make() if callable(make) else None
        return {
            **_size(self.module, self.file),
            "load_s": load_s,
            "callable": self.example_inputs is not None,
        }

    def _instance(self) -> nn.Module | None:
        if isinstance(self._fresh, nn.Module):
            return copy.deepcopy(self._fresh)
        return self._fresh() if self._fresh else None

    def warm_up(self, seconds: float) -> dict[str, Any]:
        """First calls, for about `seconds`; `first_call_ms` and `output_sha256`, the digest of the
        output (see `fingerprint`).
        """
        first = partial(fingerprint, self.module, self.example_inputs)
        digest, taken = clock.timed(partial(self._guard, "calling it with example_inputs", first))
        left = max(seconds - taken, 0.0)
        clock.race([self._run], least=_WARM_UP_CALLS, seconds=left, warm_up=0)
        return {"first_call_ms": taken * 1e3, "output_sha256": digest}

    def burst(self, seconds: float) -> list[float]:
        """Latencies in ms of calls made back to back for about `seconds`: see `clock.burst`."""
        return [1e3 * taken for taken in clock.burst(self._run, seconds)]

    def evaluate(self) -> dict[str, float]:
        """The caller's metric on the loaded model, by name; the first one is the one that a report
        shows.
        """
        if self._evaluate is None:
            return {}
        evaluate = self._evaluate
        with torch.no_grad():
            return as_metrics(self._guard("evaluate", lambda: evaluate(self.module)))

    def peak_rss_mb(self) -> float | None:
        """Most memory this process has had resident, in MiB."""
        return peak_rss_mb()

    def _run(self) -> None:
        call(self.module, self.example_inputs, copy=False)

    def _guard(self, doing: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:  # of somebody's model; the message must say whose it was
            reason = " ".join(str(error).split())[:300]
            raise MeasurementError(
                f"{self.name}: {doing} failed: {type(error).__name__}: {reason}"
            ) from error


def _size(model: Any, file: Path | None) -> dict[str, int | None]:
    """`bytes` of the file or of the model's tensors, and its `parameters`; None for what isn't
    known of an engine.
    """
    stored = list(stored_tensors(model))
    known = isinstance(model, nn.Module)
    parameters = sum(t.numel() for t in stored) if known else None
    size = sum(t.numel() * t.element_size() for t in stored) if known else None
    return {"bytes": file.stat().st_size if file else size, "parameters": parameters}


def load_artifact(path: Path, model: nn.Module | None = None) -> Any:
    """The model in a checkpoint or TorchScript file, in eval mode. Raises CheckpointError naming
    the path and the reason.
    """
    check_there(path)
    if _is_torchscript(path):
        try:
            with warnings.catch_warnings():
                # torch.jit is deprecated; files in it are still what people serve
                warnings.simplefilter("ignore", FutureWarning)
                return torch.jit.load(str(path), map_location="cpu").eval()
        except Exception as error:
            raise CheckpointError(
                f"{path}: TorchScript can't load it: {' '.join(str(error).split())[:200]}"
            ) from error
    return load(path, model=model) if model is not None else load(path)


def check_there(path: Path) -> None:
    """Raises CheckpointError if there is no such file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False  # not a zip: load() says what is wrong with it


def stored_tensors(model: Any) -> Iterator[Tensor]:
    """The tensors that a model file has to hold: parameters and weights kept in buffers, each once.

    Buffers of torch's own layers (a BatchNorm's running statistics) are not counted, nor are
    non-persistent ones. The constants into which a frozen TorchScript module turns its parameters
    are.
    """
    if not isinstance(model, nn.Module):
        return
    # the tensors too, or an id could come back as another one's
    seen: dict[tuple[int, int], Tensor] = {}
    for tensor in _tensors(model):
        address = tensor.data_ptr() if tensor.layout == torch.strided else 0
        key = (address or id(tensor), tensor.numel())
        if key not in seen and tensor.numel():
            seen[key] = tensor
            yield tensor


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from module.parameters(recurse=False)
        if not type(module).__module__.startswith("torch.nn."):
            hidden = getattr(module, "_non_persistent_buffers_set", ())
            yield from (b for n, b in module.named_buffers(recurse=False) if n not in hidden)
    if isinstance(model, torch.jit.ScriptModule):
        graph: Any = model.inlined_graph  # its nodes live only as long as it does
        for node in graph.findAllNodes("prim::Constant"):
            if node.hasAttribute("value") and node.kindOf("value") == "t":
                yield node.t("value")


def as_metrics(result: Any) -> dict[str, float]:
    """What `evaluate` returned, as name -> value: a number (named "metric"), a (name, value) pair,
    or a mapping. Values of single examples count by their mean; those of the first name also give
    "standard_error" and "examples".

    Raises:
        TypeError: nothing of the kind.
    """
    named = _named(result)
    try:
        values = {name: _values(value) for name, value in named.items()}
        metrics = {name: float(value.mean()) for name, value in values.items()}
    except (TypeError, ValueError, RuntimeError):
        metrics = {}
    if not metrics:
        raise TypeError(
            f"evaluate must return a number or one for each example, a (name, number) pair or a "
            f"dict of them, got {result!r:.100}"
        )
    first = next(iter(values.values()))
    if len(first) > 1:
        sampled = {"standard_error": standard_error(first), "examples": float(len(first))}
        metrics = {**metrics, **sampled}
    return metrics


def per_example(result: Any) -> Tensor | None:
    """The values of single examples, float64 [N], that `evaluate` returned under its first name;
    None where it returned one number.
    """
    value = _values(next(iter(_named(result).values())))
    return value if len(value) > 1 else None


def _named(result: Any) -> dict[str, Any]:
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], str):
        return dict([result])
    if isinstance(result, Mapping):
        return {str(name): value for name, value in result.items()}
    return {"metric": result}


def _values(value: Any) -> Tensor:
    """One number or a sequence of them, float64 [N]. Raises TypeError, ValueError, RuntimeError."""
    if isinstance(value, tuple):
        raise TypeError("a tuple of numbers may be several metrics")
    if not hasattr(value, "__len__"):
        value = [float(value)]
    numbers = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    if numbers.ndim > 1 or numbers.numel() == 0:
        raise ValueError("no number and no sequence of numbers")
    return numbers.reshape(-1)


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values [N]: what a bootstrap of them tends to; 0 for one value."""
    return float(values.double().std(correction=0) / math.sqrt(len(values)))


def fingerprint(model: Any, example_inputs: Any) -> str:
    """SHA-256 of the dtypes, shapes and bytes of all output tensors: equal for two models only if
    they agree bit for bit.

    The same weights give the same bits on one machine with one thread count; another count may sum
    in another order.
    """
    with torch.no_grad():
        leaves = pytree.tree_leaves(call(model, example_inputs))
    digest = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(
                leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
