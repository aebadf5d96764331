"""The house as `docs/architecture.md` draws it: every room named, no forbidden words, no second `proto` package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pando", "router", "worker", "kvstore", "kernels", "control", "bench")
FORBIDDEN_FILES = {"utils.py", "common.py", "helpers.py", "misc.py", "base.py"}
FORBIDDEN_CLASSES = re.compile(r"(Manager|Helper|Utils?|Base|Impl)$")


def sources() -> list[Path]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return sorted(path for path in files if "_pb2" not in path.name)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_paragraph_of_a_package_names_its_files_and_no_others(package: str) -> None:
    """A file is named by its stem, each one once, in the paragraph of its own package; folders may be named too."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    [paragraph] = re.findall(rf"^\*\*{package}/\*\* (.*?)\n\n", page, re.MULTILINE | re.DOTALL)
    rooms = [path for path in sources() if path.is_relative_to(ROOT / package)]
    files = [path.stem for path in rooms if path.name not in ("__init__.py", "__main__.py")]
    folders = {str(path.relative_to(ROOT / package)) for path in (ROOT / package).rglob("*") if path.is_dir()}
    named = [name for name in re.findall(r"`([^`]+)`", paragraph) if name not in folders]
    assert sorted(named) == sorted(files)


def test_the_architecture_page_names_no_room_that_is_gone() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    listed = re.findall(r"`([a-z_]+/[a-z_/]+\.(?:py|proto|toml|md))`", page)
    assert not [name for name in listed if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_names(path: Path) -> None:
    assert path.name not in FORBIDDEN_FILES
    tree = ast.parse(path.read_text())
    classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert not [name for name in classes if FORBIDDEN_CLASSES.search(name)]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "no module docstring"


def test_no_pickle_anywhere() -> None:
    pattern = re.compile(r"^\s*(import|from)\s+(pickle|cloudpickle|marshal|shelve|dill)\b", re.MULTILINE)
    assert not [str(path) for path in sources() if pattern.search(path.read_text())]


def test_proto_is_no_package() -> None:
    assert not list((ROOT / "proto").rglob("__init__.py"))


def test_no_decision_is_without_its_parts() -> None:
    for path in sorted((ROOT / "docs" / "decisions").glob("*.md")):
        assert re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", path.name)
        text = path.read_text()
        for part in ("## Context", "## Decision", "## Consequences", "## What would change our mind"):
            assert part in text, f"{path.name}: {part}"
