"""What a finished checkpoint is asked: loss by position, greedy text, close decisions, agreement with an oracle.

Knows nothing of training. Everything is computed from the folder as written, in float32.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from bench.pando_tiny.corpus import END, END_OF_TEXT, Turn, render
from bench.pando_tiny.model import Llama

BUCKETS = (0, 256, 512, 1024, 2048, 4096, 8192)
_WINDOWS = 6

PROMPTS = (
    "The with statement is used to",
    "def main(argv=None):\n    ",
    "Return a list of",
    render([Turn("user", "What does str.split do?")]) + "<|assistant|>\n",
    render([Turn("user", "What does textwrap.wrap do?")]) + "<|assistant|>\n",
    render([Turn("system", "You are a helpful assistant."), Turn("user", "Explain heapq.heappush.")])
    + "<|assistant|>\n",
    render([Turn("system", "You answer in plain English."), Turn("user", "Hello! Who are you?")]) + "<|assistant|>\n",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A greedy continuation; `gaps` is how far the best logit was ahead of the second at each step."""

    prompt: str
    text: str
    gaps: tuple[float, ...]


@torch.no_grad()
def loss_by_position(model: Llama, stream: Tensor) -> dict[str, float]:
    """Mean loss in nats per token of windows over `stream` (at most 8,192 tokens each), by position in the window."""
    length = min(BUCKETS[-1], model.shape.max_position_embeddings, len(stream) - 1)
    windows = max(1, min(_WINDOWS, (len(stream) - 1) // length))
    total = torch.zeros(length, dtype=torch.float64)
    for window in range(windows):
        ids = stream[window * length : (window + 1) * length + 1].long()
        total += F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none").double()
    mean = total / windows
    pairs = itertools.pairwise(BUCKETS)
    return {f"{low}-{min(high, length)}": round(mean[low:high].mean().item(), 4) for low, high in pairs if low < length}


@torch.no_grad()
def greedy(model: Llama, tokenizer: Tokenizer, prompt: str, max_tokens: int) -> Sample:
    """Greedy text up to an end token, without a cache: the plainest way to the right answer."""
    ids = tokenizer.encode(prompt).ids
    start, ends = len(ids), {tokenizer.token_to_id(END), tokenizer.token_to_id(END_OF_TEXT)}
    gaps: list[float] = []
    for _ in range(max_tokens):
        best = model(torch.tensor([ids]))[0, -1].topk(2)
        gaps.append((best.values[0] - best.values[1]).item())
        if (chosen := int(best.indices[0])) in ends:
            break
        ids.append(chosen)
    return Sample(prompt, tokenizer.decode(ids[start:]), tuple(gaps))


def close_calls(samples: Sequence[Sample], gap: float) -> float:
    """Share of greedy steps that were decided by less than `gap`."""
    gaps = [value for sample in samples for value in sample.gaps]
    return sum(value < gap for value in gaps) / max(1, len(gaps))


@torch.no_grad()
def oracle_difference(folder: Path, model: Llama, tokenizer: Tokenizer) -> float | None:
    """Largest difference of logits to the oracle's over the prompts; None where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    worst = 0.0
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        worst = max(worst, (oracle(ids).logits - model(ids)).abs().max().item())
    return worst
