"""Published prefixes on real parts: simulated workers, real Redis, router processes, tenants with groups and grants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import redis

import pando
from pando.errors import InvalidRequest, NotFound, PermissionDenied, ResourceExhausted, Unauthenticated, Unavailable
from tests.fleet_processes import ROOT, Child, Fleet, fleet_of, some_tokens, until

pytestmark = pytest.mark.timeout(110)

BLOCK = 16
TENANTS = {
    "alice": 'groups = ["team"]\npublish = ["own", "group", "public"]',
    "bob": 'groups = ["team", "other"]',
    "carol": "publish_budget_blocks = 12",
    "dave": 'publish = []\ngroups = ["team"]',
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet_of(tmp_path_factory.mktemp("prefixes"), TENANTS, "--device-blocks", "4000") as made:
        yield made


@pytest.fixture(scope="module")
def router(fleet: Fleet) -> Child:
    return fleet.router()


def full(count: int) -> int:
    return count // BLOCK * BLOCK


def cached(client: pando.Client, token_ids: list[int]) -> tuple[int, int]:
    """(own, published) cached tokens of one request."""
    usage = client.generate(token_ids=token_ids, max_tokens=2, temperature=0.0).usage
    assert usage.cached_tokens == usage.cached_own + usage.cached_published
    return usage.cached_own, usage.cached_published


def test_two_tenants_share_a_public_head_and_nothing_behind_it(fleet: Fleet, router: Child) -> None:
    head, tail = some_tokens(1, 200), some_tokens(2, 120)
    with fleet.client(router, "alice") as alice, fleet.client(router, "bob") as bob:
        published = alice.publish_prefix(token_ids=head, scope="public", warm=True, ttl_s=600, name="rules")
        assert (published.num_tokens, published.scope, published.copies) == (200, "public", 1)
        assert 590 < published.expires - time.time() <= 600
        # The warm-up computed it, to the end inside a block. A block of one's own that begins there is one's own.
        assert cached(alice, head + tail) == (0, 200)
        assert cached(alice, head + tail) == (319 - full(200), full(200))
        # The same text of another tenant: the head is a hit, exactly; what A computed behind it is a miss.
        assert cached(bob, head + tail) == (0, 200)
        assert cached(bob, head + tail) == (319 - full(200), full(200))
        # A guess at A's tail, block by block, tells nothing.
        for count in range(0, 120, 7):
            guess = head + tail[:count] + some_tokens(1000 + count, 40)
            other = some_tokens(2000 + count, 1) + guess
            assert cached(bob, guess)[1] == (full(200) if count else 200)
            assert cached(bob, other) == (0, 0)
        alice.delete_prefix(published.id)
        assert cached(bob, head + tail)[1] == 0


def test_without_warming_the_first_request_computes_the_head_for_all(fleet: Fleet, router: Child) -> None:
    head = some_tokens(3, 160)
    with fleet.client(router, "alice") as alice, fleet.client(router, "bob") as bob:
        published = alice.publish_prefix(token_ids=head, scope="public")
        assert published.copies == 0
        assert cached(alice, head + some_tokens(4, 50)) == (0, 0)
        assert cached(bob, head + some_tokens(5, 50)) == (0, 160)
        until(lambda: bob.get_prefix(published.id).copies == 1)
        # A prompt that parts from the head inside it shares up to there, never past it.
        assert cached(bob, head[:100] + some_tokens(6, 50)) == (0, 100)
        alice.delete_prefix(published.id)


def test_a_system_message_is_the_head_of_every_chat_with_it(fleet: Fleet, router: Child) -> None:
    system = {"role": "system", "content": "You answer in one sentence and never guess. " * 20}
    with fleet.client(router, "alice") as alice, fleet.client(router, "bob") as bob:
        published = alice.publish_prefix(chat=[system], scope="public", warm=True)
        for number, client in enumerate((alice, bob, bob)):
            chat = [system, {"role": "user", "content": f"Question {number}: what is a list?"}]
            whole = client.tokenize(chat=chat)
            assert len(whole) > published.num_tokens
            usage = client.generate(chat=chat, max_tokens=2).usage
            assert usage.predicted_cached_tokens == full(published.num_tokens)
            # Bob's second question shares the start of a block with his first one, and with nobody else's.
            assert usage.cached_published == (full(published.num_tokens) if number == 2 else published.num_tokens)
            assert 0 < usage.cached_own < BLOCK if number == 2 else usage.cached_own == 0
        other = [{"role": "system", "content": "Another."}, {"role": "user", "content": "Hi"}]
        assert bob.generate(chat=other, max_tokens=1).usage.cached_published == 0
        alice.delete_prefix(published.id)


def test_a_text_head_is_found_in_longer_texts(fleet: Fleet, router: Child) -> None:
    head = "The library of this house holds books about everything that a program may need. " * 12
    with fleet.client(router, "alice") as alice, fleet.client(router, "bob") as bob:
        published = alice.publish_prefix(text=head, scope="group", group="team", warm=True)
        # Tokens at the border may join with what follows: at most the last block is lost.
        usage = bob.generate(text=head + "And now a question.", max_tokens=1).usage
        assert usage.cached_published >= full(published.num_tokens) - BLOCK
        alice.delete_prefix(published.id)


def test_who_may_see_and_use_what(fleet: Fleet, router: Child) -> None:
    of_group, of_alice = some_tokens(7, 100), some_tokens(8, 100)
    with ExitStack() as parts:
        alice, bob, carol, dave = (parts.enter_context(fleet.client(router, name)) for name in TENANTS)
        group = alice.publish_prefix(token_ids=of_group, scope="group", group="team", warm=True)
        own = alice.publish_prefix(token_ids=of_alice, scope="own", warm=True)
        assert [p.id for p in alice.list_prefixes()] == [group.id, own.id]
        assert [p.id for p in bob.list_prefixes()] == [p.id for p in dave.list_prefixes()] == [group.id]
        assert carol.list_prefixes() == ()
        assert bob.get_prefix(group.id).group == "team"
        for client, prefix in ((bob, own), (carol, own), (carol, group)):
            with pytest.raises(NotFound):
                client.get_prefix(prefix.id)
            with pytest.raises(NotFound):
                client.delete_prefix(prefix.id)
        with pytest.raises(PermissionDenied):
            bob.delete_prefix(group.id)
        tail = some_tokens(9, 40)
        assert cached(bob, of_group + tail) == cached(dave, of_group + tail) == (0, 100)
        assert cached(carol, of_group + tail) == (0, 0)
        # A prefix of one's own is one's own cache.
        assert cached(alice, of_alice + tail) == (full(100), 0)
        assert cached(bob, of_alice + tail) == cached(carol, of_alice + tail) == (0, 0)
        for prefix in (group, own):
            alice.delete_prefix(prefix.id)
            with pytest.raises(NotFound):
                alice.get_prefix(prefix.id)


def test_what_may_not_be_published(fleet: Fleet, router: Child) -> None:
    tokens = some_tokens(10, 100)
    with ExitStack() as parts:
        bob, carol, dave = (parts.enter_context(fleet.client(router, name)) for name in ("bob", "carol", "dave"))
        for client, fields, error in (
            (bob, {"scope": "public"}, PermissionDenied),
            (dave, {"scope": "own"}, PermissionDenied),
            (bob, {"scope": "group", "group": "strangers"}, NotFound),
            (bob, {"scope": "group"}, InvalidRequest),
            (bob, {"scope": "own", "group": "team"}, InvalidRequest),
            (bob, {"ttl_s": 0}, InvalidRequest),
            (bob, {"ttl_s": -5}, InvalidRequest),
            (bob, {"ttl_s": 1e9}, InvalidRequest),
            (bob, {"copies": 65}, InvalidRequest),
            (bob, {"name": "a\nb"}, InvalidRequest),
            (bob, {"name": "a" * 129}, InvalidRequest),
            (bob, {"token_ids": tokens[:15]}, InvalidRequest),
            (bob, {"token_ids": [5000] * 20}, InvalidRequest),
            (bob, {"token_ids": [5] * 8192}, InvalidRequest),
            (bob, {"model": "other"}, NotFound),
            (carol, {"copies": 3}, ResourceExhausted),
        ):
            with pytest.raises(error):
                client.publish_prefix(**({"token_ids": tokens} | fields))
        with pando.Client(router.ready["grpc"], tenant="alice") as stranger, pytest.raises(Unauthenticated):
            stranger.list_prefixes()
        first = carol.publish_prefix(token_ids=tokens)
        carol.publish_prefix(token_ids=tokens, ttl_s=1.0)
        with pytest.raises(ResourceExhausted) as over:
            carol.publish_prefix(token_ids=tokens)
        assert over.value.reason == "PUBLISH_BUDGET" and over.value.violations
        until(lambda: len(carol.list_prefixes()) == 1)  # the second one ends by itself, and frees its budget
        carol.publish_prefix(token_ids=tokens, ttl_s=1.0)
        carol.delete_prefix(first.id)


def test_pages(fleet: Fleet, router: Child) -> None:
    from pando.v1 import prefixes_pb2

    with fleet.client(router, "bob") as bob:
        made = [bob.publish_prefix(token_ids=some_tokens(20 + i, 20), name=f"p{i}").id for i in range(5)]
        assert [prefix.id for prefix in bob.list_prefixes()] == made
        seen: list[str] = []
        request = prefixes_pb2.ListPrefixesRequest(page_size=2)
        for size in (2, 2, 1):
            page = bob._prefixes.ListPrefixes(request, **bob._call(None))
            assert len(page.prefixes) == size
            seen += [prefix.id for prefix in page.prefixes]
            request.page_token = page.next_page_token
        assert seen == made and not request.page_token
        for prefix_id in made:
            bob.delete_prefix(prefix_id)


def test_copies_are_computed_on_as_many_workers(fleet: Fleet, router: Child) -> None:
    head = some_tokens(30, 128)
    with fleet.client(router, "alice") as alice:
        published = alice.publish_prefix(token_ids=head, scope="public", warm=True, copies=2)
        until(lambda: alice.get_prefix(published.id).copies == 2, 3)
        alice.delete_prefix(published.id)


def test_routers_agree_and_a_new_one_knows_all(fleet: Fleet, router: Child) -> None:
    head = some_tokens(40, 96)
    with fleet.client(router, "alice") as alice:
        published = alice.publish_prefix(token_ids=head, scope="public", warm=True, name="for all")
        second = fleet.router()
        with fleet.client(second, "alice") as elsewhere, fleet.client(second, "bob") as bob:
            assert elsewhere.get_prefix(published.id).name == "for all"
            assert cached(bob, head + some_tokens(41, 20)) == (0, 96)
            late = elsewhere.publish_prefix(token_ids=some_tokens(42, 40), scope="own")
            until(lambda: late.id in [prefix.id for prefix in alice.list_prefixes()], 2)
            elsewhere.delete_prefix(published.id)
            until(lambda: published.id not in [prefix.id for prefix in alice.list_prefixes()], 2)
            alice.delete_prefix(late.id)
        second.stop()


def test_redis_holds_no_token_and_no_name(fleet: Fleet, router: Child) -> None:
    tokens = [*range(500, 564)]
    with fleet.client(router, "alice") as alice:
        published = alice.publish_prefix(token_ids=tokens, scope="group", group="team", name="nobody-may-read-me")
        with redis.Redis.from_url(fleet.redis.url) as client:
            dump = b"\n".join(key + b" " + (client.dump(key) or b"") for key in client.keys("*"))
            assert published.id.encode() in dump
        for secret in (b"alice", b"team", b"nobody-may", b"\xf5\x01\x00\x00\xf6\x01", b"\x01\xf5\x01\xf6"):
            assert secret not in dump
        alice.delete_prefix(published.id)


def test_the_command_line(fleet: Fleet, router: Child) -> None:
    def pando_prefixes(*words: str) -> str:
        env = {"PANDO_API_KEY": "key of alice", "PANDO_TARGET": router.ready["grpc"], "PATH": os.environ["PATH"]}
        command = [sys.executable, "-m", "pando.cli", "prefixes", *words]
        return subprocess.run(command, cwd=ROOT, env=env, check=True, text=True, capture_output=True, timeout=30).stdout

    prefix_id = pando_prefixes("publish", "--system", "Be brief. " * 20, "--scope", "public", "--name", "brief").strip()
    assert "brief" in pando_prefixes("list") and prefix_id in pando_prefixes("list")
    [shown] = json.loads(pando_prefixes("list", "--json"))
    assert (shown["id"], shown["scope"], shown["copies"]) == (prefix_id, "public", 1)
    pando_prefixes("delete", prefix_id)
    assert json.loads(pando_prefixes("list", "--json")) == []


def test_a_redis_that_goes_and_forgets_loses_no_prefix(fleet: Fleet, router: Child) -> None:
    """Last: it takes everybody's Redis away."""
    head = some_tokens(60, 96)
    with fleet.client(router, "alice") as alice, fleet.client(router, "bob") as bob:
        published = alice.publish_prefix(token_ids=head, scope="public", warm=True)
        short = alice.publish_prefix(token_ids=head[:48], scope="own")
        fleet.redis.stop()
        assert cached(bob, head + some_tokens(61, 20)) == (0, 96)
        with pytest.raises(Unavailable):
            alice.publish_prefix(token_ids=head[:32])
        with pytest.raises(Unavailable):
            alice.delete_prefix(short.id)
        fleet.redis.start()
        second = fleet.router()  # it knows only what Redis was given back
        with fleet.client(second, "alice") as elsewhere:
            until(lambda: {p.id for p in elsewhere.list_prefixes()} == {published.id, short.id}, 10)
            elsewhere.delete_prefix(published.id)
            until(lambda: [p.id for p in alice.list_prefixes()] == [short.id], 5)
        second.stop()
