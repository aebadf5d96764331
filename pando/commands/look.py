"""`pando status`, `pando explain` and `pando health`: what a fleet does, for people, programs and container probes.

Knows the admin port and the standard gRPC health service; changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import grpc

from pando.admin_client import AdminClient
from pando.commands.talk import DEFAULT_TARGET
from pando.errors import Unavailable
from pando.v1 import admin_pb2

DEFAULT_ADMIN = "127.0.0.1:8472"


def add_status(parser: argparse.ArgumentParser) -> None:
    """Flags of `pando status`."""
    _add_admin(parser)


def _add_admin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default=DEFAULT_ADMIN, metavar="ADMIN_HOST:PORT", help="admin port of a router")
    parser.add_argument("--admin-key", default="", metavar="K", help="its credential, better by PANDO_ADMIN_KEY")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds to wait for the router")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def status(given: argparse.Namespace) -> int:
    """Workers, tenants and totals of one router."""
    with _admin(given) as admin:
        document = _document(admin.stats(), admin.workers(), admin.tenants())
    if given.json:
        print(json.dumps(document))
    else:
        _show(document)
    return 0


def add_explain(parser: argparse.ArgumentParser) -> None:
    """Flags of `pando explain`."""
    parser.add_argument("request_id", metavar="REQUEST_ID", help="id of a request that the router placed lately")
    _add_admin(parser)


def explain(given: argparse.Namespace) -> int:
    """Where a request went, and the cost of every worker."""
    with _admin(given) as admin:
        placement = admin.explain(given.request_id)
    if given.json:
        document = _fields(placement) | {"candidates": [_fields(row) for row in placement.candidates]}
        print(json.dumps(document))
    else:
        _show_placement(placement)
    return 0


def _admin(given: argparse.Namespace) -> AdminClient:
    key = given.admin_key or os.environ.get("PANDO_ADMIN_KEY", "")
    return AdminClient(given.target, key=key, timeout_s=given.timeout)


def add_health(parser: argparse.ArgumentParser) -> None:
    """Flags of `pando health`."""
    parser.add_argument(
        "--target",
        default=os.environ.get("PANDO_TARGET", DEFAULT_TARGET),
        metavar="HOST:PORT",
        help="gRPC address of a router, also from PANDO_TARGET",
    )
    parser.add_argument("--service", default="", metavar="NAME", help="service to ask for; empty is the whole server")
    parser.add_argument("--timeout", type=float, default=3.0, metavar="S", help="seconds to wait")


def health(given: argparse.Namespace) -> int:
    """Exit code 0 when the router serves, 1 when it does not."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(given.target) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=given.service), timeout=given.timeout
            )
        except grpc.RpcError as error:
            raise Unavailable(f"{given.target} gave {error.code().name}") from None
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(name, file=sys.stdout if answer.status == health_pb2.HealthCheckResponse.SERVING else sys.stderr)
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


def _document(
    stats: admin_pb2.GetStatsResponse, workers: list[admin_pb2.Worker], tenants: list[admin_pb2.Tenant]
) -> dict[str, Any]:
    """Plain values of the three answers, named as in the .proto."""
    rows = [_fields(worker) for worker in workers]
    for row, worker in zip(rows, workers, strict=True):
        row["state"] = admin_pb2.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower()
    hit_ratio = stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0
    return {
        "router": _fields(stats) | {"hit_ratio": round(hit_ratio, 4)},
        "workers": rows,
        "tenants": [_fields(tenant) for tenant in tenants],
    }


def _fields(message: Any) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def _console() -> Any:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)


_TERMS = ("queue_s", "slot_s", "step_s", "plan_s", "decode_s", "behind_s", "eviction_s", "total_s")


def _show_placement(placement: admin_pb2.ExplainPlacementResponse) -> None:
    """One line for the decision, one row for each worker; times in milliseconds."""
    console = _console()
    where = f"went to {placement.worker}" if placement.worker else "went nowhere"
    found = f", {placement.found_cached_tokens} found cached" if placement.HasField("found_cached_tokens") else ""
    console.print(
        f"attempt {placement.attempt} {where}: {placement.reason}; {placement.prompt_tokens} prompt tokens{found}",
        highlight=False,
        soft_wrap=True,
    )
    names = (name.removesuffix("_s").replace("plan", "plan ms").replace("total", "total ms") for name in _TERMS)
    table = _table("worker", "plan", "cached", *names)
    for row in placement.candidates:
        if row.excluded:
            table.add_row(row.worker, row.excluded)
        else:
            times = (f"{1e3 * getattr(row, name):.1f}" for name in _TERMS)
            plan = f"{row.plan} from {row.pull_from}" if row.pull_from else row.plan
            table.add_row(row.worker, plan, str(row.cached_tokens), *times)
    console.print(table)


def _show(document: dict[str, Any]) -> None:
    console = _console()
    router = document["router"]
    index = "connected" if router["index_connected"] else "away"
    console.print(
        f"router {router['router']}: up {router['uptime_s']:.0f} s, {router['in_flight']} in flight, "
        f"{router['requests']} requests, {router['failed']} failed, hit ratio {router['hit_ratio']:.1%}, "
        f"{router['indexed_blocks']} blocks indexed, index {index}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_worker_table(document["workers"]))
    if document["tenants"]:
        console.print(_tenant_table(document["tenants"]))


def _worker_table(workers: list[dict[str, Any]]) -> Any:
    table = _table("worker", "epoch", "state", "address", "pid", "running", "waiting", "blocks free/cached/all")
    for w in workers:
        state = w["state"] + (f" ({w['reason']})" if w["reason"] else "")
        blocks = f"{w['free_blocks']}/{w['cached_blocks']}/{w['device_blocks']}"
        counts = (w["pid"], w["running"], w["waiting"])
        table.add_row(w["id"], str(w["epoch"]), state, w["address"], *map(str, counts), blocks)
    return table


def _tenant_table(tenants: list[dict[str, Any]]) -> Any:
    table = _table("tenant", "requests", "failed", "in flight", "prompt tokens", "cached", "generated")
    names = ("requests", "failed", "in_flight", "prompt_tokens", "cached_tokens", "completion_tokens")
    for tenant in tenants:
        table.add_row(tenant["id"], *(f"{tenant[name]:,}" for name in names))
    return table


def _table(first: str, *others: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="left" if name in ("state", "address") else "right")
    return table
