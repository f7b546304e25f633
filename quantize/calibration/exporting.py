"""What `torch.export` needs around it: to follow more models, and to print nothing."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch.nn.modules import transformer

from quantize.surgery import without_logs


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Inside, `torch.export` doesn't print the graph so far where it can't go on, and the layers of
    `nn.Transformer` take a mask as it is: they ask its values whether it is causal, which decides
    nothing but the kernel.
    """
    with (
        without_logs(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        mock.patch.object(transformer, "_detect_is_causal_mask", _told_causal),
    ):
        warnings.simplefilter("ignore")
        yield


def _told_causal(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Whether the caller says so, in the place of `_detect_is_causal_mask`."""
    return is_causal is True
