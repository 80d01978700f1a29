"""A service as a process whose log, descriptors, tasks and constants can be looked at, and raw bytes to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import REPO, Client, clean_env, wait_for

HOST = b"Host: localhost\r\n"
BODY = {"user_name": "tester", "tags": ["t"], "system_tags": ["metaflow_version:2.19.39"]}
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
UPGRADE = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n" + KEY

# The command line with constants of the module replaced, as many bytes of kernel buffer per connection as
# asked for, and SIGUSR2 to count the tasks of the event loop in the log.
_LAUNCH = """
import json, signal, socket, sys
sys.path.insert(0, sys.argv.pop(1))
import mflocal
constants, buffer = json.loads(sys.argv.pop(1))
for name, value in constants.items():
    assert hasattr(mflocal, name), name
    setattr(mflocal, name, value)
if buffer:
    listen = mflocal.listen
    def small(*args):
        sock = listen(*args)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        return sock
    mflocal.listen = small
def count(*_):
    import asyncio
    sys.stderr.write("tasks=%d\\n" % len(asyncio.all_tasks(asyncio.get_running_loop())))
    sys.stderr.flush()
signal.signal(signal.SIGUSR2, count)
mflocal.console()
"""


class Served:
    """`mflocal serve` on a root, in a process of its own; use it in a `with`."""

    def __init__(
        self, root: Path, *options: str, quick: dict[str, float] | None = None, buffer: int = 0,
        env: dict[str, str] | None = None, python: str = sys.executable, module: Path = REPO, **popen: Any,
    ) -> None:  # fmt: skip
        self.root = root
        self.metaflow = root / ".metaflow"
        popen.setdefault("cwd", root)
        self._log = Path(str(root) + ".log")
        words = [python, "-c", _LAUNCH, str(module), json.dumps([quick or {}, buffer])]
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                [*words, "serve", "--root", str(root), *options],
                env=env or clean_env(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, **popen,
            )  # fmt: skip
        self.pid = self.process.pid
        state = self.metaflow / ".mflocal" / "daemon.json"

        def ready() -> Any:
            assert self.process.poll() is None, self.log
            try:
                told = json.loads(state.read_text())
            except (OSError, ValueError):
                return None
            return told if told.get("state") == "ready" and told.get("pid") == self.pid else None

        try:
            self.state = wait_for(ready)
        except AssertionError:
            self.process.kill()
            self.process.wait()
            raise
        self.port = int(self.state["port"])
        self.client = Client(f"http://127.0.0.1:{self.port}", root)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def kill(self) -> None:
        """kill -9, and until it is gone."""
        self.process.kill()
        self.process.wait()

    # -- looking at it

    @property
    def log(self) -> str:
        """All that was logged."""
        return self._log.read_text(errors="replace")

    @property
    def descriptors(self) -> int:
        """Open files and sockets, but for the empty files held ready for the next writes."""
        ready, fds, found = str(self.metaflow / ".mflocal/tmp"), f"/proc/{self.pid}/fd", 0
        for name in os.listdir(fds):
            try:
                found += not os.readlink(f"{fds}/{name}").startswith(ready)
            except OSError:
                pass  # closed meanwhile
        return found

    @property
    def tasks(self) -> int:
        """Tasks of the event loop."""
        before = self.log.count("tasks=")
        os.kill(self.pid, signal.SIGUSR2)
        wait_for(lambda: self.log.count("tasks=") > before)
        return int(self.log.rpartition("tasks=")[2].split()[0])

    @property
    def children(self) -> list[int]:
        """Its child processes."""
        return children_of(self.pid)

    @property
    def workers(self) -> list[int]:
        """The processes that read what user code has written, one for each request."""
        return [pid for child in self.children for pid in children_of(child)]

    def memory(self) -> float:
        """Resident MiB."""
        return (
            int(Path(f"/proc/{self.pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
        )

    def settled(self, descriptors: int, tasks: int) -> None:
        """Waits until no more is open than that, and that nothing was logged that looks like a bug."""
        wait_for(lambda: self.descriptors <= descriptors and self.tasks <= tasks)
        assert "Traceback" not in self.log and "exception" not in self.log.lower(), self.log[-4000:]

    # -- talking to it

    def connect(self, timeout: float = 20.0, receive: int = 0) -> socket.socket:
        """A connection; `receive` limits what the kernel takes for us."""
        sock = socket.socket()
        if receive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        sock.settimeout(timeout)
        sock.connect(("127.0.0.1", self.port))
        return sock

    def raw(self, *pieces: bytes, half_close: bool = True) -> bytes:
        """All that comes back for some bytes until the service closes; a reset ends it like a close."""
        with self.connect() as sock:
            got = b""
            try:
                for piece in pieces:
                    sock.sendall(piece)
                if half_close:
                    sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            return got + rest_of(sock)

    def websocket(
        self, path: str = "/api/ws", headers: bytes = b"", receive: int = 0
    ) -> socket.socket:
        """An open WebSocket, behind its handshake."""
        sock = self.connect(receive=receive)
        sock.sendall(
            b"GET " + path.encode() + b" HTTP/1.1\r\n" + HOST + UPGRADE + headers + b"\r\n"
        )
        head = b""
        while b"\r\n\r\n" not in head:
            more = sock.recv(1)
            assert more, head
            head += more
        assert head.startswith(b"HTTP/1.1 101 "), head
        return sock

    def task(self) -> str:
        """The path of a task in a new run of flow F."""
        self.client("POST", "/flows/F", {})
        run = f"/flows/F/runs/{self.client.post('/flows/F/run', BODY)['run_number']}"
        self.client.post(f"{run}/steps/start/step", BODY)
        return f"{run}/steps/start/tasks/{self.client.post(f'{run}/steps/start/task', BODY)['task_id']}"


def children_of(parent: int) -> list[int]:
    """The child processes of a process."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if words[1] == str(parent):
            found.append(int(name))
    return found


def rest_of(sock: socket.socket) -> bytes:
    """Everything until the other side closes; a timeout is an error."""
    got = bytearray()
    while True:
        try:
            data = sock.recv(65536)
        except (ConnectionError, BrokenPipeError):
            return bytes(got)
        if not data:
            return bytes(got)
        got += data


def answers(data: bytes, methods: list[str] | None = None) -> list[int]:
    """The statuses of a row of answers; AssertionError when they are not whole or not in sync."""
    found = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, head[:200]
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, reason = first.split(" ", 2)
        assert version == "HTTP/1.1" and reason and len(status) == 3, first
        fields = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        found.append(int(status))
        if status in ("100", "101"):
            continue
        method = (
            methods[sum(s >= 200 for s in found) - 1]
            if methods and len(methods) >= len(found)
            else "GET"
        )
        if method == "HEAD" or status in ("204", "304"):
            continue
        if fields.get("transfer-encoding") == "chunked":
            while True:
                size, end, data = data.partition(b"\r\n")
                length = int(size, 16)
                assert end and data[length : length + 2] == b"\r\n", size
                data = data[length + 2 :]
                if not length:
                    break
        elif "content-length" in fields:
            length = int(fields["content-length"])
            assert len(data) >= length, (first, length, len(data))
            if fields.get("content-type") == "application/json":
                json.loads(data[:length], parse_constant=_no_constant)
            data = data[length:]
        else:
            data = b""
    return found


def _no_constant(text: str) -> None:
    raise AssertionError(f"{text} in JSON")
