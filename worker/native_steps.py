"""Steps in one native call each, where the CPU has native code for all of the model.

Knows a decoder's native side and its cache; nothing of batches. Invariant: a step gives the tokens that the plain path
gives, within rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import kernels
from worker import sampler
from worker.kv_cache import KVCache
from worker.models.decoder import Decoder
from worker.step_inputs import StepInputs


class NativeSteps:
    """Runs them one after the other, each on the calling thread."""

    def __init__(self, stack: kernels.CpuStack, layers_kv: Sequence[torch.Tensor]) -> None:
        self._stack, self._layers_kv = stack, layers_kv
        self._drawn: list[int] = []

    def run(self, inputs: StepInputs) -> list[int]:
        """A token id for each draw. Block copies have been made."""
        before, self._drawn = self._drawn, []
        step = inputs.step
        for token, draw in inputs.followed:
            if draw < len(before):  # not of a step that failed
                step.set_token(token, before[draw])
        self._drawn = self._greedy(inputs) if sampler.is_greedy(inputs.draws) else self._sampled(inputs)
        return self._drawn

    def _greedy(self, inputs: StepInputs) -> list[int]:
        tokens = self._stack.most_likely(inputs.step, self._layers_kv)
        return tokens if inputs.drawn_from is None else [tokens[row] for row in inputs.drawn_from]

    def _sampled(self, inputs: StepInputs) -> list[int]:
        logits = self._stack.logits(inputs.step, self._layers_kv)
        if inputs.drawn_from is not None:
            logits = logits[inputs.drawn_from]
        drawn: list[int] = sampler.start(logits, inputs.draws).tolist()
        return drawn


def native_steps(decoder: Decoder, cache: KVCache) -> NativeSteps | None:
    """None where steps go operation by operation: on a device, without a compiler, with sinks, KV in fewer bits."""
    stack, layers = decoder.stack, cache.layers
    if stack is None or decoder.config.sinks or not stack.takes_steps(layers):
        return None
    return NativeSteps(stack, layers)
