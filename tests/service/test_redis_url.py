"""A Redis URL: whether a server answers there, and what of the URL may be shown."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from kvstore.redis_url import described, why_no_answer, without_password


def test_an_unreachable_redis_is_named_without_its_password(free_port: Callable[[], int]) -> None:
    port = free_port()
    why = why_no_answer(f"redis://user:hunter2@127.0.0.1:{port}/0")
    assert why == f"Redis at redis://127.0.0.1:{port}/0 does not answer"
    assert "redis://" in why_no_answer(f"127.0.0.1:{port}")


def test_a_redis_that_answers(redis_url: str) -> None:
    assert why_no_answer(redis_url) == ""


def test_a_refused_password_is_said_and_not_shown() -> None:
    said = described(redis.AuthenticationError("hunter2"), "redis://:hunter2@h:1/0")
    assert said == "Redis at redis://h:1/0 refused the password"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:p@h:1/0", "redis://h:1/0"),
        ("redis://u:p@x@h:1/0", "redis://h:1/0"),
        ("redis://h:1/0?password=p", "redis://h:1/0"),
        ("unix:///a/b.sock", "unix:///a/b.sock"),
        ("u:p@h", "h"),
        ("nothing", "nothing"),
    ],
)
def test_without_password(url: str, shown: str) -> None:
    assert without_password(url) == shown
