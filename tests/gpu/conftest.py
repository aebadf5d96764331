"""Everything here needs a CUDA device, and a process of its own: elsewhere in the suite Triton is interpreted."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton is interpreted in this process: run `make gpu-test`")
