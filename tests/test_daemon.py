"""Which daemon a command uses: copied and moved projects, restored files, other users, impostors, secrets."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
from conftest import COMMAND, MODULE, Client, clean_env, mflocal, wait_for
from processes import daemon_state, running

import mflocal as module

PYTHON = sys.executable
# A flow's request, from inside `run`: makes a flow and prints what the service answered.
POST = (
    "import os, sys, urllib.request as u; url = os.environ['METAFLOW_SERVICE_URL'] + '/flows/' + sys.argv[1];"
    "key = {'x-api-key': os.environ.get('METAFLOW_SERVICE_AUTH_KEY', '')};"
    "print(u.urlopen(u.Request(url, b'{}', key, method='POST'), timeout=30).status)"
)


def start(root: Path, *options: str, **env: str) -> Client:
    """The daemon of a root, started, and a client of it."""
    mflocal("start", *options, cwd=root, check=True, env=clean_env(**env))
    return Client("http://127.0.0.1:%d" % daemon_state(root)["port"], root)


def secrets_of(root: Path) -> dict[str, Any]:
    """What the file of secrets of a living daemon holds."""
    return json.loads(Path(daemon_state(root)["secrets"]).read_text())  # type: ignore[no-any-return]


def post_in(root: Path, flow: str) -> None:
    """Makes a flow from a command under `run` in this directory; it must land in this directory."""
    done = mflocal("run", PYTHON, "-c", POST, flow, cwd=root)
    assert (done.returncode, done.stdout) == (0, "200\n"), done.stderr
    assert (root / ".metaflow" / flow / "_meta/_self.json").is_file(), done.stderr


def stop_all(*roots: Path) -> None:
    for root in roots:
        if (root / ".metaflow").is_dir():
            mflocal("stop", "--force", cwd=root)


def running_daemons(*places: Path) -> list[int]:
    """The living daemons that were started for one of these directories."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"mflocal daemon" in words and {os.fsencode(place) for place in places} & set(words):
            if running(int(name)):
                found.append(int(name))
    return found


# -- this very directory


def test_copied_and_swapped(tmp_path: Path) -> None:
    """cp -r q q.new; mv q q.old; mv q.new q: nobody's metadata goes to the other one's directory."""
    q, old = tmp_path / "q", tmp_path / "q.old"
    q.mkdir()
    try:
        start(q)
        first = daemon_state(q)["pid"]
        subprocess.run(["cp", "-r", q, tmp_path / "q.new"], check=True)
        q.rename(old)
        (tmp_path / "q.new").rename(q)
        assert mflocal("url", cwd=q).returncode == 1  # what was copied is no daemon
        post_in(old, "InOld")
        post_in(q, "InNew")
        assert not (q / ".metaflow/InOld").exists() and not (old / ".metaflow/InNew").exists()
        assert not running(first)
        assert daemon_state(q)["pid"] != daemon_state(old)["pid"]
    finally:
        stop_all(q, old)


def test_moved(tmp_path: Path) -> None:
    m1, m2 = tmp_path / "m1", tmp_path / "m2"
    m1.mkdir()
    try:
        start(m1)
        m1.rename(m2)
        post_in(m2, "Moved")
        assert not m1.exists() and len(running_daemons(m1, m2)) == 1
    finally:
        stop_all(m2)


def test_a_bind_mount_is_the_same_directory(project: Path, tmp_path: Path) -> None:
    other = tmp_path / "mounted"
    other.mkdir()
    client = start(project)
    if subprocess.run(["mount", "--bind", project, other], capture_output=True).returncode:
        pytest.skip("no bind mounts here")
    try:
        assert mflocal("url", cwd=other, check=True).stdout == client.url + "\n"
        assert "reused" in mflocal("run", "true", cwd=other, check=True).stderr
    finally:
        subprocess.run(["umount", "-l", other], check=True)


# -- files that are restored, replaced or deleted under a living daemon


def restore(project: Path, how: str) -> None:
    """Replaces every file of .metaflow by a copy of itself (an older one of our own files), as the tool does it."""
    copy = project / "copy"
    if how == "tar":
        with tarfile.open(project / "b.tar", "w") as archive:
            archive.add(project / ".metaflow", ".metaflow")
        subprocess.run(["tar", "xf", "b.tar"], cwd=project, check=True)
    elif how == "cp":
        shutil.copytree(project / ".metaflow", copy)
        words = ["cp", "-a", "--remove-destination", f"{copy}/.", ".metaflow"]
        subprocess.run(words, cwd=project, check=True)
        shutil.rmtree(copy)
    elif how == "sed":
        files = [str(path) for path in (project / ".metaflow").rglob("*") if path.is_file()]
        subprocess.run(["sed", "-i", "s/no such text/x/", *files], check=True)
    else:
        state = project / ".metaflow/.mflocal"
        for name in ("lock", "daemon.json", "daemon.log"):
            (state / name).unlink()


@pytest.mark.parametrize("how", ["tar", "cp", "sed", "unlink"])
def test_replaced_files_make_no_second_daemon(project: Path, how: str) -> None:
    client = start(project)
    pid = daemon_state(project)["pid"]
    mflocal("restart", cwd=project, check=True)
    pid = daemon_state(project)["pid"]
    restore(project, how)
    again = mflocal("start", cwd=project, check=True)
    assert "runs already" in again.stdout and f"pid {pid}," in again.stdout
    assert running_daemons(project) == [pid]
    lock = project / ".metaflow/.mflocal/lock"
    # Programs that know only of the lock file are kept out again soon.
    wait_for(lambda: lock.exists() and locked(lock))
    restore(project, how)
    mflocal("restart", cwd=project, check=True)
    after = daemon_state(project)["pid"]
    assert after != pid and running_daemons(project) == [after]
    assert client("GET", "/ping").status == 200


def locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def test_a_state_of_long_ago_is_put_right(project: Path) -> None:
    """An archive brings the daemon.json of a daemon that has gone."""
    start(project)
    path = project / ".metaflow/.mflocal/daemon.json"
    old = path.read_bytes()
    mflocal("restart", cwd=project, check=True)
    now = daemon_state(project)
    path.unlink()
    path.write_bytes(old)
    wait_for(lambda: daemon_state(project) == now)
    assert f"pid {now['pid']}," in mflocal("start", cwd=project, check=True).stdout


def test_a_deleted_state_directory_is_made_again(project: Path) -> None:
    client = start(project)
    pid = daemon_state(project)["pid"]
    shutil.rmtree(project / ".metaflow/.mflocal")
    wait_for((project / ".metaflow/.mflocal/daemon.json").exists)
    assert mflocal("url", cwd=project, check=True).stdout == client.url + "\n"
    assert running_daemons(project) == [pid]
    assert client.post("/flows/F", {}) and "anew" in mflocal("logs", cwd=project).stdout


@pytest.mark.parametrize("mode", ["a+rX", "a+rwX"])
def test_chmod_over_the_project(project: Path, mode: str) -> None:
    """It makes nobody unreachable, and the modes are tightened again."""
    client = start(project)
    subprocess.run(["chmod", "-R", mode, ".metaflow"], cwd=project, check=True)
    assert mflocal("url", cwd=project, check=True).stdout == client.url + "\n"
    state = project / ".metaflow/.mflocal"
    assert state.stat().st_mode & 0o777 == 0o700
    assert (state / "daemon.json").stat().st_mode & 0o777 == 0o600
    subprocess.run(["chmod", "-R", mode, ".metaflow"], cwd=project, check=True)
    assert "runs already" in mflocal("start", cwd=project, check=True).stdout
    assert mflocal("stop", cwd=project).returncode == 0


# -- impostors


class Impostor(threading.Thread):
    """A server that says yes to everything, and keeps what it is told."""

    def __init__(self, port: int = 0, body: bytes = b'{"instance": "x", "proof": "x"}') -> None:
        super().__init__(daemon=True)
        self.server = socket.create_server(("127.0.0.1", port))
        self.port = self.server.getsockname()[1]
        self.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        self.heard = b""
        self.start()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
                self.heard += connection.recv(65536)
                connection.sendall(self.answer)
                connection.close()
            except OSError:
                return


def test_control_routes_need_the_token(project: Path) -> None:
    client = start(project)
    token = secrets_of(project)["token"]
    for method, path in (("GET", "status"), ("POST", "stop"), ("POST", "lease"), ("POST", "ui")):
        body = {"lease": "a", "force": True} if method == "POST" else None
        assert client(method, "/_mflocal/" + path, body).status == 403
        assert (
            client(method, "/_mflocal/" + path, body, {"x-mflocal-token": "0" * 48}).status == 403
        )
    assert client("GET", "/_mflocal/status", None, {"x-mflocal-token": token}).status == 200
    # Who asks learns nothing that he could show to others as ours.
    assert client("GET", "/_mflocal/id").status == 400
    nonces = ("ab" * 16, "cd" * 16)
    proofs = [client.get(f"/_mflocal/id?nonce={nonce}") for nonce in nonces]
    assert [set(proof) for proof in proofs] == [{"proof"}] * 2 and proofs[0] != proofs[1]


@pytest.mark.parametrize("held", [False, True])
def test_a_server_on_the_port_of_a_killed_daemon_is_told_nothing(project: Path, held: bool) -> None:
    """held: another process of ours has the lock at that moment, as a start would."""
    start(project, METAFLOW_LOCAL_SERVICE_AUTH_KEY="s3cret")
    before, token = daemon_state(project), secrets_of(project)["token"]
    os.kill(int(before["pid"]), signal.SIGKILL)
    wait_for(lambda: not running(int(before["pid"])))
    impostor = Impostor(int(before["port"]))
    with open(project / ".metaflow/.mflocal/lock") as lock:
        if held:
            fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (["url"], ["status"], ["status", "--json"], ["stop"]):
            done = mflocal(*command, cwd=project, timeout=60)
            assert done.returncode == (3 if held else 1), done
            assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
            assert not held or "--force" in done.stderr
            if held:
                break  # each waits for five seconds
    done = mflocal("run", "-q", "true", cwd=project)
    assert done.returncode == 0, done.stderr
    for secret in (token.encode(), b"s3cret", b"lease", b"x-mflocal"):
        assert secret not in impostor.heard
    assert held or impostor.heard == b""
    impostor.server.close()


@pytest.mark.parametrize("how", ["", "link", "schema", "half", "directory", "fifo"])
def test_a_planted_daemon_json_is_not_believed(project: Path, how: str) -> None:
    impostor = Impostor()
    state = project / ".metaflow/.mflocal"
    state.mkdir(parents=True, mode=0o700)
    planted = {
        "schema": 99 if how == "schema" else module.STATE_SCHEMA, "instance": "x", "pid": os.getpid(),
        "port": impostor.port, "host": "127.0.0.1", "address": "127.0.0.1", "root": str(project), "state": "ready",
        "secrets": str(state / "planted"), **module.machine(),
    }  # fmt: skip
    (state / "planted").write_text(
        json.dumps({"instance": "x", "token": "t" * 48, "auth_key": "k"})
    )
    path = state / "daemon.json"
    text = json.dumps(planted)
    target = project / "planted.json"
    if how == "directory":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path, 0o600)
    else:
        (target if how == "link" else path).write_text(text[:-9] if how == "half" else text)
    if how == "link":
        path.symlink_to(target)
    assert mflocal("url", cwd=project).returncode == 1
    assert mflocal("stop", "--force", cwd=project).returncode == 1
    done = mflocal("start", cwd=project)
    if how == "directory":
        assert done.returncode == 3 and done.stderr.count("\n") == 1
        path.rmdir()
    else:
        assert done.returncode == 0 and daemon_state(project)["port"] != impostor.port
    assert impostor.heard == b""
    if how == "link":
        assert json.loads(target.read_text()) == planted  # not written through
    impostor.server.close()


def test_a_daemon_of_an_older_version_is_named(project: Path) -> None:
    """Its daemon.json has another schema, and it locks only the file: it is neither used nor doubled."""
    state = project / ".metaflow/.mflocal"
    state.mkdir(parents=True, mode=0o700)
    (state / "lock").touch(0o600)
    holder = hold(state / "lock")
    told = {"schema": 1, "version": "0.0.9", "pid": holder.pid, "port": 1, "instance": "x"}
    (state / "daemon.json").write_text(json.dumps(told))
    try:
        for command in ("start", "status", "stop"):
            done = mflocal(command, cwd=project)
            assert done.returncode == 3 and "0.0.9" in done.stderr and "--force" in done.stderr
        assert mflocal("stop", "--force", cwd=project).returncode == 0
        assert holder.wait(10) == -signal.SIGKILL
        start(project)
    finally:
        holder.kill()
        holder.wait()


def hold(path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of a file or directory, answers nothing and ignores what is polite."""
    code = (
        "import fcntl, os, signal, sys, time; signal.signal(15, signal.SIG_IGN);"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([PYTHON, "-c", code, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "\n"
    process.stdout.close()
    return process


@pytest.mark.parametrize("locked", ["lock", ""])
def test_force_ends_what_holds_the_lock(project: Path, locked: str) -> None:
    """And not the process that has the pid of daemon.json by now."""
    start(project)
    state = daemon_state(project)
    os.kill(state["pid"], signal.SIGKILL)
    wait_for(lambda: not running(state["pid"]))
    directory = project / ".metaflow/.mflocal"
    sleeper, holder = subprocess.Popen(["sleep", "60"]), hold(directory / locked)
    impostor = Impostor(state["port"], b"[]")
    try:
        (directory / "daemon.json").write_text(json.dumps({**state, "pid": sleeper.pid}))
        done = mflocal("stop", "--force", cwd=project)
        assert done.returncode == 0 and str(holder.pid) in done.stderr, done
        assert holder.wait(10) == -signal.SIGKILL and sleeper.poll() is None
        assert mflocal("status", cwd=project).returncode == 1
    finally:
        impostor.server.close()
        for process in (sleeper, holder):
            process.kill()
            process.wait()


# -- other users

OTHER = 54321


def foreign_python() -> str:
    """A Python that other users can run, if we are root."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if (
            os.path.exists(path)
            and subprocess.run([path, "-c", "pass"], user=OTHER).returncode == 0
        ):
            return path
    pytest.skip("no Python that other users can run")


@pytest.fixture
def open_project() -> Iterator[Path]:
    """A project that all users may write, with a copy of the program in it."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        root.chmod(0o755)
        shutil.copy(MODULE, root / "mflocal.py")
        (root / "mflocal.py").chmod(0o644)
        (root / ".metaflow").mkdir()
        (root / ".metaflow").chmod(0o777)
        yield root
        mflocal("stop", "--force", cwd=root)


def as_user(root: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The program, run by another user in this project."""
    python = foreign_python()
    return subprocess.run(
        [python, str(root / "mflocal.py"), *words], cwd=root, env=clean_env(HOME="/nonexistent", **env),
        capture_output=True, text=True, timeout=60, user=OTHER, group=OTHER, extra_groups=[],
    )  # fmt: skip


@pytest.mark.parametrize("first", ["root", "other"])
def test_a_daemon_of_another_user(open_project: Path, first: str) -> None:
    """While it lives, everybody is told whose it is; when it has gone, nobody is locked out by what it left."""

    def root(*words: str) -> subprocess.CompletedProcess[str]:
        return mflocal(*words, cwd=open_project)

    def other(*words: str) -> subprocess.CompletedProcess[str]:
        return as_user(open_project, *words)

    one, two = (root, other) if first == "root" else (other, root)
    owner = "user root" if first == "root" else f"user {OTHER}"
    assert one("start").returncode == 0
    pid = json.loads(one("status", "--json").stdout)["pid"]
    for command, code in (("url", 1), ("status", 1), ("stop", 1), ("start", 3)):
        done = two(command)
        assert done.returncode == code, done
        assert (
            owner in done.stderr and f"pid {pid}" in done.stderr and "no daemon" not in done.stderr
        )
    assert running(pid) and one("stop").returncode == 0
    try:
        done = two("run", PYTHON if two is root else foreign_python(), "-c", POST, "Second")
        assert (done.returncode, done.stdout) == (0, "200\n"), done.stderr
        assert (open_project / ".metaflow/Second").stat().st_uid == (OTHER if two is other else 0)
        assert "user" in one("start").stderr
    finally:
        assert two("stop").returncode == 0
    assert one("start").returncode == 0
    assert one("stop").returncode == 0
    if two is root:
        return
    assert not (open_project / f".metaflow/.mflocal-{os.geteuid()}").exists()


def test_a_store_that_cannot_be_written_is_served_for_reading(open_project: Path) -> None:
    client = start(open_project)
    client.post("/flows/F", {})
    run = client.post("/flows/F/run", {"user_name": "u", "tags": [], "system_tags": []})
    mflocal("stop", "--force", cwd=open_project)
    (open_project / ".metaflow").chmod(0o755)
    done = as_user(open_project, "start")
    try:
        assert done.returncode == 0 and "state goes to /" in done.stderr, done.stderr
        told = json.loads(as_user(open_project, "status", "--json", "-q").stdout)
        path = f"/flows/F/runs/{run['run_number']}"
        code = (
            "import sys, urllib.request as u, urllib.error as e\n"
            "for method, path in zip(sys.argv[2::2], sys.argv[3::2]):\n"
            "    request = u.Request(sys.argv[1] + path, b'{}' if method == 'POST' else None, method=method)\n"
            "    try: print(u.urlopen(request).status)\n"
            "    except e.HTTPError as error: print(error.code, error.read().decode())\n"
        )
        words = ["GET", path, "GET", f"/api{path}", "GET", "/flows", "POST", "/flows/New"]
        words += ["POST", f"{path}/heartbeat"]
        asked = subprocess.run(
            [foreign_python(), "-c", code, told["url"], *words],
            capture_output=True, text=True, user=OTHER, group=OTHER, extra_groups=[], check=True,
        )  # fmt: skip
        lines = asked.stdout.splitlines()
        assert (
            lines[:3] == ["200"] * 3 and lines[3].startswith("500 ") and ".metaflow/New" in lines[3]
        )
        assert not (open_project / ".metaflow/New").exists()
        assert (
            "started" not in as_user(open_project, "start", XDG_RUNTIME_DIR="/nonexistent").stdout
        )
        # Its owner is not kept from writing.
        assert "started" in mflocal("start", cwd=open_project, check=True).stdout
    finally:
        stopped = as_user(open_project, "stop", "--force")
        shutil.rmtree(f"/tmp/mflocal-{OTHER}")
    assert stopped.returncode == 0, stopped.stderr
    assert running_daemons(open_project) == [daemon_state(open_project)["pid"]]


# -- secrets


def test_an_archive_of_a_live_project_has_no_secret(project: Path) -> None:
    start(project, METAFLOW_LOCAL_SERVICE_AUTH_KEY="s3cret-key")
    secrets = secrets_of(project)
    assert secrets["auth_key"] == "s3cret-key"
    with tarfile.open(project / "b.tar", "w") as archive:
        archive.add(project / ".metaflow")
    data = (project / "b.tar").read_bytes()
    assert b"s3cret-key" not in data and secrets["token"].encode() not in data
    assert (project / ".metaflow/.mflocal/.gitignore").read_text() == "*\n"
    excluded = subprocess.run(
        ["tar", "--exclude-caches", "-cf", "-", ".metaflow"], cwd=project, capture_output=True, check=True
    ).stdout  # fmt: skip
    assert b"daemon.json" not in excluded and b"CACHEDIR.TAG" in excluded
    if shutil.which("git"):
        subprocess.run(["git", "init", "-q"], cwd=project, check=True)
        shown = subprocess.run(
            ["git", "status", "--porcelain", "-uall"], cwd=project, capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
        assert ".mflocal" not in shown
    path = Path(daemon_state(project)["secrets"])
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    mflocal("stop", cwd=project, check=True)
    assert not path.exists()


def test_every_environment_finds_the_secrets(project: Path, tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    client = start(project, XDG_RUNTIME_DIR=str(runtime), METAFLOW_LOCAL_SERVICE_AUTH_KEY="k")
    assert list((runtime / "mflocal").iterdir()) == [Path(daemon_state(project)["secrets"])]
    bare = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    others = (bare, {**bare, "XDG_RUNTIME_DIR": "/nonexistent", "TMPDIR": str(tmp_path)})
    for env in (*others, clean_env(XDG_RUNTIME_DIR=str(tmp_path))):
        done = mflocal("run", "sh", "-c", "echo $METAFLOW_SERVICE_AUTH_KEY", cwd=project, env=env)
        assert (done.returncode, done.stdout) == (0, "k\n") and "reused" in done.stderr, done
    # The last session of the user ends: the system deletes the runtime directory.
    shutil.rmtree(runtime)
    wait_for(lambda: Path(daemon_state(project)["secrets"]).exists())
    assert mflocal("url", cwd=project, check=True).stdout == client.url + "\n"
    assert str(runtime) not in daemon_state(project)["secrets"]


def test_secrets_of_killed_daemons_are_removed(project: Path, tmp_path: Path) -> None:
    for _ in range(2):
        start(project, XDG_RUNTIME_DIR=str(tmp_path))
        os.kill(daemon_state(project)["pid"], signal.SIGKILL)
        wait_for(lambda: mflocal("url", cwd=project).returncode == 1)
    assert len(list((tmp_path / "mflocal").iterdir())) == 1


def test_a_runtime_directory_of_somebody_else_is_not_used(project: Path, tmp_path: Path) -> None:
    (tmp_path / "mflocal").symlink_to(tmp_path)
    client = start(project, XDG_RUNTIME_DIR=str(tmp_path))
    assert not daemon_state(project)["secrets"].startswith(str(tmp_path / "mflocal"))
    assert mflocal("url", cwd=project, check=True).stdout == client.url + "\n"


# -- starts, stops and ends


def test_others_wait_for_a_start_and_a_stop(project: Path) -> None:
    """A daemon that is slow to start or to end is healthy, and nobody is told to kill it."""
    starter = subprocess.Popen(
        [*COMMAND, "start"], cwd=project, env=clean_env(), stdout=subprocess.DEVNULL
    )
    path = project / ".metaflow/.mflocal/daemon.json"
    state = wait_for(lambda: path.exists() and daemon_state(project))
    os.kill(state["pid"], signal.SIGSTOP)
    asked = [ask(project, command) for command in ("status", "url")]
    time.sleep(6)  # more than a ready daemon has for an answer
    starting = daemon_state(project)["state"] == "starting"
    os.kill(state["pid"], signal.SIGCONT)
    assert starter.wait(60) == 0
    if starting:  # else it was ready before it could be stopped
        assert [process.wait(60) for process in asked] == [0, 0]
    slow = socket.create_connection(("127.0.0.1", state["port"]))
    slow.sendall(b"POST /flows/F HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{")
    wait_for(lambda: mflocal("status", cwd=project).returncode == 0)
    stops = [ask(project, "stop"), ask(project, "stop")]
    wait_for(lambda: not path.exists())
    stops.append(ask(project, "status"))
    time.sleep(0.3)
    slow.sendall(b"}")
    assert [process.wait(60) for process in stops] == [0, 0, 1]
    slow.close()


def ask(project: Path, command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, command],
        cwd=project,
        env=clean_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


WRITER = """
import json, os, signal, sys, time, urllib.request
url = os.environ["METAFLOW_SERVICE_URL"]
def post(path):
    return urllib.request.urlopen(urllib.request.Request(url + path, b"{}", method="POST"), timeout=30).status
def cleanup(*_):
    time.sleep(1)
    print(post("/flows/Cleanup"), flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, cleanup)
print(post("/flows/Begun"), flush=True)
time.sleep(600)
"""


def test_a_signalled_daemon_serves_its_wrappers_first(project: Path) -> None:
    """systemd and Jenkins end all processes of a job at once: what a flow writes then is written."""
    wrapper = subprocess.Popen(
        [*COMMAND, "run", "-q", PYTHON, "-c", WRITER], cwd=project, env=clean_env(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert wrapper.stdout and wrapper.stdout.readline() == "200\n"
    pid = daemon_state(project)["pid"]
    wait_for(lambda: daemon_state(project)["state"] == "ready")
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: daemon_state(project)["state"] == "stopping")
    assert mflocal("url", cwd=project).returncode == 0  # it lives, and says so
    wrapper.terminate()
    out, err = wrapper.communicate(timeout=60)
    assert (wrapper.returncode, out) == (0, "200\n"), err
    wait_for(lambda: not running(pid))
    assert mflocal("url", cwd=project).returncode == 1
    assert not (project / ".metaflow/.mflocal/daemon.json").exists()


def test_a_wrapper_brings_back_a_daemon_that_was_signalled_twice(project: Path) -> None:
    wrapper = subprocess.Popen(
        [*COMMAND, "run", "-q", "sleep", "600"], cwd=project, env=clean_env(), stderr=subprocess.PIPE
    )  # fmt: skip
    path = project / ".metaflow/.mflocal/daemon.json"
    wait_for(lambda: path.exists() and daemon_state(project)["state"] == "ready")
    token = {"x-mflocal-token": secrets_of(project)["token"]}
    state = daemon_state(project)
    client = Client("http://127.0.0.1:%d" % state["port"], project)
    wait_for(lambda: client("GET", "/_mflocal/status", None, token).body["idle_left"] is None)
    for _ in range(2):
        os.kill(state["pid"], signal.SIGTERM)
        wait_for(lambda: daemon_state(project)["state"] != "ready")
    wait_for(lambda: path.exists() and daemon_state(project)["pid"] != state["pid"])
    assert daemon_state(project)["port"] == state["port"]
    wait_for(lambda: daemon_state(project)["state"] == "ready")
    assert (
        mflocal("stop", "--force", cwd=project).returncode == 0
    )  # and what was asked to stop stays away
    time.sleep(1)
    assert running_daemons(project) == []
    wrapper.terminate()
    wrapper.communicate(timeout=60)


def test_who_comes_in_the_last_idle_moment_is_served(project: Path) -> None:
    client = start(project, "--idle-timeout", "3")
    token = {"x-mflocal-token": secrets_of(project)["token"]}

    def left() -> float:
        return float(client("GET", "/_mflocal/status", None, token).body["idle_left"])

    wait_for(lambda: left() < 1)
    before = left()
    client.get("/_mflocal/id?nonce=abc")  # `status` and `url` ask like that
    assert left() <= before
    client.get("/_mflocal/id?nonce=abc&use=1")
    assert left() > before + 1
    mflocal("restart", "--idle-timeout", "1", cwd=project, check=True)
    for flow, pause in (("A", 0.8), ("B", 0.9), ("C", 1.0)):
        done = mflocal("run", "-q", PYTHON, "-c", POST, flow, cwd=project)
        assert (done.returncode, done.stdout) == (0, "200\n"), done.stderr
        time.sleep(pause)


def test_a_daemon_that_stops_before_it_has_the_lease_is_replaced(project: Path) -> None:
    """`stop` came between the answer of the daemon to `run` and the lease: the command is not left without one."""
    start(project)
    first = daemon_state(project)["pid"]
    stop = [*COMMAND, "stop"]
    code = (
        f"import subprocess, sys; sys.path.insert(0, {str(MODULE.parent)!r}); import mflocal\n"
        "def late(self, old=mflocal._Wrapper._take_lease):\n"
        "    mflocal._Wrapper._take_lease = old\n"
        f"    subprocess.run({stop!r}, stdout=2)\n"
        "    old(self)\n"
        "mflocal._Wrapper._take_lease = late\n"
        "mflocal.console()"
    )
    patient = (
        "import sys, time, urllib.error\n"
        "for _ in range(300):\n"
        f"    try: exec({POST!r}); break\n"
        "    except (OSError, urllib.error.URLError): time.sleep(0.1)\n"
    )
    done = subprocess.run(
        [PYTHON, "-c", code, "run", PYTHON, "-c", patient, "F"],
        cwd=project, env=clean_env(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "200\n"), done.stderr
    assert f"mflocal stopped: pid {first}" in done.stderr and daemon_state(project)["pid"] != first


NO_DIRECTORY_LOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
int flock(int fd, int operation) {
    struct stat info;
    if (!fstat(fd, &info) && S_ISDIR(info.st_mode)) { errno = EBADF; return -1; }
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    return real(fd, operation);
}
"""


def test_a_file_system_that_cannot_lock_directories(project: Path, tmp_path: Path) -> None:
    """As NFS: the lock on the file does it all, and one that was replaced is taken anew."""
    compiler = shutil.which("cc")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    (tmp_path / "flock.c").write_text(NO_DIRECTORY_LOCKS)
    library = tmp_path / "flock.so"
    words = [compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "flock.c"), "-ldl"]
    if subprocess.run(words).returncode:
        pytest.skip("the C compiler does not work")
    env = clean_env(LD_PRELOAD=str(library))
    started = mflocal("start", cwd=project, check=True, env=env)
    pid = daemon_state(project)["pid"]
    assert started.stderr == "" and not locked(project / ".metaflow/.mflocal")
    lock = project / ".metaflow/.mflocal/lock"
    restore(project, "tar")
    wait_for(lambda: locked(lock))
    assert f"pid {pid}," in mflocal("start", cwd=project, check=True, env=env).stdout
    assert mflocal("stop", cwd=project, env=env).returncode == 0


def test_a_daemon_ends_whatever_its_threads_do(project: Path) -> None:
    code = (
        f"import sys, threading, time; sys.path.insert(0, {str(MODULE.parent)!r}); import mflocal\n"
        "def on_ready(self, old=mflocal.Daemon._on_ready):\n"
        "    import asyncio\n"
        "    for _ in range(3): asyncio.get_running_loop().run_in_executor(None, time.sleep, 600)\n"
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "    old(self)\n"
        "mflocal.Daemon._on_ready = on_ready\n"
        "mflocal.console()"
    )
    process = subprocess.Popen(
        [PYTHON, "-c", code, "serve"], cwd=project, env=clean_env(), stderr=subprocess.DEVNULL
    )
    path = project / ".metaflow/.mflocal/daemon.json"
    wait_for(lambda: path.exists() and daemon_state(project)["state"] == "ready")
    assert mflocal("stop", cwd=project).returncode == 0
    assert process.wait(20) == 0


def test_another_version_and_a_deleted_python_are_named(project: Path, tmp_path: Path) -> None:
    """They are used all the same, and one line says what to do."""
    other = tmp_path / "other"
    other.mkdir()
    text = MODULE.read_text().replace(f'VERSION = "{module.VERSION}"', 'VERSION = "9.9.9"', 1)
    (other / "mflocal.py").write_text(text)
    python = other / "python"
    python.symlink_to(os.path.realpath(PYTHON))
    words = [str(python), str(other / "mflocal.py"), "start"]
    subprocess.run(words, cwd=project, env=clean_env(), check=True, stdout=subprocess.DEVNULL)
    done = mflocal("run", "true", cwd=project, check=True)
    assert "reused" in done.stderr and "9.9.9" in done.stderr and "mflocal restart" in done.stderr
    mflocal("stop", cwd=project, check=True)
    shutil.copy(MODULE, other / "mflocal.py")
    subprocess.run(words, cwd=project, env=clean_env(), check=True, stdout=subprocess.DEVNULL)
    client = Client("http://127.0.0.1:%d" % daemon_state(project)["port"], project)
    shutil.rmtree(other)
    for path in ("/flows", "/api/flows", "/api/features"):
        assert client("GET", path).status == 200
    done = mflocal("run", "true", cwd=project, check=True)
    assert str(python) in done.stderr and "mflocal restart" in done.stderr
    mflocal("restart", cwd=project, check=True)
    assert mflocal("run", "true", cwd=project, check=True).stderr.count("\n") == 1


@pytest.mark.parametrize("host", ["0", "127.1", "::", "localhost", "::1", "hostname"])
def test_addresses_to_listen_on(project: Path, host: str) -> None:
    """The starter can talk to its daemon whatever name the address was given by."""
    host = socket.gethostname() if host == "hostname" else host
    env = clean_env(METAFLOW_LOCAL_SERVICE_AUTH_KEY="k")
    if ":" in host:
        try:
            socket.create_server((host, 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 here")
    try:
        socket.getaddrinfo(host, 80)
    except OSError:
        pytest.skip("this machine does not know its own name")
    done = mflocal("run", "--host", host, PYTHON, "-c", POST, "F", cwd=project, env=env)
    assert (done.returncode, done.stdout) == (0, "200\n"), done.stderr
    told = json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)
    connection = http.client.HTTPConnection(told["url"].split("//")[1], timeout=10)
    connection.request("GET", "/ping")
    assert connection.getresponse().status == 200
    connection.close()
    assert mflocal("stop", cwd=project).returncode == 0
