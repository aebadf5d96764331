"""Drawing tokens on the CPU by native code: `native/sampling.cpp`, the same tokens as the twin in NumPy, to the last.

Knows tensors and pointers. Invariant: what native code does not take is drawn by the twin.
"""

from __future__ import annotations

import torch

from kernels import sampling
from kernels.cpu_calls import native, num_threads
from kernels.sampling import MOST_TOKENS, Draws

_NO_MEMORY, _NO_SUCH_TOKEN = 1, 2


def sample(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """As `kernels.sample`. Raises IndexError for a banned token that the vocabulary does not have."""
    if not _takes(logits):
        return sampling.sample(logits, draws)
    rows, banned = draws.rows, draws.banned
    assert rows.is_contiguous() and banned.is_contiguous() and len(rows) == len(logits)
    tokens = torch.empty(len(logits), dtype=torch.int64)
    wide = (logits.data_ptr(), logits.stride(0), rows.data_ptr(), *logits.shape)
    failed = native().pando_sample(*wide, banned.data_ptr(), len(banned), tokens.data_ptr(), num_threads())
    if failed == _NO_MEMORY:
        raise MemoryError("no memory to draw tokens in")
    if failed == _NO_SUCH_TOKEN:
        raise IndexError("a banned token is not in the vocabulary")
    return tokens


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """As `kernels.argmax`."""
    if not _takes(logits):
        return sampling.argmax(logits)
    tokens = torch.empty(len(logits), dtype=torch.int64)
    native().pando_argmax(logits.data_ptr(), logits.stride(0), *logits.shape, tokens.data_ptr(), num_threads())
    return tokens


def _takes(logits: torch.Tensor) -> bool:
    size = logits.shape[1]
    return logits.dtype == torch.float32 and logits.stride(1) == 1 and 0 < size <= MOST_TOKENS
