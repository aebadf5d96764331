"""The native library's functions and structures, as ctypes calls them: `face.cpp`, `plan.cpp`, `layers.h` and `ops.h`
of `native`.

Knows pointers, sizes and threads. Invariant: the fields here are those of the headers, in their order.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from kernels.cpu_library import library

Pointer = ctypes.c_void_p
Count = ctypes.c_int64


_chosen = {"threads": 0}


def num_threads() -> int:
    """Threads of one native operation: what `set_num_threads` said last, before that torch's own number."""
    return _chosen["threads"] or torch.get_num_threads()


def set_num_threads(count: int) -> None:
    """From now on, in this process; 0 for as many as torch has. Torch's own threads wait busily after each of its
    operations and take the cores from these: a process whose work is native gives torch one."""
    _chosen["threads"] = count


class Packed(ctypes.Structure):
    """A weight in panels; `depth` in words."""

    _fields_ = [("panels", Pointer), ("bias", Pointer), ("columns", Count), ("depth", Count)]


class Shape(ctypes.Structure):
    """How heads lie in a step and in the cache; a stride in numbers, a window of 0 is none."""

    _fields_ = [
        *((name, Count) for name in ("num_heads", "num_kv_heads", "head_dim", "block_size", "block_stride", "window")),
        ("scale", ctypes.c_float),
    ]


class Teams(ctypes.Structure):
    """Whose queries a step has."""

    _fields_ = [
        *((name, Pointer) for name in ("tables", "members", "teams")),
        *((name, Count) for name in ("num_teams", "most_rows", "table_stride")),
        ("taken", Pointer),
    ]


class PlanOrder(ctypes.Structure):
    """A step to be planned, and into how large parts."""

    _fields_ = [
        *((name, Pointer) for name in ("query_lens", "context_lens", "tables")),
        *((name, Count) for name in ("num_seqs", "num_tokens", "stride", "block_size")),
        ("windows", Pointer),
        *((name, Count) for name in ("num_windows", "most_tokens", "most_sequences", "num_kv_heads", "threads")),
    ]


class PlanAnswer(ctypes.Structure):
    """Where a plan goes, and its counts."""

    _fields_ = [
        *((name, Pointer) for name in ("slots", "tables", "members", "teams")),
        *((name, Count) for name in ("num_teams", "most_rows")),
    ]


class Layer(ctypes.Structure):
    """Weights of one decoder layer."""

    _fields_ = [
        ("attention_norm", Pointer),
        ("qkv", Packed),
        ("qk_norm", Pointer),
        ("output", Packed),
        ("mlp_norm", Pointer),
        ("gate_up", Packed),
        ("down", Packed),
        ("window", Count),
    ]


class Frequencies(ctypes.Structure):
    """Of rotary angles."""

    _fields_ = [("of", Pointer), ("exact", Count)]


class Stack(ctypes.Structure):
    """An embedding, layers one after the other, and the norm behind them."""

    _fields_ = [
        ("embedding", Pointer),
        ("vocab_size", Count),
        ("frequencies", Frequencies),
        ("layers", ctypes.POINTER(Layer)),
        ("num_layers", Count),
        ("norm", Pointer),
        ("head", Packed),
        ("hidden_size", Count),
        ("intermediate_size", Count),
        ("norm_eps", ctypes.c_float),
        ("shape", Shape),
    ]


class WholeStep(ctypes.Structure):
    """A step as one array of numbers, and how it is to be planned."""

    _fields_ = [
        ("numbers", Pointer),
        *((name, Count) for name in ("num_seqs", "num_wanted", "num_tokens", "width")),
        ("windows", Pointer),
        *((name, Count) for name in ("num_windows", "most_tokens", "most_sequences")),
        ("spent", Pointer),
    ]


class Tokens(ctypes.Structure):
    """A step's tokens, and which of them are wanted."""

    _fields_ = [
        ("rows", Count),
        *((name, Pointer) for name in ("token_ids", "positions", "slots")),
        ("teams", Teams),
        ("last", Pointer),
        ("num_last", Count),
        ("last_teams", Teams),
        ("spent", Pointer),
    ]


_REFUSALS: dict[int, tuple[type[Exception], str]] = {
    1: (MemoryError, "no memory for a step"),
    2: (ValueError, "a sequence computes at least one token and at most its context"),
    3: (ValueError, "a block table does not cover its context"),
    4: (ValueError, "a block table has a hole where it is read"),
    5: (ValueError, "a block table has a hole where the step writes"),
    6: (IndexError, "a token id is not in the vocabulary"),
}


def check(verdict: int) -> None:
    """Raises what a verdict of `plan.h` stands for; 0 is good."""
    if verdict:
        kind, words = _REFUSALS[verdict]
        raise kind(words)


@cache
def native() -> ctypes.CDLL:
    """The library, its functions with their types: p a pointer, i an int64, f a float. Raises RuntimeError where there
    is none."""
    found = library()
    if found is None:
        raise RuntimeError("there are no native operations here")
    kinds = {"p": Pointer, "i": Count, "f": ctypes.c_float}
    for name, arguments in (
        ("pando_panel", ""),
        ("pando_has_bf16", ""),
        ("pando_large_pages", "pi"),
        ("pando_linear", "ppp" + "iii"),
        ("pando_gated_linear", "ppp" + "iii"),
        ("pando_norm", "pppp" + "iifi"),
        ("pando_rotary_write", "ppppp" + "ipi"),
        ("pando_attention", "pipppp" + "ii"),
        ("pando_plan", "pp"),
        ("pando_layers", "pppp" + "ii"),
        ("pando_step", "ppppp" + "ii"),
        ("pando_argmax", "piiipi"),
        ("pando_sample", "pipii" + "pipi"),
    ):
        getattr(found, name).argtypes = [kinds[kind] for kind in arguments]
    found.pando_panel.restype = found.pando_has_bf16.restype = found.pando_plan.restype = Count
    found.pando_layers.restype = found.pando_step.restype = Count
    return found
