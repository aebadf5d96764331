"""The Python client without a server: options to messages, messages to results, statuses to typed errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

import pando
from pando import messages
from pando.client import AsyncClient, Client
from pando.errors import FieldViolation, InternalError, InvalidRequest, PandoError, Unavailable
from pando.v1 import inference_pb2 as pb
from pando.v1 import prefixes_pb2


class Failed(grpc.RpcError):
    """A failed call as gRPC hands it out."""

    def __init__(self, code: grpc.StatusCode, words: str = "", metadata: tuple[tuple[str, Any], ...] = ()) -> None:
        self._told = (code, words, metadata)

    def code(self) -> grpc.StatusCode:
        return self._told[0]

    def details(self) -> str:
        return self._told[1]

    def trailing_metadata(self) -> tuple[tuple[str, Any], ...]:
        return self._told[2]


def with_details(*details: Any) -> tuple[tuple[str, bytes], ...]:
    status = status_pb2.Status()
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return (("x-other", b"1"), ("grpc-status-details-bin", status.SerializeToString()))


def test_the_package_gives_the_clients_and_loads_them_late() -> None:
    assert pando.Client is Client and pando.AsyncClient is AsyncClient
    assert pando.errors.PandoError is PandoError
    with pytest.raises(AttributeError):
        pando.nothing  # noqa: B018
    code = "import sys, pando; assert 'grpc' not in sys.modules; pando.Client; assert 'grpc' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={"PYTHONPATH": ":".join(sys.path)})


def test_the_client_needs_no_part_of_the_server() -> None:
    code = (
        "import sys, pando.client\n"
        "heavy = {'torch', 'ray', 'redis', 'tokenizers', 'jinja2', 'aiohttp', 'router', 'worker', 'kvstore', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={"PYTHONPATH": ":".join(sys.path)})


def test_every_option_reaches_its_field() -> None:
    request = messages.generate_request(
        {
            "text": "x", "max_tokens": 5, "min_tokens": 1, "temperature": 0.5, "top_k": 3, "top_p": 0.25,
            "min_p": 0.125, "presence_penalty": 1.0, "frequency_penalty": 1.5, "repetition_penalty": 2.0,
            "seed": 2**64 - 1, "n": 2, "stop": "end", "stop_token_ids": [7], "ignore_eos": True, "logprobs": 1,
            "prompt_logprobs": 2, "logit_bias": {3: 0.5}, "regex": "a+", "model": "m", "priority": -1,
            "request_id": "r", "no_store": True, "stream_interval": 4, "timeout": 9.0,
        }
    )  # fmt: skip
    sampling = request.sampling
    assert (request.text, request.model, request.priority, request.request_id) == ("x", "m", -1, "r")
    assert (request.cache.no_store, request.stream_interval) == (True, 4)
    assert (sampling.max_tokens, sampling.seed, list(sampling.stop), sampling.regex) == (5, 2**64 - 1, ["end"], "a+")
    unset = {"json_schema", "choice"}
    assert {field.name for field, _ in sampling.ListFields()} == set(pb.Sampling.DESCRIPTOR.fields_by_name) - unset
    assert list(messages.generate_request({"text": "x", "choice": ["a", "b"]}).sampling.choice.options) == ["a", "b"]


def test_what_is_not_given_is_not_set() -> None:
    request = messages.generate_request({"text": "x", "max_tokens": None})  # type: ignore[typeddict-item]
    assert not request.sampling.ListFields() and not request.HasField("cache")
    assert messages.generate_request({"text": "x", "temperature": 0.0}).sampling.HasField("temperature")


def test_prompts_of_each_kind() -> None:
    assert list(messages.generate_request({"token_ids": [1, 2]}).token_ids.ids) == [1, 2]
    turns = messages.generate_request({"chat": [{"role": "user", "content": "hi"}]}).chat.messages
    assert [(turn.role, turn.content) for turn in turns] == [("user", "hi")]
    assert messages.tokenize_request({"text": "x", "model": "m"}).model == "m"
    published = messages.publish_request({"text": "x", "scope": "group", "group": "g", "ttl_s": 1.5, "warm": True})
    assert (published.scope, published.group, published.warm) == (prefixes_pb2.PREFIX_SCOPE_GROUP, "g", True)
    assert published.ttl.ToMilliseconds() == 1500
    assert messages.publish_request({"text": "x"}).scope == prefixes_pb2.PREFIX_SCOPE_OWN


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"text": "x", "token_ids": [1]},
        {"text": b"\xff"},
        {"text": "\ud800"},
        {"text": 3},
        {"token_ids": [2**40]},
        {"token_ids": ["x"]},
        {"chat": [{"role": "user", "words": "x"}]},
        {"chat": "hello"},
        {"text": "x", "max_tokens": 2**31},
        {"text": "x", "max_tokens": "many"},
        {"text": "x", "seed": -1},
        {"text": "x", "stop": [3]},
        {"text": "x", "stream_interval": -1},
    ],
)
def test_values_no_field_can_hold_are_typed_errors_too(options: Any) -> None:
    with pytest.raises(InvalidRequest):
        messages.generate_request(options)


def test_an_unknown_option_is_a_mistake_of_the_program() -> None:
    for make in (messages.generate_request, messages.tokenize_request, messages.publish_request):
        with pytest.raises(TypeError, match="max_token"):
            make({"text": "x", "max_token": 3})  # type: ignore[operator]
    with pytest.raises(InvalidRequest, match="scope"):
        messages.publish_request({"text": "x", "scope": "all"})


def test_a_key_and_a_tenant_contradict_each_other() -> None:
    with pytest.raises(InvalidRequest):
        Client("127.0.0.1:1", api_key="k", tenant="t")


def test_results_are_plain_frozen_values() -> None:
    usage = pb.Usage(prompt_tokens=9, cached_tokens=4, cached_by_tier=pb.CachedByTier(device=3, cpu=1))
    answers = [
        pb.Answer(index=i, text=f"t{i}", token_ids=[i], finish_reason=pb.FINISH_REASON_STOP, matched_stop="s")
        for i in range(2)
    ]
    result = messages.generation(pb.GenerateResponse(request_id="r", model="m", answers=answers, usage=usage))
    assert (result.text, result.token_ids, result.finish_reason, result.matched_stop) == ("t0", (0,), "stop", "s")
    assert (result.answers[1].text, result.usage.prompt_tokens, result.usage.cached_device) == ("t1", 9, 3)
    with pytest.raises(AttributeError):
        result.usage.prompt_tokens = 3  # type: ignore[misc]
    early = messages.chunk(pb.GenerateChunk(text="a", token_ids=[1], request_id="r"))
    assert (early.text, early.finish_reason, early.usage) == ("a", "", None)
    last = messages.chunk(pb.GenerateChunk(finish_reason=pb.FINISH_REASON_LENGTH, usage=usage))
    assert last.finish_reason == "length" and last.usage is not None and last.usage.cached_cpu == 1


def test_an_error_has_all_that_came_with_it() -> None:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(250)
    metadata = with_details(
        error_details_pb2.ErrorInfo(reason="WORKER_LOST", domain="pando", metadata={"error_id": "e1"}),
        retry,
        error_details_pb2.QuotaFailure(
            violations=[error_details_pb2.QuotaFailure.Violation(subject="tenant:a", description="d")]
        ),
        error_details_pb2.Help(),
    )
    error = messages.pando_error(Failed(grpc.StatusCode.UNAVAILABLE, "words", metadata), "h:1")
    assert type(error) is Unavailable
    assert (error.message, error.reason, error.retry_after_s, error.error_id) == ("words", "WORKER_LOST", 0.25, "e1")
    assert error.violations == (FieldViolation("tenant:a", "d"),)


@pytest.mark.parametrize("metadata", [(), None, (("grpc-status-details-bin", b"\xff\xff"),)])
def test_a_status_that_is_not_ours_is_typed_by_its_code(metadata: Any) -> None:
    error = messages.pando_error(Failed(grpc.StatusCode.UNKNOWN, "", metadata), "h:1")
    assert type(error) is InternalError and error.message == "UNKNOWN"


def test_nobody_there_is_unavailable_within_the_deadline() -> None:
    with Client("127.0.0.1:1", timeout=2.0) as client:
        with pytest.raises(Unavailable, match=r"^nothing answers at 127\.0\.0\.1:1$"):
            client.generate(text="x")
        with pytest.raises(Unavailable, match=r"^nothing answers at 127\.0\.0\.1:1$"):
            next(client.stream(text="x"))


@pytest.mark.parametrize(
    ("code", "words", "told"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: ...", "nothing answers at h:1"),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", "the connection to h:1 was lost"),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", "h:1 does not serve this: it is not the gRPC port of a"),
        (grpc.StatusCode.UNIMPLEMENTED, "logprobs is of a later version", "logprobs is of a later version"),
    ],
)
def test_what_gRPC_says_itself_is_told_with_the_address(code: grpc.StatusCode, words: str, told: str) -> None:
    assert messages.pando_error(Failed(code, words), "h:1").message.startswith(told)


@pytest.mark.asyncio
async def test_nobody_there_is_unavailable_for_the_async_client() -> None:
    async with AsyncClient("127.0.0.1:1", timeout=2.0) as client:
        with pytest.raises(Unavailable):
            await client.generate(text="x")
        with pytest.raises(Unavailable):
            async for _ in client.stream(text="x"):
                pass
