"""Everything here needs a CUDA device."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
