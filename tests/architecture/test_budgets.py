"""Sizes that keep the code readable: files, functions, parameters; raising one is a decision record."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pando", "router", "worker", "kvstore", "kernels", "control", "bench")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7
MAX_MEDIAN_FUNCTION_LINES = 10

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> list[Path]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return sorted(path for path in files if "_pb2" not in path.name)


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Function):
            yield node


def is_kernel(function: Function) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def length(function: Function) -> int:
    """Lines, of a kernel those of its body."""
    first = function.body[0].lineno if is_kernel(function) else function.lineno
    return (function.end_lineno or first) - first + 1


def parameters(function: Function) -> int:
    """Parameters a caller must think of: keyword-only ones with a default do not count, nor do a kernel's."""
    if is_kernel(function):
        return 0
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    required = sum(default is None for default in function.args.kw_defaults)
    return len([name for name in names if name not in ("self", "cls")]) + required


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_and_functions_are_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines"
    long = [f"{f.name}: {length(f)} lines" for f in functions(path) if length(f) > MAX_FUNCTION_LINES]
    wide = [f"{f.name}: {parameters(f)} parameters" for f in functions(path) if parameters(f) > MAX_PARAMETERS]
    assert not long + wide


def test_median_function_is_short() -> None:
    assert median(length(f) for path in sources() for f in functions(path)) <= MAX_MEDIAN_FUNCTION_LINES
