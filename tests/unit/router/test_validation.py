"""Requests before their prompt is read: every limit of the contract, defaults, and what this version does not serve."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from pando.errors import ConfigError, InvalidRequest, NotFound, PandoError, PermissionDenied, Unsupported
from pando.v1 import inference_pb2 as pb
from router.model_card import ModelCard, SamplingDefaults, read_model_card
from router.validation import check_request, fit_max_tokens, one_prompt_only, top_level_fields

CARD = ModelCard("tiny", context_length=1000, vocab_size=100, eos_token_ids=(3, 0))
BIG = 2**31 - 1


def request(sampling: dict[str, Any] | None = None, **fields: Any) -> pb.GenerateRequest:
    fields = fields or {"text": "hi"}
    return pb.GenerateRequest(sampling=pb.Sampling(**(sampling or {})), **fields)


def chat(*turns: tuple[str, str]) -> dict[str, pb.Chat]:
    return {"chat": pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in turns])}


BAD: list[tuple[dict[str, Any], dict[str, Any], type[PandoError], str]] = [
    *(({"max_tokens": value}, {}, InvalidRequest, "sampling.max_tokens") for value in (0, -1, -BIG)),
    *(({"min_tokens": value}, {}, InvalidRequest, "sampling.min_tokens") for value in (-1,)),
    *(
        ({"temperature": value}, {}, InvalidRequest, "sampling.temperature")
        for value in (float("nan"), float("inf"), -0.1, 1e30)
    ),
    *(({"top_p": value}, {}, InvalidRequest, "sampling.top_p") for value in (0.0, -1.0, 1.01, float("nan"))),
    *(({"top_k": value}, {}, InvalidRequest, "sampling.top_k") for value in (-2, -BIG)),
    *(({"min_p": value}, {}, InvalidRequest, "sampling.min_p") for value in (-0.1, 1.1, float("nan"))),
    *(({"n": value}, {}, InvalidRequest, "sampling.n") for value in (0, -1, 9, BIG)),
    *(({"presence_penalty": value}, {}, InvalidRequest, "sampling.presence_penalty") for value in (-2.1, float("nan"))),
    *(
        ({"frequency_penalty": value}, {}, InvalidRequest, "sampling.frequency_penalty")
        for value in (2.1, float("inf"))
    ),
    *(
        ({"repetition_penalty": value}, {}, InvalidRequest, "sampling.repetition_penalty")
        for value in (0.0, -1.0, 11.0)
    ),
    *(({"logprobs": value}, {}, InvalidRequest, "sampling.logprobs") for value in (-1, 21, BIG)),
    ({"prompt_logprobs": 21}, {}, InvalidRequest, "sampling.prompt_logprobs"),
    ({"logit_bias": dict.fromkeys(range(301), 0.5)}, {}, InvalidRequest, "sampling.logit_bias"),
    ({"logit_bias": {1: float("nan")}}, {}, InvalidRequest, "sampling.logit_bias"),
    ({"logit_bias": {100: 1.0}}, {}, InvalidRequest, "sampling.logit_bias"),
    ({"logit_bias": {-1: 1.0}}, {}, InvalidRequest, "sampling.logit_bias"),
    ({"stop": ["a"] * 17}, {}, InvalidRequest, "sampling.stop"),
    ({"stop": ["a", ""]}, {}, InvalidRequest, "sampling.stop[1]"),
    ({"stop": ["\u00e9" * 129]}, {}, InvalidRequest, "sampling.stop[0]"),
    ({"stop_token_ids": [1, 100]}, {}, InvalidRequest, "sampling.stop_token_ids[1]"),
    ({"stop_token_ids": [1] * 65}, {}, InvalidRequest, "sampling.stop_token_ids"),
    ({}, {"model": "tiny"}, InvalidRequest, "prompt"),
    ({}, {"text": ""}, InvalidRequest, "text"),
    ({}, {"token_ids": pb.TokenIds()}, InvalidRequest, "token_ids"),
    ({}, {"token_ids": pb.TokenIds(ids=[5, -1])}, InvalidRequest, "token_ids.ids[1]"),
    ({}, {"token_ids": pb.TokenIds(ids=[5, 6, 100])}, InvalidRequest, "token_ids.ids[2]"),
    ({}, {"token_ids": pb.TokenIds(ids=[5] * 1000)}, InvalidRequest, "token_ids"),
    ({}, {"chat": pb.Chat()}, InvalidRequest, "chat.messages"),
    ({}, chat(("system", "x"), ("tool", "x")), InvalidRequest, "chat.messages[1].role"),
    ({}, chat(*[("user", "x")] * 4097), InvalidRequest, "chat.messages"),
    ({}, {"text": "x", "request_id": "x" * 10_000}, InvalidRequest, "request_id"),
    ({}, {"text": "x", "request_id": "caf\u00e9"}, InvalidRequest, "request_id"),
    ({}, {"text": "x", "request_id": "a b"}, InvalidRequest, "request_id"),
    ({"presence_penalty": 0.5}, {}, Unsupported, "sampling.presence_penalty"),
    ({"frequency_penalty": 0.5}, {}, Unsupported, "sampling.frequency_penalty"),
    ({"repetition_penalty": 1.1}, {}, Unsupported, "sampling.repetition_penalty"),
    ({"logprobs": 0}, {}, Unsupported, "sampling.logprobs"),
    ({"prompt_logprobs": 5}, {}, Unsupported, "sampling.prompt_logprobs"),
    ({"logit_bias": {5: 1.0}}, {}, Unsupported, "sampling.logit_bias"),
    ({"json_schema": "{}"}, {}, Unsupported, "sampling.json_schema"),
    ({"regex": "a+"}, {}, Unsupported, "sampling.regex"),
    ({"choice": pb.Choice(options=["a"])}, {}, Unsupported, "sampling.choice"),
]


@pytest.mark.parametrize(("sampling", "fields", "error", "field"), BAD, ids=range(len(BAD)))
def test_a_bad_field_is_refused_by_name(
    sampling: dict[str, Any], fields: dict[str, Any], error: type[PandoError], field: str
) -> None:
    with pytest.raises(error) as caught:
        check_request(request(sampling, **fields), CARD)
    assert type(caught.value) is error
    assert [violation.field for violation in caught.value.violations] == [field]


def test_another_model_is_not_found() -> None:
    check_request(request(text="x", model="tiny"), CARD)
    with pytest.raises(NotFound):
        check_request(request(text="x", model="other"), CARD)


def test_priority_above_zero_is_above_entitlement() -> None:
    assert check_request(request(text="x", priority=-5), CARD).priority == -5
    with pytest.raises(PermissionDenied):
        check_request(request(text="x", priority=1), CARD)


def test_what_is_unset_is_the_models_own() -> None:
    defaults = SamplingDefaults(max_tokens=20, temperature=0.6, top_k=20, top_p=0.95, min_p=0.1)
    card = ModelCard("tiny", 1000, 100, (3, 0), defaults)
    checked = check_request(request(), card)
    assert (checked.temperature, checked.top_k, checked.top_p, checked.min_p) == (0.6, 20, 0.95, 0.1)
    assert (checked.n, checked.seed, checked.min_tokens, checked.stop_token_ids) == (1, None, 0, (3, 0))
    assert fit_max_tokens(checked, 10, card) == 20
    plain = check_request(request(), CARD)
    assert (plain.temperature, plain.top_k, plain.top_p, plain.min_p) == (1.0, 0, 1.0, 0.0)


def test_what_is_set_wins_zero_too() -> None:
    card = ModelCard("tiny", 1000, 100, (3,), SamplingDefaults(temperature=0.6, top_k=20, top_p=0.9))
    checked = check_request(request({"temperature": 0.0, "top_k": -1, "top_p": 1.0, "seed": 0, "n": 8}), card)
    assert (checked.temperature, checked.top_k, checked.top_p, checked.seed, checked.n) == (0.0, 0, 1.0, 0, 8)


def test_neutral_values_of_unserved_fields_pass() -> None:
    neutral = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    check_request(request(neutral), CARD)


def test_tiny_temperature_and_huge_top_k_mean_what_they_say() -> None:
    checked = check_request(request({"temperature": 1e-30, "top_k": BIG}), CARD)
    assert (checked.temperature, checked.top_k) == (0.0, 0)


def test_stop_ids_are_the_models_and_the_callers() -> None:
    assert check_request(request({"stop_token_ids": [7, 3]}), CARD).stop_token_ids == (3, 0, 7)
    ignoring = {"stop_token_ids": [7], "ignore_eos": True}
    assert check_request(request(ignoring), CARD).stop_token_ids == (7,)


def test_prompts_of_each_kind() -> None:
    assert check_request(request(text="a\x00b"), CARD).prompt == "a\x00b"
    assert check_request(request(token_ids=pb.TokenIds(ids=[0, 99])), CARD).prompt == array("I", [0, 99])
    messages = check_request(request(**chat(("user", "q"), ("assistant", ""))), CARD).prompt
    assert [(m.role, m.content) for m in messages] == [("user", "q"), ("assistant", "")]


@pytest.mark.parametrize(
    ("sampling", "prompt", "expected"),
    [({}, 10, 256), ({}, 900, 100), ({"max_tokens": 990}, 10, 990), ({"min_tokens": 300}, 10, 300), ({}, 999, 1)],
)
def test_max_tokens_fits_the_context(sampling: dict[str, int], prompt: int, expected: int) -> None:
    assert fit_max_tokens(check_request(request(sampling), CARD), prompt, CARD) == expected


@pytest.mark.parametrize(
    ("sampling", "prompt", "reason"),
    [
        ({}, 0, "EMPTY_PROMPT"),
        ({}, 1000, "CONTEXT_LENGTH"),
        ({"max_tokens": 991}, 10, "CONTEXT_LENGTH"),
        ({"max_tokens": BIG}, 10, "CONTEXT_LENGTH"),
        ({"min_tokens": 995}, 10, "INVALID_REQUEST"),
        ({"min_tokens": 5, "max_tokens": 4}, 10, "INVALID_REQUEST"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(sampling: dict[str, int], prompt: int, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        fit_max_tokens(check_request(request(sampling), CARD), prompt, CARD)
    assert caught.value.reason == reason


def test_two_prompts_on_the_wire_are_seen() -> None:
    check = one_prompt_only(2, 3, 4)
    text = pb.GenerateRequest(text="a", model="m", request_id="r").SerializeToString()
    ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1])).SerializeToString()
    check(text)
    check(ids + ids)
    check(b"")
    with pytest.raises(InvalidRequest, match="exactly one"):
        check(text + ids)


@pytest.mark.parametrize("raw", [b"\xff" * 20, b"\x0b", b"\x80", b"\x08\x01" * 100])
def test_malformed_and_bloated_messages_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        top_level_fields(raw)


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return folder


CONFIG = {"vocab_size": 10, "max_position_embeddings": 20, "eos_token_id": 2}


def test_the_card_of_a_folder(tmp_path: Path) -> None:
    generation = {"eos_token_id": [2, 5], "temperature": 0.7, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.05}
    card = read_model_card(str(tmp_path), write(tmp_path, config=CONFIG, generation_config=generation))
    assert card == ModelCard(
        tmp_path.name, 20, 10, (2, 5), SamplingDefaults(256, 0.7, 40, 0.8, 0.0), ("repetition_penalty",)
    )


def test_a_folder_without_generation_config(tmp_path: Path) -> None:
    card = read_model_card("owner/name", write(tmp_path, config=CONFIG))
    assert (card.name, card.eos_token_ids, card.defaults) == ("owner/name", (2,), SamplingDefaults())


def test_a_model_that_does_not_sample_is_greedy(tmp_path: Path) -> None:
    card = read_model_card("m", write(tmp_path, config=CONFIG, generation_config={"do_sample": False}))
    assert card.defaults.temperature == 0.0


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config": "{"},
        {"config": "[]"},
        {"config": {}},
        {"config": CONFIG | {"vocab_size": "many"}},
        {"config": CONFIG | {"eos_token_id": "x"}},
        {"config": CONFIG, "generation_config": {"top_p": "x"}},
    ],
)
def test_a_bad_folder_is_one_clear_line(tmp_path: Path, files: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        read_model_card("m", write(tmp_path, **files))
