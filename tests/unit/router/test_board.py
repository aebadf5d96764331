"""A decision from columns is the decision over all candidates, whatever happened before it, and builds none of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import BlockKey
from kvstore.events import CPU, BlocksStored
from kvstore.scope import ScopeRoot
from router.lines import owner_of
from router.link_messages import AdmissionReport
from router.member import Reservation
from router.peers import FRESH_S, SentLoad, marks
from router.placement import Candidate, Prompt, place
from router.standing import Ask
from tests.unit.router.conftest import Stage

NAMES = ("a", "b", "c", "d", "e")
OWNERS = ((ScopeRoot(b"x" * 16), 3), (ScopeRoot(b"y" * 16), 1), (ScopeRoot(b"z" * 16), 2))

acts = st.lists(
    st.tuples(
        st.sampled_from(
            ("reserve", "reserve", "start", "release", "load", "store", "store_cpu", "drain", "break", "new", "hear")
        ),
        st.integers(0, 4),
        st.integers(0, 9),
    ),
    max_size=40,
)


def prompt_keys(family: int, count: int) -> list[BlockKey]:
    """Prompts of one family share their first three blocks."""
    return [
        BlockKey(bytes([block * 7 % 256]) + f"{family % 3 if block < 3 else family}/{block}".encode().ljust(15))
        for block in range(count)
    ]


def act(stage: Stage, held: list[Reservation], what: str, which: int, number: int) -> None:
    worker, keys = NAMES[which], prompt_keys(number, 4 + number)
    match what:
        case "reserve":
            owner, weight = OWNERS[number % 3]
            answer = stage.fleet.reserve(Ask(Prompt(16 * len(keys) + 5, 16, keys[3]), keys, owner=owner, weight=weight))
            if isinstance(answer, Reservation):
                held.append(answer)
        case "start" if held:
            pull = {"pulled_tokens": 16 * number, "pull_s": number / 100, "peer_lacks": number == 3}
            held[number % len(held)].started(AdmissionReport(cached_device=16 * (number % 3), **pull))
        case "release" if held:
            held.pop(number % len(held)).release()
        case "load":
            rate = 0.0 if number == 9 else 5000.0 * (1 + number)
            stage.link(worker).say_load(
                running=number,
                queued_tokens=300 * number,
                free_blocks=number,
                step_ms=number,
                prefill_tokens_per_s=rate,
            )
        case "store":
            stage.store(worker, keys)
        case "store_cpu":
            stage.index.apply(worker, 1, [BlocksStored(list(keys), CPU)])
        case "drain":
            stage.link(worker).say_load(draining=number % 2 == 0)
        case "break":
            stage.link(worker).break_off() if number % 2 else stage.link(worker).come_up()
        case "hear":
            line = tuple((owner_of(root), weight, 90 * number) for root, weight in OWNERS[: number % 3])
            rates = (number / 10, number / 20, number // 2)
            load = SentLoad(1, 700 * number, number, marks(keys, 0), *rates, 150 * number, line)
            stage.fleet.peers.take([{worker: load}] if number else [])
        case "new":
            life = {"epoch": stage.fleet.epoch_of(worker) + 1, "payload_format": "x" if number % 3 else "y"}
            stage.mirror.say(stage.lease(worker, **life))
            stage.link(worker).come_up()
    stage.now += number / 7


@given(acts, st.integers(0, 9), st.sampled_from([(), ("a", 1)]), st.sampled_from([None, "b"]))
@settings(deadline=None, max_examples=150)
def test_a_decision_is_the_one_over_all_candidates(
    done: list[tuple[str, int, int]], family: int, avoid: tuple[Any, ...], only: Any
) -> None:
    async def check() -> None:
        stage = Stage()
        await stage.fleet.start()
        stage.add(*NAMES[:2])
        stage.add(*NAMES[2:], payload_format="x")
        for _ in range(30):  # else prompts so short are never pulled
            stage.fleet._board.pulls.add(4000, 0.001, stage.now)
        held: list[Reservation] = []
        for what, which, number in done:
            act(stage, held, what, which, number)
        keys = prompt_keys(family, 12)
        avoided = frozenset([avoid]) if avoid else frozenset()
        owner, weight = OWNERS[family % 3]
        prompt = Prompt(12 * 16 + 3, 16, keys[3])
        ask = Ask(prompt, keys, avoid=avoided, only=only, owner=owner, weight=weight)
        factor = stage.fleet._board.lengths.factor(ask.prompt.num_tokens)
        candidates = stage.fleet.candidates(ask)
        rates = stage.fleet._board.pull_rates(stage.now)
        others = stage.fleet.peers.unheard.others
        exhaustive = place(ask.prompt, candidates, pull=rates, length_factor=factor, others=others)
        decided = stage.fleet.explain(ask)
        assert decided == exhaustive
        assert decided.terms == exhaustive.terms
        for reservation in held:
            reservation.release()
        assert stage.fleet.num_reserved == 0
        assert all(candidate.pulls == 0 for candidate in stage.fleet.candidates(ask))
        assert all(view.queued_tokens >= 0 for view in stage.fleet.workers())
        await stage.fleet.stop()

    asyncio.run(check())


@pytest.mark.asyncio
async def test_a_decision_looks_at_holders_and_builds_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done for each worker is done in columns: no object, no look at a member that did not change."""
    made = Stage()
    await made.fleet.start()
    names = [f"w{number:03}" for number in range(200)]
    made.add(*names)
    keys = prompt_keys(1, 8)
    made.store(names[7], keys)
    made.reserve(keys).release()
    looks: list[str] = []
    members = made.fleet._members
    for kind, name in ((Candidate, "__init__"), (type(members["w000"]), "standing")):
        original = getattr(kind, name)

        def counted(self: Any, *told: Any, _original: Callable[..., Any] = original, **more: Any) -> Any:
            looks.append(type(self).__name__)
            return _original(self, *told, **more)

        monkeypatch.setattr(kind, name, counted)
    assert made.reserve(keys, num_tokens=130).worker == names[7]
    assert made.reserve(keys, num_tokens=130).worker == names[7]
    assert len(looks) <= 4 and "Candidate" not in looks
    assert len(made.fleet.candidates(made.ask(keys))) == 200
    await made.fleet.stop()


@pytest.mark.asyncio
async def test_what_others_sent_counts_as_queue_and_as_head_until_they_say_otherwise() -> None:
    made = Stage()
    await made.fleet.start()
    made.add("a", "b")
    keys = prompt_keys(1, 8)
    made.fleet.peers.take([{"a": SentLoad(1, 5000, 1, waiting=1)}])
    assert made.fleet.explain(made.ask(keys, num_tokens=130)).worker == "b"
    made.fleet.peers.take([{"a": SentLoad(1, 100, 1, marks(keys, 0), waiting=1)}])
    decided = made.fleet.explain(made.ask(keys, num_tokens=130))
    assert (decided.worker, decided.predicted_cached, decided.terms[0].plan) == ("a", 128, "wait")
    held = made.reserve(keys, num_tokens=130)
    told = made.fleet.sent()["a"]
    assert (told.in_flight, told.waiting, told.computing) == (1, 1, marks(keys, 0))
    held.release()
    made.fleet.peers.take([])
    assert made.fleet._board.peers.at(held.worker, 1).in_flight == 0
    await made.fleet.stop()


@pytest.mark.asyncio
async def test_what_was_sent_just_now_is_told_as_fresh_until_all_must_know_of_it() -> None:
    made = Stage()
    await made.fleet.start()
    made.add("a")
    made.reserve(num_tokens=100)
    made.now += 1.0
    held = made.reserve(num_tokens=40)
    assert (made.fleet.sent()["a"].fresh_tokens, made.fleet.sent()["a"].queued_tokens) == (40, 140 - 100)
    made.now += 2 * FRESH_S
    assert made.fleet.sent()["a"].fresh_tokens == 0
    held.release()
    await made.fleet.stop()


@pytest.mark.asyncio
async def test_a_burst_that_reaches_many_routers_at_once_is_spread_by_each_without_a_word() -> None:
    """Each has heard of bursts, not of this one, and sees the same worker as the best for all of its prompts."""
    chosen: Counter[str] = Counter()
    names = [f"router-{number}" for number in range(6)]
    for number, name in enumerate(names):
        made = Stage()
        await made.fleet.start()
        made.add(*NAMES)
        for worker, queued in zip(NAMES, (9000, 3000, 2000, 1000, 0), strict=True):
            made.link(worker).say_load(queued_tokens=queued, waiting=1, prefill_tokens_per_s=20_000.0)
        made.reserve(num_tokens=16).release()
        made.fleet.peers.unheard.stand(names, name)
        for _ in range(2):
            made.fleet.peers.take([{"a": SentLoad(1, 0, 0, fresh_tokens=6000)}])
        chosen[made.reserve([BlockKey(str(number).encode().ljust(16))], num_tokens=1000).worker] += 1
        await made.fleet.stop()
    assert chosen == {"c": 1, "d": 2, "e": 3}
