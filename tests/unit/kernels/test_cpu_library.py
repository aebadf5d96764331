"""The native library: compiled once, kept for this user alone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kernels import cpu_library


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("c++")
    assert found is not None
    return found


def test_a_library_is_compiled_once_and_privately(tmp_path: Path, compiler: str) -> None:
    folder = tmp_path / "cache"
    first = cpu_library.built(compiler, folder)
    when = first.stat().st_mtime_ns
    assert cpu_library.built(compiler, folder) == first
    assert first.stat().st_mtime_ns == when
    assert folder.stat().st_mode & 0o077 == 0
    assert list(folder.iterdir()) == [first]


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, compiler: str) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError):
        cpu_library.built(compiler, tmp_path)


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path) -> None:
    false = shutil.which("false")
    assert false is not None
    with pytest.raises(subprocess.CalledProcessError):
        cpu_library.built(false, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu_library.library.__wrapped__() is None


def test_the_switch_keeps_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_library.SWITCH, "0")
    assert cpu_library.library.__wrapped__() is None
