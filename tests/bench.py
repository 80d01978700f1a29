"""Measures mflocal beside metaflow-local-service 0.2.0 and its own first release, alternating; prints one table.

    python tests/bench.py                 start, requests and scale: about fifteen minutes
    python tests/bench.py --quick         fewer rounds and smaller trees: three minutes, rough
    python tests/bench.py --flows         real flows too: plain local mode, `mflocal run`, the peer
    python tests/bench.py --flows --wide  and a foreach 300 wide with 16 workers
    python tests/bench.py --only scale    one group (start, requests, scale, size, flows) or the requests so called
    python tests/bench.py --json FILE     every single figure too

The peer comes from PyPI into an environment of its own below --scratch, mflocal from this checkout into another;
both are kept there for the next time. Everything runs on this machine, over loopback. A ratio says how many
times better mflocal is than the peer: above 1 is better. The floor is the least that any server of this kind
would need, measured between the others: a bare asyncio echo, plus the bare calls that write the files; for
commands `python -c pass`; for flows a bare wrapper and a server that keeps nothing. What writes files depends on
the file system more than on either service: ext4 without a journal (virtual machines) makes files ten times
slower for minutes after many were deleted. So let the machine rest for five minutes before; `--scratch
/dev/shm/bench` takes the disk out of the comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pickle
import platform
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
PEER = "metaflow-local-service==0.2.0"
BEFORE = "9935570486b30c7f4bb26b48e0b9d75351a6be8f"  # the commit of the first release, from git
PATIENCE = 100.0  # s that one answer may take; the peer walks every task of every run
BUDGET = 5.0  # s that one measurement of requests may take; what was answered by then counts
SIDECAR_COUNTER = (  # a line of Python that every interpreter of the environment runs first
    "import os; f = os.environ.get('BENCH_SIDECARS'); "
    "f and b'sidecar_worker' in open('/proc/self/cmdline', 'rb').read() and open(f, 'a').write('%d ' % os.getpid())\n"
)
BARE_WRAPPER = (
    "import os, sys; pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ); "
    "os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
)
FLOW = """
from metaflow import FlowSpec, step

class BenchFlow(FlowSpec):
    @step
    def start(self):
        self.items = list(range({width}))
        self.next(self.work{foreach})

    @step
    def work(self):
        self.x = 1
        self.next(self.{after})
{join}
    @step
    def end(self):
        pass

if __name__ == "__main__":
    BenchFlow()
"""
JOIN = """
    @step
    def join(self, inputs):
        self.next(self.end)
"""


# -- the load client: a process of its own, raw sockets, requests made beforehand


class Load(NamedTuple):
    """What the client measured: seconds per request sorted, requests per second, answers that were not 2xx."""

    times: list[float]
    rate: float
    failures: int
    failure: str

    def at(self, share: float) -> float:
        """A percentile in ms."""
        return self.times[min(int(len(self.times) * share), len(self.times) - 1)] * 1000


def client_main() -> None:
    """`bench.py --client`: takes a pickled (address, connections, warm, requests) and gives back a pickled Load."""
    address, connections, warm, requests = pickle.load(sys.stdin.buffer)
    sockets = [socket.create_connection(address, timeout=PATIENCE) for _ in range(connections)]
    for sock in sockets:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    drive = _drive_one if connections == 1 else _drive_many
    drive(sockets, requests[:warm])
    began = time.perf_counter()
    times, failures, failure = drive(sockets, requests[warm:])
    rate = len(times) / (time.perf_counter() - began)
    pickle.dump(tuple(Load(sorted(times), rate, failures, failure)), sys.stdout.buffer)


def _missing(data: bytes) -> int:
    """How many bytes of an answer are still to come; -1 when its head is not whole."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return -1
    head = data[:end].lower()
    start = head.find(b"\r\ncontent-length:")
    if start < 0:
        return 0
    return end + 4 + int(head[start + 17 :].split(b"\r\n", 1)[0]) - len(data)


def _receive(sock: socket.socket) -> bytes:
    data = sock.recv(262144)
    while data:
        missing = _missing(data)
        if missing == 0:
            return data
        more = sock.recv(max(missing, 65536))
        if not more:
            break
        data += more
    raise ConnectionError("the server closed the connection")


def _drive_one(sockets: list[socket.socket], requests: list[bytes]) -> tuple[list[float], int, str]:
    sock, clock = sockets[0], time.perf_counter
    times: list[float] = []
    failures, failure = 0, ""
    until = clock() + BUDGET
    for data in requests:
        began = clock()
        if began > until:
            break
        sock.sendall(data)
        data = _receive(sock)
        times.append(clock() - began)
        if data[9:10] != b"2":
            failures, failure = failures + 1, repr(data[:300])
    return times, failures, failure


def _drive_many(
    sockets: list[socket.socket], requests: list[bytes]
) -> tuple[list[float], int, str]:
    poll, clock = select.epoll(), time.perf_counter
    by_fd = {sock.fileno(): sock for sock in sockets}
    began: dict[int, float] = {}
    parts = dict.fromkeys(by_fd, b"")
    times: list[float] = []
    failures, failure = 0, ""
    waiting, until = iter(requests), clock() + BUDGET
    for fd, first in zip(by_fd, waiting):
        poll.register(fd, select.EPOLLIN)
        began[fd] = clock()
        by_fd[fd].sendall(first)
    while began:
        for fd, _ in poll.poll(PATIENCE):
            data = parts[fd] + by_fd[fd].recv(262144)
            if not data:
                raise ConnectionError("the server closed a connection")
            if _missing(data):
                parts[fd] = data
                continue
            now = clock()
            times.append(now - began.pop(fd))
            parts[fd] = b""
            if data[9:10] != b"2":
                failures, failure = failures + 1, repr(data[:300])
            following = next(waiting, None)
            if following is not None and now < until:
                began[fd] = clock()
                by_fd[fd].sendall(following)
    poll.close()
    return times, failures, failure


def load(port: int, connections: int, requests: Sequence[bytes], warm: int = 0) -> Load:
    """Drives a server from a process of its own."""
    data = pickle.dumps((("127.0.0.1", port), connections, warm, list(requests)))
    done = subprocess.run(
        [sys.executable, __file__, "--client"], input=data, stdout=subprocess.PIPE, check=True
    )
    return Load(*pickle.loads(done.stdout))


def request(method: str, path: str, body: Any = None) -> bytes:
    """A request as Metaflow's client (requests) sends it."""
    data = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nUser-Agent: python-requests/2.32.3\r\n"
        "Accept-Encoding: gzip, deflate\r\nAccept: */*\r\nConnection: keep-alive\r\n"
    )
    if method != "GET":
        head += f"Content-Length: {len(data)}\r\n"
    if data:
        head += "Content-Type: application/json\r\n"
    return head.encode() + b"\r\n" + data


def ask(
    port: int, method: str, path: str, body: Any = None, patience: float = PATIENCE
) -> tuple[float, bytes]:
    """(seconds, body) of one answer on a connection of its own. Raises OSError, ValueError when it is not 2xx."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as sock:
        began = time.perf_counter()
        sock.sendall(request(method, path, body))
        data = _receive(sock)
        seconds = time.perf_counter() - began
    if data[9:10] != b"2":
        raise ValueError(f"{method} {path}: {data[:300]!r}")
    return seconds, data.partition(b"\r\n\r\n")[2]


# -- the floors


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\npong"
    while await reader.read(65536):
        writer.write(answer)
    writer.close()


def echo_main() -> None:
    """`bench.py --echo`: the least that a server on asyncio streams can do; prints its port."""

    async def serve() -> None:
        server = await asyncio.start_server(_echo, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(serve())


class _Yes(asyncio.Protocol):
    """Agrees to all that a flow asks of a metadata service, and keeps nothing of it: whole flows at the least."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.data = transport, b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        while True:
            head, end, rest = self.data.partition(b"\r\n\r\n")
            size = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            if not end or len(rest) < int(size or 0):
                return
            self.data = rest[int(size or 0) :]
            path = head.split(b" ", 2)[1]
            body: dict[str, Any] | list[str] = {"flow_id": "BenchFlow"}
            if path.endswith((b"/run", b"/task")):
                number = time.time_ns() // 1000
                body = {
                    "flow_id": "BenchFlow",
                    "run_number": number,
                    "task_id": number,
                    "tags": [],
                    "system_tags": [],
                }
            elif path.endswith((b"/metadata", b"/artifact")):
                body = []
            text = json.dumps(body).encode()
            start = b"HTTP/1.1 200 OK\r\nMETADATA_SERVICE_VERSION: 2.5.0\r\nContent-Type: application/json\r\n"
            self.transport.write(start + b"Content-Length: %d\r\n\r\n" % len(text) + text)  # type: ignore[attr-defined]


def yes_main() -> None:
    """`bench.py --yes`: a server of _Yes; prints its port."""

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Yes, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(serve())


def write_files(directory: Path, files: int, folders: int, rounds: int) -> float:
    """Times per second that an object's directories and files can be made, whole files by a temp file and rename.

    `folders`: 2 for an object and its `_meta`, into which the files then go; 0 for files of an object that exists.
    """
    base = tempfile.mkdtemp(dir=directory)
    for name in ("tmp", "made", "made/_meta"):
        os.mkdir(f"{base}/{name}")
    data = b"x" * 260
    began = time.perf_counter()
    for number in range(rounds):
        place = f"{base}/made/{number}" if folders else f"{base}/made"
        if folders:
            os.mkdir(place)
            os.mkdir(f"{place}/_meta")
        for file in range(files):
            temp = f"{base}/tmp/{file}"
            fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            os.write(fd, data)
            os.close(fd)
            os.rename(temp, f"{place}/_meta/{number}-{file}.json")
    return rounds / (
        time.perf_counter() - began
    )  # nothing is deleted: ext4 is slow beside fresh deletions


# -- the two services


def clean_env(home: Path, **more: str) -> dict[str, str]:
    """This environment without what would steer Metaflow or either service, with a home of its own."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("METAFLOW", "MFLOCAL", "PYTHON", "XDG_", "SHIV"))
    }
    home.mkdir(parents=True, exist_ok=True)
    return {**kept, "HOME": str(home), "USER": "tester", **more}


def run(command: Sequence[str], env: dict[str, str], cwd: Path, check: bool = True) -> float:
    """Seconds that a command took. Raises CalledProcessError with what it said."""
    began = time.perf_counter()
    done = subprocess.run(
        command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    seconds = time.perf_counter() - began
    if check and done.returncode:
        sys.stderr.write(done.stdout.decode("utf-8", "replace"))
        raise subprocess.CalledProcessError(done.returncode, command)
    return seconds


def wait_gone(pid: int) -> None:
    """Waits until a process has ended, so that it does not disturb what is measured next."""
    until = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
        time.sleep(0.01)


class Subject:
    """One of the two services: its command line, and its daemon on a root."""

    name = ""

    def __init__(self, program: Sequence[str], home: Path) -> None:
        self.program = list(program)
        self.home = home
        self.env = clean_env(home)
        self.root = home
        self.pid = self.port = 0

    def options(self, root: Path) -> list[str]:
        """Options of `start` and `run`."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What the daemon's state file says."""
        raise NotImplementedError

    def start(self, root: Path) -> None:
        """Starts the daemon on a root; returns when it answers."""
        self.root = root
        run([*self.program, "start", *self.options(root)], self.env, root)
        state = self.state()
        self.pid, self.port = state["pid"], state["port"]
        ask(self.port, "GET", "/ping")

    def stop(self) -> None:
        """Stops the daemon, if there is one, and waits until it is gone."""
        with contextlib.suppress(OSError, ValueError):
            self.pid = self.state()["pid"]
            run([*self.program, "stop", *self.stop_options()], self.env, self.root, check=False)
            wait_gone(self.pid)

    def stop_options(self) -> list[str]:
        """Options of `stop`."""
        return []

    def run_command(self, root: Path, *command: str) -> list[str]:
        """The words that run a command under the service."""
        return [*self.program, "run", *self.options(root), *command]

    def resident(self) -> float:
        """Resident memory of the daemon and its children in MB."""
        total = 0
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        for pid in (self.pid, *children):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
                line = next(line for line in file if line.startswith("VmRSS"))
                total += int(line.split()[1])
        return total / 1024


class Mflocal(Subject):
    """This project."""

    name = "mflocal"

    def options(self, root: Path) -> list[str]:
        return ["--root", str(root), "--idle-timeout", "3600"]

    def stop_options(self) -> list[str]:
        return ["--root", str(self.root), "--force"]

    def state(self) -> dict[str, Any]:
        with open(self.root / ".metaflow/.mflocal/daemon.json") as file:
            return dict(json.load(file))


class Before(Mflocal):
    """The first release of this project."""

    name = "before"


class Peer(Subject):
    """metaflow-local-service from PyPI."""

    name = "peer"

    def options(self, root: Path) -> list[str]:
        return ["--metaflow-root", str(root), "--idle-timeout", "3600"]

    def run_command(self, root: Path, *command: str) -> list[str]:
        return [*self.program, "run", *self.options(root), "--", *command]

    def state(self) -> dict[str, Any]:
        with open(self.home / ".metaflow-local-service/state.json") as file:
            return dict(json.load(file))


# -- the table


class Row:
    """One row: figures by subject, one per round; `better` tells whether more or less of the unit is good."""

    def __init__(
        self, group: str, what: str, unit: str, better: str, target: str = "", limit: float = 0.0
    ) -> None:
        self.group, self.what, self.unit, self.better, self.target, self.limit = (
            group, what, unit, better, target, limit,
        )  # fmt: skip
        self.figures: dict[str, list[float]] = {}
        self.notes: dict[str, str] = {}

    def add(self, subject: str, value: float, note: str = "") -> None:
        """One more measurement; `note` stands behind the median of it."""
        self.figures.setdefault(subject, []).append(value)
        if note:
            self.notes[subject] = note

    def median(self, subject: str) -> float | None:
        """The median of a subject's figures."""
        found = self.figures.get(subject)
        return statistics.median(found) if found else None

    def ratio(self, other: str = "peer") -> float | None:
        """How many times better mflocal is than the peer, or how far it is above the floor."""
        ours, theirs = self.median("mflocal"), self.median(other)
        if not ours or not theirs:
            return None
        return ours / theirs if self.better == "more" else theirs / ours

    def reached(self) -> bool | None:
        """Whether the target is met: "x" and "before" are ratios to others, "abs" is the figure itself."""
        if not self.target:
            return None
        kind = self.target.split()[0]
        value = (
            self.median("mflocal")
            if kind == "abs"
            else self.ratio(kind if kind in ("local", "before") else "peer")
        )
        if value is None:
            return None
        if kind == "local":
            return 1 / value <= self.limit
        return value >= self.limit if kind in ("x", "before") else value <= self.limit

    def cell(self, subject: str) -> str:
        """The median with its unit, and the note."""
        value = self.median(subject)
        if value is None:
            return self.notes.get(subject, "")
        text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        return f"{text} {self.unit}{self.notes.get(subject, '')}"

    def line(self) -> str:
        """The row in Markdown."""
        ratio, floor = self.ratio(), self.ratio("floor")
        if self.group == "flows":
            local = self.ratio("local")
            ratio, floor = ratio, local
        wanted = {
            "x": f"≥ {self.limit:g} ×",
            "abs": f"≤ {self.limit:g} {self.unit}",
            "local": f"≤ {self.limit:g} × local",
            "before": f"≥ {self.limit:g} × before",
        }
        reached, before = self.reached(), self.ratio("before")
        cells = [
            self.what, self.cell("peer"), self.cell("before"), self.cell("mflocal"),
            f"{ratio:.3g} ×" if ratio else "", f"{before:.3g} ×" if before else "",
            self.cell("local") or self.cell("floor"), f"{1 / floor:.3g} ×" if floor else "",
            wanted.get(self.target, ""), "" if reached is None else "yes" if reached else "**no**",
        ]  # fmt: skip
        return "| " + " | ".join(cells) + " |"


class Bench:
    """The environments, the services and the rows of one run of this program."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.quick: bool = options.quick
        self.rounds = options.rounds or (2 if self.quick else 5)
        self.scratch: Path = options.scratch
        self.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="run-", dir=self.scratch))
        self.rows: list[Row] = []
        self.serial = 0

    def wanted(self, group: str, what: str = "") -> bool:
        """Whether --only lets a group or row through."""
        word = (self.options.only or "").lower()
        if not word or word in GROUPS:
            return word in ("", group)
        return group == "requests" and (not what or word in what.lower())

    def row(self, *values: Any) -> Row:
        """A new row of the table."""
        row = Row(*values)
        self.rows.append(row)
        return row

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        print(f"# {text}", file=sys.stderr, flush=True)

    def folder(self, name: str) -> Path:
        """A new directory."""
        self.serial += 1
        path = self.work / f"{self.serial:03d}-{name}"
        path.mkdir()
        return path

    # -- what is measured, installed

    def install(self) -> None:
        """The two environments, the .pyz, and the two subjects."""
        version = "py%d.%d" % sys.version_info[:2]
        self.peer_venv = self.scratch / f"peer-0.2.0-{version}"
        self.our_venv = self.scratch / f"mflocal-{version}"
        self._venv(self.peer_venv, [PEER, "metaflow"])
        self._venv(self.our_venv, ["metaflow"])
        site = next(self.our_venv.glob("lib/python*/site-packages"))
        if not (self.our_venv / "bin/mflocal").exists():
            source = self.folder("source")  # pip builds in the folder that it installs from
            for name in ("mflocal.py", "pyproject.toml", "README.md"):
                shutil.copyfile(REPO / name, source / name)
            self._pip(self.our_venv, ["--no-deps", str(source)])
        shutil.copyfile(
            REPO / "mflocal.py", site / "mflocal.py"
        )  # what pip would install, as of now
        self.python = str(self.our_venv / "bin/python")
        run(
            [self.python, "-m", "compileall", "-q", str(site / "mflocal.py")],
            clean_env(self.work / "home"),
            self.work,
        )
        for venv in (self.our_venv, self.peer_venv):
            (next(venv.glob("lib/python*/site-packages")) / "bench_sidecars.pth").write_text(
                SIDECAR_COUNTER
            )
        self.pyz = self.scratch / "mflocal.pyz"
        run(
            [sys.executable, str(REPO / "build.py"), "--output", str(self.pyz)],
            dict(os.environ),
            REPO,
        )
        self.ours = Mflocal([str(self.our_venv / "bin/mflocal")], self.work / "home-ours")
        self.before = Before([self.python, str(self._released())], self.work / "home-before")
        self.peer = Peer(
            [str(self.peer_venv / "bin/metaflow-local-service")], self.work / "home-peer"
        )

    def _released(self) -> Path:
        """A command of the first release, as pip would have installed it."""
        path = self.scratch / f"before-{BEFORE[:12]}"
        path.mkdir(exist_ok=True)
        show = ["git", "-C", str(REPO), "show", f"{BEFORE}:mflocal.py"]
        (path / "mflocal.py").write_bytes(
            subprocess.run(show, stdout=subprocess.PIPE, check=True).stdout
        )
        command = path / "mflocal-before"
        command.write_text("import mflocal\nmflocal.console()\n")
        run([self.python, "-m", "compileall", "-q", str(path)], clean_env(self.work / "home"), path)
        return command

    def _venv(self, path: Path, packages: list[str]) -> None:
        done = path / "installed"
        if not done.exists():
            self.say(f"installing {' '.join(packages)} into {path}")
            shutil.rmtree(path, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
            self._pip(path, packages)
            done.touch()

    def _pip(self, venv: Path, words: list[str]) -> None:
        command = [
            str(venv / "bin/python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            *words,
        ]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if done.returncode:
            raise SystemExit(done.stdout.decode())

    def subjects(self, number: int) -> tuple[Subject, ...]:
        """All, in the other order in every other round."""
        subjects = (self.ours, self.before, self.peer)
        return subjects if number % 2 == 0 else subjects[::-1]

    # -- start

    def bench_start(self) -> None:
        """`run true` without and with a daemon, `url`, `status`."""
        cold = self.row("start", "`run true`, no daemon yet", "ms", "less", "x", 10.0)
        first = self.row("start", "the same, .pyz, its very first start", "ms", "less")
        later = self.row("start", "the same, .pyz", "ms", "less")
        for number in range(self.rounds):
            for subject in self.subjects(number):
                cold.add(subject.name, self._cold(subject.program, subject))
            first.add(
                "mflocal", self._cold([self.python, str(self.pyz)], self.ours, self.folder("home"))
            )
            later.add("mflocal", self._cold([self.python, str(self.pyz)], self.ours))
            cold.add("floor", run([self.python, "-c", "pass"], self.ours.env, self.work) * 1000)
        self._warm_starts()

    def _cold(self, program: list[str], subject: Subject, home: Path | None = None) -> float:
        """ms that `run true` took on a new root; the daemon that it started is stopped again."""
        root = subject.root = self.folder("cold")
        subject.stop()
        env = {**subject.env, "HOME": str(home)} if home else subject.env
        command = [*program, *subject.run_command(root, "true")[len(subject.program) :]]
        seconds = run(command, env, root)
        until = time.monotonic() + 10
        while (
            time.monotonic() < until
        ):  # the daemon may still be starting, which is no use of `run`'s time
            try:
                ask(subject.state()["port"], "GET", "/ping")
                break
            except (OSError, ValueError):
                time.sleep(0.02)
        subject.stop()
        return seconds * 1000

    def _warm_starts(self) -> None:
        for subject in self.subjects(0):
            subject.start(self.folder(f"warm-{subject.name}"))
        plain = self.row("start", "`run true`, daemon up", "ms", "less", "x", 1.3)
        archive = self.row("start", "the same, .pyz", "ms", "less")
        url = self.row("start", "`url`", "ms", "less")
        status = self.row("start", "`status`", "ms", "less")
        pyz = [self.python, str(self.pyz)]
        root = self.ours.root
        run([*pyz, "url", "--root", str(root)], self.ours.env, root)
        for number in range(self.rounds * 4):
            for subject in self.subjects(number):
                for row, words in (
                    (plain, subject.run_command(subject.root, "true")),
                    (url, [*subject.program, "url"]),
                    (status, [*subject.program, "status"]),
                ):
                    row.add(subject.name, run(words, subject.env, subject.root) * 1000)
            command = [*pyz, *self.ours.run_command(root, "true")[1:]]
            archive.add("mflocal", run(command, self.ours.env, root) * 1000)
            floor = run([self.python, "-c", "pass"], self.ours.env, root) * 1000
            for row in (plain, url, status):
                row.add("floor", floor)
        for subject in self.subjects(0):
            subject.stop()

    # -- requests

    def bench_requests(self) -> None:
        """Every request that a flow makes, at 1 and at 16 connections."""
        contexts: dict[str, Context] = {}
        for subject in self.subjects(0):
            root = self.folder(f"requests-{subject.name}")
            wide = make_tree().make_foreach(_metaflow_dir(root), 1500)
            subject.start(root)
            contexts[subject.name] = Context(subject.port, wide)
        with self._bare_server("--echo") as echo:
            for case in CASES:
                for connections in case.connections:
                    name = f"{case.name} @{connections}"
                    if self.wanted("requests", name):
                        self._case(case, name, connections, contexts, echo)
        for subject in self.subjects(0):
            subject.stop()

    def _case(
        self, case: Case, name: str, connections: int, contexts: dict[str, Context], echo: int
    ) -> None:
        self.say(name)
        row = self.row("requests", name, "req/s", "more", *case.target)
        count = case.times * (2 if connections > 1 else 1) // (5 if self.quick else 1)
        warm = count // 10
        seen: dict[str, list[Load]] = {}
        for number in range(self.rounds):
            for subject in self.subjects(number):
                context = contexts[subject.name]
                done = load(subject.port, connections, case.make(context, count + warm), warm)
                if done.failures:
                    raise SystemExit(
                        f"{subject.name}: {name}: {done.failures} failures, {done.failure}"
                    )
                row.add(subject.name, done.rate)
                seen.setdefault(subject.name, []).append(done)
            seconds = (
                1 / load(echo, connections, [request("GET", "/ping")] * (count + warm), warm).rate
            )
            if case.files:
                seconds += 1 / write_files(self.work, case.files, case.folders, max(count // 4, 20))
            row.add("floor", 1 / seconds)
        for subject_name, loads in seen.items():
            low = statistics.median(done.at(0.5) for done in loads)
            high = statistics.median(done.at(0.99) for done in loads)
            row.notes[subject_name] = f", p50 {low:.2f} p99 {high:.2f} ms"

    @contextlib.contextmanager
    def _bare_server(self, kind: str) -> Iterator[int]:
        """The port of `bench.py --echo` or `--yes`."""
        process = subprocess.Popen([self.python, __file__, kind], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()
            process.wait()

    # -- scale

    def _scale_rounds(self) -> Iterator[Subject]:
        """Who is measured, in order: the peer, which needs half a minute for an answer, only in the first round."""
        for number in range(1 if self.quick else 3):
            yield from self.subjects(number) if number == 0 else (self.ours, self.before)

    def bench_scale(self) -> None:
        """10,000 runs of one flow, and one run of 10,000 tasks: lists, memory, and who waits meanwhile."""
        count = 1000 if self.quick else 10_000
        self.say(f"making {count} runs and {count} tasks")
        root = self._tree(count)
        runs = "/api/flows/ManyRuns/runs"
        first = self.row(
            "scale", f"newest 30 of {count:,} runs, first after start", "ms", "less", "before", 0.8
        )
        warm = self.row("scale", f"newest 30 of {count:,} runs, warm", "ms", "less", "before", 0.8)
        idle = self.row("scale", "resident memory, idle", "MB", "less", "abs", 40.0)
        after = self.row(
            "scale", f"resident memory, {count:,} runs listed", "MB", "less", "abs", 80.0
        )
        listing = self.row(
            "scale", f"all {count:,} runs for the client, warm", "ms", "less", "before", 0.8
        )
        for subject in self._scale_rounds():
            subject.start(root)
            time.sleep(0.5)
            idle.add(subject.name, subject.resident())
            if self._list(first, subject, f"{runs}?_order=-ts_epoch&_limit=30&_page=1"):
                for _ in range(5 if subject is not self.peer else 1):
                    self._list(warm, subject, f"{runs}?_order=-ts_epoch&_limit=30&_page=1")
                for _ in range(3 if subject is not self.peer else 1):
                    self._list(listing, subject, "/flows/ManyRuns/runs")
                after.add(subject.name, subject.resident())
            subject.stop()
        self._scale_tasks(root, count)
        self._scale_beats(root, count)

    def _tree(self, count: int) -> Path:
        root = self.scratch / f"tree-{count}"
        if not (root / "whole").exists():
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            make_tree().make_runs(_metaflow_dir(root), count)
            make_tree().make_foreach(_metaflow_dir(root), count)
            (root / "whole").touch()
        return root

    def _list(self, row: Row, subject: Subject, path: str) -> bool:
        """One list; False when it took longer than anybody would wait."""
        if row.notes.get(subject.name):
            return False
        try:
            row.add(subject.name, ask(subject.port, "GET", path)[0] * 1000)
            return True
        except OSError:
            row.notes[subject.name] = f"> {PATIENCE:g} s"
            return False

    def _scale_tasks(self, root: Path, count: int) -> None:
        """The run page: the UI follows links.next through pages of 1,000 rows."""
        first = self.row(
            "scale", f"all {count:,} task rows of a run for the UI, first after start", "ms", "less"
        )
        row = self.row(
            "scale",
            f"all {count:,} task rows of a run for the UI, warm",
            "ms",
            "less",
            "before",
            0.8,
        )
        wide = sorted(name for name in os.listdir(root / ".metaflow/WideRun") if name.isdigit())[-1]
        path = (
            f"/api/flows/WideRun/runs/{wide}/tasks?_order=%2Bts_epoch&_limit=1000&postprocess=false"
        )
        for subject in self._scale_rounds():
            subject.start(root)
            pages = (
                count // 1000 + 1 if subject is not self.peer else 1
            )  # the peer gives all rows as one page
            for place in (first, row, row, row):
                try:
                    seconds = [
                        ask(subject.port, "GET", f"{path}&_page={n}")[0]
                        for n in range(1, pages + 1)
                    ]
                    place.add(subject.name, sum(seconds) * 1000)
                except OSError:
                    place.notes[subject.name] = f"> {PATIENCE:g} s"
                    break
            subject.stop()

    def _scale_beats(self, root: Path, count: int) -> None:
        """Heartbeats of one client while another asks for a list that nobody has asked for since the start."""
        row = self.row(
            "scale",
            f"heartbeat p99 during a cold list of {count:,} runs",
            "ms",
            "less",
            "abs",
            50.0,
        )
        for subject in self._scale_rounds():
            subject.start(root)
            beats = sorted(self._beats(subject))
            if beats:
                row.add(subject.name, beats[min(int(len(beats) * 0.99), len(beats) - 1)] * 1000)
            subject.stop()

    def _beats(self, subject: Subject) -> list[float]:
        """Seconds of each heartbeat from just before the list is asked for until it has come."""
        wide = sorted(
            name for name in os.listdir(subject.root / ".metaflow/WideRun") if name.isdigit()
        )[-1]
        beat = request("POST", f"/flows/WideRun/runs/{wide}/heartbeat", {})
        done = threading.Event()

        def list_runs() -> None:
            with contextlib.suppress(OSError):
                ask(subject.port, "GET", "/flows/ManyRuns/runs")
            done.set()

        beats: list[float] = []
        with socket.create_connection(("127.0.0.1", subject.port), timeout=PATIENCE + 10) as sock:
            sock.sendall(beat)
            _receive(sock)
            thread = threading.Thread(target=list_runs)
            thread.start()
            while not done.is_set() and len(beats) < 100_000:
                began = time.perf_counter()
                sock.sendall(beat)
                _receive(sock)
                beats.append(time.perf_counter() - began)
                time.sleep(0.002)
            thread.join()
        return beats

    # -- flows

    def bench_flows(self) -> None:
        """Whole flows: plain local mode, `mflocal run`, the peer. The daemons run already."""
        plans = [
            ("linear flow of 3 steps", 0, 4, 1.05),
            ("30-wide foreach, 4 workers", 30, 4, 1.05),
        ]
        if self.options.wide:
            plans.append(("300-wide foreach, 16 workers", 300, 16, 0.0))
        for what, width, workers, limit in plans:
            row = self.row("flows", what, "s", "less", "local" if limit else "", limit)
            code = FLOW.format(
                width=width, foreach=', foreach="items"' if width else "", after="join" if width else "end",
                join=JOIN if width else "",
            )  # fmt: skip
            rounds = (
                2 if width >= 300 else self.rounds if width else 5 * self.rounds
            )  # a short one is more at the mercy of noise
            least = self.row(
                "flows",
                "the least for it: a bare wrapper, a server that only says yes",
                "s",
                "less",
            )
            roots = {
                name: self.folder(f"flow-{name}")
                for name in ("local", "mflocal", "before", "peer", "floor")
            }
            for root in roots.values():
                (root / "flow.py").write_text(code)
            self.ours.start(roots["mflocal"])
            self.before.start(roots["before"])
            self.peer.start(roots["peer"])
            with self._bare_server("--yes") as port:
                for number in range(rounds):
                    names = list(roots) if number % 2 == 0 else list(roots)[::-1]
                    for name in names:
                        seconds, sidecars = self._flow(name, roots[name], workers, port)
                        (least if name == "floor" else row).add(
                            name, seconds, f", {sidecars} sidecars"
                        )
                        self.say(f"{what}: {name} {seconds:.2f} s, {sidecars} sidecars")
            low, local = least.median("floor"), row.median("local")
            least.notes["floor"] += f", {low / local:.3f} × local" if low and local else ""
            for subject in self.subjects(0):
                subject.stop()

    def _flow(self, name: str, root: Path, workers: int, yes: int) -> tuple[float, int]:
        counter = root / "sidecars"
        counter.write_text("")
        command = [
            self.python,
            "flow.py",
            "--no-pylint",
            "run",
            "--max-workers",
            str(workers),
            "--max-num-splits",
            "999",
        ]
        more = {"BENCH_SIDECARS": str(counter)}
        if name == "local":
            seconds = run(
                command,
                clean_env(self.work / "home-local", METAFLOW_DEFAULT_METADATA="local", **more),
                root,
            )
        elif name == "floor":
            more.update(
                METAFLOW_DEFAULT_METADATA="service", METAFLOW_SERVICE_URL=f"http://127.0.0.1:{yes}"
            )
            more.update(METAFLOW_ENABLED_SIDECAR="", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
            seconds = run(
                [self.python, "-c", BARE_WRAPPER, *command],
                clean_env(self.work / "home-floor", **more),
                root,
            )
        else:
            subject = next(one for one in self.subjects(0) if one.name == name)
            seconds = run(subject.run_command(root, *command), {**subject.env, **more}, root)
        return seconds, len(set(counter.read_text().split()))

    # -- size

    def bench_size(self) -> None:
        """What is installed."""
        row = self.row("size", "size of what is installed", "KB", "less", "abs", 200.0)
        row.add("mflocal", self.pyz.stat().st_size / 1000)
        files = [
            path for path in self.peer_venv.rglob("*") if path.is_file() and not path.is_symlink()
        ]
        packages = len(list(self.peer_venv.glob("lib/python*/site-packages/*.dist-info")))
        row.add(
            "peer", sum(path.stat().st_size for path in files) / 1000, f" ({packages} packages)"
        )

    # -- all of it

    def _asked(self, group: str) -> bool:
        return (
            group != "flows"
            or self.options.flows
            or self.options.wide
            or self.options.only == "flows"
        )

    def report(self) -> str:
        """The table."""
        lines = [
            f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, Python "
            f"{platform.python_version()}, {time.strftime('%Y-%m-%d')}; medians of {self.rounds} rounds"
            + (", quick" if self.quick else ""),
            "",
            "| what | peer | before | mflocal | to the peer | to before | floor or local | above it | to reach | reached |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        return "\n".join([*lines, *(row.line() for row in self.rows if row.figures)])

    def main(self) -> None:
        """Measures, prints, cleans up."""
        self.install()
        try:
            for group in GROUPS:
                if self.wanted(group) and self._asked(group):
                    self.say(group)
                    getattr(self, f"bench_{group}")()
        finally:
            for subject in self.subjects(0):
                subject.stop()
            shutil.rmtree(self.work, ignore_errors=True)
            print(self.report())
        if self.options.json:
            rows = [
                {"what": r.what, "unit": r.unit, "figures": r.figures, "notes": r.notes}
                for r in self.rows
            ]
            Path(self.options.json).write_text(json.dumps(rows, indent=1))


GROUPS = ("start", "requests", "scale", "size", "flows")


# -- the requests that a flow makes


class Context:
    """One service with a run to work on; makes what a case needs before it is measured."""

    def __init__(self, port: int, wide: str) -> None:
        self.port = port
        self.wide = wide
        self.serial = 0
        body = {"user_name": "tester", "tags": ["a"], "system_tags": ["user:tester", "runtime:dev"]}
        self.body = body
        ask(port, "POST", "/flows/BenchFlow", body)
        self.base, self.long = (
            self._run(),
            self._run(),
        )  # the second gets thousands of steps, as no real one has
        ask(port, "POST", f"{self.base}/steps/work/step", body)
        self.task = self.tasks(1)[0]

    def _run(self) -> str:
        """The path of a new run."""
        answer = json.loads(ask(self.port, "POST", "/flows/BenchFlow/run", self.body)[1])
        return f"/flows/BenchFlow/runs/{answer['run_number']}"

    def next(self) -> int:
        """A number not used before."""
        self.serial += 1
        return self.serial

    def tasks(self, count: int) -> list[str]:
        """Paths of new tasks."""
        made = []
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            for _ in range(count):
                sock.sendall(request("POST", f"{self.base}/steps/work/task", self.body))
                answer = json.loads(_receive(sock).partition(b"\r\n\r\n")[2])
                made.append(f"{self.base}/steps/work/tasks/{answer['task_id']}")
        return made


class Case(NamedTuple):
    """A kind of request: how to make `count` of them, and the files and folders that each must write."""

    name: str
    times: int
    make: Callable[[Context, int], list[bytes]]
    target: tuple[str, float]
    files: int = 0
    folders: int = 0
    connections: tuple[int, ...] = (1, 16)


def _same(
    method: str, path: Callable[[Context], str], body: Any = None
) -> Callable[[Context, int], list[bytes]]:
    return lambda context, count: [request(method, path(context), body)] * count


def _post_step(context: Context, count: int) -> list[bytes]:
    return [
        request("POST", f"{context.long}/steps/s{context.next()}/step", context.body)
        for _ in range(count)
    ]


def _post_task(context: Context, count: int) -> list[bytes]:
    return [request("POST", f"{context.base}/steps/work/task", context.body)] * count


def _post_metadata(context: Context, count: int) -> list[bytes]:
    rows = [
        {
            "field_name": f"field{n}",
            "type": f"field{n}",
            "value": f"value{n}",
            "tags": ["attempt_id:0"],
            "user_name": "tester",
        }
        for n in range(10)
    ]
    return [request("POST", f"{task}/metadata", rows) for task in context.tasks(count)]


def _post_artifacts(context: Context, count: int) -> list[bytes]:
    rows = [
        {
            "name": f"x{n}", "attempt_id": 0, "content_type": "pickle-v4", "type": "metaflow.artifact", "ds_type": "local",
            "sha": "868436778cb011a1c6230bc12534683ab0b7f1c3", "location": " ", "user_name": "tester",
            "tags": [], "system_tags": ["metaflow_version:2.19.39", "runtime:dev", "user:tester"],
        }
        for n in range(10)
    ]  # fmt: skip
    return [request("POST", f"{task}/artifact", rows) for task in context.tasks(count)]


def _mutate_tags(context: Context, count: int) -> list[bytes]:
    made = []
    for _ in range(count):
        number = context.next()
        body = {"tags_to_add": [f"t{number % 20}"], "tags_to_remove": [f"t{(number + 7) % 20}"]}
        made.append(request("PATCH", f"{context.base}/tag/mutate", body))
    return made


READ, WRITTEN = ("before", 0.8), ("x", 1.0)
CASES = (
    Case("ping", 2000, _same("GET", lambda c: "/ping"), READ),
    Case("heartbeat", 2000, _same("POST", lambda c: f"{c.task}/heartbeat", {}), READ),
    Case("GET step", 1500, _same("GET", lambda c: f"{c.base}/steps/work"), READ),
    Case("POST step", 500, _post_step, WRITTEN, files=1, folders=2),
    Case("GET task", 1500, _same("GET", lambda c: c.task), READ),
    Case(
        "GET run of 1,500 tasks",
        300,
        _same("GET", lambda c: f"/flows/WideRun/runs/{c.wide}"),
        READ,
        connections=(1,),
    ),
    Case("POST task", 500, _post_task, WRITTEN, files=1, folders=2),
    Case("POST 10 metadata", 150, _post_metadata, WRITTEN, files=10),
    Case("POST 10 artifacts", 150, _post_artifacts, WRITTEN, files=10),
    Case("tag mutate", 250, _mutate_tags, WRITTEN, files=1),
)


def make_tree() -> Any:
    """The module that makes trees."""
    sys.path.insert(0, str(HERE))
    try:
        import make_tree as module
    finally:
        sys.path.remove(str(HERE))
    return module


def _metaflow_dir(root: Path) -> str:
    path = root / ".metaflow"
    path.mkdir(exist_ok=True)
    return str(path)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measures mflocal beside metaflow-local-service 0.2.0."
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller trees")
    parser.add_argument(
        "--only",
        metavar="NAME",
        help=f"one of {', '.join(GROUPS)}, or requests by a part of their name",
    )
    parser.add_argument("--rounds", type=int, default=0, help="rounds per row (default 5, quick 2)")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    parser.add_argument("--flows", action="store_true", help="real flows too")
    parser.add_argument("--wide", action="store_true", help="and a foreach 300 wide")
    default = Path(tempfile.gettempdir()) / f"mflocal-bench-{os.getuid()}"
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", default=default, help=f"default {default}"
    )
    return parser.parse_args(words)


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # so that the daemons are stopped


if __name__ == "__main__":
    if sys.argv[1:] == ["--client"]:
        client_main()
    elif sys.argv[1:] == ["--echo"]:
        echo_main()
    elif sys.argv[1:] == ["--yes"]:
        yes_main()
    else:
        signal.signal(signal.SIGTERM, _end)
        Bench(parse(sys.argv[1:])).main()
