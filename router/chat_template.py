"""Chat messages to one prompt text by the model's own template, in a sandbox with a time and a size cap.

Knows jinja and nothing of tokens. Templates come from the model's folder only; no clock, file or network is in reach
of one, so the same messages always give the same text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from pando.errors import ConfigError, InvalidRequest
from router.model_card import read_json

RENDER_SECONDS = 2.0
MAX_RENDERED_CHARACTERS = 16 * 1024 * 1024

_DEADLINE = "pando_render_deadline"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn: role is "system", "user" or "assistant"."""

    role: str
    content: str


class TemplateTooBig(Exception):
    """A template ran past its time or size cap."""


class ChatTemplate:
    """One model's template. Safe to render from several threads at once."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`special_tokens`: what the template sees as `bos_token`, `eos_token` and so on."""
        self._special_tokens = dict(special_tokens)
        self._clock = clock
        environment = _Sandbox(clock)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError("the model's chat template is not a valid template") from error

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> str:
        """The prompt text. Raises `InvalidRequest` where the template refuses the messages or takes too long."""
        values = {
            **self._special_tokens,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "add_generation_prompt": add_generation_prompt,
            _DEADLINE: self._clock() + RENDER_SECONDS,
        }
        try:
            return self._joined(values)
        except (jinja2.TemplateError, TemplateTooBig, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequest(
                "the model's chat template refuses this conversation", reason="CHAT_TEMPLATE"
            ) from error

    def _joined(self, values: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate(values):
            size += len(piece)
            if size > MAX_RENDERED_CHARACTERS or self._clock() > values[_DEADLINE]:
                raise TemplateTooBig
            pieces.append(piece)
        return "".join(pieces)


def read_chat_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of a model folder: `chat_template.jinja`, else that of `tokenizer_config.json`; None if neither."""
    path = folder / "chat_template.jinja"
    source = path.read_text("utf-8") if path.exists() else _default_template(config.get("chat_template"))
    if source is None:
        return None
    return ChatTemplate(source, special_token_texts(config))


def special_token_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... of a tokenizer_config.json as plain text."""
    texts: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            texts[name] = text
    return texts


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The object in tokenizer_config.json; {} where there is none."""
    return read_json(folder / "tokenizer_config.json", optional=True)


def _default_template(found: Any) -> str | None:
    if isinstance(found, list):  # several named templates
        by_name = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = by_name.get("default")
    return found if isinstance(found, str) else None


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said, for training; here it only has a body."""

    tags = {"generation"}  # noqa: RUF012 - the attribute of the parent class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of jinja with the clock looked at on every call and without ways to make huge values."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, clock: Callable[[], float]) -> None:
        extensions = [_GenerationTag, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self._clock = clock
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _refuse

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if self._clock() > context.get(_DEADLINE, float("inf")):
            raise TemplateTooBig
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if not numbers or operator == "**":
            raise TemplateTooBig
        return super().call_binop(context, operator, left, right)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
