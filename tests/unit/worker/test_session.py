"""What a session has yet to say stays bounded and in order, however slow its router reads."""

from __future__ import annotations

import asyncio

import pytest

from worker.engine import Load
from worker.sequence import AdmissionFacts, Finish, SequenceOutput
from worker.session import MAX_PENDING_EVENTS, MAX_PENDING_PONGS, Attempt, RouterSession


@pytest.mark.asyncio
async def test_outputs_of_one_attempt_merge() -> None:
    session = RouterSession("r")
    facts = AdmissionFacts(16, 0, 0.1)
    for i in range(100):
        session.add_output(Attempt(1, 1), SequenceOutput(9, i, (i,), admission=facts if i == 0 else None))
    session.add_output(Attempt(1, 1), SequenceOutput(9, 100, finish=Finish.CANCELLED, reason="why"))
    session.add_output(Attempt(1, 2), SequenceOutput(10, 0, (5,)))
    news = await session.news()
    assert list(news.outputs) == [Attempt(1, 1), Attempt(1, 2)]
    merged = news.outputs[Attempt(1, 1)]
    assert (merged.first_index, merged.token_ids) == (0, tuple(range(100)))
    assert (merged.admission, merged.finish, merged.reason) == (facts, Finish.CANCELLED, "why")


@pytest.mark.asyncio
async def test_everything_else_is_bounded_to_the_newest() -> None:
    session = RouterSession("r")
    for i in range(5000):
        session.add_feed([b"%d" % i])
        session.add_pong(i)
        session.set_load(Load(running=i))
    news = await session.news()
    assert (len(news.feed), news.feed[-1]) == (MAX_PENDING_EVENTS, b"4999")
    assert (len(news.pongs), news.pongs[-1]) == (MAX_PENDING_PONGS, 4999)
    assert news.load == Load(running=4999)


@pytest.mark.asyncio
async def test_news_are_told_once_and_waited_for() -> None:
    session = RouterSession("r")
    session.add_pong(1)
    assert (await session.news()).pongs == [1]
    waiting = asyncio.ensure_future(session.news())
    await asyncio.sleep(0)
    assert not waiting.done()
    session.add_pong(2)
    assert (await waiting).pongs == [2]
