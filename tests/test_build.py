"""build.py and what it makes: the same bytes always, and a program that runs in the poorest places."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Iterator

import pytest
from conftest import MODULE, REPO, clean_env, wait_for

COMMITTED = REPO / "dist" / "mflocal.pyz"


def build(folder: Path, *options: str, umask: int = 0o022) -> Path:
    """Builds from a copy of the repository's two files in `folder`."""
    folder.mkdir(parents=True)
    for path in (REPO / "build.py", MODULE):
        shutil.copyfile(path, folder / path.name)
    command = [sys.executable, "build.py", *options]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, umask=umask, timeout=300
    )
    if done.returncode and "could not fetch" in done.stderr:
        pytest.skip("shiv is neither installed nor to be had")
    assert done.returncode == 0, done.stderr
    return folder / "dist" / "mflocal.pyz"


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("build") / "one")


@pytest.fixture
def place(pyz: Path) -> Iterator[Path]:
    """An empty folder that any user can enter, with nothing but the .pyz in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)
        shutil.copy(pyz, folder / "mflocal.pyz")
        (folder / "project").mkdir()
        yield folder
        run(folder, "stop", "--force")


def run(
    place: Path, *words: str, python: str = sys.executable, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    kwargs.setdefault("env", clean_env(HOME=str(place / "home")))
    kwargs.setdefault("cwd", place / "project")
    command = [python, str(place / "mflocal.pyz"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_same_bytes_every_time(pyz: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "elsewhere" / "deep", umask=0o077)
    assert other.read_bytes() == pyz.read_bytes()


def test_size_contents_and_shebang(pyz: Path) -> None:
    data = pyz.read_bytes()
    assert len(data) < 200_000
    assert data.startswith(b"#!/usr/bin/env python3\n")
    assert os.access(pyz, os.X_OK)
    files = contents(pyz)
    assert {name for name in files if name.startswith("site-packages/")} == {
        "site-packages/mflocal.py"
    }
    assert files["site-packages/mflocal.py"] == MODULE.read_bytes().replace(b"\r\n", b"\n")
    assert str(REPO).encode() not in b"".join(files.values())


def test_the_committed_file_is_of_today() -> None:
    if not COMMITTED.exists() and not (REPO / ".git").exists():
        pytest.skip("not a checkout")
    files = contents(COMMITTED)
    assert files["site-packages/mflocal.py"] == MODULE.read_bytes().replace(b"\r\n", b"\n"), (
        "run build.py"
    )
    assert files["__main__.py"].split(b"FILES = ")[0].count(b"BUILD = ") == 1
    template = (REPO / "build.py").read_text().split("LAUNCHER = '''\\\n")[1].split("'''\n")[0]
    body = files["__main__.py"].decode().split("TOP = ")[1]
    assert body == template.split("TOP = ")[1], "run build.py"


@pytest.mark.core
def test_it_runs_and_leaves_no_trace_in_the_environment(place: Path) -> None:
    env = clean_env(HOME=str(place / "home"))
    (place / "home").mkdir()
    done = run(
        place,
        "run",
        sys.executable,
        "-c",
        "import os, json; print(json.dumps(dict(os.environ)))",
        env=env,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    added = {key for key in told if told[key] != env.get(key)} - {
        "PWD",
        "OLDPWD",
        "_",
        "SHLVL",
        "LC_CTYPE",
    }
    assert {key for key in added if not key.startswith("METAFLOW_")} == {"NO_PROXY", "no_proxy"}
    cached = [
        str(p.relative_to(place / "home")) for p in (place / "home").rglob("*") if p.is_file()
    ]
    assert cached and all(
        re.match(r"\.cache/mflocal/mflocal-[0-9a-f]{16}/", name) for name in cached
    )
    assert any(name.endswith(".pyc") for name in cached)
    assert (place / "home/.cache/mflocal").stat().st_mode & 0o777 == 0o700
    again = run(place, "run", "-q", "true", env=env)
    assert again.returncode == 0
    assert run(place, "url", env=env).stdout.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("home", ["missing", "read-only", "unset", "relative"])
def test_poor_homes(place: Path, home: str) -> None:
    temp = place / "temp"
    temp.mkdir()
    env = clean_env(HOME=str(place / "home"), TMPDIR=str(temp))
    env.pop("XDG_CACHE_HOME", None)
    if home == "read-only":
        (place / "home").write_text("not even a folder")
    elif home == "unset":
        del env["HOME"]
    elif home == "relative":
        env["HOME"] = "here"
    done = run(place, "start", env=env)
    assert done.returncode == 0, done.stderr
    assert list(temp.glob("mflocal-*/mflocal-*/mflocal.py"))
    assert {p.name for p in place.iterdir()} <= {"mflocal.pyz", "project", "temp", "home"}
    assert run(place, "stop", env=env).returncode == 0


def test_the_cache_is_deleted_under_a_run(place: Path) -> None:
    """Somebody tidies up ~/.cache; then the daemon dies, and is brought back out of the archive."""
    env = clean_env(HOME=str(place / "home"))
    (place / "home").mkdir()
    wrapper = subprocess.Popen(
        [sys.executable, "../mflocal.pyz", "run", "sleep", "600"],
        cwd=place / "project", env=env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    path = place / "project/.metaflow/.mflocal/daemon.json"

    def ready() -> int:
        told = json.loads(path.read_text()) if path.exists() else {}
        return int(told["pid"]) if told.get("state") == "ready" else 0

    try:
        first = wait_for(ready)
        shutil.rmtree(place / "home/.cache")
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: ready() not in (0, first))
    finally:
        wrapper.terminate()
        err = wrapper.communicate(timeout=60)[1]
    assert "started it again" in err


def test_an_empty_environment(place: Path) -> None:
    done = run(place, "run", "-q", sys.executable, "-c", "print(1)", env={})
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert run(place, "stop", env={}).returncode == 0


def test_nothing_writable_anywhere(place: Path) -> None:
    """Out of the archive, if need be. (No folder can be made for this build, which has a name of its own.)"""
    code = (
        "import os, runpy, sys; real = os.mkdir\n"
        "def mkdir(path, *rest, **more):\n"
        "    if 'mflocal-' in str(path) or '.cache' in str(path): raise OSError(30, 'Read-only file system', path)\n"
        "    return real(path, *rest, **more)\n"
        "os.mkdir = mkdir\n"
        "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    files = contents(place / "mflocal.pyz")
    files["__main__.py"] = re.sub(
        rb'BUILD = "\w+"', b'BUILD = "%s"' % os.urandom(8).hex().encode(), files["__main__.py"]
    )
    with zipfile.ZipFile(place / "mflocal.pyz", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    env = clean_env(HOME=str(place / "home"))
    command = [sys.executable, "-c", code, str(place / "mflocal.pyz")]
    for word, text in (
        ("start", "mflocal started"),
        ("url", "http://"),
        ("stop", "mflocal stopped"),
    ):
        done = subprocess.run(
            [*command, word],
            cwd=place / "project",
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 and text in done.stdout, done.stderr


def test_first_starts_at_once(place: Path) -> None:
    (place / "home").mkdir()
    env = clean_env(HOME=str(place / "home"))
    command = [sys.executable, str(place / "mflocal.pyz"), "start"]
    pipe = subprocess.PIPE
    starts = [
        subprocess.Popen(
            command, cwd=place / "project", env=env, stdout=pipe, stderr=pipe, text=True
        )
        for _ in range(8)
    ]
    outs = [process.communicate(timeout=120) for process in starts]
    assert [process.returncode for process in starts] == [0] * 8, outs
    assert sum("mflocal started" in out for out, _ in outs) == 1
    assert [p.name for p in (place / "home/.cache/mflocal").iterdir() if ".tmp" in p.name] == []
    assert len(list((place / "home/.cache/mflocal").glob("mflocal-*/*.py"))) == 1


@pytest.mark.parametrize("how", ["removed", "truncated", "other bytes", "bytecode truncated"])
def test_a_damaged_cache_is_mended(place: Path, how: str) -> None:
    (place / "home").mkdir()
    assert run(place, "--version").returncode == 0
    (unpacked,) = (place / "home/.cache/mflocal").glob("mflocal-*/mflocal.py")
    whole = unpacked.read_bytes()
    (compiled,) = unpacked.parent.glob("__pycache__/*.pyc")
    if how == "bytecode truncated":
        compiled.write_bytes(compiled.read_bytes()[:5000])
    else:
        unpacked.unlink()
        compiled.unlink()
        if how != "removed":
            unpacked.write_bytes(whole[:5000] if how == "truncated" else b"\0" * len(whole))
    for _ in range(2):
        done = run(place, "--version")
        assert (done.returncode, done.stderr) == (0, "")
    assert unpacked.read_bytes() == whole


def test_a_cache_that_others_can_write_is_not_used(place: Path) -> None:
    home = place / "home"
    home.mkdir()
    assert run(place, "--version").returncode == 0
    (unpacked,) = (home / ".cache/mflocal").glob("mflocal-*")
    (unpacked / "mflocal.py").write_text("raise SystemExit('planted')")
    unpacked.chmod(0o777)
    done = run(place, "--version")
    assert done.returncode == 0 and "planted" not in done.stderr


def test_another_user_and_a_read_only_folder(place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    python = "/usr/bin/python3"
    if not os.path.exists(python) or subprocess.run([python, "-c", "pass"], user=65534).returncode:
        pytest.skip("no Python that other users can run")
    project = Path(tempfile.mkdtemp())
    try:
        os.chown(project, 65534, 65534)
        place.chmod(0o555)
        env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
        done = run(
            place,
            "run",
            "-q",
            "/bin/echo",
            "hello",
            python=python,
            cwd=project,
            env=env,
            user=65534,
        )
        assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
        assert run(place, "stop", python=python, cwd=project, env=env, user=65534).returncode == 0
    finally:
        place.chmod(0o755)
        shutil.rmtree(project)


def test_another_mflocal_beside_metaflow_does_not_matter(place: Path) -> None:
    other = place / "other"
    other.mkdir()
    (other / "mflocal.py").write_text("raise SystemExit('the wrong one')")
    (place / "project" / "mflocal.py").write_text("raise SystemExit('the wrong one')")
    done = run(place, "start", env=clean_env(PYTHONPATH=str(other), HOME=str(place / "home")))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", ["folder", "zip", "zip with a folder"])
def test_a_ui_inside(tmp_path: Path, form: str) -> None:
    ui = tmp_path / "ui"
    (ui / "static/js").mkdir(parents=True)
    (ui / "index.html").write_text("<title>embedded UI</title>")
    (ui / "static/js/main.0a1b2c3d.js").write_text("1")
    (ui / "static/js/main.0a1b2c3d.js.map").write_text("x" * 1000)
    source = ui
    if form != "folder":
        source = Path(
            shutil.make_archive(str(tmp_path / "bundle"), "zip", ui if form == "zip" else tmp_path)
        )
    pyz = build(tmp_path / "b", "--ui", str(source))
    files = contents(pyz)
    (tmp_path / "inner.zip").write_bytes(files["site-packages/mflocal_ui.zip"])
    assert set(contents(tmp_path / "inner.zip")) == {"index.html", "static/js/main.0a1b2c3d.js"}
    (tmp_path / "project").mkdir()
    shutil.copy(pyz, tmp_path / "mflocal.pyz")
    try:
        done = run(tmp_path, "ui", "--no-open", "--root", ".")
        assert done.returncode == 0, done.stderr
        import urllib.request

        with urllib.request.urlopen(done.stdout.strip(), timeout=10) as answer:
            assert b"embedded UI" in answer.read()
    finally:
        run(tmp_path, "stop", "--force")


def test_only_a_trusted_users_bundle_beside_the_pyz_is_served(place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    with zipfile.ZipFile(place / "metaflow-ui-1.zip", "w") as archive:
        archive.writestr("index.html", "<title>a UI</title>")
    for owner, expected in ((54321, "No UI bundle found"), (0, "http://")):
        os.chown(place / "metaflow-ui-1.zip", owner, -1)
        done = run(place, "ui", "--no-open", "--root", ".")
        assert done.returncode == 0 and done.stdout.startswith(expected), done


def test_a_folder_without_a_page_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, str(REPO / "build.py"), "--ui", str(tmp_path / "empty"), "--output", str(tmp_path / "x")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "index.html" in done.stderr and not (tmp_path / "x").exists()
