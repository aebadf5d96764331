"""The public gRPC port as strangers see it: real server and tokenizer, and a fleet that answers by a fixed rule."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import logging
import random
import time
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import redis.asyncio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import pando
from kvstore.block import WorkerId
from pando.admin_client import AdminClient
from pando.cli import main
from pando.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from pando.model_folder import resolve_model
from pando.v1 import admin_pb2, admin_pb2_grpc, prefixes_pb2
from pando.v1 import inference_pb2 as pb
from pando.v1 import inference_pb2_grpc as stubs
from router.admin_api import RouterView
from router.admission import Admission
from router.auth import KeyedTenants, NamedTenants, key_hash
from router.dispatch import AdmissionReport, TokenDelta, TokenRequest
from router.fleet import WorkerState, WorkerView
from router.generation import Generation, derived_seed
from router.grpc_api import InferenceService
from router.health import HealthService
from router.interceptors import GateLimits
from router.metrics import Metrics
from router.model_card import read_model_card
from router.placement import Candidate, Placement, Prompt, place
from router.prefix_catalog import PrefixCatalog, PrefixRecord, Published
from router.prefix_registry import PrefixRegistry
from router.prefix_seal import PrefixSeal
from router.prefixes_api import PrefixesService
from router.publishing import Publishing
from router.purging import PurgeReport
from router.recent import Recent
from router.server import PublicServices, ServerOptions, admin_server, listen, public_server
from router.tokenizer import Tokenizer

MAX_MESSAGE = 1024 * 1024
LIMITS = GateLimits(request_s=20.0, first_message_s=0.5, slow_reader_s=0.5)
SECRET = "the prompt nobody may see"


class FakeStream:
    """What a fake fleet says, less what is dropped."""

    def __init__(self, deltas: AsyncGenerator[TokenDelta, None]) -> None:
        self.deltas = deltas
        self.dropped: set[int] = set()

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> TokenDelta:
        while (delta := await anext(self.deltas)).index in self.dropped:
            pass
        return delta

    def drop(self, index: int) -> None:
        self.dropped.add(index)

    async def aclose(self) -> None:
        await self.deltas.aclose()


@dataclass
class FakeFleet:
    """Answers "abcabc..." one token a delta; texts and behaviours are set by the test."""

    tokens: list[int] = field(default_factory=list)
    finish: str = "length"
    stop_token_id: int | None = None
    delay_s: float = 0.0
    error: Exception | None = None
    found: AdmissionReport = field(default_factory=AdmissionReport)
    requests: list[TokenRequest] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    open: int = 0
    home_names: tuple[str, ...] = ("w0", "w1")
    lost: tuple[str, ...] = ()

    def stream(self, request: TokenRequest) -> FakeStream:
        """Streams are kept, so that only whoever closes them closes them, not the garbage collector."""
        self.streams.append(FakeStream(self._stream(request)))
        return self.streams[-1]

    async def _stream(self, request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        if request.only in self.lost:
            raise Unavailable("lost")
        self.open += 1
        try:
            count = request.sampling.max_tokens if self.finish == "length" else len(self.tokens)
            for index in range(count):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self.error is not None and index == 2:
                    raise self.error
                last = index == count - 1
                for answer in range(1 + len(request.fork_seeds)):
                    yield TokenDelta(
                        first_index=index,
                        token_ids=(self.tokens[(index + answer) % len(self.tokens)],),
                        finish=self.finish if last else None,
                        stop_token_id=self.stop_token_id if last else None,
                        admission=self.found if index == answer == 0 else None,
                        worker="w0",
                        attempts=1,
                        predicted_cached=16,
                        index=answer,
                    )
        finally:
            self.open -= 1

    def homes(self, record: PrefixRecord) -> list[WorkerId]:
        return list(map(WorkerId, self.home_names))

    async def settle(self, published: Published) -> None:
        """Nothing is pinned."""


async def purge(tenant: str) -> PurgeReport:
    if tenant == "silent":
        raise Unavailable("not purged: no answer from w0", reason="PURGE_INCOMPLETE")
    return PurgeReport(device_blocks=5, cpu_blocks=4, remaining_blocks=3, workers=2, prefixes=1)


class House:
    """The servers, what they are made of, and ways to call them."""

    def __init__(self, fleet: FakeFleet, tokenizer: Tokenizer, public: str, admin: str, metrics: Metrics) -> None:
        self.fleet = fleet
        self.tokenizer = tokenizer
        self.public = public
        self.admin = admin
        self.metrics = metrics
        self.ready = True

    def client(self, **keywords: Any) -> pando.AsyncClient:
        return pando.AsyncClient(self.public, **{"tenant": "t", "timeout": 10.0} | keywords)

    @asynccontextmanager
    async def raw(self, method: str, kind: str = "unary_unary") -> AsyncIterator[Any]:
        async with grpc.aio.insecure_channel(self.public) as channel:
            yield getattr(channel, kind)(method)

    async def refusal(self, raw: bytes, method: str = "/pando.v1.Inference/Generate", **keywords: Any) -> Refusal:
        """How a call with these raw bytes fails."""
        async with self.raw(method) as call:
            try:
                await call(raw, **{"timeout": 10} | keywords)
            except grpc.aio.AioRpcError as error:
                return Refusal(error)
        raise AssertionError("the call went through")

    async def settled(self) -> None:
        """Every stream of the fleet is closed, soon."""
        for _ in range(100):
            if not self.fleet.open:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("a stream was left open")


class Refusal:
    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.words = error.details()
        self.metadata = dict(error.trailing_metadata() or ())
        self.initial = list(error.initial_metadata() or ())
        self.status = status_pb2.Status.FromString(self.metadata.get("grpc-status-details-bin", b""))

    def detail(self, kind: Any) -> Any:
        for detail in self.status.details:
            message = kind()
            if detail.Unpack(message):
                return message
        return None


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    made = Tokenizer(resolve_model("pando-tiny"), max_tokens=lambda: 8192)
    yield made
    made.close()


Start = Callable[..., Any]


@pytest_asyncio.fixture
async def start(tokenizer: Tokenizer, redis_url: str) -> AsyncIterator[Start]:
    """Starts a house; keywords: tenants file, admin key, limits, max_in_flight."""
    servers: list[grpc.aio.Server] = []
    registries: list[PrefixRegistry] = []

    async def make(
        *, tenants: Path | None = None, admin_key: str = "", limits: GateLimits = LIMITS, max_in_flight: int = 100
    ) -> House:
        metrics, admission = Metrics(), Admission(max_in_flight)
        fleet = FakeFleet(tokens=list(tokenizer.encode_now("abc")))
        options = ServerOptions(limits, MAX_MESSAGE, reflection=True)
        card = read_model_card("pando-tiny", resolve_model("pando-tiny"))
        generation = Generation(fleet, tokenizer, admission, metrics)
        inference = InferenceService(generation, tokenizer, lambda: card, block_size=16)
        client = redis.asyncio.Redis.from_url(redis_url)
        registry = PrefixRegistry(client, "api", PrefixSeal(b"s", "api"), PrefixCatalog(), model="pando-tiny")
        registries.append(registry)
        publishing = Publishing(registry, fleet, fleet, model="pando-tiny", block_size=16)
        prefixes = PrefixesService(publishing, tokenizer, admission, lambda: card, lambda _: 1, block_size=16)
        view = RouterView(
            "r1",
            metrics,
            admission,
            lambda: [VIEW],
            lambda: 7,
            lambda: True,
            lambda: 1.5,
            purge,
            {"r-1": RECENT}.get,
            explain,
        )
        house = House(fleet, tokenizer, "", "", metrics)
        health = HealthService(lambda: house.ready, ("pando.v1.Inference",))
        identity = KeyedTenants(tenants) if tenants else NamedTenants()
        public = public_server(PublicServices(inference, prefixes, health), identity, metrics, options)
        admin = admin_server(view, admin_key, options)
        house.public, house.admin = listen(public, "127.0.0.1", 0), listen(admin, "127.0.0.1", 0)
        for server in (public, admin):
            await server.start()
            servers.append(server)
        return house

    yield make
    for server in servers:
        await server.stop(0)
    for registry in registries:
        await registry.stop()


@pytest_asyncio.fixture
async def house(start: Start) -> House:
    return await start()


PAIR = [Candidate("w0", 16, 0, 1e4, 0.0, 0.0), Candidate("w1", 0, 0, 1e4, 0.0, 0.0, "queue full")]
RECENT = Recent(2, place(Prompt(20, 5, b"k"), PAIR), 12)


async def explain(tenant: str, request: pb.GenerateRequest) -> Placement:
    assert (tenant, request.text) == ("b", SECRET)
    return RECENT.placement


VIEW = WorkerView("w0", 3, WorkerState.READY, "127.0.0.1:1", "m", 42, 1, 2, 100, 60, 39, 500, 1e4, 38, "because")


def run_cli(*argv: str) -> str:
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(argv) == 0
    return out.getvalue()


def generate(**fields: Any) -> bytes:
    sampling = fields.pop("sampling", {})
    return pb.GenerateRequest(sampling=pb.Sampling(**sampling), **fields or {"text": SECRET}).SerializeToString()


# What was asked


@pytest.mark.asyncio
async def test_an_answer_and_what_it_took(house: House) -> None:
    house.fleet.found = AdmissionReport(
        cached_device=16, cached_cpu=8, cached_remote=4, cached_published=12, blocks_copied=1, queue_ms=2.5
    )
    async with house.client() as client:
        result = await client.generate(text="x" * 100, max_tokens=6, temperature=0.5, seed=9, request_id="mine")
    assert (result.finish_reason, result.request_id, result.model) == ("length", "mine", "pando-tiny")
    assert len(result.token_ids) == 6
    assert result.text == house.tokenizer.decode_now(result.token_ids)
    usage = result.usage
    assert usage.prompt_tokens == len(house.tokenizer.encode_now("x" * 100)) == len(house.fleet.requests[0].token_ids)
    assert (usage.completion_tokens, usage.cached_tokens, usage.predicted_cached_tokens) == (6, 28, 16)
    assert (usage.cached_device, usage.cached_cpu, usage.cached_remote) == (16, 8, 4)
    assert (usage.cached_own, usage.cached_published, usage.blocks_copied, usage.queue_ms) == (16, 12, 1, 2.5)
    assert (usage.worker, usage.attempts) == ("w0", 1)
    assert 0 < usage.ttft_ms <= usage.total_ms


@pytest.mark.asyncio
async def test_the_request_reaches_the_fleet_whole(house: House) -> None:
    async with house.client(tenant="acme") as client:
        await client.generate(
            token_ids=[5, 6, 7],
            max_tokens=3,
            min_tokens=1,
            temperature=0.25,
            top_k=9,
            top_p=0.5,
            min_p=0.125,
            seed=2**64 - 1,
            stop_token_ids=[11],
            priority=-3,
            no_store=True,
            ignore_eos=True,
            timeout=5,
        )
        await client.generate(text="x", max_tokens=1)
    sent, plain = house.fleet.requests
    assert (sent.tenant, sent.token_ids, sent.priority, sent.no_store) == ("acme", array("I", [5, 6, 7]), -3, True)
    sampling = sent.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.seed) == (3, 1, 2**64 - 1)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.25, 9, 0.5, 0.125)
    assert sampling.stop_token_ids == (11,)
    assert 4 < sent.deadline - asyncio.get_running_loop().time() < 5.1
    assert plain.sampling.stop_token_ids and not plain.no_store and len(plain.request_id) == 24


@pytest.mark.asyncio
async def test_a_stream_is_the_answer_in_pieces(house: House) -> None:
    async with house.client() as client:
        chunks = [chunk async for chunk in client.stream(text="x", max_tokens=9)]
        whole = await client.generate(text="x", max_tokens=9)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == list(whole.token_ids)
    assert [chunk.usage is not None for chunk in chunks] == [False] * 8 + [True]
    assert [chunk.finish_reason for chunk in chunks] == [""] * 8 + ["length"]
    assert len({chunk.request_id for chunk in chunks}) == 1


@pytest.mark.asyncio
async def test_a_stream_interval_gathers_tokens(house: House) -> None:
    async with house.client() as client:
        chunks = [chunk async for chunk in client.stream(text="x", max_tokens=9, stream_interval=4)]
    assert [len(chunk.token_ids) for chunk in chunks] == [1, 4, 4]


@pytest.mark.asyncio
async def test_characters_are_never_split(house: House) -> None:
    house.fleet.tokens = list(house.tokenizer.encode_now("\U0001f600\u65e5"))
    house.fleet.finish = "stop"
    assert len(house.fleet.tokens) > 2
    async with house.client() as client:
        chunks = [chunk async for chunk in client.stream(text="x")]
    assert "".join(chunk.text for chunk in chunks) == "\U0001f600\u65e5"
    assert all("\ufffd" not in chunk.text for chunk in chunks)


@pytest.mark.asyncio
async def test_a_stop_string_ends_the_answer_and_the_workers_part(house: House) -> None:
    house.fleet.tokens = list(house.tokenizer.encode_now("one two three four five six"))
    async with house.client() as client:
        result = await client.generate(text="x", max_tokens=1000, stop=["zzz", "ee fo"])
        chunks = [chunk async for chunk in client.stream(text="x", max_tokens=1000, stop="ee fo")]
    assert (result.text, result.finish_reason, result.matched_stop) == ("one two thr", "stop", "ee fo")
    assert "".join(chunk.text for chunk in chunks) == "one two thr"
    assert result.usage.completion_tokens == len(result.token_ids) < 30
    await house.settled()


@pytest.mark.asyncio
async def test_a_stop_token_is_named(house: House) -> None:
    house.fleet.finish, house.fleet.stop_token_id = "stop", house.fleet.tokens[-1]
    async with house.client() as client:
        result = await client.generate(text="x")
    assert (result.finish_reason, result.matched_stop) == ("stop", str(house.fleet.tokens[-1]))
    assert result.text == house.tokenizer.decode_now(house.fleet.tokens[:-1])
    assert list(result.token_ids) == house.fleet.tokens


@pytest.mark.asyncio
async def test_n_answers_have_seeds_of_their_own(house: House) -> None:
    house.fleet.found = AdmissionReport(cached_device=16, blocks_copied=1)
    async with house.client() as client:
        result = await client.generate(text="x" * 50, max_tokens=4, n=3, seed=7, request_id="r")
        chunks = [chunk async for chunk in client.stream(text="x", max_tokens=4, n=3)]
    assert [answer.index for answer in result.answers] == [0, 1, 2]
    assert all(len(answer.token_ids) == 4 and answer.finish_reason == "length" for answer in result.answers)
    assert (result.usage.completion_tokens, result.usage.cached_tokens, result.usage.blocks_copied) == (12, 16, 1)
    request = house.fleet.requests[0]
    assert (result.usage.prompt_tokens, request.request_id) == (len(request.token_ids), "r")
    seeds = [request.sampling.seed, *request.fork_seeds]
    assert seeds == [7, derived_seed(7, 1), derived_seed(7, 2)] and len(set(seeds)) == 3
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert sorted(chunk.index for chunk in chunks if chunk.finish_reason) == [0, 1, 2]


@pytest.mark.asyncio
async def test_a_stop_string_in_one_answer_lets_the_others_go_on(house: House) -> None:
    house.fleet.tokens = list(house.tokenizer.encode_now("one two three four five six"))
    async with house.client() as client:
        result = await client.generate(text="x", max_tokens=1000, n=3, stop="ee fo")
    (stream,) = house.fleet.streams
    assert stream.dropped == {0, 1, 2}
    assert [answer.matched_stop for answer in result.answers] == ["ee fo"] * 3
    lengths = [len(answer.token_ids) for answer in result.answers]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 3
    assert result.usage.completion_tokens == sum(lengths)
    await house.settled()


@pytest.mark.asyncio
async def test_one_failing_answer_ends_all_n(house: House) -> None:
    house.fleet.error = Unavailable("gone", retry_after_s=None)
    house.fleet.delay_s = 0.01
    async with house.client() as client:
        with pytest.raises(Unavailable):
            await client.generate(text="x", max_tokens=50, n=4, timeout=3)
    await house.settled()


@pytest.mark.asyncio
async def test_chat_tokenize_detokenize_and_models(house: House) -> None:
    async with house.client() as client:
        chat = [{"role": "user", "content": "hello <|end|>"}]
        ids = await client.tokenize(chat=chat)
        await client.generate(chat=chat, max_tokens=1)
        assert list(house.fleet.requests[0].token_ids) == list(ids)
        assert await client.detokenize(await client.tokenize(text="hello <|end|>")) == "hello <|end|>"
        [model] = await client.list_models()
        assert (model.name, model.context_length, model.block_size) == ("pando-tiny", 8192, 16)
        with pytest.raises(InvalidRequest):
            await client.detokenize([model.vocab_size])


@pytest.mark.asyncio
async def test_more_ids_than_the_context_are_refused_unread(house: House) -> None:
    async with house.client() as client:
        assert await client.detokenize([5] * 8192)
        with pytest.raises(InvalidRequest) as caught:
            await client.detokenize([2**30] * 8193)
    assert caught.value.reason == "CONTEXT_LENGTH"


@pytest.mark.asyncio
async def test_a_prefix_is_computed_on_its_homes_before_it_is_answered(house: House) -> None:
    async with house.client(tenant="a") as client:
        published = await client.publish_prefix(text="x" * 100, scope="public", warm=True, ttl_s=60, name="xs")
        assert [(request.only, request.sampling.max_tokens) for request in house.fleet.requests] == [
            ("w0", 1),
            ("w1", 1),
        ]
        assert all(request.warming is not None and request.sampling.max_tokens == 1 for request in house.fleet.requests)
        assert await client.get_prefix(published.id) == published
        async with house.client(tenant="b") as other:
            assert await other.list_prefixes() == (published,)
            with pytest.raises(PermissionDenied):
                await other.delete_prefix(published.id)
            with pytest.raises(NotFound):
                await other.publish_prefix(text="x" * 100, scope="group", group="g")
        await client.delete_prefix(published.id)
        assert await client.list_prefixes() == ()
        # One home that fails is made up for later; if all do, nothing is left behind.
        house.fleet.lost = ("w0",)
        kept = await client.publish_prefix(text="x" * 100, warm=True)
        house.fleet.lost = ("w0", "w1")
        with pytest.raises(Unavailable):
            await client.publish_prefix(text="x" * 100, warm=True, timeout=5)
        house.fleet.home_names = ()
        with pytest.raises((Unavailable, DeadlineExceeded)):  # the client waits as long as it is told, then tries again
            await client.publish_prefix(text="x" * 100, warm=True, timeout=0.5)
        assert await client.list_prefixes() == (kept,)
        with pytest.raises(InvalidRequest):
            await client.publish_prefix(text="x" * 100, scope="own", group="g")
    both = prefixes_pb2.PublishPrefixRequest(text="x" * 99, scope=3).SerializeToString() + b"\x22\x00"
    assert (await house.refusal(both, "/pando.v1.Prefixes/PublishPrefix")).code is C.INVALID_ARGUMENT
    assert (await house.refusal(b"", "/pando.v1.Prefixes/PublishPrefix")).code is C.INVALID_ARGUMENT
    token = prefixes_pb2.ListPrefixesRequest(page_token="what").SerializeToString()
    assert (await house.refusal(token, "/pando.v1.Prefixes/ListPrefixes")).code is C.INVALID_ARGUMENT


@pytest.mark.asyncio
async def test_the_plain_client_does_the_same(house: House) -> None:
    def plain() -> tuple[pando.Generation, list[pando.Chunk]]:
        with pando.Client(house.public, tenant="t", timeout=5) as client:
            with pytest.raises(InvalidRequest):
                client.generate(text="x", n=9)
            assert client.list_prefixes() == ()
            assert client.detokenize(client.tokenize(text="abc")) == "abc"
            assert client.list_models()[0].name == "pando-tiny"
            early = client.stream(text="x", max_tokens=1000)
            next(early)
            early.close()
            return client.generate(text="x", max_tokens=6), list(client.stream(text="x", max_tokens=6))

    whole, chunks = await asyncio.to_thread(plain)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 6
    await house.settled()


# Bad input: each a row


TEXT = pb.GenerateRequest(text=SECRET).SerializeToString()
IDS = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2])).SerializeToString()
C = grpc.StatusCode
ROWS: dict[str, tuple[bytes, grpc.StatusCode]] = {
    "garbage": (b"\xff\xfe garbage", C.INVALID_ARGUMENT),
    "truncated": (TEXT[:-3], C.INVALID_ARGUMENT),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.", C.INVALID_ARGUMENT),
    "invalid UTF-8": (b"\x12\x02\xc3\x28", C.INVALID_ARGUMENT),
    "lone surrogate": (b"\x12\x03\xed\xa0\x80", C.INVALID_ARGUMENT),
    "empty message": (b"", C.INVALID_ARGUMENT),
    "no prompt": (generate(model="pando-tiny"), C.INVALID_ARGUMENT),
    "text and token_ids": (TEXT + IDS, C.INVALID_ARGUMENT),
    "empty text": (generate(text=""), C.INVALID_ARGUMENT),
    "message over the limit": (generate(text="x" * (MAX_MESSAGE + 10)), C.RESOURCE_EXHAUSTED),
    "unknown model": (generate(text="x", model="other"), C.NOT_FOUND),
    "token id below 0": (generate(token_ids=pb.TokenIds(ids=[1, -1])), C.INVALID_ARGUMENT),
    "token id too high": (generate(token_ids=pb.TokenIds(ids=[2**31 - 1])), C.INVALID_ARGUMENT),
    "prompt over the context": (generate(token_ids=pb.TokenIds(ids=[1] * 8192)), C.INVALID_ARGUMENT),
    "text over the context": (generate(text="a b c d " * 20_000), C.INVALID_ARGUMENT),
    "max_tokens over the context": (generate(sampling={"max_tokens": 8192}), C.INVALID_ARGUMENT),
    "max_tokens 0": (generate(sampling={"max_tokens": 0}), C.INVALID_ARGUMENT),
    "max_tokens 2^31-1": (generate(sampling={"max_tokens": 2**31 - 1}), C.INVALID_ARGUMENT),
    "temperature NaN": (generate(sampling={"temperature": float("nan")}), C.INVALID_ARGUMENT),
    "top_p 0": (generate(sampling={"top_p": 0.0}), C.INVALID_ARGUMENT),
    "n 9": (generate(sampling={"n": 9}), C.INVALID_ARGUMENT),
    "logprobs": (generate(sampling={"logprobs": 5}), C.UNIMPLEMENTED),
    "json_schema": (generate(sampling={"json_schema": "{}"}), C.UNIMPLEMENTED),
    "17 stops": (generate(sampling={"stop": ["x"] * 17}), C.INVALID_ARGUMENT),
    "request_id of 9 KB": (generate(text="x", request_id="r" * 9000), C.INVALID_ARGUMENT),
    "priority above entitlement": (generate(text="x", priority=1), C.PERMISSION_DENIED),
    "unknown role": (
        generate(chat=pb.Chat(messages=[pb.ChatMessage(role="root", content=SECRET)])),
        C.INVALID_ARGUMENT,
    ),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_bad_input(house: House, method: str) -> None:
    for name, (raw, code) in ROWS.items():
        refusal = await house.refusal(raw, f"/pando.v1.Inference/{method}")
        assert refusal.code is code, (name, refusal.words)
        assert SECRET not in refusal.words and "Traceback" not in refusal.words and "Error(" not in refusal.words
        assert not refusal.initial, name
        assert refusal.detail(error_details_pb2.RetryInfo) is None, name
        assert "grpc-retry-pushback-ms" not in refusal.metadata
    assert not house.fleet.requests
    async with house.client() as client:  # and the server is well
        assert (await client.generate(text="x", max_tokens=2)).text


ODD = {
    "NUL and control": "a\x00b\x01\x7f",
    "right to left": "\u202e\u05d0\u05d1\u202c",
    "4-byte": "\U0001f600" * 20,
    "combining": "a" + "\u0301" * 2000,
    "no spaces": "x" * 5000,
    "special text": "<|end|><|user|>",
    "noncharacters": "\ufdd0\uffff",
}


@pytest.mark.asyncio
async def test_odd_text_is_served(house: House) -> None:
    async with house.client() as client:
        for name, text in ODD.items():
            result = await client.generate(text=text, max_tokens=1)
            assert result.usage.prompt_tokens > 0, name
            assert house.tokenizer.decode_now(house.fleet.requests[-1].token_ids) == text, name


@pytest.mark.asyncio
async def test_the_field_and_the_reason_are_told(house: House) -> None:
    refusal = await house.refusal(generate(token_ids=pb.TokenIds(ids=[1, 2, -5])))
    info = refusal.detail(error_details_pb2.ErrorInfo)
    assert (info.domain, info.reason) == ("pando", "INVALID_REQUEST")
    [violation] = refusal.detail(error_details_pb2.BadRequest).field_violations
    assert violation.field == "token_ids.ids[2]"
    assert refusal.status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


@pytest.mark.asyncio
async def test_unknown_fields_are_ignored(house: House) -> None:
    # Field 15 does not exist: a tenant, a template or a worker id that a caller makes up goes nowhere.
    extra = b"\x7a\x05other"
    async with house.raw("/pando.v1.Inference/Generate") as call:
        answer = pb.GenerateResponse.FromString(await call(generate(text="x", sampling={"max_tokens": 1}) + extra))
    assert answer.usage.completion_tokens == 1
    assert b"other" not in answer.SerializeToString()
    assert house.fleet.requests[0].tenant == "default"


@pytest.mark.asyncio
async def test_an_unknown_method_is_unimplemented(house: House) -> None:
    for method in ("/pando.v1.Inference/Nothing", "/pando.v1.Admin/GetStats", "/other.Service/X"):
        assert (await house.refusal(b"", method)).code is C.UNIMPLEMENTED


@pytest.mark.asyncio
async def test_a_gzip_bomb_is_refused_quickly(house: House) -> None:
    raw = generate(text="\0" * (64 * 1024 * 1024))
    assert len(gzip.compress(raw)) < MAX_MESSAGE
    began = time.monotonic()
    refusal = await house.refusal(raw, compression=grpc.Compression.Gzip)
    assert refusal.code is C.RESOURCE_EXHAUSTED
    assert time.monotonic() - began < 5.0


@pytest.mark.asyncio
async def test_metadata_over_the_limit_is_refused(house: House) -> None:
    refusal = await house.refusal(TEXT, metadata=(("x-large", "x" * 9000),))
    assert refusal.code is C.RESOURCE_EXHAUSTED


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "method", ["/pando.v1.Inference/Generate", "/pando.v1.Inference/GenerateStream", "/grpc.health.v1.Health/Check"]
)
async def test_a_call_without_a_message(house: House, method: str) -> None:
    async with house.raw(method, "stream_stream") as call:
        began = time.monotonic()
        closed = call(timeout=10)
        await closed.done_writing()
        assert await closed.code() is C.INVALID_ARGUMENT
        assert time.monotonic() - began < 0.4
        silent = call(timeout=10)
        assert await silent.code() is C.DEADLINE_EXCEEDED
        assert 0.4 < time.monotonic() - began < 3.0


@pytest.mark.asyncio
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_call_with_two_messages(house: House, method: str) -> None:
    async with house.raw(f"/pando.v1.Inference/{method}", "stream_stream") as call:
        twice = call(iter([TEXT, TEXT]), timeout=10)
        assert await twice.code() is C.INVALID_ARGUMENT
    assert not house.fleet.requests


@pytest.mark.asyncio
async def test_silent_calls_lock_nobody_out(house: House) -> None:
    async with house.raw("/pando.v1.Inference/Generate", "stream_stream") as call, house.client() as client:
        silent = [call(timeout=10) for _ in range(200)]
        began = time.monotonic()
        assert (await client.generate(text="x", max_tokens=2)).text
        assert time.monotonic() - began < 2.0
        for quiet in silent:
            quiet.cancel()


@pytest.mark.asyncio
async def test_a_defect_is_contained_and_told_by_id(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.fleet.error = ValueError(f"cannot handle {SECRET}")
    with caplog.at_level(logging.ERROR):
        refusal = await house.refusal(generate(sampling={"max_tokens": 5}))
    assert refusal.code is C.INTERNAL
    error_id = refusal.detail(error_details_pb2.ErrorInfo).metadata["error_id"]
    assert error_id and refusal.words == f"internal error {error_id}"
    assert house.metrics.total.failed == 1
    assert error_id in caplog.text and "ValueError" in caplog.text and "test_api.py" in caplog.text
    assert SECRET not in caplog.text
    house.fleet.error = None
    async with house.client() as client:
        assert (await client.generate(text="x", max_tokens=2)).text


@pytest.mark.asyncio
async def test_an_error_after_the_first_token_still_has_its_type(house: House) -> None:
    house.fleet.error = Unavailable("the worker is gone", reason="WORKER_LOST", retry_after_s=0.25)
    got = []
    async with house.client() as client:
        with pytest.raises(Unavailable) as caught:
            async for chunk in client.stream(text="x", max_tokens=9):
                got.append(chunk)
    assert len(got) == 2
    assert (caught.value.reason, caught.value.retry_after_s) == ("WORKER_LOST", 0.25)


@pytest.mark.asyncio
async def test_a_request_without_a_worker_is_retried_by_the_client(house: House) -> None:
    house.fleet.error, first = Unavailable("no worker", retry_after_s=0.01), house.fleet.stream

    async def early(request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        if len(house.fleet.requests) < 2:
            house.fleet.requests.append(request)
            raise Unavailable("no worker", retry_after_s=0.01)
        house.fleet.error = None
        async for delta in first(request):
            yield delta

    house.fleet.stream = lambda request: FakeStream(early(request))  # type: ignore[method-assign]
    async with house.client() as client:
        assert (await client.generate(text="x", max_tokens=2)).text
    assert len(house.fleet.requests) == 3


@pytest.mark.asyncio
async def test_what_the_router_waited_for_is_not_waited_for_again(house: House) -> None:
    async def nobody(request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        house.fleet.requests.append(request)
        raise Unavailable("no worker is ready", reason="NO_WORKER", retry_after_s=0.01)
        yield

    house.fleet.stream = lambda request: FakeStream(nobody(request))  # type: ignore[method-assign]
    async with house.client() as client:
        with pytest.raises(Unavailable) as caught:
            await client.generate(text="x")
        assert (caught.value.reason, caught.value.retry_after_s) == ("NO_WORKER", 0.01)
        with pytest.raises(Unavailable):
            _ = [chunk async for chunk in client.stream(text="x")]
    assert len(house.fleet.requests) == 2


@pytest.mark.asyncio
async def test_mutated_messages_never_break_anything(house: House) -> None:
    rng = random.Random(5)
    seeds = [raw for name, (raw, _) in ROWS.items() if len(raw) < 500]
    seeds += [generate(text="x", sampling={"max_tokens": 2, "n": 2, "stop": ["a"], "seed": 3}), IDS]
    allowed = {C.OK, C.INVALID_ARGUMENT, C.NOT_FOUND, C.PERMISSION_DENIED, C.UNIMPLEMENTED}
    seen = set()
    async with house.raw("/pando.v1.Inference/Generate") as call:
        for _ in range(600):
            raw = bytearray(rng.choice(seeds))
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(raw) + 1)
                raw[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
            ongoing = call(bytes(raw), timeout=10)
            code = await ongoing.code()
            assert code in allowed, (code, await ongoing.details(), bytes(raw))
            seen.add(code)
    assert {C.OK, C.INVALID_ARGUMENT} <= seen
    await house.settled()


# Time, cancellation, limits


@pytest.mark.asyncio
async def test_no_headers_come_before_the_first_token(house: House) -> None:
    house.fleet.delay_s = 0.3
    async with grpc.aio.insecure_channel(house.public) as channel:
        began = time.monotonic()
        call = stubs.InferenceStub(channel).GenerateStream(pb.GenerateRequest(text="x"), timeout=10)
        await call.initial_metadata()
        assert time.monotonic() - began > 0.25
        call.cancel()
    await house.settled()


@pytest.mark.asyncio
@pytest.mark.parametrize("n", [1, 3])
async def test_a_cancel_closes_the_streams(house: House, n: int) -> None:
    house.fleet.delay_s = 0.02
    async with house.client() as client:
        whole = asyncio.create_task(client.generate(text="x", max_tokens=1000, n=n))
        await asyncio.sleep(0.1)
        assert (house.fleet.open, len(house.fleet.requests[0].fork_seeds)) == (1, n - 1)
        whole.cancel()
        await asyncio.gather(whole, return_exceptions=True)
        await house.settled()
        stream = client.stream(text="x", max_tokens=1000, n=n)
        await anext(stream)
        await stream.aclose()
        await house.settled()
    counted = house.metrics.registry.get_sample_value
    assert house.metrics.total.failed == 0
    assert counted("pando_router_requests_cancelled_total", {"tenant": "t"}) == 2


@pytest.mark.asyncio
async def test_a_vanished_client_closes_the_streams(house: House) -> None:
    house.fleet.delay_s = 0.02
    client = house.client()
    stream = client.stream(text="x", max_tokens=1000)
    await anext(stream)
    await client.close()
    await house.settled()


@pytest.mark.asyncio
async def test_deadlines_end_the_work(start: Start) -> None:
    house = await start(limits=replace(LIMITS, request_s=0.3))
    house.fleet.delay_s = 0.05
    async with house.client() as client:
        for timeout in (0.15, 5.0):  # the caller's, then the server's own
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await client.generate(text="x", max_tokens=1000, timeout=timeout)
            assert time.monotonic() - began < 1.0
            await house.settled()
    assert house.metrics.total.failed == 2


@pytest.mark.asyncio
async def test_a_deadline_that_passed_starts_no_work(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Tokenizer.encode

    async def slowly(tokenizer: Tokenizer, text: str) -> array[int]:
        await asyncio.sleep(0.4)
        return await encode(tokenizer, text)

    monkeypatch.setattr(Tokenizer, "encode", slowly)
    async with house.client() as client:
        with pytest.raises(DeadlineExceeded):
            await client.generate(text="x", timeout=0.1)
    await asyncio.sleep(0.6)
    assert not house.fleet.requests


@pytest.mark.asyncio
async def test_a_slow_reader_is_dropped_alone(house: House) -> None:
    house.fleet.tokens = list(house.tokenizer.encode_now("wide "))
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with grpc.aio.insecure_channel(house.public, options=options) as channel, house.client() as client:
        call = channel.unary_stream("/pando.v1.Inference/GenerateStream")(
            generate(text="x", sampling={"max_tokens": 8000, "ignore_eos": True}), timeout=15
        )
        await call.read()
        assert (await client.generate(text="x", max_tokens=2)).text
        for _ in range(300):
            if not house.fleet.open:
                break
            await asyncio.sleep(0.02)
        assert not house.fleet.open
        labels = {"method": "GenerateStream", "code": "RESOURCE_EXHAUSTED"}
        assert house.metrics.registry.get_sample_value("pando_router_calls_total", labels) == 1
        call.cancel()


@pytest.mark.asyncio
async def test_an_id_in_flight_is_taken_for_its_tenant_alone(house: House) -> None:
    house.fleet.delay_s = 0.02
    async with house.client() as client, house.client(tenant="u") as other:
        first = asyncio.create_task(client.generate(text="x", max_tokens=20, request_id="same"))
        await asyncio.sleep(0.1)
        with pytest.raises(AlreadyExists):
            await client.generate(text="x", max_tokens=1, request_id="same")
        await other.generate(text="x", max_tokens=1, request_id="same")
        await first
        await client.generate(text="x", max_tokens=1, request_id="same")


@pytest.mark.asyncio
async def test_a_full_router_says_when_to_come_again(start: Start) -> None:
    house = await start(max_in_flight=1)
    house.fleet.delay_s = 0.02
    async with house.client() as client:
        first = asyncio.create_task(client.generate(text="x", max_tokens=30))
        await asyncio.sleep(0.1)
        refusal = await house.refusal(TEXT)
        await first
    assert refusal.code is C.RESOURCE_EXHAUSTED
    assert refusal.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 500
    assert refusal.metadata["grpc-retry-pushback-ms"] == "500"


# Identity


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.toml"
    path.write_text(
        f'[tenants.a]\nkeys = ["{key_hash("ka")}"]\n[tenants.b]\nkeys = ["{key_hash("kb")}"]\nmax_in_flight = 1\n'
    )
    return path


@pytest.mark.asyncio
async def test_every_method_needs_a_credential(start: Start, keys: Path) -> None:
    house = await start(tenants=keys, admin_key="root")
    methods = [
        *(f"/pando.v1.Inference/{m}" for m in ("Generate", "GenerateStream", "Tokenize", "Detokenize", "ListModels")),
        *(f"/pando.v1.Prefixes/{m}" for m in ("PublishPrefix", "GetPrefix", "ListPrefixes", "DeletePrefix")),
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ]
    bad = ((), (("authorization", "Bearer nope"),), (("x-pando-tenant", "a"),), (("authorization", "Bearer root"),))
    for method in methods:
        for metadata in bad:
            refusal = await house.refusal(b"", method, metadata=metadata)
            assert refusal.code is C.UNAUTHENTICATED, method
    house.public = house.admin
    names = ("ListWorkers", "DrainWorker", "ListTenants", "PurgeTenant", "ExplainPlacement", "GetStats")
    for name in names:
        for metadata in (*bad[:3], (("authorization", "Bearer ka"),)):
            refusal = await house.refusal(b"", f"/pando.v1.Admin/{name}", metadata=metadata)
            assert refusal.code is C.UNAUTHENTICATED, name
    assert not house.fleet.requests


@pytest.mark.asyncio
async def test_the_tenant_is_the_keys_whatever_else_is_said(start: Start, keys: Path) -> None:
    house = await start(tenants=keys)
    forged = (("authorization", "Bearer ka"), ("x-pando-tenant", "b"), ("tenant", "b"))
    async with house.raw("/pando.v1.Inference/Generate") as call:
        await call(generate(text="x", sampling={"max_tokens": 1}), metadata=forged, timeout=5)
    assert [request.tenant for request in house.fleet.requests] == ["a"]
    async with house.client(tenant="", api_key="kb") as client:
        await client.generate(text="x", max_tokens=1)
    assert house.fleet.requests[-1].tenant == "b"
    async with house.client(tenant="", api_key="nope") as client:
        with pytest.raises(Unauthenticated):
            await client.generate(text="x", max_tokens=1)


@pytest.mark.asyncio
async def test_a_tenants_limit_is_a_quota_failure_of_its_own(start: Start, keys: Path) -> None:
    house = await start(tenants=keys)
    house.fleet.delay_s = 0.02
    async with house.client(tenant="", api_key="kb") as client, house.client(tenant="", api_key="ka") as other:
        first = asyncio.create_task(client.generate(text="x", max_tokens=30))
        await asyncio.sleep(0.1)
        refusal = await house.refusal(TEXT, metadata=(("authorization", "Bearer kb"),))
        assert refusal.code is C.RESOURCE_EXHAUSTED
        [violation] = refusal.detail(error_details_pb2.QuotaFailure).violations
        assert violation.subject == "tenant:b"
        with pytest.raises(ResourceExhausted) as caught:
            await client.generate(text="x", max_tokens=1)
        assert caught.value.retry_after_s == 0.5 and caught.value.reason == "TENANT_IN_FLIGHT"
        await other.generate(text="x", max_tokens=1)
        await first


# The other services


@pytest.mark.asyncio
async def test_health_follows_the_fleet_and_needs_no_key(start: Start, keys: Path) -> None:
    house = await start(tenants=keys)
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with grpc.aio.insecure_channel(house.public) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="pando.v1.Inference"), timeout=10)
        assert (await watch.read()).status == serving
        for service in ("", "pando.v1.Inference"):
            request = health_pb2.HealthCheckRequest(service=service)
            house.ready = True
            assert (await health.Check(request, timeout=5)).status == serving
            house.ready = False
            assert (await health.Check(request, timeout=5)).status == not_serving
        assert (await watch.read()).status == not_serving
        watch.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=5)
        assert caught.value.code() is C.NOT_FOUND
    assert (await house.refusal(b"\xff\xff", "/grpc.health.v1.Health/Check")).code is C.INVALID_ARGUMENT


@pytest.mark.asyncio
async def test_reflection_names_the_services(house: House) -> None:
    async with grpc.aio.insecure_channel(house.public) as channel:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = reflection.ServerReflectionInfo(timeout=5)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        await call.done_writing()
        assert await call.code() is C.OK
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {"pando.v1.Inference", "pando.v1.Prefixes", "grpc.health.v1.Health"}


@pytest.mark.asyncio
async def test_admin_tells_what_happened(start: Start) -> None:
    house = await start(admin_key="root")
    house.fleet.found = AdmissionReport(cached_device=16)
    async with house.client() as client, house.client(tenant="u") as other:
        for _ in range(2):
            await client.generate(text="x" * 100, max_tokens=3)
        await other.generate(text="x", max_tokens=1)
        with pytest.raises(InvalidRequest):
            await other.generate(text="x" * 30_000, max_tokens=8000)
        with pytest.raises(NotFound):
            await other.generate(text="x", model="other")
    async with grpc.aio.insecure_channel(house.admin) as channel:
        admin, key = admin_pb2_grpc.AdminStub(channel), (("authorization", "Bearer root"),)
        stats = await admin.GetStats(admin_pb2.GetStatsRequest(), metadata=key, timeout=5)
        tenants = (await admin.ListTenants(admin_pb2.ListTenantsRequest(), metadata=key, timeout=5)).tenants
        [worker] = (await admin.ListWorkers(admin_pb2.ListWorkersRequest(), metadata=key, timeout=5)).workers
        purged = await admin.PurgeTenant(admin_pb2.PurgeTenantRequest(tenant="t"), metadata=key, timeout=5)
        assert (purged.device_blocks, purged.cpu_blocks, purged.remaining_blocks) == (5, 4, 3)
        assert (purged.workers, purged.prefixes) == (2, 1)
        with pytest.raises(grpc.aio.AioRpcError, match="w0"):
            await admin.PurgeTenant(admin_pb2.PurgeTenantRequest(tenant="silent"), metadata=key, timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.DrainWorker(admin_pb2.DrainWorkerRequest(), metadata=key, timeout=5)
        assert caught.value.code() is C.UNIMPLEMENTED
        ask = admin_pb2.ExplainPlacementRequest
        for asked in (ask(request_id="r-1"), ask(tenant="b", text=SECRET)):
            why = await admin.ExplainPlacement(asked, metadata=key, timeout=5)
            assert (why.worker, why.reason, why.prompt_tokens) == ("w0", "least cost", 20)
            first, second = why.candidates
            assert (first.worker, first.plan, first.cached_tokens, second.excluded) == (
                "w0",
                "recompute",
                16,
                "queue full",
            )
            assert first.total_s == first.ttft_s == first.plan_s == pytest.approx(4e-4)
            assert why.HasField("found_cached_tokens") == bool(asked.request_id)
        for asked, code in (
            (ask(request_id="gone"), C.NOT_FOUND),
            (ask(tenant="no/name", text="x"), C.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await admin.ExplainPlacement(asked, metadata=key, timeout=5)
            assert caught.value.code() is code
    why = await asyncio.to_thread(run_cli, "explain", "r-1", "--target", house.admin, "--admin-key", "root")
    assert "attempt 2 went to w0: least cost; 20 prompt tokens, 12 found cached" in why
    assert "recompute" in why and "queue full" in why
    said = await asyncio.to_thread(run_cli, "explain", "r-1", "--target", house.admin, "--admin-key", "root", "--json")
    assert [row["worker"] for row in json.loads(said)["candidates"]] == ["w0", "w1"]
    refused = pytest.raises(Unsupported, match=f"^{house.public} is not an admin port$")
    with AdminClient(house.public, key="root") as stranger, refused:
        await asyncio.to_thread(stranger.stats)
    async with pando.AsyncClient(house.admin, api_key="root") as lost:
        with pytest.raises(Unsupported, match=f"^{house.admin} does not serve this"):
            await lost.generate(text="x")
    assert (stats.router, stats.requests, stats.failed, stats.in_flight) == ("r1", 4, 0, 0)
    assert (stats.cached_tokens, stats.completion_tokens, stats.indexed_blocks) == (48, 7, 7)
    assert [(t.id, t.requests, t.failed, t.completion_tokens) for t in tenants] == [("t", 2, 0, 6), ("u", 2, 0, 1)]
    assert (worker.id, worker.epoch, worker.state) == ("w0", 3, admin_pb2.WORKER_STATE_READY)
    assert (worker.free_blocks, worker.cached_blocks, worker.reason) == (60, 39, "because")
    text, kind = house.metrics.exposition()
    assert b'pando_router_requests_refused_total{tenant="u"} 1.0' in text and b"requests_failed_total{" not in text
    assert b"pando_router_tasks " in text and b"process_open_fds " in text
    assert b'pando_router_tokens_total{kind="completion",tenant="t"} 6.0' in text and "text" in kind


@pytest.mark.asyncio
async def test_a_storm_with_cancels_leaves_nothing(house: House) -> None:
    house.fleet.delay_s = 0.002
    async with house.client() as client:

        async def one(number: int) -> str:
            task = asyncio.create_task(client.generate(text=f"p{number}", max_tokens=5, n=1 + number % 2))
            if number % 5 == 0:
                await asyncio.sleep(0.001 * (number % 9))
                task.cancel()
            try:
                return (await task).finish_reason
            except asyncio.CancelledError:
                return "cancelled"
            except InternalError:
                return "internal"

        outcomes = await asyncio.gather(*(one(number) for number in range(80)))
    assert set(outcomes) <= {"length", "cancelled"} and outcomes.count("length") >= 60
    await house.settled()
    assert house.metrics.total.failed == 0
