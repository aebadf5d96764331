"""A router as a child of a command: where it listens, and what of its settings others may see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import redis

from control.router_process import RouterProcess
from pando.settings import RouterSettings


def test_no_secret_stands_on_its_command_line(own_redis: Any) -> None:
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set("requirepass", "hunter2")
    url = own_redis.url.replace("://", "://:hunter2@")
    router = RouterProcess(
        RouterSettings(redis=url, link_token="hunter3", cluster_secret="hunter4", port=0, http_port=0, admin_port=0)
    )
    router.start()
    try:
        assert router.wait_listening(20).grpc.startswith("127.0.0.1:")
        assert router._child is not None
        assert b"hunter" not in Path(f"/proc/{router._child.pid}/cmdline").read_bytes()
    finally:
        router.stop()
