"""`pando generate` and `pando chat`: text in, streamed text out, through the Python client.

Knows the client and the terminal. stdout carries the answer alone; all else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from pando.client import Client
from pando.errors import PandoError

DEFAULT_TARGET = "127.0.0.1:8470"


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Flags of `pando generate`."""
    parser.add_argument("text", help="the prompt; '-' reads it from standard input")
    _add_sampling(parser)
    add_target(parser)
    parser.add_argument("--no-store", action="store_true", help="keep nothing of this request for later ones")
    parser.add_argument("--usage", action="store_true", help="say on stderr what the request took and what was cached")
    parser.add_argument("--json", action="store_true", help="print one JSON document when the answer is complete")


def generate(given: argparse.Namespace) -> int:
    """One prompt, one answer."""
    text = sys.stdin.read() if given.text == "-" else given.text
    with open_client(given) as client:
        if given.json:
            result = client.generate(text=text, no_store=given.no_store, **_sampling(given))
            document = {
                "text": result.text,
                "token_ids": list(result.token_ids),
                "finish_reason": str(result.finish_reason),
                "usage": _usage(result.usage),
            }
            print(json.dumps(document))
            return 0
        usage = None
        for chunk in client.stream(text=text, no_store=given.no_store, **_sampling(given)):
            print(chunk.text, end="", flush=True)
            usage = chunk.usage or usage
        print()
        if given.usage and usage is not None:
            print(_usage_line(usage), file=sys.stderr)
    return 0


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Flags of `pando chat`."""
    parser.add_argument("--system", default="", help="the system message")
    _add_sampling(parser)
    add_target(parser)


def chat(given: argparse.Namespace) -> int:
    """A conversation: each line of input is a message, the history goes along; ends with the input."""
    talking = sys.stdin.isatty()
    messages = [{"role": "system", "content": given.system}] if given.system else []
    with open_client(given) as client:
        for line in _lines(talking):
            messages.append({"role": "user", "content": line})
            answer = ""
            try:
                for chunk in client.stream(chat=messages, **_sampling(given)):
                    answer += chunk.text
                    print(chunk.text, end="", flush=True)
            except PandoError as error:
                if not talking:
                    raise
                messages.pop()
                print(f"pando chat: {error.message}", file=sys.stderr)
                continue
            print()
            messages.append({"role": "assistant", "content": answer})
    return 0


def add_target(parser: argparse.ArgumentParser) -> None:
    """Flags that say which router to ask, and as whom."""
    env = os.environ
    group = parser.add_argument_group("where to")
    group.add_argument(
        "--target",
        default=env.get("PANDO_TARGET", DEFAULT_TARGET),
        metavar="HOST:PORT",
        help="gRPC address of a router, also from PANDO_TARGET",
    )
    who = group.add_mutually_exclusive_group()
    who.add_argument("--api-key", default=argparse.SUPPRESS, metavar="K", help="credential, better by PANDO_API_KEY")
    who.add_argument(
        "--tenant",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="tenant, on loopback without keys; also from PANDO_TENANT",
    )
    group.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds until the request is given up"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling; what is not given is the model's own")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens to generate")

    def add(flag: str, text: str, **keywords: Any) -> None:
        group.add_argument(flag, help=text, default=argparse.SUPPRESS, **keywords)

    add("--min-tokens", "fewest tokens to generate", type=int, metavar="N")
    add("--temperature", "0 is greedy", type=float, metavar="X")
    add("--top-k", "keep the N likeliest tokens", type=int, metavar="N")
    add("--top-p", "keep the likeliest tokens of this total probability", type=float, metavar="X")
    add("--min-p", "keep tokens of at least this share of the likeliest one's probability", type=float, metavar="X")
    add("--seed", "equal seeds draw equal tokens", type=int, metavar="N")
    add("--stop", "end before this text; may be given again", action="append", metavar="TEXT")
    add("--ignore-eos", "go on over the end of the sequence", action="store_true")


_SAMPLING = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "ignore_eos")


def _sampling(given: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(given, name) for name in _SAMPLING if name in given} | {"timeout": given.timeout}


def open_client(given: argparse.Namespace) -> Client:
    """A client for the flags of `add_target`."""
    if "api_key" in given or "tenant" in given:
        return Client(given.target, api_key=getattr(given, "api_key", ""), tenant=getattr(given, "tenant", ""))
    key = os.environ.get("PANDO_API_KEY", "")
    return Client(given.target, api_key=key, tenant="" if key else os.environ.get("PANDO_TENANT", ""))


def _lines(talking: bool) -> Iterator[str]:
    while True:
        if talking:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _usage(usage: Any) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
        "queue_ms": usage.queue_ms,
        "ttft_ms": usage.ttft_ms,
        "total_ms": usage.total_ms,
        "worker": usage.worker,
    }


def _usage_line(usage: Any) -> str:
    return (
        f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.completion_tokens} generated; "
        f"first token after {usage.ttft_ms:.0f} ms, all after {usage.total_ms:.0f} ms on {usage.worker}"
    )
