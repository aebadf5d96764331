"""The image file by its own text, and what the router image can import by an interpreter that has nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROUTER_PACKAGES = {"pando", "kvstore", "router"}
WORKER_PACKAGES = ROUTER_PACKAGES | {"kernels", "worker", "control"}


@dataclass(frozen=True)
class Instruction:
    """One instruction with its lines joined."""

    stage: str
    word: str
    rest: str


def instructions(path: Path) -> list[Instruction]:
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    found: list[Instruction] = []
    stage = ""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            stage = rest.split(" AS ")[1]
        found.append(Instruction(stage, word, " ".join(rest.split())))
    return found


@pytest.fixture(scope="module")
def dockerfile(root: Path) -> list[Instruction]:
    return instructions(root / "deploy" / "Dockerfile")


def of_stage(dockerfile: list[Instruction], stage: str, word: str) -> list[str]:
    return [i.rest for i in dockerfile if i.stage == stage and i.word == word]


def test_needs_no_frontend_and_no_new_builder(root: Path, dockerfile: list[Instruction]) -> None:
    text = (root / "deploy" / "Dockerfile").read_text()
    assert not re.search(r"^#\s*(syntax|escape)\s*=", text, re.MULTILINE)
    assert "<<" not in text
    assert not [
        i for i in dockerfile if i.word in ("RUN", "COPY", "ADD") and re.match(r"--(mount|link|chmod|parents)", i.rest)
    ]
    plain = {
        "ARG",
        "FROM",
        "ENV",
        "RUN",
        "COPY",
        "WORKDIR",
        "LABEL",
        "USER",
        "EXPOSE",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert {i.word for i in dockerfile} <= plain


def test_stages_stand_on_known_ones(dockerfile: list[Instruction]) -> None:
    arguments = {i.rest.partition("=")[0] for i in dockerfile if i.word == "ARG"}
    known: set[str] = set()
    for base, name in (i.rest.split(" AS ") for i in dockerfile if i.word == "FROM"):
        assert base in known or base == "${BASE_IMAGE}"
        known.add(name)
    assert {"router", "worker"} <= known
    assert {
        "BASE_IMAGE",
        "PIP_INDEX_URL",
        "PIP_EXTRA_INDEX_URL",
        "PIP_NO_INDEX",
        "WHEELS",
        "TORCH_INDEX_URL",
    } <= arguments
    assert "ARG BASE_IMAGE=python:3.11-slim" in [f"{i.word} {i.rest}" for i in dockerfile]
    for i in dockerfile:
        if i.word == "COPY" and i.rest.startswith("--from="):
            assert i.rest.split()[0].removeprefix("--from=") in known


def test_sources_exist_and_are_in_the_build_context(root: Path, dockerfile: list[Instruction]) -> None:
    let_in = [line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((root / name).exists() for name in let_in if name not in ("README.md", "LICENSE"))
    copied: set[str] = set()
    for i in dockerfile:
        if i.word != "COPY" or i.rest.startswith("--from="):
            continue
        for source in i.rest.split()[:-1]:
            path = source.replace("${WHEELS}", "deploy/wheels").rstrip("/")
            assert path in let_in, f"{path} is not in the build context"
            copied.add(path)
    assert copied == set(let_in), "the build context holds what no image takes"


@pytest.mark.parametrize(
    ("stage", "packages", "extra"), [("router", ROUTER_PACKAGES, "router"), ("worker", WORKER_PACKAGES, "server")]
)
def test_each_image_takes_its_packages(
    root: Path, dockerfile: list[Instruction], stage: str, packages: set[str], extra: str
) -> None:
    sources = {rest.split("/")[0] for rest in of_stage(dockerfile, f"{stage}-build", "COPY")} - {"deploy"}
    assert sources == packages
    runs = " ".join(of_stage(dockerfile, f"{stage}-build", "RUN"))
    assert f'".[{extra}]"' in runs
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]


@pytest.mark.parametrize("stage", ["router", "worker"])
def test_runs_as_a_numbered_user_under_tini(dockerfile: list[Instruction], stage: str) -> None:
    assert of_stage(dockerfile, stage, "USER") == ["10001:10001"]
    assert of_stage(dockerfile, stage, "ENTRYPOINT") == ['["tini", "--"]']
    after_user = [i.word for i in dockerfile if i.stage == stage]
    assert "RUN" not in after_user[after_user.index("USER") :]
    environment = " ".join(of_stage(dockerfile, "base", "ENV") + of_stage(dockerfile, stage, "ENV"))
    for name in ("PYTHONDONTWRITEBYTECODE=1", "HOME=/tmp", "HF_HOME=/models"):
        assert name in environment, name


def test_health_check_and_command_are_ours(dockerfile: list[Instruction], parse_pando: Callable[..., Any]) -> None:
    (check,) = of_stage(dockerfile, "router", "HEALTHCHECK")
    given = parse_pando(json_list(check.partition("CMD ")[2]))
    (command,) = of_stage(dockerfile, "router", "CMD")
    settings = parse_pando(json_list(command))
    assert given.target == f"127.0.0.1:{settings.port}"
    (ports,) = of_stage(dockerfile, "router", "EXPOSE")
    assert ports.split() == [str(settings.port), str(settings.http_port), str(settings.admin_port)]


def test_router_image_needs_neither_torch_nor_ray(root: Path, tmp_path: Path) -> None:
    """Only what the image holds lies on the path, and what it does not hold cannot be imported."""
    for package in ROUTER_PACKAGES:
        shutil.copytree(
            root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
        )
    program = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    names = {"torch", "ray", "triton", "safetensors", "transformers", "worker", "kernels", "control", "bench"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is not in the router image", name=name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv[1])
import router.process, router.__main__
import pando.cli, pando.client, pando.commands.look, pando.commands.serve, pando.commands.talk
assert router.__file__.startswith(sys.argv[1]), router.__file__
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def json_list(text: str) -> list[str]:
    import json

    found = json.loads(text)
    assert isinstance(found, list)
    return found
