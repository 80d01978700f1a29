"""The server with handlers of the test's own, through its sockets: who is cancelled, what is held in memory."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path
from typing import Any, AsyncIterator, Awaitable, Callable

import pytest

import mflocal
from mflocal import Request, Response

GET = b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"


class Scene:
    """A service in this process, a route /slow in it, and what was logged."""

    def __init__(self, root: Path) -> None:
        (root / ".metaflow/.mflocal").mkdir(parents=True, exist_ok=True)
        self.logged: list[str] = []
        self.service = mflocal.Service(mflocal.Settings(root=str(root)), {}, self.logged.append)
        self.listener = socket.create_server(("127.0.0.1", 0))

    def play(self, script: Callable[[], Awaitable[None]]) -> None:
        """Runs the script while the service serves."""

        async def main() -> None:
            ready = asyncio.Event()
            serving = asyncio.ensure_future(self.service.serve(self.listener, ready=ready.set))
            await ready.wait()
            try:
                await asyncio.wait_for(script(), 60)
            finally:
                self.service.stop(now=True)
                await serving

        asyncio.run(main())

    async def client(self, data: bytes = b"", receive: int = 0) -> socket.socket:
        """A connection on which these bytes have been sent."""
        sock = socket.socket()
        if receive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, self.listener.getsockname())
        await loop.sock_sendall(sock, data)
        return sock


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def answer_of(sock: socket.socket) -> bytes:
    """All that comes until the service closes."""
    got = b""
    while True:
        data = await asyncio.get_running_loop().sock_recv(sock, 65536)
        if not data:
            return got
        got += data


async def until(condition: Callable[[], Any]) -> None:
    """Waits for it."""
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", ["reset", "closed", "half-closed"])
def test_a_handler_ends_with_its_client(scene: Scene, how: str) -> None:
    seen: list[str] = []

    async def slow(request: Request) -> Response:
        seen.append("begun")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        return Response()

    async def script() -> None:
        sock = await scene.client(GET)
        await until(lambda: seen == ["begun"])
        if how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how == "half-closed":
            sock.shutdown(socket.SHUT_WR)
        else:
            sock.close()
        await until(lambda: seen == ["begun", "cancelled"] and not scene.service.connections)
        sock.close()

    scene.service.router.add("GET", "/slow", slow)
    scene.play(script)
    assert not scene.logged


def test_who_only_closes_its_half_is_answered(scene: Scene) -> None:
    async def slow(request: Request) -> Response:
        await asyncio.sleep(0.1)
        return Response(200, b"there you are")

    async def script() -> None:
        sock = await scene.client(GET)
        sock.shutdown(socket.SHUT_WR)
        assert (await answer_of(sock)).endswith(b"there you are")
        sock.close()

    scene.service.router.add("GET", "/slow", slow)
    scene.play(script)


def test_a_write_is_finished_without_its_client(scene: Scene) -> None:
    seen: list[str] = []

    async def slow(request: Request) -> Response:
        seen.append("begun")
        await until(lambda: not scene.service.connections)
        seen.append("done")
        return Response()

    async def script() -> None:
        sock = await scene.client(POST)
        await until(lambda: seen)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        await until(lambda: seen == ["begun", "done"])

    scene.service.router.add("POST", "/slow", slow)
    scene.play(script)
    assert not scene.logged


def test_a_stream_goes_as_fast_as_its_client_reads_and_ends_with_it(scene: Scene) -> None:
    pieces: list[int] = []
    closed: list[bool] = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                pieces.append(1)
                yield b"x" * 65536
        finally:
            closed.append(True)

    async def script() -> None:
        sock = await scene.client(GET, receive=4096)
        count = -1
        while count != len(pieces):
            count = len(pieces)
            await asyncio.sleep(0.2)
        assert 0 < count < 200  # the kernel's buffers take some megabytes
        assert scene.service.unsent > 0
        sock.close()
        await until(lambda: closed and not scene.service.unsent)

    scene.service.router.add("GET", "/slow", lambda request: Response(stream=endless()))
    scene.play(script)
    assert not scene.logged


@pytest.mark.parametrize("size", [3_000_000, 2_999_999])
def test_a_stream_of_known_length(scene: Scene, size: int) -> None:
    """One that turns out shorter is cut off, so that nobody takes it for the whole."""

    async def stream() -> AsyncIterator[bytes]:
        for at in range(0, size, 100_000):
            yield b"y" * min(100_000, size - at)

    async def script() -> None:
        for method in (b"GET", b"HEAD"):
            sock = await scene.client(
                GET.replace(b"GET", method).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
            )
            try:
                got = await answer_of(sock)
            except ConnectionResetError:
                got = b""
            sock.close()
            if size == 3_000_000 or method == b"HEAD":
                head, _, body = got.partition(b"\r\n\r\n")
                assert b"Content-Length: 3000000" in head and b"chunked" not in head
                assert len(body) == (size if method == b"GET" else 0)
            else:
                assert len(got.partition(b"\r\n\r\n")[2]) < 3_000_000

    scene.service.router.add(
        "GET", "/slow", lambda request: Response(stream=stream(), length=3_000_000)
    )
    scene.play(script)


def test_long_answers_to_deaf_clients_have_a_bound(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mflocal, "MAX_UNSENT", 50_000_000)

    async def script() -> None:
        deaf = [await scene.client(GET, receive=4096) for _ in range(10)]
        await until(lambda: scene.service.unsent >= 40_000_000)
        refused = 0
        for sock in deaf:
            start = await asyncio.get_running_loop().sock_recv(sock, 12)
            refused += start == b"HTTP/1.1 503"
        assert refused == 5 and scene.service.unsent == 50_000_000
        for sock in deaf:
            sock.close()
        await until(lambda: not scene.service.unsent)
        sock = await scene.client(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert len(await answer_of(sock)) > 10_000_000
        sock.close()

    scene.service.router.add("GET", "/slow", lambda request: Response(200, b"z" * 10_000_000))
    scene.play(script)


def test_a_background_task_that_fails_is_logged_and_goes_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mflocal, "SIGNS_INTERVAL", 0.02)
    calls: list[int] = []

    def tick() -> None:
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("a bug")

    async def script() -> None:
        await until(lambda: len(calls) > 5)

    scene.service.liveness.tick = tick  # type: ignore[method-assign]
    scene.play(script)
    assert len(scene.logged) == 2 and all("a bug" in text for text in scene.logged)


@pytest.mark.parametrize(
    "body",
    [
        b"[]", b" [ ] ", b"[1]", b'[{"a": [1, {"b": null}]}, "x" , 2.5]\n', b"{}", b"1", b"", b"[", b"[1", b"[1,", b"[1,]",
        b"[,]", b"[1 2]", b"[1]]", b"[1] x", b"[NaN]", b"\xff", b"[" * 100_000, b'["\xc3\xa4"]', b"[1e999]",
    ],
)  # fmt: skip
def test_rows_are_what_json_is(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mflocal, "SMALL_BODY", -1)

    def of(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except mflocal.Problem as problem:
            return problem.detail

    request = Request("POST", body=body)
    assert of(lambda: asyncio.run(request.rows())) == of(request.json)


def test_a_long_body_is_decoded_while_others_have_their_turns() -> None:
    body = mflocal.dumps(
        [{"field_name": f"f{number}", "value": "x" * 50} for number in range(50_000)]
    )
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> Any:
        other = asyncio.ensure_future(others())
        rows = await Request("POST", body=body).rows()
        other.cancel()
        return rows

    assert asyncio.run(main()) == mflocal.loads(body) and turns > 5
