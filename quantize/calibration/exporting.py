"""What `torch.export` needs around it: to follow more models, and to print nothing."""

from __future__ import annotations

import contextlib
import gc
import io
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

from torch.fx import GraphModule, config
from torch.fx.experimental import proxy_tensor
from torch.fx.passes import shape_prop
from torch.nn.modules import transformer

from quantize.calibration.shapes import by_shapes
from quantize.surgery import without_logs

# What tracing notes of each result, without the one of three layouts that its strides have: those
# may be expressions in the free sizes, and nobody reads the answer.
_WITHOUT_LAYOUT = partial(shape_prop._extract_tensor_metadata, include_contiguity=False)
_recompile = GraphModule.recompile


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Inside, `torch.export` doesn't print the graph so far where it can't go on, and takes no time
    for what nobody reads, the stack of calls at each operation, layouts and Python code of graphs
    that nobody calls, nor to look for cycles among millions of objects that it goes on using;
    shapes of layers take little (`by_shapes`). The layers of `nn.Transformer` take a mask as it is:
    they ask its values whether it is causal, which decides nothing but the kernel.
    """
    with (
        _without_collections(),
        by_shapes,
        without_logs(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        _replaced(transformer, "_detect_is_causal_mask", _told_causal),
        _replaced(GraphModule, "recompile", _recompile_when_called),
        _replaced(config, "do_not_emit_stack_traces", True),
        _replaced(proxy_tensor, "_extract_tensor_metadata", _WITHOUT_LAYOUT),
    ):
        warnings.simplefilter("ignore")
        yield


def _replaced(owner: Any, name: str, value: Any) -> contextlib.AbstractContextManager[Any]:
    """Patches a private name of torch; a torch without it does without what the patch saves."""
    if not hasattr(owner, name):
        return contextlib.nullcontext()
    return mock.patch.object(owner, name, value)


def _recompile_when_called(graph: GraphModule) -> None:
    """Each pass of an export would have the graph written as Python, which the next one drops."""
    type(graph).forward = _compiled_call


def _compiled_call(graph: GraphModule, *args: Any, **kwargs: Any) -> Any:
    _recompile(graph)
    return graph.forward(*args, **kwargs)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _told_causal(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Whether the caller says so, in the place of `_detect_is_causal_mask`."""
    return is_causal is True
