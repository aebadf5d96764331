"""The native CPU operations: compiled once for this processor by the compiler that is there, then kept.

Knows files and a compiler; nothing of tensors. Invariant: the cache folder and the library belong to this user alone,
and a library appears under its name whole or not at all.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-O3", "-march=native", "-std=c++20", "-pthread", "-fPIC", "-shared")
COMPILERS = ("c++", "g++")
SWITCH = "KERNELS_NATIVE"
"""Set to 0, this environment variable keeps the operations in plain torch."""
COMPILE_S = 120


@cache
def library() -> ctypes.CDLL | None:
    """The operations, None where there is no compiler, or it fails, or `SWITCH` says so."""
    if os.environ.get(SWITCH) == "0":
        return None
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        log.info("no C++ compiler: CPU operations stay in plain torch")
        return None
    try:
        return ctypes.CDLL(str(built(compiler, cache_folder())))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("CPU operations stay in plain torch: %s", error)
        return None


def cache_folder() -> Path:
    """Where libraries are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pando" / "native"


def built(compiler: str, folder: Path) -> Path:
    """The library of these sources for this processor in `folder`, compiled if it is not there. Raises `OSError` for a
    folder that others may write to, `SubprocessError` where the compiler fails."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} must belong to this user alone")
    target = folder / f"cpu-{_digest(compiler)}.so"
    if not target.exists():
        _compile(compiler, target)
    return target


def _compile(compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
        subprocess.run(
            [compiler, *FLAGS, *sources, "-o", str(fresh)], check=True, capture_output=True, timeout=COMPILE_S
        )
        fresh.chmod(0o700)
        fresh.replace(target)


def _digest(compiler: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(repr((FLAGS, str(Path(compiler).resolve()), _processor())).encode())
    return digest.hexdigest()


def _processor() -> str:
    """What the processor can do, as far as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("flags", "Features", "model name"))))
