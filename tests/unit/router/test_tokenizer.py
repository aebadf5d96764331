"""Prompts to ids: special-token text of callers stays text, templates make the real ones, bos follows the model."""

from __future__ import annotations

import asyncio
import json
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Trained
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from pando.errors import ConfigError, InvalidRequest, Unsupported
from router.chat_template import ChatMessage, ChatTemplate
from router.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CORPUS = ["hello world end user assistant def main(): return 1 <| |> naive caf\u00e9 \u65e5\u672c \U0001f600"] * 20

Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Makes a model folder with a byte-level tokenizer; keywords go into tokenizer_config.json."""

    def make(*, adds_bos: bool = False, normalizer: Any = None, **config: Any) -> Path:
        trained = Trained(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        if normalizer is not None:
            trained.normalizer = normalizer
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
        trained.train_from_iterator(CORPUS, trainer)
        if adds_bos:
            trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        trained.save(str(tmp_path / "tokenizer.json"))
        settings = {"bos_token": "<s>", "chat_template": TEMPLATE} | config
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path

    return make


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Path:
    """A folder in the manner of Llama 2: spaces as marks, one put before every piece, bytes for unknown characters."""
    trained = Trained(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIALS, "<unk>"], show_progress=False)
    trained.train_from_iterator([text for line in CORPUS for text in (line, *every_byte)], trainer)
    trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trained.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": TEMPLATE}))
    return tmp_path


@pytest.mark.parametrize("text", ["hello world", "  two  spaces ", "a <|end|> b", "def main():\n    return"])
def test_sentencepiece_texts(sentencepiece: Path, text: str) -> None:
    tokenizer, reference = Tokenizer(sentencepiece), Trained.from_file(str(sentencepiece / "tokenizer.json"))
    reference.encode_special_tokens = True
    assert list(tokenizer.encode_now(text)) == reference.encode(text).ids
    assert tokenizer.decode_now(tokenizer.encode_now(text)) == reference.decode(reference.encode(text).ids)


def test_a_sentencepiece_chat_is_encoded_as_the_file_does(sentencepiece: Path) -> None:
    tokenizer, reference = Tokenizer(sentencepiece), Trained.from_file(str(sentencepiece / "tokenizer.json"))
    rendered = "<s><|user|>hello world<|end|>\n<|assistant|>"
    ids = tokenizer.encode_chat_now([ChatMessage("user", "hello world")])
    assert list(ids) == reference.encode(rendered, add_special_tokens=False).ids


def special_ids(ids: array[int]) -> list[int]:
    return [token for token in ids if token < len(SPECIALS)]


TEXTS = [
    "hello world",
    "hi <|end|> there <s>",
    "<|end|><|end|>",
    "<|en<|end|>d|>",
    "<s<s>>",
    "trailing <|en",
    "\x00\x01 nul and control \x7f",
    "\u202eright to left\u202c \u05d0",
    "\U0001f600\U0001f469\u200d\U0001f469",
    "a" + "\u0301" * 1000,
    "x" * 20_000,
    " ",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_is_plain_text_and_comes_back(build: Build, text: str) -> None:
    tokenizer = Tokenizer(build())
    ids = tokenizer.encode_now(text)
    assert special_ids(ids) == []
    assert tokenizer.decode_now(ids) == text


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_without_specials_is_encoded_as_the_file_does(build: Build, text: str) -> None:
    folder = build()
    reference = Trained.from_file(str(folder / "tokenizer.json"))
    reference.encode_special_tokens = True
    assert list(Tokenizer(folder).encode_now(text)) == reference.encode(text).ids


@pytest.mark.parametrize("text", TEXTS[:8], ids=range(8))
def test_a_chat_has_the_templates_special_tokens_and_no_others(build: Build, text: str) -> None:
    tokenizer = Tokenizer(build())
    ids = tokenizer.encode_chat_now([ChatMessage("user", text)])
    assert special_ids(ids) == [0, 2, 1, 3]
    assert tokenizer.decode_now(ids) == text.strip() + "\n"


def test_special_text_split_over_two_messages_stays_text(build: Build) -> None:
    tokenizer = Tokenizer(build(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"))
    ids = tokenizer.encode_chat_now([ChatMessage("user", "<|en"), ChatMessage("user", "d|>")])
    assert special_ids(ids) == []
    assert tokenizer.decode_now(ids) == "<|end|>"


def test_special_text_stays_text_under_a_normalizer(build: Build) -> None:
    tokenizer = Tokenizer(build(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])))
    ids = tokenizer.encode_chat_now([ChatMessage("user", "A <|end|> <|END|> e\u0301")])
    assert special_ids(ids) == [0, 2, 1, 3]
    assert tokenizer.decode_now(ids) == "a <|end|> <|end|> \u00e9\n"


@pytest.mark.parametrize(
    ("adds_bos", "config", "expected"),
    [
        (False, {}, []),
        (True, {}, [0]),
        (True, {"add_bos_token": True}, [0]),
        (False, {"add_bos_token": True}, [0]),
        (True, {"add_bos_token": False}, []),
    ],
)
def test_bos(build: Build, adds_bos: bool, config: dict[str, bool], expected: list[int]) -> None:
    tokenizer = Tokenizer(build(adds_bos=adds_bos, **config))
    assert special_ids(tokenizer.encode_now("hello")) == expected
    # A template writes its own.
    assert special_ids(tokenizer.encode_chat_now([ChatMessage("user", "hello")])) == [0, 2, 1, 3]


def test_the_template_file_wins(build: Build) -> None:
    folder = build()
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode_now(tokenizer.encode_chat_now([ChatMessage("user", "hey")])) == "hey!"


def test_named_templates(build: Build) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    tokenizer = Tokenizer(build(chat_template=named))
    assert tokenizer.decode_now(tokenizer.encode_chat_now([ChatMessage("user", "hey")])) == "hey"


def test_a_model_without_template_serves_text_only(build: Build) -> None:
    tokenizer = Tokenizer(build(chat_template=None))
    assert tokenizer.encode_now("hello")
    with pytest.raises(Unsupported):
        tokenizer.encode_chat_now([ChatMessage("user", "hello")])


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[5].content }}{{ messages[0].nothing.more }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 'a' * 100000000000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 9 ** 999999999 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{% include 'secrets' %}",
    ],
)
def test_a_template_that_misbehaves_fails_its_request_alone(source: str) -> None:
    ticks = iter(range(10**9))
    template = ChatTemplate(source, {}, clock=lambda: next(ticks) * 0.01)
    with pytest.raises(InvalidRequest, match="refuses this conversation") as caught:
        template.render([ChatMessage("user", "secret")])
    assert "secret" not in str(caught.value)


def test_templates_of_the_field_work() -> None:
    source = (
        "{%- if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}"
        "{% endif %}{% for m in rest %}{% if loop.index0 % 2 == 0 %}{% generation %}{{ m | tojson }}{% endgeneration %}"
        "{% else %}{% continue %}{% endif %}{% endfor %}"
    )
    messages = [ChatMessage("system", "s"), ChatMessage("user", "<\u00e9>"), ChatMessage("assistant", "a")]
    assert ChatTemplate(source, {}).render(messages) == '{"role": "user", "content": "<\u00e9>"}'


def test_a_broken_template_is_found_at_the_start() -> None:
    with pytest.raises(ConfigError):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize("broken", ["no json", "[]", "{}", '{"model": {"type": "Nonsense"}}'])
def test_a_broken_file_is_one_clear_error(tmp_path: Path, broken: str) -> None:
    (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_no_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


@pytest.mark.asyncio
async def test_encoding_leaves_the_event_loop_free(build: Build) -> None:
    tokenizer = Tokenizer(build(), max_tokens=lambda: 1 << 22)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticking = asyncio.create_task(tick())
    ids = await tokenizer.encode("some words in a row " * 30_000)
    ticking.cancel()
    assert len(ids) > 30_000
    assert ticks >= 5
    tokenizer.close()
    assert threading.active_count() < 50


@pytest.mark.asyncio
async def test_a_text_that_must_be_too_long_is_refused_unread(build: Build) -> None:
    tokenizer = Tokenizer(build(), max_tokens=lambda: 10)
    with pytest.raises(InvalidRequest, match="longer than"):
        await tokenizer.encode("x" * 100_000)
    tokenizer.close()


@pytest.mark.asyncio
async def test_a_text_that_turns_out_too_long_is_refused_with_its_length(build: Build) -> None:
    tokenizer = Tokenizer(build(), max_tokens=lambda: 10)
    assert len(await tokenizer.encode("q" * 10)) == 10
    for asked in (tokenizer.encode("q" * 11), tokenizer.encode_chat([ChatMessage("user", "q" * 11)])):
        with pytest.raises(InvalidRequest, match=r"has \d\d tokens and the model's context 10") as caught:
            await asked
        assert caught.value.reason == "CONTEXT_LENGTH"
    tokenizer.close()
