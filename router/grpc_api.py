"""The inference service: messages in, `Checked` requests on, messages out.

Knows the .proto and nothing of placement or workers. Identity and errors are the gate's.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from pando.v1 import inference_pb2 as pb
from pando.v1 import inference_pb2_grpc
from router.generation import Generation, TextDelta, Usage
from router.interceptors import Call, RawCheck
from router.model_card import ModelCard
from router.tokenizer import Tokenizer
from router.validation import (
    check_length,
    check_messages,
    check_model,
    check_request,
    check_token_ids,
    one_prompt_only,
    wrong,
)

_FINISH = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "cancelled": pb.FINISH_REASON_CANCELLED,
    "error": pb.FINISH_REASON_ERROR,
}

RAW_CHECKS: Mapping[str, RawCheck] = {
    "/pando.v1.Inference/Generate": one_prompt_only(2, 3, 4),
    "/pando.v1.Inference/GenerateStream": one_prompt_only(2, 3, 4),
    "/pando.v1.Inference/Tokenize": one_prompt_only(2, 3),
    "/pando.v1.Prefixes/PublishPrefix": one_prompt_only(2, 3, 4),
}


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """`pando.v1.Inference`. `card` gives the model as the fleet serves it now; `block_size` is the fleet's."""

    def __init__(
        self, generation: Generation, tokenizer: Tokenizer, card: Callable[[], ModelCard], *, block_size: int
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._card = card
        self._block_size = block_size

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> pb.GenerateResponse:
        card = self._card()
        checked = check_request(request, card)
        response = pb.GenerateResponse(model=card.name, answers=[pb.Answer(index=i) for i in range(checked.n)])
        texts: list[list[str]] = [[] for _ in range(checked.n)]
        async with aclosing(self._generation.run(call.tenant, checked, card, call.deadline)) as deltas:
            async for delta in deltas:
                answer = response.answers[delta.index]
                texts[delta.index].append(delta.text)
                answer.token_ids.extend(delta.token_ids)
                answer.finish_reason = _FINISH[delta.finish]
                answer.matched_stop = delta.matched_stop
                response.request_id = delta.request_id
                if delta.usage is not None:
                    response.usage.CopyFrom(usage_message(delta.usage))
        for answer, text in zip(response.answers, texts, strict=True):
            answer.text = "".join(text)
        return response

    async def GenerateStream(self, request: pb.GenerateRequest, call: Call) -> AsyncGenerator[pb.GenerateChunk, None]:
        card = self._card()
        checked = check_request(request, card)
        async with aclosing(self._generation.run(call.tenant, checked, card, call.deadline)) as deltas:
            async for delta in deltas:
                yield _chunk(delta)

    async def Tokenize(self, request: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:
        check_model(request.model, self._card())
        kind = request.WhichOneof("prompt")
        if kind == "text":
            return pb.TokenizeResponse(token_ids=await self._tokenizer.encode(request.text))
        if kind == "chat":
            return pb.TokenizeResponse(token_ids=await self._tokenizer.encode_chat(check_messages(request.chat)))
        raise wrong("prompt", "must be exactly one of text and chat")

    async def Detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:
        card = self._card()
        check_model(request.model, card)
        check_length("token_ids", request.token_ids, card.context_length, card)
        check_token_ids("token_ids", request.token_ids, card)
        return pb.DetokenizeResponse(text=await self._tokenizer.decode(array("I", request.token_ids)))

    async def ListModels(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        card = self._card()
        model = pb.Model(
            name=card.name,
            context_length=card.context_length,
            vocab_size=card.vocab_size,
            block_size=self._block_size,
        )
        return pb.ListModelsResponse(models=[model])


def usage_message(usage: Usage) -> pb.Usage:
    """Usage as it goes over the wire: prompt_tokens = computed + cached_tokens, each split adding up."""
    found = usage.found
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=found.cached_tokens,
        cached_by_tier=pb.CachedByTier(device=found.cached_device, cpu=found.cached_cpu, remote=found.cached_remote),
        cached_by_scope=pb.CachedByScope(
            own=found.cached_tokens - found.cached_published, published=found.cached_published
        ),
        predicted_cached_tokens=usage.predicted_cached,
        blocks_copied=found.blocks_copied,
        queue_ms=found.queue_ms,
        ttft_ms=usage.ttft_ms,
        total_ms=usage.total_ms,
        worker=usage.worker,
        attempts=usage.attempts,
    )


def _chunk(delta: TextDelta) -> pb.GenerateChunk:
    return pb.GenerateChunk(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=_FINISH[delta.finish],
        matched_stop=delta.matched_stop,
        usage=None if delta.usage is None else usage_message(delta.usage),
        request_id=delta.request_id,
    )
