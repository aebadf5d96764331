"""Which folder a model name means, and the one line for every way that it can mean none."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from pando import model_folder
from pando.errors import ConfigError
from pando.model_folder import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": b"the same weights again",
    "original/params.json": b"{}",
}


def refusal(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_model(name)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return cache


class Hub(BaseHTTPRequestHandler):
    """The few answers of a hub that a download needs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/gated/"):
            self.reply(401, b"{}", {"X-Error-Code": "GatedRepo"}, with_body)
        elif path.startswith("/api/models/broken/"):
            self.reply(503, b"{}", {}, with_body)
        elif not path.startswith(("/api/models/org/model", "/org/model/")):
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif "/tree/" in path:
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in FILES.items()]
            self.reply(200, json.dumps(tree).encode(), {}, with_body)
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in FILES]
            about = {"id": "org/model", "sha": COMMIT, "private": False, "siblings": siblings}
            self.reply(200, json.dumps(about).encode(), {}, with_body)
        else:
            name = path.split(f"/resolve/{COMMIT}/")[1]
            self.reply(200, FILES[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}, with_body)

    def reply(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield
    server.shutdown()
    server.server_close()
    thread.join()
    huggingface_hub.close_session()


def test_the_built_in_name_is_the_built_in_folder() -> None:
    folder = resolve_model("pando-tiny")
    assert folder.is_absolute()
    assert (folder / "config.json").is_file()


def test_the_built_in_name_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pando-tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("pando-tiny") != tmp_path / "pando-tiny"


def test_an_installation_without_the_built_in_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "_BUILTIN_FOLDER", tmp_path)
    assert refusal("pando-tiny") == "the built-in model is not part of this installation"


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(str(folder)) == folder
    assert resolve_model("org/model") == folder  # a folder before a hub id
    assert resolve_model("~/org/model") == folder


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)) == f"the model folder {tmp_path} has no config.json"


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    assert "is no model folder" in refusal(str(path))


@pytest.mark.parametrize(
    "name", ["/nowhere/model", "./org/model", "model", "a/b/c", "../model", "org/../x", "org/mo del"]
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_without_asking_anyone(
    name: str, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refusal(name) == f"no model folder {name}"


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "~nobody-of-this-name/model"])
def test_odd_names_are_refused(name: str) -> None:
    assert refusal(name)


def test_a_hub_id_without_the_hub_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "install huggingface-hub" in refusal("org/model")


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_that_refuses_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    assert "the hub cannot be reached (ConnectError)" in refusal("org/model")


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_whose_name_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub.invalid")
    assert "the hub cannot be reached" in refusal("org/model")


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_that_never_answers_costs_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "_HUB_TIMEOUT_S", 0.3)
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "the hub cannot be reached (ReadTimeout)" in refusal("org/model")
    assert time.monotonic() - start < 5


@pytest.mark.usefixtures("hub_cache")
def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal("org/model")


@pytest.mark.usefixtures("hub")
def test_a_download_brings_what_a_server_needs_and_serves_again_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model("org/model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub.invalid")
    assert resolve_model("org/model") == folder


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org-of-nobody/model", "the hub has none of that name"),
        ("gated/model", "set HF_TOKEN"),
        ("broken/model", "the hub cannot be reached"),
    ],
)
def test_what_the_hub_says_is_told_in_one_line(name: str, words: str) -> None:
    assert words in refusal(name)
