"""What `mflocal run` hands through: signals, terminals, descriptors, orphans, names."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any, Iterator

import pytest
from conftest import COMMAND, clean_env, mflocal, wait_for

PYTHON = sys.executable
RUN = [*COMMAND, "run", "-q"]
# Tells of each signal that it gets; SIGVTALRM ends it.
EAR = """
import os, signal, sys, time
def heard(number, frame):
    print(signal.Signals(number).name, flush=True)
    if number == signal.SIGVTALRM:
        sys.exit(3)
for number in signal.Signals:
    if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD):
        signal.signal(number, heard)
if "own" in sys.argv:
    os.setpgid(0, 0)
print("up", flush=True)
while True:
    time.sleep(0.05)  # a signal just before pause() would wake nobody
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with a daemon, for all tests here."""
    root = tmp_path_factory.mktemp("served")
    mflocal("start", cwd=root, check=True)
    yield root
    mflocal("stop", "--force", cwd=root)


def begin(root: Path, *words: str, **how: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RUN, *words], cwd=root, env=clean_env(), text=True, stdout=subprocess.PIPE,
        start_new_session=True, **how,
    )  # fmt: skip


def hears(wrapper: subprocess.Popen[str], *names: str) -> None:
    assert wrapper.stdout
    for name in names:
        assert wrapper.stdout.readline() == name + "\n"


SENT = ("HUP", "INT", "QUIT", "USR1", "USR2", "ALRM", "TERM", "WINCH", "CONT", "ABRT", "IO")


@pytest.mark.core
@pytest.mark.parametrize("group", ["shared", "own"])
def test_a_signal_reaches_the_command_once(served: Path, group: str) -> None:
    """Sent to the wrapper alone, and sent to its process group (Ctrl-C, kill -- -PGID)."""
    wrapper = begin(served, PYTHON, "-c", EAR, group)
    hears(wrapper, "up")
    for name in SENT:
        number = signal.Signals["SIG" + name]
        os.kill(wrapper.pid, number)
        hears(wrapper, "SIG" + name)
        os.killpg(wrapper.pid, number)
        hears(wrapper, "SIG" + name)
    os.kill(wrapper.pid, signal.SIGVTALRM)
    hears(wrapper, "SIGVTALRM")
    assert wrapper.stdout and wrapper.stdout.read() == ""
    assert wrapper.wait(60) == 3


def test_ignored_signals_stay_ignored(served: Path) -> None:
    code = "import os; os.kill(os.getppid(), 1); os.kill(os.getpid(), 1); print('here')"
    done = subprocess.run(
        ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *RUN, PYTHON, "-c", code],
        cwd=served, env=clean_env(), capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "here\n")


def test_blocked_signals_are_the_commands(served: Path) -> None:
    blocked = {signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM}
    code = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"
    wrapper = begin(
        served, PYTHON, "-c", code + "; raise SystemExit(4)",
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, blocked),
    )  # fmt: skip
    assert wrapper.communicate(timeout=60)[0] == f"{sorted(map(int, blocked))}\n"
    assert wrapper.returncode == 4


def test_a_shell_loop_ends_with_ctrl_c(served: Path) -> None:
    bash = shutil.which("bash")
    if not bash:
        pytest.skip("needs bash")
    loop = 'for i in 1 2; do "$@"; echo "went on"; done'
    shell = subprocess.Popen(
        [bash, "-c", loop, "bash", *RUN, "sh", "-c", "echo up; exec sleep 600"],
        cwd=served, env=clean_env(), text=True, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    hears(shell, "up")
    os.killpg(shell.pid, signal.SIGINT)
    assert shell.communicate(timeout=60)[0] == "" and shell.returncode == -signal.SIGINT


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_closed_for_the_command(served: Path, closed: str) -> None:
    code = "import sys; sys.exit(40 + [sys.stdin, sys.stdout, sys.stderr].count(None))"
    words = ["sh", "-c", f'"$@" {closed}', "sh", *RUN, PYTHON, "-c", code]
    done = subprocess.run(words, cwd=served, env=clean_env(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (40 + closed.count("-"), "", "")


def test_an_environment_entry_without_a_name(served: Path) -> None:
    code = (
        "import ctypes, sys; words = [w.encode() for w in sys.argv[1:]]\n"
        "entries = [b'=x', b'PATH=/usr/bin:/bin', b'USER=tester']\n"
        "make = lambda texts: (ctypes.c_char_p * (len(texts) + 1))(*texts, None)\n"
        "ctypes.CDLL(None).execve(words[0], make(words), make(entries))"
    )
    done = subprocess.run(
        [PYTHON, "-c", code, *RUN, "sh", "-c", "exit 6"], cwd=served, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (6, "")


def test_orphans_are_reaped_as_process_1(tmp_path: Path) -> None:
    inside = ["unshare", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"]).returncode:
        pytest.skip("needs the right to make a process namespace")
    script = "sh -c 'sleep 0.1 & exit'; sleep 0.5; grep -l '^State:.Z' /proc/[0-9]*/status; exit 7"
    done = subprocess.run(
        [*inside, *RUN, "sh", "-c", script], cwd=tmp_path, env=clean_env(), capture_output=True,
        text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (7, ""), done
    done = subprocess.run([*inside, *RUN, "sh", "-c", "kill -9 $$"], cwd=tmp_path, env=clean_env())
    assert done.returncode == 128 + signal.SIGKILL


class Terminal:
    """An interactive bash on a terminal of its own."""

    def __init__(self, cwd: Path) -> None:
        self.fd, slave = pty.openpty()
        self.process = subprocess.Popen(
            ["bash", "--norc", "-i"], cwd=cwd, env=clean_env(PS1="$ ", HISTFILE=""),
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, text: str) -> None:
        while text not in self.seen:
            assert select.select([self.fd], [], [], 30)[0], self.seen
            self.seen += os.read(self.fd, 4096).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]


def test_job_control(served: Path) -> None:
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    terminal = Terminal(served)
    try:
        (served / "ear.py").write_text(
            "import os\nwhile True: print('ready>', flush=True); print('got', os.read(0, 99).decode())"
        )
        terminal.type(shlex.join([*RUN, PYTHON, "ear.py"]) + "\n")
        terminal.until("ready>")
        terminal.type("\x1a")
        terminal.until("Stopped")
        terminal.type("echo shell $((1 + 1))\n")
        terminal.until("shell 2")
        terminal.type("fg\n")
        terminal.until("ear.py")
        terminal.type("a word\n")
        terminal.until("got a word")
        terminal.until("ready>")
        terminal.type("\x03")
        terminal.until("KeyboardInterrupt")
        terminal.type("echo code $?\n")
        terminal.until("code 130")
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.fd)


def test_exporters_know_nothing_of_the_lease(served: Path) -> None:
    """What argo-workflows, airflow, step-functions and @kubernetes write into a deployment."""
    pytest.importorskip("metaflow")
    code = "from metaflow.metaflow_config import *; print(SERVICE_INTERNAL_URL, SERVICE_HEADERS)"
    done = mflocal("run", "-q", PYTHON, "-c", code, cwd=served, check=True)
    url = mflocal("url", cwd=served, check=True).stdout.strip()
    assert done.stdout == url + " {}\n"
    env = clean_env(METAFLOW_SERVICE_INTERNAL_URL="https://prod.example")
    done = mflocal("run", "-q", PYTHON, "-c", code, cwd=served, check=True, env=env)
    assert done.stdout == "https://prod.example {}\n"


def test_root_is_told_to_choose_a_name(served: Path) -> None:
    if os.geteuid():
        pytest.skip("only root has no name")
    env = clean_env(USER="root")
    env.pop("USERNAME", None), env.pop("SUDO_USER", None)
    assert "METAFLOW_USER=" in mflocal("run", "true", cwd=served, env=env).stderr
    env["METAFLOW_USER"] = "me"
    assert "METAFLOW_USER" not in mflocal("run", "true", cwd=served, env=env).stderr


def test_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    root = tmp_path / "ü €"
    root.mkdir()
    env = clean_env(PYTHONIOENCODING="latin-1", PYTHONUTF8="1")
    try:
        for words in (["start"], ["status"], ["env"], ["run", "true"], ["url"], ["stop"]):
            done = subprocess.run([*COMMAND, *words], cwd=root, env=env, capture_output=True)
            assert done.returncode == 0, done
            assert words[0] not in ("start", "status") or b"\xfc \\u20ac" in done.stdout
    finally:
        mflocal("stop", cwd=root)


def test_the_login_of_the_ui_is_not_on_a_command_line(tmp_path: Path) -> None:
    (tmp_path / ".metaflow").mkdir()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/index.html").write_text("<title>UI</title>")
    told = tmp_path / "told"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$@" > {told}.tmp; mv {told}.tmp {told}\n')
    browser.chmod(0o755)
    env = clean_env(BROWSER=f"{browser} %s", METAFLOW_LOCAL_SERVICE_AUTH_KEY="k")
    try:
        done = mflocal("ui", "--bundle", "bundle", cwd=tmp_path, env=env, check=True)
        words = wait_for(told.exists) and told.read_text().strip()
        assert words.startswith("file://") and "once" not in words
        page = Path(words[len("file://") :])
        assert page.stat().st_mode & 0o777 == 0o600
        assert done.stdout.strip() in page.read_text() and "once=" in done.stdout
        page.unlink()
    finally:
        mflocal("stop", "--force", cwd=tmp_path, env=env)
