"""Pando: multi-tenant LLM serving with prefix-cache sharing. This package is what users touch.

`pando.Client`, `pando.AsyncClient` and the results are imported when they are first used: the command line and the
servers need none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pando import errors
    from pando.client import Answer, AsyncClient, Chunk, Client, Generation, Model, Prefix, Usage

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AsyncClient",
    "Chunk",
    "Client",
    "Generation",
    "Model",
    "Prefix",
    "Usage",
    "__version__",
    "errors",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("pando.errors")
    if name in __all__:
        return getattr(importlib.import_module("pando.client"), name)
    raise AttributeError(f"module 'pando' has no attribute '{name}'")
