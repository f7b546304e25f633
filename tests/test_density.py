"""The code stays calm: one step a line with its result named, short functions, short files."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NODES_PER_LINE = {"quantize": 10.5, "tests": 11.0, "benchmarks": 11.0}
MOST_LINES = 350
MOST_LINES_OF_A_FUNCTION = 60  # without its docstring
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
PACKAGE = sorted((ROOT / "quantize").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))


pytestmark = pytest.mark.xdist_group("density")  # each file is parsed once


@functools.cache
def parsed(path: Path) -> list[ast.AST]:
    """All nodes of a file's syntax tree, the file itself first."""
    return list(ast.walk(ast.parse(path.read_text())))


def prose(nodes: Iterable[ast.AST]) -> set[int]:
    """Numbers of the lines that docstrings take."""
    lines: set[int] = set()
    for node in nodes:
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines |= set(range(text.lineno, text.end_lineno + 1))
    return lines


def measured(files: list[Path]) -> tuple[int, int]:
    """Syntax-tree nodes and lines of code; docstrings and comments are neither."""
    nodes = lines = 0
    for path in files:
        source = path.read_text()
        kept = prose(parsed(path))
        places = [node for node in parsed(path) if isinstance(node, DOCUMENTED)]
        documented = [node for node in places if ast.get_docstring(node) is not None]
        nodes += len(parsed(path)) - 2 * len(documented)
        for number, line in enumerate(source.splitlines(), 1):
            text = line.strip()
            lines += bool(text) and number not in kept and not text.startswith("#")
    return nodes, lines


def found(files: list[Path], rule: str) -> Iterator[str]:
    """Where a rule is broken: `quantize/host.py` or `quantize/host.py:pinned`."""
    for path in files:
        name = str(path.relative_to(ROOT))
        if rule == "long file":
            if len(path.read_text().splitlines()) > MOST_LINES:
                yield name
            continue
        for node in parsed(path):
            if BROKEN[rule](node):
                yield f"{name}:{getattr(node, 'name', '')}".removesuffix(":")


def is_long_function(node: ast.AST) -> bool:
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    lines = set(range(node.lineno, node.end_lineno + 1))
    if len(lines) <= MOST_LINES_OF_A_FUNCTION:
        return False
    return len(lines - prose(ast.walk(node))) > MOST_LINES_OF_A_FUNCTION


def is_nested_conditional(node: ast.AST) -> bool:
    if not isinstance(node, ast.IfExp):
        return False
    return any(isinstance(part, ast.IfExp) for part in ast.walk(node) if part is not node)


def has_two_loops(node: ast.AST) -> bool:
    return isinstance(node, COMPREHENSIONS) and len(node.generators) > 1


BROKEN = {
    "long function": is_long_function,
    "nested conditional": is_nested_conditional,
    "two loops": has_two_loops,
}


@pytest.mark.parametrize("folder", NODES_PER_LINE)
def test_lines_do_one_thing(folder: str) -> None:
    """A folder has at most so many syntax-tree nodes per line of code."""
    nodes, lines = measured(sorted((ROOT / folder).rglob("*.py")))
    assert nodes / lines <= NODES_PER_LINE[folder], f"{nodes / lines:.2f} nodes per line"


@pytest.mark.parametrize("rule", ["long file", *BROKEN])
@pytest.mark.parametrize("folder", NODES_PER_LINE)
def test_the_code_is_calm(folder: str, rule: str) -> None:
    """No long file or function, no conditional inside another, no comprehension with two loops."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert set(found([*files, *SCRIPTS], rule)) == set()


def test_no_logic_in_an_init() -> None:
    """An `__init__.py` imports, and names what is public."""
    for path in PACKAGE:
        if path.name != "__init__.py":
            continue
        for node in ast.iter_child_nodes(parsed(path)[0]):
            plain = isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr))
            names = [getattr(target, "id", "") for target in getattr(node, "targets", [])]
            assert plain or (set(names) <= {"__all__", "__version__"} and names), path


def test_scripts_are_thin_and_import_no_script() -> None:
    """60 to 120 lines each, and nothing imports one of them."""
    scripts = [path for path in SCRIPTS if path.stem != "setup"]
    names = {path.stem for path in scripts}
    assert names == {"train", "fusion", "kv_cache"}
    assert all(60 <= len(path.read_text().splitlines()) <= 120 for path in scripts)
    for path in [*scripts, *PACKAGE, *(ROOT / "benchmarks").rglob("*.py")]:
        for node in parsed(path):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.append(node.module)
            assert not names.intersection(imported), path
