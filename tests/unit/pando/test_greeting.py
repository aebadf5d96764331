"""What `pando up` prints when it is ready: lines that work where they are pasted."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pando.commands import serve
from pando.settings import UpSettings

RUNNING: Any = SimpleNamespace(grpc="127.0.0.1:1", http="127.0.0.1:2", admin="127.0.0.1:3")


def pasted(**settings: Any) -> list[str]:
    return [line.strip() for line in serve.greeting(UpSettings(**settings), RUNNING, 1.0) if line.startswith("  ")]


def test_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some where/pando"])
    generate, grpcurl = pasted()
    assert generate == "'/some where/pando' generate 'Return a list of' --max-tokens 32 --target 127.0.0.1:1"
    assert grpcurl.startswith('grpcurl -plaintext -d \'{"text": "Return a list of"')


def test_with_keys_and_without_reflection() -> None:
    generate, grpcurl = pasted(tenants="t.toml")
    assert generate.endswith(" --api-key KEY")
    assert " -H 'authorization: Bearer KEY' " in grpcurl
    assert len(pasted(reflection="off")) == 1


def test_the_program_is_named_as_a_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "pando"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", os.defpath)
    assert serve.program() == str(script)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert serve.program() == "pando"
    monkeypatch.setattr(sys, "argv", ["/lib/pando/cli.py"])
    assert serve.program() == f"{sys.executable} -m pando.cli"
