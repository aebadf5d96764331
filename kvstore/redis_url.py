"""The URL of the fleet's Redis: whether one answers there, and how the URL may be shown.

Knows nothing of what is kept in Redis. Invariant: no sentence made here holds a password.
"""

from __future__ import annotations

import redis


def why_no_answer(url: str, timeout_s: float = 2.0) -> str:
    """Why no Redis answers at `url` within `timeout_s` seconds; empty when one does."""
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=timeout_s, socket_timeout=timeout_s) as client:
            client.ping()
    except (redis.RedisError, ValueError) as error:
        return described(error, url)
    return ""


def described(error: redis.RedisError | ValueError, url: str) -> str:
    """What to tell an operator of an error that redis-py raised for `url`; ValueError is its word for no URL."""
    if isinstance(error, ValueError):
        return "the Redis URL must begin with redis://, rediss:// or unix://"
    if isinstance(error, redis.AuthenticationError):
        return f"Redis at {without_password(url)} refused the password"
    return f"Redis at {without_password(url)} does not answer"


def without_password(url: str) -> str:
    """The URL as it may be shown: no user, no password, no query, which can hold both."""
    scheme, found, rest = url.rpartition("://")
    return f"{scheme}{found}{rest.rpartition('@')[2].partition('?')[0]}"
