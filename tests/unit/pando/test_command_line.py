"""Flags derived from settings dataclasses: precedence, help, and one line with exit code 2 for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from pando.command_line import parse, parse_switches
from pando.settings import RouterSettings, UpSettings, WorkerSettings, to_flags


def worker(*argv: str, env: dict[str, str] | None = None) -> WorkerSettings:
    return parse(WorkerSettings, argv, prog="worker", description="a worker", env=env or {})


def test_no_flags_give_the_defaults() -> None:
    assert worker() == WorkerSettings()


def test_flags_are_the_fields_and_keep_their_types() -> None:
    settings = worker("--device-blocks", "12", "--lease-ttl-s=0.5", "--model", "m", "--prefix-cache", "off")
    assert (settings.device_blocks, settings.lease_ttl_s) == (12, 0.5)
    assert (settings.model, settings.prefix_cache) == ("m", "off")


def test_to_flags_is_the_way_back() -> None:
    settings = worker("--device-blocks", "12", "--worker-id", "worker-3")
    assert worker(*to_flags(settings)) == settings


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "pando.toml"
    file.write_text('device_blocks = 1\ncpu_blocks = 1\nmodel = "of the file"\n', "utf-8")
    env = {"PANDO_DEVICE_BLOCKS": "2", "PANDO_CPU_BLOCKS": "2", "HOME": "/"}
    settings = worker("--config", str(file), "--device-blocks", "3", env=env)
    assert (settings.device_blocks, settings.cpu_blocks, settings.model) == (3, 2, "of the file")


def test_switches_are_told_apart_from_settings() -> None:
    settings, switches = parse_switches(
        RouterSettings, ["--json", "--port", "1"], {"json": "h", "other-one": "h"}, prog="r", description="d", env={}
    )
    assert (settings.port, switches) == (1, {"json"})
    assert parse_switches(RouterSettings, [], {"json": "h"}, prog="r", description="d", env={})[1] == frozenset()


@pytest.mark.parametrize(
    ("argv", "env", "says"),
    [
        (["--no-such-option", "1"], {}, "--no-such-option"),
        (["stray"], {}, "stray"),
        (["--device-block", "1"], {}, "--device-block"),
        (["--device-blocks", "many"], {}, "whole number"),
        (["--device-blocks", "-1"], {}, "0 or more"),
        (["--device-blocks"], {}, "--device-blocks"),
        (["--lease-ttl-s", "nan"], {}, "number"),
        (["--runner", "magic"], {}, "simulated"),
        (["--config", "/no/such/file.toml"], {}, "/no/such/file.toml"),
        ([], {"PANDO_NO_SUCH_SETTING": "1"}, "PANDO_NO_SUCH_SETTING"),
        ([], {"PANDO_RUNNER": "magic"}, "must be one of"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str], env: dict[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        worker(*argv, env=env)
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert out == ""
    assert err.startswith("worker: ") and err.count("\n") == 1 and says in err


def test_an_unknown_key_in_the_file_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pando.toml"
    file.write_text("device_block = 1\n", "utf-8")
    with pytest.raises(SystemExit):
        worker("--config", str(file))
    err = capsys.readouterr().err
    assert "device_block" in err and str(file) in err


def test_help_names_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(UpSettings, ["--help"], prog="up", description="all of it", env={})
    text = " ".join(capsys.readouterr().out.split())
    assert leaving.value.code == 0
    assert "all of it" in text and "--http-port" in text and "(default: 8471)" in text
    assert "PANDO_ADMIN_KEY" in text
