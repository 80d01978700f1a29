"""The commands and the daemon, with real processes: races, kills, signals, exit codes, idleness."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND, MODULE, Client, clean_env, mflocal, wait_for

import mflocal as module

PYTHON = sys.executable


def state_of(root: Path) -> dict[str, Any]:
    return json.loads((root / ".metaflow" / ".mflocal" / "daemon.json").read_text())  # type: ignore[no-any-return]


def popen(
    *args: str, cwd: Path, env: dict[str, str] | None = None, **kwargs: Any
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PYTHON, str(MODULE), *args], cwd=cwd, env=env or clean_env(), text=True, **kwargs
    )


def start(root: Path, *options: str, **env: str) -> Client:
    mflocal("start", *options, cwd=root, check=True, env=clean_env(**env))
    return Client("http://127.0.0.1:%d" % state_of(root)["port"], root)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def daemons_of(root: Path) -> list[int]:
    """Every process whose command line says that it is the daemon of `root`."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"mflocal daemon" in words and os.fsencode(str(root)) in words and alive(int(name)):
                found.append(int(name))
    return found


def begin_run(client: Client) -> http.client.HTTPConnection:
    """An unfinished run whose runtime lives as long as the connection is open."""
    run = None
    connection = http.client.HTTPConnection(
        "127.0.0.1", int(client.url.rpartition(":")[2]), timeout=10
    )
    body = json.dumps({"user_name": "u", "tags": [], "system_tags": []})
    for path in ("/flows/F", "/flows/F/run", "steps/start/step", "steps/start/task"):
        if not path.startswith("/"):
            path = f"/flows/F/runs/{run}/{path}"
        connection.request("POST", path, body)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        run = json.loads(answer.read()).get("run_number")
    return connection


# -- start, stop, status, url, env, logs


@pytest.mark.core
def test_the_life_of_a_daemon(project: Path) -> None:
    none = mflocal("url", cwd=project)
    assert (none.returncode, none.stdout) == (1, "") and "no daemon runs" in none.stderr
    assert mflocal("status", cwd=project).returncode == 1
    assert mflocal("stop", cwd=project).returncode == 1
    assert not (project / ".metaflow").exists()  # looking makes nothing

    first = mflocal("start", cwd=project, check=True)
    state = state_of(project)
    url = "http://127.0.0.1:%d" % state["port"]
    for text in (f"pid {state['pid']}", url, str(project), f"export METAFLOW_SERVICE_URL={url}\n"):
        assert text in first.stdout
    assert "export METAFLOW_DEFAULT_METADATA=service\n" in first.stdout
    assert (
        f"docker run -p 3000:3000 -e METAFLOW_SERVICE={url}/api netflix/metaflow-ui:latest"
        in first.stdout
    )
    again = mflocal("start", cwd=project, check=True)
    assert "runs already" in again.stdout and f"pid {state['pid']}" in again.stdout

    (project / "deep" / "down").mkdir(parents=True)
    assert mflocal("url", cwd=project / "deep" / "down", check=True).stdout == url + "\n"
    told = json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)
    assert told["running"] and told["pid"] == state["pid"] and told["port"] == state["port"]
    assert told["url"] == url and told["root"] == str(project) and told["active_runs"] == []
    assert 295 < told["idle_left"] <= 300 and 0 <= told["uptime"] < 60 and told["version"]
    text = mflocal("status", cwd=project, check=True).stdout
    assert re.search(rf"^pid +{state['pid']}$", text, re.M) and re.search(
        r"^idle stop +in \d+ s$", text, re.M
    )
    assert "serves" in mflocal("logs", cwd=project, check=True).stdout

    stopped = mflocal("stop", cwd=project, check=True)
    assert f"pid {state['pid']}" in stopped.stdout
    assert not alive(state["pid"])
    assert mflocal("stop", cwd=project).returncode == 1
    assert "stopped" in mflocal("logs", cwd=project, check=True).stdout


def test_state_is_private(project: Path) -> None:
    process = popen("start", cwd=project, stdout=subprocess.DEVNULL, umask=0)
    assert process.wait(60) == 0
    directory = project / ".metaflow" / ".mflocal"
    assert directory.stat().st_mode & 0o777 == 0o700
    for name in ("lock", "daemon.json", "daemon.log"):
        assert (directory / name).stat().st_mode & 0o777 == 0o600, name


def test_env_can_be_evaluated(project: Path) -> None:
    script = f'eval "$({PYTHON} {MODULE} env --root "$PWD/it\'s")"; env'
    (project / "it's").mkdir()
    env = clean_env(NO_PROXY="corp.example", no_proxy="10.0.0.1,corp.example")
    out = subprocess.run(
        ["sh", "-c", script], cwd=project, env=env, capture_output=True, text=True, check=True
    )
    told = dict(line.split("=", 1) for line in out.stdout.splitlines() if "=" in line)
    root = project / "it's"
    try:
        assert told["METAFLOW_SERVICE_URL"] == "http://127.0.0.1:%d" % state_of(root)["port"]
        assert told["METAFLOW_DEFAULT_METADATA"] == "service"
        assert told["METAFLOW_DATASTORE_SYSROOT_LOCAL"] == str(root)
        assert told["METAFLOW_CARD_LOCALROOT"] == str(root / ".metaflow" / "mf.cards")
        assert told["NO_PROXY"] == told["no_proxy"] == "corp.example,10.0.0.1,127.0.0.1,localhost"
        assert "METAFLOW_ENABLED_SIDECAR" not in told and "METAFLOW_SERVICE_HEADERS" not in told
        assert "stops after 300 s without use" in out.stderr
    finally:
        mflocal("stop", "--root", str(root), cwd=project)


@pytest.mark.core
def test_twenty_starts_make_one_daemon(project: Path) -> None:
    starts = [
        popen("start", cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(20)
    ]
    outs = [process.communicate(timeout=120) for process in starts]
    assert [process.returncode for process in starts] == [0] * 20, outs
    told = {re.search(r"pid (\d+), (\S+),", out).groups() for out, _ in outs}  # type: ignore[union-attr]
    assert len(told) == 1
    assert sum("mflocal started" in out for out, _ in outs) == 1
    assert daemons_of(project) == [int(told.pop()[0])]


@pytest.mark.core
def test_after_kill_9_the_port_is_the_same(project: Path) -> None:
    start(project)
    before = state_of(project)
    os.kill(before["pid"], signal.SIGKILL)
    wait_for(lambda: not alive(before["pid"]))
    assert mflocal("url", cwd=project).returncode == 1
    start(project)
    after = state_of(project)
    assert after["port"] == before["port"] and after["instance"] != before["instance"]
    mflocal("stop", cwd=project, check=True)
    start(project)
    assert state_of(project)["port"] == before["port"]


def test_the_last_port_if_free(project: Path) -> None:
    start(project)
    port = state_of(project)["port"]
    mflocal("stop", cwd=project, check=True)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        start(project)
        assert state_of(project)["port"] != port


def test_a_taken_port_is_one_line(project: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for command in (["start"], ["serve"], ["run"]):
            done = mflocal(
                *command,
                "--port",
                str(port),
                *(["true"] if command == ["run"] else []),
                cwd=project,
            )
            assert done.returncode == 3
            assert re.fullmatch(rf"mflocal: port {port} on 127.0.0.1 is taken .*\n", done.stderr)


@pytest.mark.parametrize(
    "command", ["run", "start", "status", "stop", "url", "env", "logs", "serve", "ui"]
)
def test_a_malformed_variable_is_one_line(project: Path, command: str) -> None:
    env = clean_env(METAFLOW_LOCAL_SERVICE_PORT="eighty")
    done = mflocal(command, *(["true"] if command == "run" else []), cwd=project, env=env)
    assert done.returncode == 2
    assert re.fullmatch(r"mflocal: METAFLOW_LOCAL_SERVICE_PORT .*\n", done.stderr)


@pytest.mark.parametrize(
    "words",
    [
        ["fly"],
        ["start", "--prot", "1"],
        ["start", "--port"],
        ["stop", "now"],
        ["run"],
        ["url", "--json=1"],
    ],
)
def test_wrong_words_are_one_line(project: Path, words: list[str]) -> None:
    done = mflocal(*words, cwd=project)
    assert (
        done.returncode == 2
        and done.stderr.startswith("mflocal: ")
        and done.stderr.count("\n") == 1
    )


def test_help_and_version(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = mflocal("--help", cwd=project, check=True).stdout
    assert "usage: mflocal [-q] COMMAND" in text and "-V, --version" in text
    assert mflocal("help", cwd=project, check=True).stdout == text
    assert mflocal(cwd=project).stdout == text and mflocal(cwd=project).returncode == 2
    text = mflocal("help", "run", cwd=project, check=True).stdout
    assert "usage: mflocal run [options] CMD" in text and "--idle-timeout SECONDS" in text
    assert mflocal("help", "fly", cwd=project).returncode == 2
    for word in ("--version", "-V"):
        assert re.fullmatch(
            r"mflocal \d+\.\d+\.\d+\n", mflocal(word, cwd=project, check=True).stdout
        )
    for name in ("run", "start", "stop", "restart", "status", "url", "env", "logs", "serve", "ui"):
        assert module.main([name, "--help"]) == 0
        assert f"usage: mflocal {name}" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["--help", "--version", ""])
def test_nobody_reads_the_help(project: Path, word: str) -> None:
    read, write = os.pipe()
    os.close(read)
    process = popen(*[word] * bool(word), cwd=project, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", -signal.SIGPIPE)


def test_other_options_name_restart(project: Path) -> None:
    start(project, "--idle-timeout", "100")
    done = mflocal("start", "--idle-timeout", "50", cwd=project, check=True)
    assert (
        "--idle-timeout is 100" in done.stderr
        and "restart" in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert mflocal("start", "--idle-timeout", "100", cwd=project, check=True).stderr == ""
    port = state_of(project)["port"]
    mflocal("restart", "--allow-host", "box.example", cwd=project, check=True)
    options = state_of(project)["options"]
    assert options["idle_timeout"] == 100 and options["allowed_hosts"] == ["box.example"]
    assert state_of(project)["port"] == port
    mflocal("restart", "--idle-timeout", "50", cwd=project, check=True)
    options = state_of(project)["options"]
    assert options["idle_timeout"] == 50 and options["allowed_hosts"] == ["box.example"]


def test_stop_is_refused_while_runs_are_active(project: Path) -> None:
    client = start(project)
    connection = begin_run(client)
    run = json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)["active_runs"][0]
    assert run["flow_id"] == "F" and run["how"] == "connection"
    for command in ("stop", "restart"):
        refused = mflocal(command, cwd=project)
        assert refused.returncode == 4
        assert f"F/{run['run_number']}" in refused.stderr and "--force" in refused.stderr
    assert mflocal("url", cwd=project).returncode == 0
    assert mflocal("stop", "--force", cwd=project).returncode == 0
    connection.close()


def test_start_during_a_drain_waits(project: Path) -> None:
    client = start(project)
    before = state_of(project)
    slow = socket.create_connection(("127.0.0.1", before["port"]))
    slow.sendall(b"POST /flows/F HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{")
    time.sleep(0.2)
    os.kill(before["pid"], signal.SIGTERM)
    wait_for(lambda: not (project / ".metaflow/.mflocal/daemon.json").exists())
    starter = popen("start", cwd=project, stdout=subprocess.PIPE)
    time.sleep(0.6)
    assert starter.poll() is None and alive(before["pid"])
    slow.sendall(b"}")
    assert b"HTTP/1.1 " in slow.recv(4096)
    slow.close()
    assert starter.wait(60) == 0
    starter.communicate()
    after = state_of(project)
    assert after["pid"] != before["pid"] and after["port"] == before["port"]
    assert daemons_of(project) == [after["pid"]]
    assert client("GET", "/ping").status == 200


def test_a_second_signal_stops_at_once(project: Path) -> None:
    start(project)
    state = state_of(project)
    slow = socket.create_connection(("127.0.0.1", state["port"]))
    slow.sendall(b"POST /flows/F HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{")
    time.sleep(0.2)
    os.kill(state["pid"], signal.SIGTERM)
    time.sleep(0.5)
    assert alive(state["pid"])
    os.kill(state["pid"], signal.SIGTERM)
    wait_for(lambda: not alive(state["pid"]))
    slow.close()


def test_sighup_is_ignored(project: Path) -> None:
    client = start(project)
    os.kill(state_of(project)["pid"], signal.SIGHUP)
    time.sleep(0.2)
    assert client("GET", "/ping").status == 200


def test_the_daemon_holds_nobody_elses_pipes(project: Path) -> None:
    """A CI step waits for the end of its pipes: the daemon must not keep them."""
    reader, writer = os.pipe()
    done = popen(
        "start", cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=(writer,)
    )
    os.close(writer)
    out, _ = done.communicate(timeout=60)
    assert "mflocal started" in out
    os.set_blocking(reader, False)
    assert wait_for(lambda: read_end(reader))
    pid = state_of(project)["pid"]
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) == pid
    env = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"METAFLOW_" not in env
    os.close(reader)


def read_end(fd: int) -> bool:
    try:
        return os.read(fd, 1) == b""
    except BlockingIOError:
        return False


def test_client_settings_do_not_reach_the_daemon(project: Path) -> None:
    start(project, METAFLOW_SERVICE_URL="http://elsewhere", METAFLOW_DEFAULT_METADATA="service")
    assert b"METAFLOW_" not in Path(f"/proc/{state_of(project)['pid']}/environ").read_bytes()


def test_closed_standard_streams(project: Path) -> None:
    script = f"{PYTHON} {MODULE} run -q {PYTHON} -c 'print(1)' <&- 2>&-"
    done = subprocess.run(
        ["sh", "-c", script], cwd=project, env=clean_env(), stdout=subprocess.PIPE, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, b"1\n")


# -- idleness


def test_idles_out_though_pinged(project: Path) -> None:
    client = start(project, "--idle-timeout", "2")
    pid = state_of(project)["pid"]
    client.get("/flows")
    used = time.monotonic()

    def ended() -> bool:
        """Asked all the time with what is no use: a ping."""
        try:
            client("GET", "/ping")
        except OSError:
            pass
        return not alive(pid)

    mflocal("status", cwd=project)  # is none either
    wait_for(ended)
    assert time.monotonic() - used > 1.9
    assert not (project / ".metaflow/.mflocal/daemon.json").exists()
    assert "idle for 2 s" in mflocal("logs", cwd=project).stdout


def test_no_idle_stop_under_a_living_run(project: Path) -> None:
    began = time.monotonic()
    done = mflocal("run", "--idle-timeout", "1", "sleep", "3", cwd=project)
    assert done.returncode == 0, done.stderr
    pid = state_of(project)["pid"]
    assert alive(pid) and time.monotonic() - began >= 3
    wait_for(lambda: not alive(pid))


def test_the_lease_ends_with_the_wrapper(project: Path) -> None:
    wrapper = popen("run", "-q", "--idle-timeout", "1", "sleep", "30", cwd=project)
    pid = wait_for(lambda: daemons_of(project))[0]
    time.sleep(2)
    assert alive(pid)
    child = wait_for(lambda: children_of(wrapper.pid))
    wrapper.kill()
    wrapper.wait()
    wait_for(lambda: not alive(pid))
    for process in child:
        if process != pid:
            os.kill(process, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# -- run


@pytest.mark.core
def test_run_hands_through(project: Path) -> None:
    code = "import sys; print(sys.stdin.read().upper()); sys.stderr.write('err'); sys.exit(7)"
    done = mflocal("run", PYTHON, "-c", code, "--port", "x", cwd=project, input="abc")
    state = state_of(project)
    line = "mflocal: http://127.0.0.1:%d, root %s, started, pid %d\n" % (
        state["port"],
        project,
        state["pid"],
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "ABC\n", line + "err")
    again = mflocal("run", "true", cwd=project)
    assert again.returncode == 0 and again.stderr == line.replace("started", "reused")
    assert mflocal("run", "-q", "--", "true", cwd=project).stderr == ""


@pytest.mark.core
def test_exit_codes(project: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        # A shell sees 128 + N, and that a signal was the end: its loop stops after Ctrl-C.
        words = ("run", "-q", "sh", "-c", f"kill -{int(number)} $$")
        assert mflocal(*words, cwd=project).returncode == -number
        line = '"$0" "$@"; echo $?'
        done = subprocess.run(
            ["sh", "-c", line, *COMMAND, *words],
            cwd=project, env=clean_env(), capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout == f"{128 + number}\n", done
    missing = mflocal("run", "-q", "no-such-command", cwd=project)
    assert missing.returncode == 127 and "no-such-command" in missing.stderr
    (project / "plain").write_text("text")
    assert mflocal("run", "-q", "./plain", cwd=project).returncode == 126
    assert mflocal("run", "-q", ".", cwd=project).returncode == 126
    nameless = mflocal("run", "-q", "", cwd=project)
    assert nameless.returncode == 127 and nameless.stderr.count("\n") == 1
    (project / "script").write_text('echo "$1"; exit 5\n')
    (project / "script").chmod(0o755)
    for name, path in (("./script", os.environ["PATH"]), ("script", str(project))):
        done = mflocal("run", "-q", name, "a b", cwd=project, env=clean_env(PATH=path))
        assert (done.returncode, done.stdout) == (5, "a b\n"), done


@pytest.mark.core
def test_the_environment_of_the_command(project: Path) -> None:
    code = "import os, json; print(json.dumps(dict(os.environ)))"
    home = project / "home"
    home.mkdir()
    told_elsewhere = {"METAFLOW_UI_URL": "https://ui.example"}
    (home / "config.json").write_text(json.dumps(told_elsewhere))
    env = clean_env(
        METAFLOW_HOME=str(home),
        METAFLOW_SERVICE_URL="http://prod.example",
        https_proxy="http://p:1",
    )
    done = mflocal("run", PYTHON, "-c", code, cwd=project, env=env)
    told = json.loads(done.stdout)
    url = "http://127.0.0.1:%d" % state_of(project)["port"]
    assert re.fullmatch(url + "/_lease/[0-9a-f]{16}", told["METAFLOW_SERVICE_URL"])
    assert told["METAFLOW_SERVICE_INTERNAL_URL"] == url
    assert told["METAFLOW_UI_URL"] == ""  # the configured one shows another service's runs
    assert told["METAFLOW_DEFAULT_METADATA"] == "service"
    assert told["METAFLOW_ENABLED_SIDECAR"] == ""
    assert told["NO_PROXY"] == told["no_proxy"] == "127.0.0.1,localhost"
    added = {key for key in told if told[key] != env.get(key)} - {
        "PWD",
        "OLDPWD",
        "_",
        "SHLVL",
        "LC_CTYPE",
    }
    assert added == {
        "METAFLOW_SERVICE_URL", "METAFLOW_DEFAULT_METADATA", "METAFLOW_ENABLED_SIDECAR",
        "METAFLOW_SERVICE_INTERNAL_URL", "METAFLOW_UI_URL", "NO_PROXY", "no_proxy",
    }  # fmt: skip
    assert "overrides METAFLOW_SERVICE_URL=http://prod.example" in done.stderr
    done = mflocal("run", "true", cwd=project, env=clean_env(METAFLOW_DEFAULT_DATASTORE="s3"))
    assert "default datastore s3 is not local" in done.stderr
    words = ["run", *COMMAND, "run", "--", "true"]
    assert "overrides" not in mflocal(*words, cwd=project, check=True).stderr


@pytest.mark.parametrize(
    ("options", "env", "expected"),
    [
        ([], {}, ""),
        (["--heartbeats", "sidecar"], {}, None),
        ([], {"METAFLOW_LOCAL_SERVICE_HEARTBEATS": "sidecar"}, None),
        ([], {"METAFLOW_ENABLED_SIDECAR": "save_logs_periodically"}, "save_logs_periodically"),
        (["--heartbeats", "connection"], {}, ""),
    ],
)
def test_sidecars(
    project: Path, options: list[str], env: dict[str, str], expected: str | None
) -> None:
    show = "import os, json; print(json.dumps(os.environ.get('METAFLOW_ENABLED_SIDECAR')))"
    (project / "show.py").write_text(show)
    (project / "script.sh").write_text(f'#!/bin/sh\nexec nice "{PYTHON}" show.py\n')
    (project / "script.sh").chmod(0o755)
    python = [PYTHON, "show.py"]
    launchers = [[], ["env"], ["timeout", "60"], ["sh", "-c", 'exec "$0" "$@"']]
    for words in ["./script.sh"], *([*launcher, *python] for launcher in launchers):
        done = mflocal("run", *options, *words, cwd=project, env=clean_env(**env))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == expected, words


def test_explicit_root_moves_everything(project: Path) -> None:
    (project / "data").mkdir()
    code = "import os; e = os.environ.get; print(e('METAFLOW_DATASTORE_SYSROOT_LOCAL'), e('METAFLOW_CARD_LOCALROOT'))"
    try:
        done = mflocal("run", "--root", "data", PYTHON, "-c", code, cwd=project)
        assert done.stdout.split() == [
            str(project / "data"),
            str(project / "data/.metaflow/mf.cards"),
        ]
        env = clean_env(METAFLOW_DATASTORE_SYSROOT_LOCAL="/mine", METAFLOW_CARD_LOCALROOT="/cards")
        done = mflocal("run", "--root", "data", PYTHON, "-c", code, cwd=project, env=env)
        assert done.stdout.split() == ["/mine", "/cards"]
    finally:
        mflocal("stop", "--root", "data", cwd=project)
    assert not (project / ".metaflow").exists()


def test_the_command_inherits_neither_lock_nor_socket(project: Path) -> None:
    for _ in range(2):  # started, reused
        out = mflocal("run", "-q", "ls", "-l", "/proc/self/fd", cwd=project, check=True).stdout
        fds = re.findall(r" (\d+) -> (.+)", out)
        assert sorted(int(fd) for fd, _ in fds) == [0, 1, 2, 3] and fds[3][1].startswith(
            "/proc/"
        ), out


@pytest.mark.core
def test_ctrl_c_is_the_commands(project: Path) -> None:
    code = "import time\ntry:\n print('up', flush=True); time.sleep(30)\nexcept KeyboardInterrupt:\n raise SystemExit(5)"
    wrapper = popen(
        "run", "-q", PYTHON, "-c", code, cwd=project, stdout=subprocess.PIPE, start_new_session=True
    )
    assert wrapper.stdout and wrapper.stdout.readline() == "up\n"
    os.killpg(wrapper.pid, signal.SIGINT)
    assert wrapper.wait(60) == 5
    wrapper.stdout.close()
    assert mflocal("url", cwd=project).returncode == 0  # the daemon has a session of its own


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_are_forwarded(project: Path, number: signal.Signals) -> None:
    code = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *a: sys.exit(9))\n"
        "print('up', flush=True)\ntime.sleep(30)"
    )
    wrapper = popen("run", "-q", PYTHON, "-c", code, cwd=project, stdout=subprocess.PIPE)
    assert wrapper.stdout and wrapper.stdout.readline() == "up\n"
    wrapper.send_signal(number)
    assert wrapper.wait(60) == 9
    wrapper.stdout.close()


def test_a_terminal_passes_through(project: Path) -> None:
    import pty

    code = "import os; print(os.isatty(0), os.isatty(1), os.getpgrp() == os.tcgetpgrp(0))"
    master, slave = pty.openpty()
    script = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "os.execv(sys.executable, [sys.executable] + sys.argv[1:])"
    )
    command = [PYTHON, "-c", script, str(MODULE), "run", "-q", PYTHON, "-c", code]
    process = subprocess.Popen(
        command, cwd=project, env=clean_env(), stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    assert process.wait(60) == 0
    assert os.read(master, 4096).split() == [b"True", b"True", b"True"]
    os.close(master)


@pytest.mark.core
def test_a_daemon_that_dies_under_a_run_comes_back(project: Path) -> None:
    wrapper = popen("run", "sleep", "8", cwd=project, stderr=subprocess.PIPE)
    first = wait_for(lambda: read_state(project))
    for _ in range(2):
        before = state_of(project)
        os.kill(before["pid"], signal.SIGKILL)
        after = wait_for(lambda: changed(project, before["instance"]))  # noqa: B023
        assert after["port"] == first["port"]
        wait_for(lambda: state_of(project)["state"] == "ready")
        time.sleep(0.3)
    assert len(daemons_of(project)) == 1
    _, err = wrapper.communicate(timeout=60)
    assert wrapper.returncode == 0 and err.count("started it again") == 2


def read_state(root: Path) -> dict[str, Any] | None:
    try:
        state = state_of(root)
    except (OSError, ValueError):
        return None
    return state if state["state"] == "ready" else None


def changed(root: Path, instance: str) -> dict[str, Any] | None:
    state = read_state(root)
    return state if state and state["instance"] != instance else None


def test_a_broken_bundle_that_nobody_named_keeps_nothing_from_working(project: Path) -> None:
    cache = project / "cache" / "mflocal"
    cache.mkdir(parents=True)
    (cache / "metaflow-ui-1.zip").write_bytes(b"PK\3\4 broken off")
    env = clean_env(XDG_CACHE_HOME=str(cache.parent), HOME=str(project))
    (project / ".cache").symlink_to(cache.parent)
    assert mflocal("run", "true", cwd=project, env=env).returncode == 0
    (cache / "metaflow-ui-2.zip").write_bytes(b"PK\3\4 broken PK\5\6 inside")
    mflocal("stop", cwd=project, check=True)
    assert mflocal("run", "sleep", "1", cwd=project, env=env).returncode == 0


def test_a_daemon_comes_back_without_its_bundle(project: Path) -> None:
    bundle = project / "bundle"
    bundle.mkdir()
    (bundle / "index.html").write_text("<html></html>")
    mflocal("start", "--bundle", str(bundle), cwd=project, check=True)
    wrapper = popen(
        "run", "-q", "sh", "-c", "touch up; sleep 4", cwd=project, stderr=subprocess.PIPE
    )
    first = state_of(project)
    wait_for((project / "up").exists)
    bundle.rename(project / "away")
    os.kill(first["pid"], signal.SIGKILL)
    wait_for(lambda: changed(project, first["instance"]))
    _, err = wrapper.communicate(timeout=60)
    assert wrapper.returncode == 0 and "started it again" in err


@pytest.mark.core
@pytest.mark.parametrize("state", ["starting", "ready"])
def test_a_daemon_killed_while_it_starts_takes_nothing_with_it(project: Path, state: str) -> None:
    """daemon.json says `ready` before the wrapper has been told; killed in between it leaves without a word."""
    wrapper = popen("run", "sleep", "3", cwd=project, stderr=subprocess.PIPE)
    killed: set[str] = set()
    until = time.monotonic() + 60
    while len(killed) < 2 and time.monotonic() < until:
        try:
            found = state_of(project)
        except (OSError, ValueError):
            continue
        if found["state"] == state and found["instance"] not in killed:
            os.kill(found["pid"], signal.SIGKILL)
            killed.add(found["instance"])
    assert len(killed) == 2
    wait_for(lambda: (read_state(project) or {"instance": None})["instance"] not in {None, *killed})
    _, err = wrapper.communicate(timeout=60)
    assert wrapper.returncode == 0 and err.count("started it again") == 2


def test_a_port_that_is_taken_for_a_moment_is_waited_for(project: Path) -> None:
    wrapper = popen("run", "sleep", "6", cwd=project, stderr=subprocess.PIPE)
    first = wait_for(lambda: read_state(project))
    time.sleep(0.3)
    wrapper.send_signal(signal.SIGSTOP)
    os.kill(first["pid"], signal.SIGKILL)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wait_for(lambda: bound(taken, first["port"]))
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # from here on nobody shares it
        wrapper.send_signal(signal.SIGCONT)
        time.sleep(1.5)
        assert wrapper.poll() is None
    assert wait_for(lambda: changed(project, first["instance"]))["port"] == first["port"]
    _, err = wrapper.communicate(timeout=60)
    assert wrapper.returncode == 0 and err.count("started it again") == 1


def bound(sock: socket.socket, port: int) -> bool:
    try:
        sock.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def test_not_more_than_three_times_a_minute(project: Path) -> None:
    wrapper = popen("run", "-q", "sleep", "30", cwd=project)
    try:
        instance = wait_for(lambda: read_state(project))["instance"]
        for _ in range(3):
            os.kill(state_of(project)["pid"], signal.SIGKILL)
            instance = wait_for(lambda: changed(project, instance))["instance"]  # noqa: B023
            time.sleep(0.2)
        os.kill(state_of(project)["pid"], signal.SIGKILL)
        time.sleep(2)
        assert state_of(project)["instance"] == instance and daemons_of(project) == []
        assert wrapper.poll() is None
    finally:
        wrapper.terminate()
        wrapper.wait()


def test_a_stopped_daemon_stays_away_and_a_restarted_one_is_adopted(project: Path) -> None:
    wrapper = popen("run", "-q", "--idle-timeout", "2", "sleep", "9", cwd=project)
    wait_for(lambda: read_state(project))
    mflocal("restart", cwd=project, check=True)
    after = state_of(project)["pid"]
    time.sleep(4)
    assert alive(after), "the wrapper did not take a lease on the new daemon"
    mflocal("stop", cwd=project, check=True)
    time.sleep(1)
    assert daemons_of(project) == []
    assert wrapper.wait(60) == 0


def test_a_daemon_that_cannot_start_ends_the_command(project: Path) -> None:
    bundle = project / "bundle.zip"
    bundle.write_bytes(b"PK\3\4 but PK\5\6 not really")
    done = mflocal("run", "-q", "--bundle", str(bundle), "sleep", "600", cwd=project)
    assert done.returncode == 3
    assert "could not start" in done.stderr and "bundle.zip" in done.stderr
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    done = mflocal("run", "-q", "--bundle", str(bundle), PYTHON, "-c", stubborn, cwd=project)
    assert done.returncode == 3
    done = mflocal("start", "--bundle", str(bundle), cwd=project)
    assert done.returncode == 3 and "bundle.zip" in done.stderr
    assert daemons_of(project) == []


def test_the_wrapper_does_not_poll(project: Path) -> None:
    wrapper = popen("run", "-q", "sleep", "5", cwd=project)
    wait_for(lambda: read_state(project))
    time.sleep(1)
    before = switches(wrapper.pid)
    time.sleep(2)
    assert switches(wrapper.pid) - before <= 1
    wrapper.wait()


def switches(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return sum(int(n) for n in re.findall(r"ctxt_switches:\s+(\d+)", text))


# -- trust


@pytest.mark.parametrize("options", [[], ["-q"], ["--root", "."]])
def test_a_run_beside_a_running_daemon_does_not_load_the_server(
    project: Path, options: list[str]
) -> None:
    """Its time is a part of every flow's."""
    start(project)
    code = (
        f"import os, sys; sys.path.insert(0, {str(MODULE.parent)!r}); had = set(sys.modules); import mflocal\n"
        "end, os._exit = os._exit, lambda code: (print(code, *sorted(set(sys.modules) - had), flush=True), end(code))\n"
        "sys.argv = ['mflocal', *sys.argv[1:]]; mflocal.console()"
    )
    command = [PYTHON, "-I", "-S", "-c", code, "run", *options, "--", "true"]
    done = subprocess.run(command, cwd=project, env=clean_env(), capture_output=True, text=True)
    status, *loaded = done.stdout.split()
    assert status == "0" and "reused" in done.stderr or "-q" in options, done
    assert not {"asyncio", "ssl", "http", "subprocess", "inspect", "tempfile", "urllib"} & set(
        loaded
    )


@pytest.mark.parametrize("name", ["", "lock", "daemon.log"])
def test_links_in_place_of_state_are_refused(project: Path, name: str) -> None:
    victim = project / "victim"
    directory = project / ".metaflow" / ".mflocal"
    if name:
        victim.write_text("mine")
        directory.mkdir(parents=True)
        (directory / name).symlink_to(victim)
    else:
        victim.mkdir()
        directory.parent.mkdir()
        directory.symlink_to(victim)
    done = mflocal("start", cwd=project)
    assert done.returncode == 3 and ".mflocal" in done.stderr and done.stderr.count("\n") == 1
    assert (victim.read_text() == "mine") if name else (list(victim.iterdir()) == [])


def test_a_vanished_root_ends_the_daemon(project: Path) -> None:
    start(project)
    pid = state_of(project)["pid"]
    shutil.rmtree(project / ".metaflow")
    wait_for(lambda: not alive(pid))
    assert not (project / ".metaflow").exists()


def test_a_stuck_daemon_can_be_killed(project: Path) -> None:
    start(project)
    pid = state_of(project)["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        done = mflocal("stop", cwd=project)
        assert done.returncode == 3 and f"pid {pid}" in done.stderr and "--force" in done.stderr
        assert mflocal("stop", "--force", cwd=project).returncode == 0
        assert not alive(pid)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


NO_FLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int flock(int fd, int operation) {
    char name[64], path[4096];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    long n = readlink(name, path, sizeof path - 1);
    path[n > 0 ? n : 0] = 0;
    if (strstr(path, "/.mflocal")) {
        const char *how = getenv("TEST_FLOCK");
        if (how && !strcmp(how, "lies")) return 0;
        errno = ENOLCK;
        return -1;
    }
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    return real(fd, operation);
}
"""


@pytest.mark.parametrize("how", ["fails", "lies"])
def test_a_file_system_without_locks(project: Path, tmp_path: Path, how: str) -> None:
    compiler = shutil.which("cc")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    (tmp_path / "no_flock.c").write_text(NO_FLOCK)
    library = tmp_path / "no_flock.so"
    build = [compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "no_flock.c"), "-ldl"]
    if subprocess.run(build).returncode:
        pytest.skip("the C compiler does not work")
    env = clean_env(LD_PRELOAD=str(library), TEST_FLOCK=how)
    starts = [
        popen("start", cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    outs = [process.communicate(timeout=60) for process in starts]
    assert [process.returncode for process in starts] == [0] * 4, outs
    assert sum("state goes to /" in err for _, err in outs) == 1
    assert len(daemons_of(project)) == 1
    assert mflocal("url", cwd=project, env=env).returncode == 0
    assert mflocal("stop", cwd=project, env=env).returncode == 0
    assert daemons_of(project) == []


# -- serve, logs, ui


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve(project: Path, number: signal.Signals) -> None:
    process = popen("serve", cwd=project, stderr=subprocess.PIPE)
    wait_for(lambda: read_state(project))
    told = json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)
    assert told["pid"] == process.pid and told["idle_timeout"] == 0 and told["idle_left"] is None
    second = mflocal("serve", cwd=project)
    assert second.returncode == 3 and f"pid {process.pid}" in second.stderr
    assert "runs already" in mflocal("start", cwd=project, check=True).stdout
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "serves" in err and "stopped" in err
    assert not (project / ".metaflow/.mflocal/daemon.json").exists()


def test_the_log_rotates(project: Path) -> None:
    directory = project / ".metaflow" / ".mflocal"
    directory.mkdir(parents=True)
    log = directory / "daemon.log"
    log.write_bytes(b"old\n" + b"x" * (1 << 20))
    log.chmod(0o600)
    start(project)
    old = log.with_name("daemon.log.1")
    assert wait_for(old.exists) and old.read_bytes().startswith(b"old\n")
    assert log.stat().st_size < 10_000 and log.stat().st_mode & 0o777 == 0o600
    out = mflocal("logs", cwd=project, check=True).stdout
    assert out.startswith("old\n") and "serves" in out
    assert sorted(p.name for p in directory.glob("daemon.log*")) == ["daemon.log", "daemon.log.1"]


def test_logs_follow(project: Path) -> None:
    start(project)
    follower = popen("logs", "-f", cwd=project, stdout=subprocess.PIPE)
    assert follower.stdout and "serves" in follower.stdout.readline()
    mflocal("stop", cwd=project, check=True)
    assert "stopping" in follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    assert follower.wait(60) == -signal.SIGINT
    follower.stdout.close()


def test_ui_without_a_bundle(project: Path) -> None:
    refused = mflocal("ui", "--no-open", cwd=project)
    assert refused.returncode == 2 and str(project) in refused.stderr and "--root" in refused.stderr
    assert not (project / ".metaflow").exists()
    (project / ".metaflow").mkdir()
    done = mflocal("ui", "--no-open", cwd=project, env=clean_env(HOME=str(project)), check=True)
    assert "docker run -p 3000:3000 -e METAFLOW_SERVICE=http://127.0.0.1:" in done.stdout


def make_bundle(folder: Path) -> Path:
    folder.mkdir()
    (folder / "index.html").write_text("<title>the UI</title>")
    return folder


def test_ui_with_a_bundle(project: Path) -> None:
    start(project)
    bundle = make_bundle(project / "bundle")
    done = mflocal("ui", "--no-open", "--bundle", str(bundle), cwd=project, check=True)
    url = "http://127.0.0.1:%d/" % state_of(project)["port"]
    assert done.stdout == url + "\n" and f"root {project}" in done.stderr
    assert "the UI" in str(Client(url[:-1], project)("GET", "/").body)
    env = mflocal("run", "-q", "sh", "-c", "echo $METAFLOW_UI_URL", cwd=project).stdout
    assert env == url[:-1] + "\n"
    bad = mflocal("ui", "--no-open", "--bundle", str(project), cwd=project)
    assert bad.returncode == 2 and "index.html" in bad.stderr


def test_ui_with_a_key(project: Path) -> None:
    bundle = make_bundle(project / "bundle")
    (project / ".metaflow").mkdir()
    env = clean_env(
        METAFLOW_LOCAL_SERVICE_AUTH_KEY="s3cret", METAFLOW_LOCAL_SERVICE_UI_BUNDLE=str(bundle)
    )
    url = mflocal("ui", "--no-open", cwd=project, env=env, check=True).stdout.strip()
    assert "s3cret" not in url
    host, port = url.split("/")[2].split(":")

    def get(path: str, **headers: str) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    assert get("/flows")[0] == 401
    status, headers, _ = get(url[url.index("/_mflocal") :])
    assert status == 303 and headers["Location"] == "/"
    assert "HttpOnly" in headers["Set-Cookie"] and "SameSite=Strict" in headers["Set-Cookie"]
    cookie = headers["Set-Cookie"].split(";")[0]
    assert get("/flows", Cookie=cookie)[0] == 200
    assert get("/", Cookie=cookie)[0] == 200
    assert get(url[url.index("/_mflocal") :])[0] == 403  # once
    told = mflocal(
        "run", "-q", "sh", "-c", "echo $METAFLOW_SERVICE_AUTH_KEY", cwd=project, check=True
    )
    assert told.stdout == "s3cret\n"


# -- what surrounds us


@pytest.mark.parametrize(
    ("environ", "address", "expected"),
    [
        ({}, "", "127.0.0.1,localhost"),
        ({"NO_PROXY": "*"}, "", "*"),
        ({"NO_PROXY": "a", "no_proxy": "*"}, "", "*"),
        ({"NO_PROXY": "*", "no_proxy": "a"}, "", "*,a,127.0.0.1,localhost"),
        ({"no_proxy": "a, b"}, "192.0.2.1", "a,b,127.0.0.1,localhost,192.0.2.1"),
        ({"no_proxy": "a"}, "127.0.0.1", "a,127.0.0.1,localhost"),
    ],
)
def test_no_proxy(environ: dict[str, str], address: str, expected: str) -> None:
    assert module.no_proxy(environ, address) == expected


def test_artifacts_elsewhere_are_named(project: Path) -> None:
    for name in ("a", "b"):
        (project / name).mkdir()
    env = clean_env(METAFLOW_DATASTORE_SYSROOT_LOCAL=str(project / "a"))
    done = mflocal("run", "--root", "b", "true", cwd=project, env=env)
    assert done.returncode == 0 and f"keeps artifacts in {project / 'a'}" in done.stderr
    done = mflocal("run", "--root", "a", "true", cwd=project, env=env)
    assert "keeps artifacts" not in done.stderr
    for name in ("a", "b"):
        mflocal("stop", "--root", name, cwd=project)


def test_a_signal_before_the_command_is_there_reaches_it(project: Path) -> None:
    code = (
        "import os, sys; sys.path.insert(0, %r); import mflocal; spawn = os.posix_spawnp\n"
        "def late(*a, **k): os.kill(os.getpid(), 15); return spawn(*a, **k)\n"
        "os.posix_spawnp = late; sys.argv[1:] = ['run', 'sleep', '600']; mflocal.console()"
    )
    done = subprocess.run(
        [PYTHON, "-c", code % str(MODULE.parent)], cwd=project, env=clean_env(), timeout=60
    )
    assert done.returncode == -signal.SIGTERM


def test_restart_keeps_the_files_of_the_ui(project: Path) -> None:
    notice = {"message": "hello", "created": 1}
    (project / "n.json").write_text(json.dumps([notice]))
    client = start(project, METAFLOW_LOCAL_SERVICE_NOTIFICATIONS=str(project / "n.json"))
    assert [row["message"] for row in client.get("/api/notifications")] == ["hello"]
    mflocal("restart", cwd=project, check=True)
    assert [row["message"] for row in client.get("/api/notifications")] == ["hello"]


@pytest.mark.parametrize("name", ["link", "mf-local.py", "copy"])
def test_the_module_under_another_name(project: Path, name: str) -> None:
    path = project / name
    path.symlink_to(MODULE) if name == "link" else shutil.copy(MODULE, path)
    done = subprocess.run(
        [PYTHON, str(path), "run", "true"], cwd=project, env=clean_env(), timeout=60
    )
    assert done.returncode == 0
    subprocess.run(
        [PYTHON, str(path), "start"],
        cwd=project,
        env=clean_env(),
        check=True,
        stdout=subprocess.DEVNULL,
    )


def test_a_stuck_daemon_is_not_called_absent(project: Path) -> None:
    start(project)
    pid = state_of(project)["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        for command in ("url", "status"):
            done = mflocal(command, cwd=project)
            assert done.returncode == 3 and "does not answer" in done.stderr, done
    finally:
        os.kill(pid, signal.SIGCONT)


def test_output_that_cannot_be_written_is_one_line(project: Path) -> None:
    start(project)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [PYTHON, str(MODULE), "status"],
            cwd=project,
            env=clean_env(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode != 0 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    odd = project / os.fsdecode(b"n\xff")
    odd.mkdir()
    done = mflocal(
        "start",
        "--root",
        ".",
        cwd=odd,
        env=clean_env(PYTHONIOENCODING="utf-8:strict"),
        errors="surrogateescape",
    )
    assert done.returncode == 0 and str(odd) in done.stdout, done.stderr
    mflocal("stop", "--root", ".", cwd=odd)


def test_sidecars_asked_for_inside_another_run(project: Path) -> None:
    words = [PYTHON, str(MODULE), "run", "-q"]
    show = ["sh", "-c", 'echo "[${METAFLOW_ENABLED_SIDECAR-unset}]"']
    assert mflocal("run", *words[:-1], *show, cwd=project).stdout == "[]\n"
    assert (
        mflocal("run", *words, "--heartbeats", "sidecar", *show, cwd=project).stdout == "[unset]\n"
    )
