"""Pando: multi-tenant LLM serving with prefix-cache sharing. This package is what users touch."""

__version__ = "0.1.0"
