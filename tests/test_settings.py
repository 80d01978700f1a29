"""Flags, variables and defaults; and which .metaflow they lead to, compared with Metaflow itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import clean_env
from conftest import mflocal as run

import mflocal

PREFIX = "METAFLOW_LOCAL_SERVICE_"


def make(tmp_path: Path, env: dict[str, str] | None = None, **flags: object) -> mflocal.Settings:
    environ = {PREFIX + key: value for key, value in (env or {}).items()}
    return mflocal.make_settings(flags, environ, str(tmp_path))


def test_defaults(tmp_path: Path) -> None:
    settings = make(tmp_path)
    assert settings.root == os.path.realpath(tmp_path)
    assert (settings.host, settings.port, settings.idle_timeout) == ("127.0.0.1", 0, 300)
    assert (settings.auth_key, settings.debug, settings.heartbeats) == (None, False, "auto")
    assert settings.asked == frozenset()
    assert settings.state_dir == os.path.join(settings.metaflow_dir, ".mflocal")


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("PORT", "8123", "port", 8123),
        ("PORT", "0", "port", 0),
        ("PORT", "", "port", 0),
        ("IDLE_TIMEOUT", "0", "idle_timeout", 0.0),
        ("IDLE_TIMEOUT", "2.5", "idle_timeout", 2.5),
        ("DEBUG", "1", "debug", True),
        ("DEBUG", "true", "debug", True),
        ("DEBUG", "YES", "debug", True),
        ("DEBUG", "no", "debug", False),
        ("AUTH_KEY", "s3cret!", "auth_key", "s3cret!"),
        ("ALLOWED_HOSTS", "A.example, [::1],", "allowed_hosts", ("a.example", "::1")),
        (
            "ALLOWED_ORIGINS",
            "https://UI.example/,http://[::1]:3000",
            "allowed_origins",
            ("https://ui.example", "http://[::1]:3000"),
        ),
        ("HEARTBEATS", "sidecar", "heartbeats", "sidecar"),
        ("RUN_CUTOFF", "90", "run_cutoff", 90.0),
    ],
)
def test_variables(tmp_path: Path, variable: str, text: str, field: str, value: object) -> None:
    settings = make(tmp_path, {variable: text})
    assert getattr(settings, field) == value
    assert settings.asked == (frozenset({field}) if text else frozenset())


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("PORT", "http"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("PORT", "+80"),
        ("PORT", "8_0"),
        ("PORT", "٣"),
        ("IDLE_TIMEOUT", "soon"),
        ("IDLE_TIMEOUT", "-5"),
        ("IDLE_TIMEOUT", "1e3"),
        ("IDLE_TIMEOUT", "nan"),
        ("DEBUG", "maybe"),
        ("AUTH_KEY", "two words"),
        ("AUTH_KEY", "line\nbreak"),
        ("AUTH_KEY", "ключ"),
        ("ALLOWED_HOSTS", "name:80"),
        ("ALLOWED_HOSTS", "*"),
        ("ALLOWED_HOSTS", "http://name"),
        ("ALLOWED_ORIGINS", "name:3000"),
        ("ALLOWED_ORIGINS", "ftp://name"),
        ("ALLOWED_ORIGINS", "http://name/path"),
        ("HEARTBEATS", "never"),
        ("RUN_CUTOFF", "0"),
    ],
)
def test_malformed_variables_are_named(tmp_path: Path, variable: str, text: str) -> None:
    with pytest.raises(mflocal.SettingsError) as caught:
        make(tmp_path, {variable: text})
    assert PREFIX + variable in str(caught.value)


def test_flags_beat_variables(tmp_path: Path) -> None:
    settings = make(tmp_path, {"PORT": "1", "ALLOWED_HOSTS": "x"}, port=2, allowed_hosts=["a", "b"])
    assert settings.port == 2 and settings.allowed_hosts == ("a", "b")


def test_flags_on_the_command_line(project: Path) -> None:
    env = clean_env(METAFLOW_LOCAL_SERVICE_PORT="1", METAFLOW_LOCAL_SERVICE_AUTH_KEY="k")
    flags = ["--port", "0", "--allow-host", "a,b", "--allow-host=c", "--host", "::", "-q"]
    run("start", *flags, cwd=project, env=env, check=True)
    state = json.loads((project / ".metaflow/.mflocal/daemon.json").read_text())
    assert state["options"]["allowed_hosts"] == ["a", "b", "c"] and state["host"] == "::"
    assert run("status", "-q", cwd=project).returncode == 0
    for host in (socket.gethostname(), "127.1", "0"):  # and the starter may ask it
        run("stop", cwd=project, check=True)
        run("start", "--host", host, cwd=project, env=env, check=True)
        assert run("run", "-q", "true", cwd=project, env=env).returncode == 0
        assert run("url", cwd=project).returncode == 0
    for words in (
        ["--port", "x"],
        ["--host", "a b"],
        ["--heartbeats", "no"],
        ["--idle-timeout=-1"],
    ):
        done = run("run", *words, "true", cwd=project)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert words[0].partition("=")[0] in done.stderr


def test_other_machines_only_with_a_key(tmp_path: Path) -> None:
    assert make(tmp_path, host="127.0.0.1").host == "127.0.0.1"
    with pytest.raises(mflocal.SettingsError, match="AUTH_KEY"):
        make(tmp_path, host="0.0.0.0")
    assert make(tmp_path, {"AUTH_KEY": "k"}, host="0.0.0.0").host == "0.0.0.0"


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("localhost", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("0", "0.0.0.0"),
        ("::", "::"),
        ("[::1]", "::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("Box.example", "box.example"),
    ],
)
def test_an_address_has_one_form(text: str, host: str) -> None:
    assert mflocal.OPTIONS["host"].parse(text) == host


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.8.7", True),
        ("LocalHost", True),
        ("[::1]", True),
        ("127.0.0.256", False),
    ]
    + [("127.0.0.1.evil.example", False), ("0.0.0.0", False), ("127.1", False), ("", False)],
)
def test_is_loopback(host: str, loopback: bool) -> None:
    assert mflocal.is_loopback(host) is loopback


def test_root_by_flag_and_variable(tmp_path: Path) -> None:
    other, third = tmp_path / "other", tmp_path / "third"
    other.mkdir()
    third.mkdir()
    settings = make(tmp_path, {"ROOT": str(third)}, root="other")
    assert settings.root == str(other.resolve()) and "root" in settings.asked
    assert make(tmp_path, {"ROOT": str(third)}).root == str(third.resolve())
    with pytest.raises(mflocal.SettingsError, match="--root"):
        make(tmp_path, root=str(other / ".metaflow"))
    (tmp_path / "file").write_text("")
    with pytest.raises(mflocal.SettingsError, match="not a directory"):
        make(tmp_path, root="file")


def test_one_name_per_root(tmp_path: Path) -> None:
    real = tmp_path / "real"
    (real / ".metaflow").mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / ".metaflow").symlink_to(real / ".metaflow")
    roots = {
        mflocal.find_root(None, {}, str(path))[0] for path in (real, tmp_path / "link", shared)
    }
    assert roots == {str(real.resolve())}


CASES = {
    "nothing": ({}, {}, "work"),
    "nearest": ({"work/.metaflow/x": "", ".metaflow/x": ""}, {}, "work/a/b"),
    "upward": ({".metaflow/x": "", "work/a/b/x": ""}, {}, "work/a/b"),
    "file is no directory": ({".metaflow/x": "", "work/.metaflow": ""}, {}, "work"),
    "variable": (
        {".metaflow/x": ""},
        {"METAFLOW_DATASTORE_SYSROOT_LOCAL": "{top}/elsewhere"},
        "work",
    ),
    "relative variable": ({}, {"METAFLOW_DATASTORE_SYSROOT_LOCAL": "sub/dir"}, "work"),
    "empty variable": ({".metaflow/x": ""}, {"METAFLOW_DATASTORE_SYSROOT_LOCAL": ""}, "work"),
    "project file": ({".metaflow/config.json": "p", "home/config.json": "g"}, {}, "work"),
    "home file": ({".metaflow/x": "", "home/config.json": "g"}, {}, "work"),
    "profile": (
        {"home/config_dev.json": "g", "home/config.json": "p"},
        {"METAFLOW_PROFILE": "dev"},
        "work",
    ),
    "tilde stays": ({}, {"METAFLOW_DATASTORE_SYSROOT_LOCAL": "~/x"}, "work"),
}
ASK_METAFLOW = """
from metaflow.plugins.datastores.local_storage import LocalStorage
print(LocalStorage.get_datastore_root_from_config(print, create_on_absent=False))
"""


@pytest.mark.parametrize("case", CASES)
def test_root_is_the_one_that_metaflow_uses(tmp_path: Path, case: str) -> None:
    pytest.importorskip("metaflow")
    files, variables, cwd = CASES[case]
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {"p": str(tmp_path / "by_project"), "g": str(tmp_path / "by_home")}
        path.write_text(
            json.dumps({"METAFLOW_DATASTORE_SYSROOT_LOCAL": values[text]}) if text else ""
        )
    (tmp_path / cwd).mkdir(parents=True, exist_ok=True)
    env = clean_env(METAFLOW_HOME=str(tmp_path / "home"))
    env.update({key: value.format(top=tmp_path) for key, value in variables.items()})
    told = subprocess.run(
        [sys.executable, "-c", ASK_METAFLOW],
        cwd=tmp_path / cwd,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    ours = mflocal.find_root(None, env, str(tmp_path / cwd))[0]
    if case == "project file" and "by_home" in told:
        pytest.skip("this Metaflow is too old to read the project's file")
    expected = (
        str(tmp_path / cwd)
        if told == "None"
        else os.path.dirname(os.path.join(tmp_path / cwd, told))
    )
    assert ours == os.path.realpath(expected)


@pytest.mark.parametrize("text", ["{", "[1]", '{"METAFLOW_DATASTORE_SYSROOT_LOCAL": 5}'])
def test_broken_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(mflocal.SettingsError, match="configuration"):
        mflocal.find_root(None, {"METAFLOW_HOME": str(tmp_path)}, str(tmp_path))


def test_a_pipe_in_the_place_of_a_configuration_hangs_nobody(project: Path) -> None:
    (project / ".metaflow").mkdir()
    os.mkfifo(project / ".metaflow/config.json")
    for words in (["status"], ["run", "true"]):
        done = run(*words, cwd=project)
        assert done.returncode == 2 and ".metaflow/config.json" in done.stderr
    (project / ".metaflow/config.json").unlink()


def test_missing_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(mflocal.SettingsError, match="METAFLOW_PROFILE"):
        mflocal.find_root(
            None, {"METAFLOW_HOME": str(tmp_path), "METAFLOW_PROFILE": "no"}, str(tmp_path)
        )


def test_nothing_is_created_by_looking(tmp_path: Path) -> None:
    mflocal.find_root(None, {}, str(tmp_path))
    assert list(tmp_path.iterdir()) == []
