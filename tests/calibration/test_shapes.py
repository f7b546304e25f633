"""An export by shapes is the export that torch makes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from helpers import randn, seeded
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from quantize.calibration.shapes import by_shapes


class Constants(nn.Module):
    """Multiplies tensors that it makes itself, whose numbers torch may know, and others."""

    def forward(self, x: Tensor) -> Tensor:
        known = F.linear(torch.tensor([2.0])[None], torch.tensor([3.0])[None])
        made = F.linear(torch.ones(2, 3), torch.arange(6.0).reshape(2, 3))
        return F.relu(known).item() * x + F.layer_norm(made, (2,)).sum()


def in_training(x: Tensor) -> Tensor:
    return F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True)


def in_a_row(x: Tensor) -> Tensor:
    """All activations that no other model here has."""
    for function in (torch.abs, torch.exp, torch.sqrt, torch.reciprocal, torch.erf, torch.neg):
        x = function(x)
    for function in (F.elu, F.leaky_relu, F.mish, F.softplus, F.hardsigmoid):
        x = function(x)
    return x.sin() + x.cos().round() + x.int().abs()


class Called(nn.Module):
    """A function as a model."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


ROWS, IMAGES = randn(4, 6, 5), randn(2, 4, 6, 8)
LAST = IMAGES.to(memory_format=torch.channels_last)
MODELS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(5, 7), ROWS),
    "linear of rows": (nn.Linear(5, 7), ROWS[0]),
    "linear of a vector": (nn.Linear(5, 7), ROWS[0, 0]),
    "linear of columns": (nn.Linear(4, 7), ROWS.transpose(0, 2)),
    "linear without a bias": (nn.Linear(6, 7, bias=False), ROWS.transpose(1, 2)),
    "linear in half": (nn.Linear(5, 7).half(), ROWS.half()),
    "batch norm": (nn.BatchNorm2d(4), IMAGES),
    "batch norm, channels last": (nn.BatchNorm2d(4), LAST),
    "batch norm without weights": (nn.BatchNorm2d(4, affine=False), IMAGES),
    "batch norm of rows": (nn.BatchNorm1d(5), ROWS[0]),
    "batch norm that keeps nothing": (nn.BatchNorm2d(4, track_running_stats=False), IMAGES),
    "batch norm in training": (Called(in_training), IMAGES),
    "layer norm": (nn.LayerNorm(5), ROWS),
    "layer norm of columns": (nn.LayerNorm(6), ROWS.transpose(1, 2)),
    "layer norm of two sizes": (nn.LayerNorm((6, 8)), IMAGES),
    "layer norm, channels last": (nn.LayerNorm((6, 8), bias=False), LAST),
    "layer norm of another type": (nn.LayerNorm(5), ROWS.bfloat16()),
    "rms norm": (nn.RMSNorm(5), ROWS),
    "rms norm of columns": (nn.RMSNorm(6), ROWS.transpose(1, 2)),
    "gelu": (nn.GELU(), ROWS),
    "hardswish": (nn.Hardswish(), ROWS),
    "hardtanh": (nn.ReLU6(), ROWS),
    "relu": (nn.ReLU(), ROWS),
    "relu in place": (nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True)), ROWS),
    "relu of columns": (nn.ReLU(), ROWS.transpose(0, 2)),
    "relu, channels last": (nn.ReLU(), LAST),
    "relu of a slice": (nn.ReLU(), ROWS[:, ::2]),
    "relu of one row for all": (nn.ReLU(), ROWS[:1].expand(4, 6, 5)),
    "relu of numbers": (nn.ReLU(), torch.arange(6).reshape(2, 3)),
    "rsqrt of numbers": (Called(torch.rsqrt), torch.arange(1, 7).reshape(2, 3)),
    "sigmoid": (nn.Sigmoid(), ROWS),
    "sigmoid of numbers": (nn.Sigmoid(), torch.arange(6).reshape(2, 3)),
    "silu": (nn.SiLU(), ROWS.bfloat16()),
    "tanh": (nn.Tanh(), ROWS.double()),
    "clamped": (Called(lambda x: x.clamp(-1, 1).clamp_min(-0.5).clamp_max(0.5)), ROWS),
    "in place": (Called(lambda x: F.hardtanh_((x + 1).round_().clamp_(-1, 1))), ROWS),
    "columns in place": (Called(lambda x: (x + 1).transpose(0, 2).relu_() * 2), ROWS),
    "numbers in place": (Called(lambda x: x.int().clamp_(-1, 1)), ROWS),
    "functions": (Called(in_a_row), ROWS),
    "constants": (Constants(), ROWS),
}


class Together(nn.Module):
    """Each model called with its own input."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [model(x) for model, x in zip(self.models, inputs, strict=True)]


def exported(model: nn.Module, inputs: Any, *, free: bool) -> Any:
    """The export of a model with sizes that are free, or none."""
    size = torch.export.Dim.AUTO if free else None
    sizes = tree_map(lambda tensor: [size] * tensor.dim(), inputs)
    with torch.no_grad():
        return torch.export.export(model, (inputs,), dynamic_shapes=(sizes,), strict=False)


def about(node: torch.fx.Node) -> str:
    """A call, and the shape, type and strides of what it gives."""
    value = node.meta.get("val")
    facts = (value.shape, value.dtype, value.stride()) if isinstance(value, Tensor) else value
    return f"{node.format_node()}: {facts}"


@pytest.mark.parametrize("free", [True, False], ids=["free", "fixed"])
@pytest.mark.parametrize("names", [list(MODELS)[i::4] for i in range(4)])
def test_the_graph_is_the_same(names: list[str], free: bool):
    """With the same calls, shapes, types and strides, and it gives what the models give."""
    models, inputs = map(list, zip(*(MODELS[name] for name in names), strict=True))
    model = Together(models).eval()
    plain = exported(model, inputs, free=free)
    with by_shapes:
        quick = exported(model, inputs, free=free)
    nodes = [[about(node) for node in made.graph.nodes] for made in (plain, quick)]
    assert nodes[0] == nodes[1]
    assert plain.range_constraints == quick.range_constraints
    answers = quick.module()(inputs), model(inputs)
    assert [*map(torch.equal, *answers)] == [True] * len(names)


@pytest.mark.parametrize("free", [True, False], ids=["free", "fixed"])
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Linear(6, 7), ROWS),
        (nn.BatchNorm2d(3), IMAGES),
        (nn.LayerNorm(6), ROWS),
        (nn.RMSNorm(6), ROWS),
    ],
)
def test_sizes_that_do_not_fit_are_refused(model: nn.Module, x: Tensor, free: bool):
    """Also where a size was free until then."""
    with pytest.raises(Exception, match="is taken"), by_shapes:
        exported(model.eval(), x, free=free)


TRACED = (
    lambda x: F.gelu(x),
    lambda x: F.hardtanh(x),
    lambda x: F.linear(x, x),
    lambda x: F.layer_norm(x, [5]),
)


def traced(x: Tensor) -> list[bool]:
    """Do functions that are traced operation by operation, as compilers do it, give their own
    answers?
    """
    operations = torch.ops.aten.gelu.default, torch.ops.aten.hardtanh.default
    table = {one: torch._decomp.decomposition_table[one] for one in operations}
    graphs = [make_fx(f, table, tracing_mode="fake")(torch.ones_like(x)) for f in TRACED]
    return [torch.allclose(g(x), f(x), atol=1e-6) for g, f in zip(graphs, TRACED, strict=True)]


def test_what_others_trace_is_recorded():
    """Inside, by this thread and by others, operations are recorded, and no new tensors."""
    x = ROWS[0]
    with by_shapes, ThreadPoolExecutor() as pool:
        assert traced(x) + pool.submit(traced, x).result() == [True] * 8


def test_threads_are_inside_together():
    """The first one that ends leaves the other what it has; the last one leaves nothing."""
    linear, first, second = torch.ops.aten.linear.default, ExitStack(), ExitStack()
    before = len(linear.py_kernels)
    first.enter_context(by_shapes)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(second.enter_context, by_shapes).result()
        first.close()
        assert len(linear.py_kernels) == before + 1
        pool.submit(second.close).result()
    assert len(linear.py_kernels) == before


def test_nothing_stays():
    """Afterwards torch finds shapes in its own way again, also after an error."""
    model, x = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU())), ROWS
    operations = torch.ops.aten.linear.default, torch.ops.aten.layer_norm.default
    before = [dict(operation.py_kernels) for operation in operations]
    table = dict(torch._decomp.decomposition_table)
    with pytest.raises(KeyError), by_shapes:
        exported(model, x, free=True)
        raise KeyError
    assert [dict(operation.py_kernels) for operation in operations] == before
    assert dict(torch._decomp.decomposition_table) == table
