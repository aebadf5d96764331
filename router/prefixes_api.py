"""The prefixes service: what a tenant publishes, sees and ends.

Knows the .proto and its limits. Identity and errors are the gate's; what may be done is `publishing`'s. Invariant: an
answer holds nothing of a prefix that the caller may not use, and never whose it is.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable

from google.protobuf import timestamp_pb2

from pando.v1 import prefixes_pb2 as pb
from pando.v1 import prefixes_pb2_grpc
from router.admission import Admission
from router.interceptors import Call
from router.model_card import ModelCard
from router.prefix_catalog import PrefixRecord, Published
from router.publishing import DEFAULT_TTL_S, MAX_COPIES, MAX_NAME, MAX_TTL_S, Publication, Publishing
from router.tenants import GROUP, OWN, PUBLIC
from router.tokenizer import Tokenizer
from router.validation import check_messages, check_model, check_token_ids, wrong

DEFAULT_PAGE = 50
MAX_PAGE = 500

_AUDIENCES = {pb.PREFIX_SCOPE_OWN: OWN, pb.PREFIX_SCOPE_GROUP: GROUP, pb.PREFIX_SCOPE_PUBLIC: PUBLIC}
_SCOPES = {audience: scope for scope, audience in _AUDIENCES.items()}


class PrefixesService(prefixes_pb2_grpc.PrefixesServicer):
    """`pando.v1.Prefixes`. `num_copies` says how many workers hold a prefix now."""

    def __init__(
        self,
        publishing: Publishing,
        tokenizer: Tokenizer,
        admission: Admission,
        card: Callable[[], ModelCard],
        num_copies: Callable[[PrefixRecord], int],
        *,
        block_size: int,
    ) -> None:
        self._publishing = publishing
        self._tokenizer = tokenizer
        self._admission = admission
        self._card = card
        self._num_copies = num_copies
        self._block_size = block_size

    async def PublishPrefix(self, request: pb.PublishPrefixRequest, call: Call) -> pb.Prefix:
        card = self._card()
        audience, group, ttl_s = _checked(request, card)
        async with self._admission.enter(call.tenant, ""):
            token_ids = await self._encode(request, card)
            _check_length(len(token_ids), card, self._block_size)
            asked = Publication(token_ids, audience, group, request.name, request.copies or 1, request.warm, ttl_s)
            return self._message(await self._publishing.publish(call.tenant, asked, call.deadline))

    async def GetPrefix(self, request: pb.GetPrefixRequest, call: Call) -> pb.Prefix:
        return self._message(self._publishing.get(call.tenant, request.id))

    async def ListPrefixes(self, request: pb.ListPrefixesRequest, call: Call) -> pb.ListPrefixesResponse:
        after = _page_start(request.page_token)
        size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
        found = [published for published in self._publishing.visible(call.tenant) if published.record.rank > after]
        page = [self._message(published) for published in found[:size]]
        token = _page_token(found[size - 1].record) if len(found) > size else ""
        return pb.ListPrefixesResponse(prefixes=page, next_page_token=token)

    async def DeletePrefix(self, request: pb.DeletePrefixRequest, call: Call) -> pb.DeletePrefixResponse:
        await self._publishing.delete(call.tenant, request.id)
        return pb.DeletePrefixResponse()

    async def _encode(self, request: pb.PublishPrefixRequest, card: ModelCard) -> array[int]:
        kind = request.WhichOneof("prompt")
        if kind == "text":
            return await self._tokenizer.encode(request.text)
        if kind == "chat":
            return await self._tokenizer.encode_chat(check_messages(request.chat), answer=False)
        if kind == "token_ids":
            check_token_ids("token_ids.ids", request.token_ids.ids, card)
            return array("I", request.token_ids.ids)
        raise wrong("prompt", "must be exactly one of text, token_ids and chat")

    def _message(self, published: Published) -> pb.Prefix:
        record = published.record
        expires = timestamp_pb2.Timestamp()
        expires.FromMilliseconds(int((time.time() + published.expires_at - self._publishing.clock()) * 1000))
        return pb.Prefix(
            id=record.id,
            name=record.name,
            scope=_SCOPES[record.audience],
            group=record.group,
            num_tokens=record.num_tokens,
            expires=expires,
            copies=self._num_copies(record),
        )


def _checked(request: pb.PublishPrefixRequest, card: ModelCard) -> tuple[str, str, float]:
    """Audience, group and time to live; the first field that is wrong raises."""
    check_model(request.model, card)
    audience = _AUDIENCES.get(request.scope)
    if audience is None:
        raise wrong("scope", "must be own, group or public")
    if (audience == GROUP) != bool(request.group):
        raise wrong("group", "must be given for scope group, and for no other")
    if request.copies > MAX_COPIES:
        raise wrong("copies", f"must be from 0 to {MAX_COPIES}")
    if len(request.name) > MAX_NAME or not request.name.isprintable():
        raise wrong("name", f"must be up to {MAX_NAME} printable characters")
    ttl_s = request.ttl.seconds + request.ttl.nanos / 1e9 if request.HasField("ttl") else DEFAULT_TTL_S
    if not 0 < ttl_s <= MAX_TTL_S:
        raise wrong("ttl", f"must be above 0 and up to {MAX_TTL_S:.0f} seconds")
    return audience, request.group, ttl_s


def _check_length(num_tokens: int, card: ModelCard, block_size: int) -> None:
    if num_tokens < block_size:
        raise wrong("prompt", f"has {num_tokens} tokens and fills no block of {block_size}", reason="TOO_SHORT")
    if num_tokens >= card.context_length:
        raise wrong("prompt", f"does not fit a context of {card.context_length}", reason="CONTEXT_LENGTH")


def _page_token(record: PrefixRecord) -> str:
    return f"{record.created_ms}-{record.id}"


def _page_start(token: str) -> tuple[int, str]:
    """The rank behind which a page begins."""
    if not token:
        return -1, ""
    created, separator, prefix_id = token.partition("-")
    if not separator or not created.isascii() or not created.isdigit() or len(created) > 20:
        raise wrong("page_token", "is not one of ours")
    return int(created), prefix_id
