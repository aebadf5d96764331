"""Checks that the committed gRPC stubs are what proto/ generates; `--write` writes them anew.

Run as `python -m tests.check_stubs` from the repository root.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"


def generate(target: Path) -> list[Path]:
    """Generate all stubs below `target`; returns their paths relative to it."""
    sources = sorted(str(path) for path in PROTO.rglob("*.proto"))
    include = str(Path(protoc.__file__).parent / "_proto")
    outputs = [f"--python_out={target}", f"--pyi_out={target}", f"--grpc_python_out={target}"]
    if protoc.main(["protoc", f"-I{PROTO}", f"-I{include}", *outputs, *sources]) != 0:
        raise SystemExit("protoc failed")
    return sorted(path.relative_to(target) for path in target.rglob("*_pb2*.py*"))


def stale(generated_root: Path) -> list[str]:
    """Stubs that are missing, differ, or have no source any more."""
    fresh = set(generate(generated_root))
    present = (path for path in (ROOT / "pando").rglob("*_pb2*.py*") if "__pycache__" not in path.parts)
    committed = {path.relative_to(ROOT) for path in present}
    differing = {path for path in fresh & committed if _differs(generated_root / path, ROOT / path)}
    return sorted(str(path) for path in (fresh ^ committed) | differing)


def _differs(one: Path, other: Path) -> bool:
    return one.read_bytes() != other.read_bytes()


def main() -> int:
    if "--write" in sys.argv[1:]:
        for path in generate(ROOT):
            print("wrote", path)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        wrong = stale(Path(folder))
    for path in wrong:
        print(f"{path}: not what proto/ generates; run `make proto`")
    print(f"stubs: {'stale' if wrong else 'up to date'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
