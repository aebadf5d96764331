"""`pando key`: what it prints makes a tenants file that lets the key in."""

from __future__ import annotations

from pathlib import Path

import pytest

from pando.cli import main
from router.auth import open_authenticator


@pytest.mark.parametrize("name", ["alice", "team.a-1"])
def test_the_printed_lines_let_the_printed_key_in(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["key", name]) == 0
    printed = capsys.readouterr()
    path = tmp_path / "tenants.toml"
    path.write_text(printed.out)
    key = printed.err.split()[-1]
    assert key not in printed.out
    tenants = open_authenticator(str(path), "0.0.0.0")
    assert tenants.tenant([("authorization", f"Bearer {key}")]).id == name


def test_a_name_that_no_tenant_can_have(capsys: pytest.CaptureFixture) -> None:
    assert main(["key", 'a"b']) == 2
    assert "tenant name" in capsys.readouterr().err
