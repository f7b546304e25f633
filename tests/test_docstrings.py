"""Public functions say what each of their parameters is."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest

import quantize

FUNCTIONS = [name for name in quantize.__all__ if inspect.isfunction(getattr(quantize, name))]
SECTION = re.compile(r"^(Args|Returns|Raises|Source):", re.MULTILINE)


def sections(function: Callable) -> dict[str, str]:
    """The text of each section of the docstring, by its name."""
    parts = SECTION.split(inspect.getdoc(function) or "")
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def described(arguments: str) -> list[str]:
    """The names at the outer indentation under `Args:`, in their order; `a, b: ...` are two."""
    names: list[str] = []
    for line in re.findall(r"^ {4}(\w+(?:, \w+)*):", arguments, re.MULTILINE):
        names += line.split(", ")
    return names


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_described(name: str) -> None:
    """Under `Args:` stand the parameters of the signature, each once and no others."""
    function = getattr(quantize, name)
    names = described(sections(function).get("Args", ""))
    assert sorted(names) == sorted(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_and_errors_are_described(name: str) -> None:
    """`Raises:` says what can go wrong; `Returns:` what comes back, unless that is nothing."""
    function = getattr(quantize, name)
    found = sections(function).keys()
    nothing = inspect.signature(function).return_annotation in (None, "None")
    assert "Raises" in found and (nothing or "Returns" in found), found
