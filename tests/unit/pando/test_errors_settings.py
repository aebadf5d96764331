"""The error table and the settings: one code each way, sources in order, and no mistake that passes silently."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import grpc
import pytest

from pando import errors, settings
from pando.errors import ConfigError, InternalError, PandoError, error_type
from pando.settings import RouterSettings, UpSettings, WorkerSettings, load, narrow, secrets, to_flags

TREE = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, PandoError)]


@pytest.mark.parametrize("cls", [cls for cls in TREE if cls is not PandoError], ids=lambda cls: cls.__name__)
def test_every_error_crosses_the_wire_and_comes_back(cls: type[PandoError]) -> None:
    assert error_type(cls.wire.code) is cls
    error = cls("words", retry_after_s=1.0)
    assert (str(error), error.message, error.reason) == ("words", "words", cls.default_reason)
    assert cls("words", reason="OTHER").reason == "OTHER"


def test_codes_are_used_once_and_retries_are_of_two_kinds() -> None:
    leaves = [cls for cls in TREE if cls is not PandoError]
    assert len({cls.wire.code for cls in leaves}) == len(leaves)
    retryable = {cls.wire.code for cls in leaves if cls.wire.retryable}
    assert retryable == {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}


def test_a_code_pando_never_sends_is_internal() -> None:
    assert error_type(grpc.StatusCode.DATA_LOSS) is InternalError


def test_sources_win_in_order(tmp_path: Path) -> None:
    toml = tmp_path / "s.toml"
    toml.write_text('port = 1\nhttp-port = 2\nadmin_port = 3\nmodel = "file"')
    env = {"PANDO_HTTP_PORT": "20", "PANDO_ADMIN_PORT": "30", "HOME": "/x"}
    found = load(RouterSettings, {"admin-port": "300"}, toml=toml, env=env)
    assert (found.port, found.http_port, found.admin_port, found.model) == (1, 20, 300, "file")
    assert found.block_size == 16


@pytest.mark.parametrize(
    ("flags", "env", "says"),
    [
        ({"prot": 1}, {}, "unknown setting 'prot' in command line"),
        ({}, {"PANDO_PROT": "1"}, "unknown setting PANDO_PROT in the environment"),
        ({"port": "x"}, {}, "'port' in command line must be a whole number"),
        ({"port": -1}, {}, "0 or more"),
        ({"port": 1.5}, {}, "a whole number"),
        ({"port": True}, {}, "must be a number"),
        ({"port": None}, {}, "must be a number"),
        ({"port": float("inf")}, {}, "a whole number"),
        ({"max-request-s": "nan"}, {}, "a number"),
        ({"max-request-s": "inf"}, {}, "a number"),
        ({"model": 3}, {}, "must be text"),
        ({"reflection": "maybe"}, {}, "must be one of on, off"),
        ({}, {"PANDO_PORT": "many"}, "'port' in environment"),
    ],
)
def test_a_mistake_is_named_with_its_source(flags: dict[str, object], env: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(RouterSettings, flags, env=env)


@pytest.mark.parametrize("text", ["port = ", "unknown = 1", "[table]\nport = 1", "port = '1'\nport = 2"])
def test_a_bad_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"s\.toml"):
        load(RouterSettings, toml=tmp_path / "s.toml", env={})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load(RouterSettings, toml=tmp_path / "none.toml", env={})


def test_another_process_s_variables_are_no_mistake() -> None:
    assert load(RouterSettings, env={"PANDO_DEVICE_BLOCKS": "5", "PANDO_API_KEY": "k"}) == RouterSettings()
    assert load(WorkerSettings, env={"PANDO_DEVICE_BLOCKS": "5"}).device_blocks == 5


def test_flags_give_the_same_settings_back_and_no_secret() -> None:
    made = RouterSettings(port=1, admin_key="s3cret", redis="redis://:hidden@h", link_token="hidden", max_request_s=1.5)
    flags = to_flags(made)
    assert not any("s3cret" in flag or "hidden" in flag for flag in flags)
    assert secrets(made) == {
        "PANDO_ADMIN_KEY": "s3cret",
        "PANDO_REDIS": "redis://:hidden@h",
        "PANDO_LINK_TOKEN": "hidden",
    }
    pairs = dict(zip((flag.removeprefix("--") for flag in flags[::2]), flags[1::2], strict=True))
    assert load(RouterSettings, pairs, env=secrets(made)) == made


def test_narrow_takes_what_a_process_needs() -> None:
    up = UpSettings(port=9, device_blocks=7, model="m")
    worker = narrow(WorkerSettings, up, worker_id="w9")
    assert (worker.device_blocks, worker.model, worker.worker_id) == (7, "m", "w9")
    assert narrow(RouterSettings, up).port == 9


@pytest.mark.parametrize("cls", [RouterSettings, WorkerSettings, UpSettings])
def test_every_setting_has_help_and_a_default_that_is_allowed(cls: type) -> None:
    for f in dataclasses.fields(cls):
        assert f.metadata["help"] and f.default is not dataclasses.MISSING
        assert not f.metadata["choices"] or f.default in f.metadata["choices"]
    assert load(cls, {}, env={}) == cls()
    assert settings.ENV_PREFIX == "PANDO_"


def test_the_files_for_tls_are_part_of_the_redis_url_and_workers_have_a_name_in_it() -> None:
    url = "rediss://{worker_id}:pw@r:6379/0"
    worker = load(WorkerSettings, {"redis": url, "redis_ca": "/a b/ca.crt", "worker_id": "w/1"}, env={})
    assert worker.redis_url == "rediss://w%2F1:pw@r:6379/0?ssl_ca_certs=%2Fa+b%2Fca.crt"
    files = {"redis_cert": "c", "redis_key": "k"}
    router = load(RouterSettings, {"redis": "rediss://r/0?db=1", **files}, env={})
    assert router.redis_url == "rediss://r/0?db=1&ssl_certfile=c&ssl_keyfile=k"
    assert load(RouterSettings, {"redis": "redis://r/0"}, env={}).redis_url == "redis://r/0"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"redis": "redis://r/0", "redis_ca": "ca"}, "rediss://"),
        ({"redis": "rediss://r/0", "redis_cert": "c"}, "go together"),
        ({"redis_key": "k"}, "rediss://"),
    ],
)
def test_tls_settings_that_make_no_sense_are_refused(flags: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(RouterSettings, flags, env={})
