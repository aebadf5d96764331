"""The built-in checkpoint is whole, and the script that made it works end to end on a small corpus."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer, models

from bench.pando_tiny import checks, train
from bench.pando_tiny.checkpoint import read, train_tokenizer
from bench.pando_tiny.corpus import SPECIAL_TOKENS, STANDARD_LIBRARY, Turn, gather, render
from bench.pando_tiny.model import Llama, Shape
from pando.errors import ConfigError
from pando.model_folder import resolve_model

FOLDER = resolve_model("pando-tiny")
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
CHAT = [
    Turn("system", "You are a helpful assistant."),
    Turn("user", "What does str.split do?"),
    Turn("assistant", "Return a list."),
    Turn("user", "And str.join?"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more to waiting threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of sources, just large enough to learn from."""
    folder = tmp_path / "library"
    folder.mkdir()
    for module in ("river", "forest"):
        functions = [
            f'def {verb}_{module}(place, *, depth={depth}):\n    """{verb.title()} the {module} at a place.\n\n'
            f'    The {module} is {depth} steps away, and nothing else is known of it.\n    """\n    return place\n'
            for depth, verb in enumerate(("cross", "enter", "leave", "measure", "draw", "name"))
        ]
        (folder / f"{module}.py").write_text(f'"""All about one {module}."""\n# A comment.\n' + "\n".join(functions))
    return folder


def contents(name: str) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((FOLDER / name).read_text("utf-8"))
    return loaded


def test_the_built_in_folder_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "training.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * 1024 * 1024


def test_the_config_is_a_llama_of_8192_positions() -> None:
    config = contents("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 8192
    assert config["tie_word_embeddings"] is True
    assert config["torch_dtype"] == "bfloat16"
    assert config["vocab_size"] == TOKENIZER.get_vocab_size() == 2048


def test_the_weights_are_bfloat16_and_of_the_config_s_shape() -> None:
    config = contents("config.json")
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 - not a dict
        embedding = file.get_slice("model.embed_tokens.weight").get_shape()
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert embedding == [config["vocab_size"], config["hidden_size"]]


def test_special_tokens_and_end_tokens_agree_over_the_files() -> None:
    ids = {token: TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS}
    assert None not in ids.values()
    ends = [ids["<|end|>"], ids["<|endoftext|>"]]
    assert contents("generation_config.json")["do_sample"] is False
    assert contents("generation_config.json")["eos_token_id"] == contents("config.json")["eos_token_id"] == ends
    assert contents("tokenizer_config.json")["add_bos_token"] is False
    assert TOKENIZER.encode("text").ids[0] != ids["<|endoftext|>"]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_the_tokenizer_gives_every_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["", " ", "naïve 東京 🌲🌲\r\n\t\0", "a" * 5000, "<|user|> in the middle", "  two  spaces "]
)
def test_the_tokenizer_gives_odd_texts_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def chat_text(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(str(contents("tokenizer_config.json")["chat_template"]))
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def test_the_chat_template_writes_what_the_corpus_taught() -> None:
    messages = [{"role": turn.role, "content": turn.content} for turn in CHAT]
    assert chat_text(messages, False) == render(CHAT)
    assert chat_text(messages, True) == render(CHAT) + "<|assistant|>\n"


def test_a_longer_chat_begins_with_the_tokens_of_the_shorter() -> None:
    short, long = TOKENIZER.encode(render(CHAT[:1])).ids, TOKENIZER.encode(render(CHAT)).ids
    assert long[: len(short)] == short


def test_the_chat_template_refuses_an_unknown_role() -> None:
    with pytest.raises(ValueError, match="unknown role: tool"):
        chat_text([{"role": "tool", "content": "x"}], True)


def test_greedy_text_of_the_built_in_checkpoint_is_decided_clearly() -> None:
    model, tokenizer = read(FOLDER)
    samples = [checks.greedy(model, tokenizer, prompt, 12) for prompt in checks.PROMPTS[:4]]
    assert all(sample.text.strip() for sample in samples)
    assert checks.close_calls(samples, 1e-4) == 0.0


def test_far_positions_cost_no_more_than_near_ones() -> None:
    model, tokenizer = read(FOLDER)
    text = " ".join(document.text for document in gather(STANDARD_LIBRARY / "json", 0)) * 4
    stream = torch.tensor(tokenizer.encode(text).ids[:8193])
    losses = checks.loss_by_position(model, stream)
    assert losses["4096-8192"] < losses["0-256"] + 1.0


def test_the_corpus_is_the_same_every_time_and_has_no_text_twice() -> None:
    library = STANDARD_LIBRARY / "json"
    documents = gather(library, 3)
    assert documents == gather(library, 3)
    assert len({document.text for document in documents}) == len(documents)
    assert {document.kind for document in documents} == {"prose", "chat", "code"}


def test_the_corpus_names_no_folder_of_this_machine() -> None:
    assert not any(str(STANDARD_LIBRARY) in document.text for document in gather(STANDARD_LIBRARY / "importlib", 0))


@pytest.fixture
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no propagated warnings of the oracle while it loads."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


@pytest.mark.usefixtures("quiet_transformers")
def test_a_few_steps_on_a_small_corpus_give_a_folder_that_transformers_loads(
    tmp_path: Path, library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "deep" / "model"
    flags = ["--library", str(library), "--precision", "float32", "--out", str(out), "--steps", "3"]
    assert train.main(flags) == 0
    printed = capsys.readouterr().out
    difference = float(printed.rsplit("in float32: ", 1)[1])
    assert difference < 1e-4
    assert "loss by position" in printed and "0 s left" in printed
    assert resolve_model(str(out)) == out
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": turn.role, "content": turn.content} for turn in CHAT]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == render(CHAT)
    assert tokenizer("def f(x):").input_ids == Tokenizer.from_file(str(out / "tokenizer.json")).encode("def f(x):").ids
    assert json.loads((out / "training.json").read_text())["steps"] == 3
    tokenizer_text = (out / "tokenizer.json").read_text()
    assert list(tmp_path.joinpath("deep").iterdir()) == [out]

    assert train.main([*flags[:-1], "1", "--start", str(out)]) == 0
    record = json.loads((out / "training.json").read_text())
    assert (record["steps"], record["before"]["steps"]) == (1, 3)
    assert (out / "tokenizer.json").read_text() == tokenizer_text


def test_equal_seeds_give_equal_tokenizers_and_weights(library: Path) -> None:
    def trained(seed: int) -> tuple[str, torch.Tensor]:
        plan = train.parse(["--out", "unused", "--steps", "2", "--seed", str(seed)])
        documents = gather(library, seed)
        tokenizer = train_tokenizer([document.text for document in documents], 400)
        torch.manual_seed(seed)
        model = Llama(Shape(vocab_size=tokenizer.get_vocab_size()))
        steps, _ = train.train(model, train.tokenize(documents, tokenizer, seed).training, plan, bfloat16=False)
        assert steps == 2
        return tokenizer.to_str(), torch.cat([value.flatten() for value in model.state_dict().values()])

    (text, weights), (text_again, weights_again) = trained(1), trained(1)
    assert text == text_again
    assert torch.equal(weights, weights_again)
    assert not torch.equal(weights, trained(2)[1])


@pytest.mark.parametrize("stage", [train.FROM_NOTHING, train.FROM_CHECKPOINT])
def test_the_rate_falls_after_the_warm_up_and_lengths_reach_the_whole_context(stage: train.Stage) -> None:
    rates = [train.learning_rate(stage, step, step / 1000) for step in range(1001)]
    assert max(rates) == rates[stage.warmup_steps - 1] <= stage.peak_rate
    assert rates[stage.warmup_steps :] == sorted(rates[stage.warmup_steps :], reverse=True)
    assert rates[-1] == pytest.approx(0.02 * stage.peak_rate)
    assert max(train.sequence_length(stage, step, step / 1000) for step in range(1000)) == 8192


def test_a_folder_of_another_model_is_no_start(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    for config in ("{", "[]", json.dumps(contents("config.json") | {"hidden_size": 96})):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ConfigError, match="is no checkpoint that this script wrote"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "1", "--minutes", "1"], "not both"),
        (["--steps", "0"], "--steps must be more than 0"),
        (["--minutes", "nan"], "--minutes must be more than 0"),
        (["--threads", "-1"], "--threads must be more than 0"),
        (["--steps", "many"], "invalid int value"),
        (["--speed", "9"], "unrecognized arguments"),
        (["--start", "EMPTY", "--tokenizer", "EMPTY"], "not both"),
        (["--start", "EMPTY"], "no tokenizer.json"),
        (["--start", str(FOLDER), "--out", "FILE"], "is a file"),
        (["--library", "/nowhere"], "no folder /nowhere"),
        (["--library", "EMPTY"], "no documented Python source"),
        (["--tokenizer", "EMPTY"], "no tokenizer.json"),
        (["--tokenizer", "BROKEN"], "cannot be read as a tokenizer"),
        (["--tokenizer", "FOREIGN"], "lacks one of the tokens"),
        (["--out", "FILE"], "is a file"),
        (["--out", "OTHER"], "holds other files"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    flags: list[str], words: str, tmp_path: Path, library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").touch()
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER" / "letter.txt").touch()
    for name, text in (("BROKEN", "{"), ("FOREIGN", Tokenizer(models.BPE()).to_str())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)
    placed = [str(tmp_path / flag) if flag.isupper() else flag for flag in flags]
    assert train.main(["--out", str(tmp_path / "model"), "--library", str(library), *placed]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert words in printed.err
