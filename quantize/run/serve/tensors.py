"""A model from tensors to tensors: what goes in and comes out, checked, and many requests as one
batch.

What a model takes is read from example inputs: names from its forward, datatypes and sizes from the
examples. The first axis is the batch; axes of integers (token ids) are free, other sizes are those
of the example. Whether rows may share a batch is tried, not assumed: the example has to give the
same outputs alone and beside other rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.run.serve.batching import Job
from quantize.run.serve.datatypes import NAMES
from quantize.run.serve.errors import Refused
from quantize.run.serve.settings import ROW_TOKENS

FREE = -1
TOLERANCE = 2e-2  # between a row alone and beside others, of the largest output


@dataclass(frozen=True)
class Port:
    """An input or output: its name, datatype and shape, with FREE for axes of any size."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def described(self) -> dict[str, Any]:
        """As the Open Inference Protocol's metadata has it."""
        return {"name": self.name, "datatype": NAMES[self.dtype], "shape": list(self.shape)}

    def check(self, tensor: Tensor) -> None:
        """Raises Refused for a tensor of another shape."""
        shape = tuple(tensor.shape)
        fits = len(shape) == len(self.shape) and all(
            allowed in (FREE, size) for size, allowed in zip(shape, self.shape, strict=True)
        )
        if not fits:
            raise Refused(
                f"input {self.name!r}: shape is {list(shape)}; allowed: {list(self.shape)}"
            )


class TensorModel:
    """A model and its ports.

    Args:
        model: in eval mode, on the CPU.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments;
            the first axis of each tensor is the batch.

    Raises:
        TypeError: inputs or outputs that aren't tensors.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model = model
        self.example = example = named(model, example_inputs)
        self.by_keyword = isinstance(example_inputs, Mapping)
        self.inputs = [_input_port(name, value) for name, value in example.items()]
        self._vocabulary = _vocabulary(model)
        outputs = self(example)
        self.outputs = self._output_ports(next(iter(example.values())), outputs)
        self.batches = self._rows_are_apart(example, outputs)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name."""
        with torch.no_grad():
            if self.by_keyword:
                output = self.model(**inputs)
            else:
                output = self.model(*inputs.values())
        return named_outputs(output)

    def job(self, inputs: Mapping[str, Tensor]) -> Job:
        """Checked inputs as a job. Raises Refused, naming the input that is missing or wrong."""
        known = {port.name: port for port in self.inputs}
        for name in inputs:
            if name not in known:
                raise Refused(f"no input {name!r}; allowed: {', '.join(known)}")
        for name, port in known.items():
            if name not in inputs:
                raise Refused(f"input {name!r} is missing")
            port.check(inputs[name])
            if inputs[name].dtype != port.dtype:
                given, wanted = NAMES[inputs[name].dtype], NAMES[port.dtype]
                raise Refused(f"input {name!r}: datatype is {given}; allowed: {wanted}")
        ordered = {name: inputs[name] for name in known}
        first = next(iter(ordered.values()))
        self._check_rows(ordered)
        self._check_ids(ordered)
        rows, tokens = first.shape[0], not first.is_floating_point() and first.dim() > 1
        shapes = tuple(tuple(tensor.shape[1:]) for tensor in ordered.values())
        key = shapes if self.batches else object()
        return Job(ordered, rows, first.shape[1] if tokens else ROW_TOKENS, key)

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Tensor]]:
        """The outputs of each job; one call for all of them."""
        if len(jobs) == 1:
            return [self(jobs[0].content)]
        names = jobs[0].content
        joined = {name: torch.cat([job.content[name] for job in jobs]) for name in names}
        outputs = self(joined)
        counts = [job.rows for job in jobs]
        parts = {name: tensor.split(counts) for name, tensor in outputs.items()}
        return [{name: split[i] for name, split in parts.items()} for i in range(len(jobs))]

    @staticmethod
    def _check_rows(inputs: Mapping[str, Tensor]) -> None:
        rows = {name: tensor.shape[0] for name, tensor in inputs.items()}
        if len(set(rows.values())) > 1:
            raise Refused(f"the inputs differ in rows: {rows}")

    def _check_ids(self, inputs: Mapping[str, Tensor]) -> None:
        """Token ids beyond an embedding would read someone else's memory or raise far inside."""
        if self._vocabulary is None:
            return
        first, ids = next(iter(inputs.items()))
        if ids.is_floating_point() or ids.dtype is torch.bool:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocabulary:
            wrong = low if low < 0 else high
            raise Refused(f"input {first!r} holds id {wrong}; allowed: 0 to {self._vocabulary - 1}")

    def _rows_are_apart(self, example: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> bool:
        """Whether the example's rows give the same outputs beside others, which are its own
        mirrored.
        """
        rows = next(iter(example.values())).shape[0]
        try:
            joined = {name: torch.cat((x, _mirrored(x))) for name, x in example.items()}
            double = self(joined)
        except Exception:  # whatever a model raises for another batch
            return False
        for name, once in outputs.items():
            twice = double.get(name)
            if twice is None or twice.shape != (2 * rows, *once.shape[1:]):
                return False
            apart = (twice[:rows].double() - once.double()).abs().max()
            if not bool(apart <= TOLERANCE * once.double().abs().max() + 1e-6):
                return False
        return True

    @staticmethod
    def _output_ports(first: Tensor, outputs: Mapping[str, Tensor]) -> list[Port]:
        """The output ports; axes as long as a free one of the first input are free too."""
        free = set() if first.is_floating_point() else set(first.shape[1:])
        ports = []
        for name, tensor in outputs.items():
            sizes = tensor.shape[1:-1] if free else ()
            inner = [FREE if size in free else size for size in sizes]
            last = tensor.shape[1 + len(inner) :]
            ports.append(Port(name, tensor.dtype, (FREE, *inner, *last)))
        return ports


def named(model: nn.Module, example_inputs: Any) -> dict[str, Tensor]:
    """Example inputs by the names that the model's forward gives them.

    Raises TypeError for what isn't a tensor, or is one without a batch axis.
    """
    if isinstance(example_inputs, Mapping):
        example = dict(example_inputs)
    else:
        given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        example = dict(zip(_argument_names(model, len(given)), given, strict=True))
    for name, value in example.items():
        if not isinstance(value, Tensor) or value.dtype not in NAMES or value.dim() == 0:
            raise TypeError(f"example input {name!r} must be a tensor with a batch axis")
    if not example:
        raise TypeError("example inputs are empty")
    return example


def _argument_names(model: nn.Module, count: int) -> list[str]:
    try:
        names = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):  # TorchScript
        schema = getattr(model.forward, "schema", None)
        names = [argument.name for argument in schema.arguments[1:]] if schema else []
    return names[:count] if len(names) >= count else [f"input_{i}" for i in range(count)]


def named_outputs(output: Any) -> dict[str, Tensor]:
    """A model's tensors by name: those of a mapping, numbered ones of a tuple, or `output`."""
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        pairs = list(output.items())
    elif isinstance(output, (tuple, list)):
        pairs = [(f"output_{i}", value) for i, value in enumerate(output)]
    else:
        raise TypeError(f"the model gives a {type(output).__name__}, not tensors")
    tensors = {str(name): value for name, value in pairs if isinstance(value, Tensor)}
    if not tensors:
        raise TypeError("the model gives no tensor")
    return tensors


def _input_port(name: str, value: Tensor) -> Port:
    ids = not value.is_floating_point() and value.dtype is not torch.bool
    shape = [FREE] * value.dim() if ids else [FREE, *value.shape[1:]]
    return Port(name, value.dtype, tuple(shape))


def _mirrored(x: Tensor) -> Tensor:
    """Other rows of the same kind: every axis but the first backwards, or the first if alone."""
    return x.flip(tuple(range(1, x.dim())) or (0,))


def _vocabulary(model: nn.Module) -> int | None:
    """Ids that the first embedding of the model holds."""
    for module in model.modules():
        size = getattr(module, "num_embeddings", None)
        if isinstance(size, int):
            return size
    return None
