"""Hostile bytes, names, bodies, files, pages and neighbours, against a real service and its real files."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Callable, Iterator
from urllib.parse import quote

import make_tree
import pytest
from conftest import COMMAND, clean_env, mflocal, wait_for
from meta_shared import script
from test_http import VECTORS
from test_http import mutate as mutate_bytes
from test_websocket import frame, random_frames
from wire import BODY, HOST, UPGRADE, Served, answers, rest_of

import mflocal as module

FUZZ_SECONDS = float(os.environ.get("MFLOCAL_FUZZ_SECONDS", "4"))
FUZZ_SEED = int(os.environ.get("MFLOCAL_FUZZ_SEED", "1"))
TEXT, PING, CLOSE = 1, 9, 8


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One service for everything that leaves it as it was: that is what is tested."""
    root = tmp_path_factory.mktemp("hostile") / "root"
    root.mkdir()
    with Served(root) as found:
        found.task()
        yield found


def census(served: Served) -> tuple[int, int]:
    """(descriptors, tasks) at rest."""
    time.sleep(0.1)
    return served.descriptors, served.tasks


# -- bytes


def test_request_vectors_over_a_socket(served: Served) -> None:
    """As many answers as requests, in sync, the expected status at the end, and then the end."""
    before = census(served)
    for vector in VECTORS:
        error = (
            vector.expected[-1]
            if vector.expected and isinstance(vector.expected[-1], int)
            else None
        )
        requests = [request for request in vector.expected if not isinstance(request, int)]
        methods = [request[0] for request in requests]
        cut = len(vector.data) // 2
        for pieces in ([vector.data], [vector.data[:cut], vector.data[cut:]]):
            # After an error the service closes by itself; else it waits for more until we say that none comes.
            got = served.raw(*pieces, half_close=error is None)
            found = [status for status in answers(got, methods) if status >= 200]
            assert 500 not in found, vector.name
            if error is not None:
                assert found[-1:] == [error], (vector.name, found)
                assert len(found) == len(requests) + 1, (vector.name, found)
            else:
                assert len(found) in (len(requests), len(requests) + 1), (vector.name, found)
                assert found[len(requests) :] in ([], [400]), (
                    vector.name,
                    found,
                )  # 400: cut off in the middle
    served.settled(*before)


def test_ends_at_every_moment(served: Served) -> None:
    """Row 26: a peer that resets, half closes or only stays away, at any byte of a request and of its answer."""
    before = census(served)
    whole = b"POST /flows/F/run HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n{}"
    runs = len(served.client.get("/flows/F/runs"))
    for size in range(len(whole)):
        with served.connect() as sock:
            if size % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(whole[:size])
    for size in (1, 20, 200):
        with served.connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(b"GET /flows/F/runs HTTP/1.1\r\n" + HOST + b"\r\n")
            sock.recv(size)
    served.settled(*before)
    assert len(served.client.get("/flows/F/runs")) == runs, "half a request made a run"


class Grammar:
    """Requests that are mostly well formed and mean harm, from one source of chance."""

    SEGMENTS = (
        "..", ".", "%2e%2e", "..%2f..", "%00", "%", "%zz", "%ff", "%c0%ae", "*", "?", "%5c", "_meta", "data", ".mflocal",
        "latest_run", "0", "-1", "9" * 5000, "9" * 18, "%F0%9F%92%A9", "a" * 300, "%C2%B2", "%D9%A3", "", "~", "null",
        "F%0d%0aX:y", "x:y", "{flow}", "%ED%A0%80",
    )  # fmt: skip
    KEYS = (
        "_limit", "_page", "_order", "_group", "_group_limit", "_tags", "_cursor", "status", "status:re", "user", "user:ne",
        "user:re", "user:co", "flow_id:li", "ts_epoch:gt", "duration:le", "run_number", "run:is", "attempt_id", "step_name:ne",
        "tags:any", "_tags:likeany", "taskId", "postprocess", "metadata_field_name", "pattern", "reverse_order", "start_time",
        "path", "flow", "key", "value", "once", "timezone", "hash", "invalid", "", ":", "_:", "finished_at:gt", "raw",
    )  # fmt: skip
    VALUES = (
        "", "0", "1", "-1", "1.5", "1e999", "nan", "9" * 4400, "%C2%B2", "%D9%A3", "null", "None", "true", "a,b,,c", ",", "(",
        "(a%2B)%2B$", "(x%2Bx%2B)%2By", "%5B", "%5C", "a" * 600, "%00", "%", "%80", "+", "-ts_epoch,run", "completed,running",
        "e30=", "AAAA", "status", "flow_id,user", "%25%25%25", "_____", "(?P<a>x)(?P=a)", ".*" * 100, "\\", "'--", "\"",
        "2026-01-01", "1999999999999", "%F0%9F%92%A9", "attempt_id:0", "a{1000}{1000}", "(?i)X", "%5Cd",
    )  # fmt: skip
    BODIES = (
        b"", b"{}", b"[]", b"[{}]", b"null", b"1", b'"x"', b"{", b"\xff", b"[" * 5000, b"[" * 200_000, b'{"a":' * 3000,
        b'{"run_number": "..", "task_id": "../x", "tags": ["\\ud800"]}', b'{"tags": [1], "system_tags": {}}', b"NaN",
        b'{"user_name": 1e999, "tags": null}', b'[{"field_name": "/", "value": "x"}]', b'{"tags_to_add": [[]]}',
        b'[{"field_name": "a", "value": [1e999, true, "x"]}]', b'[{"name": "..", "attempt_id": -1}]', b"9" * 5000,
        b'{"tags_to_add": ["a", "\\u0000"], "tags_to_remove": "x"}', b'[{"name": "n", "attempt_id": 1e3, "sha": null}]',
        b'[{"field_name": "attempt", "value": "99999999"}]', b'[{"field_name": "attempt", "value": "\\u0663"}]',
        b'{"user_name": "a", "user_name": {"b": 1}}', b'{"task_id": "1", "run_number": 5}', b'\xef\xbb\xbf{}',
        b'[{"field_name": "attempt_ok", "value": "maybe", "tags": ["attempt_id:99999999999999999999"]}]',
    )  # fmt: skip
    FIELDS = (
        b"Origin: null", b"Origin: http://localhost:3000", b"Origin: http://evil.example", b"Sec-Fetch-Site: cross-site",
        b"Connection: close", b"Connection: upgrade, keep-alive", b"Range: bytes=" + b"9" * 5000 + b"-", b"Range: bytes=5-1",
        b"Expect: 100-continue", b"If-None-Match: *", b"x-mflocal-lease: ..", b"x-mflocal-token: \xff", b"x-api-key: \xe9",
        b"Cookie: mflocal_key=\xff; a", b"Upgrade: websocket", b"X-Forwarded-Proto: javascript", b"X-Forwarded-Host: evil",
        b"Accept-Encoding: gzip", b"Content-Type: text/html", b"Authorization: Basic =", b"Host: evil.example",
        b"Access-Control-Request-Method: POST", UPGRADE[:-2],
    )  # fmt: skip

    def __init__(self, seed: int, task: str, routes: list[tuple[str, str]]) -> None:
        self.chance = random.Random(seed)
        words = task.split("/")
        self.known = {
            "flow": "F",
            "run": words[4],
            "step": words[6],
            "task": words[8],
            "attempt": "0",
            "name": "x",
        }
        self.routes = routes

    def target(self) -> tuple[str, str]:
        chance = self.chance
        method, pattern = chance.choice(self.routes)
        segments = []
        for segment in pattern.split("/")[1:]:
            good = self.known.get(segment.strip("{}"), "x") if segment[:1] == "{" else segment
            segments.append(chance.choice(self.SEGMENTS) if chance.random() < 0.12 else good)
        path = "/" + "/".join(segments)
        pairs = [
            f"{chance.choice(self.KEYS)}={chance.choice(self.VALUES)}"
            for _ in range(chance.choice((0, 0, 1, 1, 2, 5)))
        ]
        return method, path + ("?" + "&".join(pairs) if pairs else "")

    def request(self) -> bytes:
        chance = self.chance
        method, target = self.target()
        if chance.random() < 0.1:
            method = chance.choice(("HEAD", "OPTIONS", "PATCH", "DELETE", "POST", "GET", "PUT"))
        lines = [f"{method} {target} HTTP/1.{int(chance.random() > 0.05)}".encode(), HOST[:-2]]
        lines += [chance.choice(self.FIELDS) for _ in range(chance.choice((0, 0, 0, 1, 2)))]
        body = (
            chance.choice(self.BODIES)
            if method not in ("GET", "HEAD") or chance.random() < 0.02
            else b""
        )
        if chance.random() < 0.2:
            lines.append(b"Transfer-Encoding: chunked")
            cut = chance.randrange(1, 40)
            pieces = [body[i : i + cut] for i in range(0, min(len(body), 4000), cut)]
            body = (
                b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
            )
        elif body or chance.random() < 0.1:
            lines.append(b"Content-Length: %d" % (len(body) + (chance.random() < 0.03)))
        return b"\r\n".join(lines) + b"\r\n\r\n" + body

    def noise(self) -> bytes:
        """One to four requests on a connection, some of them with bytes changed."""
        chance = self.chance
        data = b"".join(self.request() for _ in range(chance.choice((1, 1, 1, 2, 4))))
        return mutate_bytes(chance, data) if chance.random() < 0.4 else data


class Noted(module.Router):
    """A router that remembers its patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.patterns: list[tuple[str, str]] = []

    def add(self, method: str, pattern: str, handler: Any) -> None:
        self.patterns.append((method, pattern))
        super().add(method, pattern, handler)


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    """(store, router with every route) in this process, on a root of its own."""
    settings = module.Settings(root=str(tmp_path / "project"))
    os.makedirs(settings.state_dir, mode=0o700)
    store = module.Store(settings.metaflow_dir, os.path.join(settings.state_dir, "tmp"))
    store.sweep()
    router, liveness = Noted(), module.Liveness(store)
    site = module.Site(store, liveness, settings)
    module.register_metadata_routes(router, module.MetadataApi(site))
    module.register_ui_routes(router, site)
    return store, router


def routes_of(parts: Any) -> list[tuple[str, str]]:
    own = [
        ("GET", "id"),
        ("GET", "status"),
        ("POST", "stop"),
        ("POST", "lease"),
        ("POST", "ui"),
        ("GET", "login"),
    ]
    more = [("GET", "/api/ws"), ("GET", "/"), ("GET", "/static/x.js"), ("OPTIONS", "*")]
    return parts[1].patterns + more + [(method, f"/_mflocal/{name}") for method, name in own]


def hostile_files(task: Path) -> None:
    """What a checkout may have shipped beside good files: records of any shape."""
    odd = [
        None,
        5,
        "x",
        [],
        {},
        [[]],
        {"a": 1},
        True,
        -1,
        1e300,
        10**30,
        "²",
        "9" * 5000,
        ["attempt_id:²"],
        [{}],
    ]
    for number, value in enumerate(odd):
        record = {
            key: value
            for key in (
                "ts_epoch",
                "tags",
                "system_tags",
                "user_name",
                "value",
                "field_name",
                "run_number",
            )
        }
        for name in (f"sysmeta_odd_{number}", f"sysmeta_attempt_{number}", f"{number}_artifact_odd", "9" * 200 + "_artifact_x",
                     f"sysmeta_attempt_ok_{number}", f"{number}_artifact__task_ok", "sysmeta_x_" + "9" * 200):  # fmt: skip
            (task / "_meta" / f"{name}.json").write_text(json.dumps(record))
        for level in (task.parents[2], task.parents[1], task.parent, task):
            other = level.parent / f"odd{number}" / "_meta"
            other.mkdir(parents=True, exist_ok=True)
            (other / "_self.json").write_text(json.dumps(record))
            (other / "_mflocal.json").write_text(
                json.dumps(
                    {"last_heartbeat_ts": value, "lost": {str(value): value}, "lease": value}
                )
            )


def test_grammar_fuzz(served: Served, parts: Any) -> None:
    """MFLOCAL_FUZZ_SECONDS (4) and MFLOCAL_FUZZ_SEED (1) say how long and which."""
    task = served.task()
    served.client.post(
        f"{task}/metadata",
        [{"field_name": "f", "value": "a" * 40}, {"field_name": "attempt", "value": "0"}],
    )
    served.client.post(f"{task}/artifact", [{"name": "x", "sha": "1", "attempt_id": 0}])
    before = census(served)
    grammar = Grammar(FUZZ_SEED, task, routes_of(parts))
    end, count, seen, slowest = time.monotonic() + FUZZ_SECONDS, 0, {}, 0.0
    while time.monotonic() < end or count < 200:
        data = grammar.noise()
        began = time.monotonic()
        got = served.raw(data)  # a timeout in there is a hang
        took = time.monotonic() - began
        slowest = max(slowest, took)
        statuses = [int(status) for status in re.findall(rb"(?:^|\n)HTTP/1.1 (\d{3}) ", got)]
        assert got[:9] in (b"HTTP/1.1 ", b""), (data, got[:100])
        assert 500 not in statuses, (data[:2000], got[-1000:])
        assert served.process.poll() is None, data
        for status in statuses:
            seen[status] = seen.get(status, 0) + 1
        count += 1
    print(f"{count} connections, slowest {slowest:.2f} s, answers {dict(sorted(seen.items()))}")
    assert {200, 400, 404, 405} <= set(seen)
    served.settled(before[0] + 1, before[1])


def test_records_of_any_shape(tmp_path: Path, parts: Any) -> None:
    """Hostile files instead of hostile requests: every reading route answers, none with 500."""
    root = tmp_path / "odd"
    root.mkdir()
    with Served(root) as served:
        path = served.task()
        served.kill()
    _, _, flow, _, run, _, step, _, task = path.split("/")
    hostile_files(served.metaflow / flow / run / step / task)
    wrong = {}
    with Served(root) as served:
        for number in [*range(15), None]:
            names = {
                "flow": "F",
                "run": run,
                "step": step,
                "task": task,
                "attempt": "0",
                "name": "odd",
            }
            for level in ("run", "step", "task") if number is not None else ("none",):
                for method, pattern in routes_of(parts):
                    if (
                        method != "GET"
                        or "/ws" in pattern
                        or (level != "none" and f"{{{level}}}" not in pattern)
                    ):
                        continue
                    if pattern.startswith("/api/metadata") or pattern.startswith("/_mflocal"):
                        continue
                    target = pattern.format(**{**names, level: f"odd{number}"}, hash="x", file="x")
                    got = served.raw(b"GET " + target.encode() + b" HTTP/1.0\r\n" + HOST + b"\r\n")
                    if not got or answers(got)[0] >= 500:
                        wrong[target] = got[:60]
        assert wrong == {}, served.log[-3000:]
        assert "Traceback" not in served.log


# -- WebSocket

RESOURCES = (
    "/runs",
    "/flows",
    "/flows/F/runs",
    "/flows/../runs",
    "/flows/%2e%2e/runs",
    "/%",
    "",
    "/runs?",
    "/flows/F/runs/%00",
)
MESSAGES = (
    '{"type": "SUBSCRIBE", "uuid": "a", "resource": "%s"}', '{"type": "SUBSCRIBE", "uuid": 5, "resource": "%s", "since": 1}',
    '{"type": "SUBSCRIBE", "uuid": "a", "resource": "%s?status:re=(a+)+$&_tags=x"}', '{"type": "UNSUBSCRIBE", "uuid": "a"}',
    '{"type": "SUBSCRIBE", "uuid": [1], "resource": "%s"}', '{"type": "SUBSCRIBE", "uuid": "\\ud800", "resource": "%s"}',
    '{"type": "SUBSCRIBE", "uuid": "b", "resource": "%s", "since": 1e999}', "__ping__", "[" * 3000, "NaN", "", "null", "{}",
    '{"type": "SUBSCRIBE", "uuid": "c", "resource": "%s?_limit=' + "9" * 4400 + '"}', '{"key": "x", "value": "%s"}',
    '{"type": "SUBSCRIBE", "uuid": "c", "resource": "%s", "since": "' + "9" * 4400 + '"}', '{"type": {"a": 1}, "uuid": {}}',
)  # fmt: skip


def closing_code(data: bytes) -> int | None:
    """The code of the close frame that must be the last of these server frames; None when there is none."""
    code = None
    while data:
        assert code is None, "frames behind a close frame"
        assert data[0] in (0x81, 0x88, 0x89, 0x8A) and not data[1] & 0x80, data[:20].hex()
        size, head = data[1], 2
        if size == 126:
            size, head = int.from_bytes(data[2:4], "big"), 4
        elif size == 127:
            size, head = int.from_bytes(data[2:10], "big"), 10
        payload = data[head : head + size]
        assert len(payload) == size
        if data[0] == 0x88:
            code = int.from_bytes(payload[:2], "big") if payload else 1005
        elif data[0] == 0x81:
            payload.decode("utf-8")
        data = data[head + size :]
    return code


def test_websocket_fuzz(served: Served) -> None:
    before = census(served)
    chance = random.Random(FUZZ_SEED)
    end, count, codes = time.monotonic() + FUZZ_SECONDS / 2, 0, set()
    paths = (
        "/api/ws",
        "/api/ws",
        "/api/search/flows/F/runs/1?key=x&value=y",
        "/api/flows/F/runs/1/search?key=(&value=%25",
    )
    while time.monotonic() < end or count < 60:
        with served.websocket(chance.choice(paths)) as sock:
            data = b""
            for _ in range(chance.randrange(4)):
                text = chance.choice(MESSAGES)
                text = text.replace("%s", chance.choice(RESOURCES))
                data += frame(TEXT, text.encode())
            data += random_frames(chance) if chance.random() < 0.7 else b""
            try:
                sock.sendall(data + frame(CLOSE, b"\x03\xe8"))
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            codes.add(closing_code(rest_of(sock)))
        count += 1
    print(f"{count} connections, codes {codes}")
    assert {1000, 1002} <= codes and codes <= {
        None,
        1000,
        1001,
        1002,
        1003,
        1005,
        1007,
        1009,
    } | set(range(1000, 5000))
    served.settled(*before)


def test_websocket_ends_at_every_moment(served: Served) -> None:
    before = census(served)
    whole = (
        frame(TEXT, b'{"type": "SUBSCRIBE", "uuid": "a", "resource": "/runs"}')
        + frame(PING, b"x")
        + frame(CLOSE, b"\x03\xe8")
    )
    for size in range(0, len(whole), 3):
        with served.websocket() as sock:
            if size % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(whole[:size])
    served.settled(*before)


# -- bodies


def test_json_bombs(served: Served) -> None:
    """Row 34: each is refused or stored as something that reads back as JSON."""
    task = served.task()
    run, posts = (
        task.rpartition("/steps")[0],
        (f"{task}/metadata", f"{task}/artifact", "/flows/F/run"),
    )
    bombs = [
        b"[" * 100_000, b'{"a":' * 100_000, b"[" * 3_000_000, b"9" * 100_000, b"-" + b"9" * 5000, b"NaN", b"-Infinity", b"Infinity",
        b'[{"field_name": "a", "value": NaN}]', b'[{"name": "a", "attempt_id": NaN}]', b'{"user_name": Infinity}',
        b'[{"field_name": "a", "value": ' + b"9" * 5000 + b"}]", b"{'a': 1}",
        b'[{"name": "\\udfff"}]', b"\xed\xa0\x80", b"\xff\xfe{\x00}\x00", b"{}{}",
        b'[{"field_name": "a", "value": "v"}', b"// {}", b'{"tags": ["a", {"b": 1}]}',
    ]  # fmt: skip
    for bomb in bombs:
        for path in (
            posts[:1] if b"field_name" in bomb else posts[1:2] if b'name"' in bomb else posts
        ):
            answer = served.client("POST", path, bomb)
            assert answer.status in (400, 413), (path, bomb[:60], answer)
            assert (
                set(answer.body) == {"id", "status", "title", "detail", "type"}
                and len(answer.body["detail"]) < 500
            )
    doubled = b'[{"field_name": "twice", "value": "first", "value": "second"}]'
    assert served.client("POST", posts[0], doubled).status == 200
    served.client.post(
        posts[0], [{"field_name": "lone", "value": "\ud800 \udfff", "tags": ["\udc80"]}]
    )
    rows = {row["field_name"]: row["value"] for row in served.client.get(f"{task}/metadata")}
    assert rows == {"twice": "second", "lone": "\ud800 \udfff"}
    assert served.client.get(run)["flow_id"] == "F"


def test_numbers_beyond_json_never_reach_the_disk(served: Served) -> None:
    """1e999 is JSON and becomes infinite, which no other reader of the file or of the answer understands."""
    task = served.task()
    for value in (b"1e999", b"[1e999]", b"[1, -1e999]"):
        served.client(
            "POST", f"{task}/metadata", b'[{"field_name": "inf", "value": ' + value + b"}]"
        )
    served.client("POST", f"{task}/artifact", b'[{"name": "inf", "sha": 1e999, "tags": []}]')

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    for file in (served.metaflow / "F").rglob("*inf*.json"):
        json.loads(file.read_text(), parse_constant=refuse)
    for path in ("metadata", "artifacts"):
        answers(served.raw(b"GET " + f"{task}/{path}".encode() + b" HTTP/1.1\r\n" + HOST + b"\r\n"))


def test_the_largest_body_and_one_byte_more(served: Served) -> None:
    task = served.task()
    before = census(served)
    frame_of_row = b'[{"field_name": "big", "value": "%s"}]'
    largest = frame_of_row % (b"x" * (module.MAX_BODY - len(frame_of_row) + 2))
    assert len(largest) == module.MAX_BODY
    assert served.client("POST", f"{task}/metadata", largest).status == 200
    assert len(served.client.get(f"{task}/metadata")[0]["value"]) > module.MAX_BODY - 100
    head = b"POST /flows/F/run HTTP/1.1\r\n" + HOST
    too_much = head + b"Content-Length: %d\r\n\r\n" % (module.MAX_BODY + 1)
    assert answers(served.raw(too_much, half_close=False)) == [413]
    expecting = head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (module.MAX_BODY + 1)
    assert answers(served.raw(expecting, half_close=False)) == [413]
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    got = served.raw(head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 17, half_close=False)
    assert got[:13] in (b"HTTP/1.1 413 ", b"")  # a reset may overtake it
    served.settled(*before)


def test_large_bodies_have_a_bound_in_all(root: Path) -> None:
    """Who comes too many gets 503, which Metaflow's client tries again; small requests go on meanwhile."""
    with Served(root, quick={"MAX_BODIES": 40 << 20}) as served:
        task = served.task()
        body = json.dumps([{"field_name": "big", "value": "x" * (15 << 20)}]).encode()
        head = b"POST %s/metadata HTTP/1.1\r\nContent-Length: %d\r\n" % (task.encode(), len(body))
        before = served.memory()
        socks, refused = [served.connect() for _ in range(8)], 0
        for sock in socks:
            with contextlib.suppress(ConnectionError):
                sock.sendall(head + HOST + b"\r\n" + body[:-1])
        for sock in socks[2:]:
            refused += b"Retry-After: 1\r\n" in rest_of(sock)
        assert refused == 6 and served.memory() < before + 90
        assert served.client("POST", f"{task}/heartbeat", {}).status == 200
        for sock in socks[:2]:
            sock.sendall(body[-1:])
            assert sock.recv(12) == b"HTTP/1.1 200"
            sock.close()
        assert served.client("POST", f"{task}/metadata", body).status == 200


def test_an_ordinary_client_learns_that_its_body_is_too_large(served: Served) -> None:
    """It sends all before it reads: the refusal must not be lost in a reset, which Metaflow's client retries."""
    assert (
        served.client("POST", "/flows/F/run", b"x" * (module.MAX_BODY + 1024 * 1024)).status == 413
    )


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?:a?){40}a{40}$", "(?=a)(a+)+$", r"(a)(?:\1+)+$"])
def test_a_catastrophic_pattern_stops_nobody(served: Served, pattern: str) -> None:
    task = served.task()
    run, step = task.rpartition("/steps")[0], task.rpartition("/tasks")[0]
    served.client.post(f"{task}/metadata", [{"field_name": "f", "value": "a" * 40 + "!"}])
    served.client.post("/flows/F/run", {**BODY, "user_name": "a" * 40 + "!"})
    found: list[int] = []
    targets = [f"{step}/filtered_tasks?metadata_field_name=f&pattern={quote(pattern)}"] * 3
    targets += [
        f"/api/flows/F/runs?user:re={quote(pattern)}",
        f"/flows/F/runs?user:re={quote(pattern)}",
        f"/api{run}/tasks?taskId:re={quote(pattern)}",
    ]
    threads = [
        threading.Thread(target=lambda t=t: found.append(served.client("GET", t).status))
        for t in targets
    ]

    def beat() -> float:
        began = time.monotonic()
        assert served.client("POST", f"{task}/heartbeat", {}).status == 200
        time.sleep(0.02)
        return time.monotonic() - began

    alone, waits, began = median(beat() for _ in range(20)), [], time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        waits.append(beat())
    took = time.monotonic() - began
    for thread in threads:
        thread.join()
    assert set(found) <= {200, 400}, found
    # A heartbeat that waited for a pattern would take a sixth of it all.
    assert median(waits) < max(took / 12, 20 * alone), (took, alone, waits)
    wait_for(lambda: not served.workers)


def test_patterns_that_explode_take_few_processes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with Served(root, quick={"PATTERN_TIMEOUT": 0.4}) as served:
        task = served.task()
        served.client.post(f"{task}/metadata", [{"field_name": "f", "value": "a" * 40 + "!"}])
        target = f"{task.rpartition('/tasks')[0]}/filtered_tasks?pattern={quote('(?=a)(a+)+$')}"
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(served.client, "GET", target) for _ in range(8)]
            most = 0
            while not all(future.done() for future in asked):
                most = max(most, len(served.workers))
                time.sleep(0.02)
        assert {future.result().status for future in asked} == {400}
        # One that was killed may still be there when the next one starts.
        assert 1 <= most <= 2 * module.LANES["patterns"] < len(asked)
        wait_for(lambda: not served.workers)


# -- deadlines, caps, slow peers. The constants are real, only their values are smaller.

QUICK = {
    "HEADER_TIMEOUT": 0.8,
    "BODY_TIMEOUT": 0.8,
    "KEEP_ALIVE_TIMEOUT": 0.8,
    "WRITE_TIMEOUT": 0.8,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


def drip(sock: socket.socket, data: bytes, pause: float) -> tuple[bytes, float]:
    """Sends byte by byte until the service has enough; what it said, and after how long it closed."""
    began = time.monotonic()
    for byte in data:
        try:
            sock.sendall(bytes((byte,)))
        except OSError:
            break
        sock.settimeout(pause)
        try:
            got = sock.recv(65536)
        except socket.timeout:
            continue
        except OSError:
            got = b""
        if got:
            sock.settimeout(20)
            got += rest_of(sock)
        return got, time.monotonic() - began
    return b"", time.monotonic() - began


def test_slow_senders_are_sent_away(root: Path) -> None:
    """Row 31. A head has one deadline for all of it, a body one for each piece, a pause between requests its own."""
    head = b"POST /flows/F HTTP/1.1\r\n" + HOST
    whole = head + b"Content-Length: 26\r\nConnection: close\r\n\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    with Served(root, quick=QUICK) as served:
        before = census(served)

        def dripped(sent: bytes, slowly: bytes, pause: float) -> tuple[list[int], float]:
            with served.connect() as sock:
                sock.sendall(sent)
                got, took = drip(sock, slowly, pause)
                return answers(got), took

        def stopped(sent: bytes) -> list[int]:
            with served.connect() as sock:
                sock.sendall(sent)
                return answers(rest_of(sock))

        with ThreadPoolExecutor(12) as pool:
            slow = [
                pool.submit(dripped, b"", start + b"X-Slow: " + b"x" * 500, 0.1)
                for start in (head, b"\r\n" + head)
            ]
            patient = pool.submit(dripped, whole, b'{"user_name": "patient" }   ', 0.15)
            halves = (
                head,
                whole + b"{",
                chunked,
                chunked + b"5\r\nab",
                chunked + b"0\r\n",
                chunked + b"0\r\nX-Trailer: ",
            )
            half = [pool.submit(stopped, sent) for sent in halves]
            silent = [
                pool.submit(stopped, sent)
                for sent in (b"", b"GET /ping HTTP/1.1\r\n" + HOST + b"\r\n", b"\r\n")
            ]
            for found in slow:
                assert found.result()[0] == [408]
            for found in half:
                assert found.result() == [408]
            assert (
                patient.result()[0] == [200] and patient.result()[1] > 3
            )  # a body that goes on coming is waited for
            for found in silent:  # silence between requests is no error
                assert found.result() in ([], [200], [408])
        served.settled(*before)


def test_silence_is_allowed_to_what_speaks_for_work(root: Path) -> None:
    with Served(root, quick=QUICK) as served:
        with served.connect() as speaks, served.connect() as other:

            def post(path: str) -> Any:
                data = json.dumps(BODY).encode()
                head = f"POST {path} HTTP/1.1\r\nContent-Length: {len(data)}\r\n".encode()
                speaks.sendall(head + HOST + b"\r\n" + data)
                return json.loads(speaks.recv(65536).partition(b"\r\n\r\n")[2])

            post("/flows/F")
            run = f"/flows/F/runs/{post('/flows/F/run')['run_number']}"
            post(f"{run}/steps/start/step")
            post(f"{run}/steps/start/task")
            other.sendall(b"GET /ping HTTP/1.1\r\n" + HOST + b"\r\n")
            assert rest_of(other)  # has been closed
            time.sleep(1)
            speaks.sendall(b"GET /ping HTTP/1.1\r\n" + HOST + b"\r\n")
            assert speaks.recv(65536).startswith(b"HTTP/1.1 200")


def large_task(served: Served, size: int) -> str:
    task = served.task()
    served.client.post(f"{task}/metadata", [{"field_name": "big", "value": "x" * size}])
    return task


@pytest.mark.parametrize("how", ["keep-alive", "close", "close-small", "half-close"])
def test_readers_who_stop_reading_are_sent_away(root: Path, how: str) -> None:
    """Row 33. Also when all that is left of the answer waits in the service and the connection is closing."""
    with Served(root, quick=QUICK, buffer=4096) as served:
        task = large_task(served, 40_000 if how == "close-small" else 3_000_000)
        before = census(served)
        socks = []
        for _ in range(5):
            sock = served.connect(receive=2048)
            close = b"Connection: close\r\n" if how.startswith("close") else b""
            sock.sendall(
                b"GET " + task.encode() + b"/metadata HTTP/1.1\r\n" + HOST + close + b"\r\n"
            )
            if how == "half-close":
                sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b"H"
            socks.append(sock)
        began = time.monotonic()
        try:
            wait_for(lambda: served.descriptors <= before[0])
        finally:
            print(f"{served.descriptors - before[0]} left after {time.monotonic() - began:.1f} s")
            for sock in socks:
                sock.close()
        served.settled(*before)


def test_a_slow_reader_gets_everything(root: Path) -> None:
    """Slow is not stopped: who takes a little within each deadline is served to the end."""
    with Served(root, quick=QUICK, buffer=4096) as served:
        task = large_task(served, 120_000)
        with served.connect(receive=2048) as sock:
            sock.sendall(
                b"GET "
                + task.encode()
                + b"/metadata HTTP/1.1\r\n"
                + HOST
                + b"Connection: close\r\n\r\n"
            )
            got = b""
            while True:
                data = sock.recv(3000)
                if not data:
                    break
                got += data
                time.sleep(0.1)
        assert answers(got) == [200] and len(got) > 120_000


def test_the_cap_on_connections(root: Path) -> None:
    """Row 32: the rest is told 503, those inside notice nothing, and there is room again when they leave."""
    with Served(root, quick={"MAX_CONNECTIONS": 20}) as served:
        task = served.task()
        before = census(served)
        inside = [served.connect() for _ in range(20)]
        beat = (
            b"POST "
            + task.encode()
            + b"/heartbeat HTTP/1.1\r\n"
            + HOST
            + b"Content-Length: 2\r\n\r\n{}"
        )
        for sock in inside:
            sock.sendall(beat)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        for _ in range(10):
            with served.connect() as sock:
                assert answers(rest_of(sock)) == [503]
        refused = 0
        for _ in range(
            10
        ):  # a client that has sent its request already must not lose the answer in a reset
            refused += answers(served.raw(beat, half_close=False)) == [503]
        assert refused == 10
        for sock in inside:
            sock.sendall(beat)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
            sock.close()
        wait_for(lambda: served.descriptors <= before[0])
        assert served.client("GET", "/ping").status == 200
        served.settled(*before)


def test_descriptors_run_out(root: Path) -> None:
    """A low hard limit lowers the cap; the store still can open its files."""
    command = ["sh", "-c", 'ulimit -n 100; exec "$@"', "sh"]
    with Served(root) as served:  # to have a task on disk
        task = served.task()
        served.kill()
    log = open(str(root) + ".log", "ab")
    process = subprocess.Popen(
        [*command, *COMMAND, "serve", "--root", str(root)],
        cwd=root,
        env=clean_env(),
        stderr=log,
        stdout=log,
    )
    try:
        state = root / ".metaflow/.mflocal/daemon.json"
        wait_for(
            lambda: (
                state.exists()
                and json.loads(state.read_text())["pid"] == process.pid
                and json.loads(state.read_text())["state"] == "ready"
            )
        )
        port = json.loads(state.read_text())["port"]
        socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(150)]
        time.sleep(0.3)
        inside = []
        for sock in socks:
            sock.settimeout(10)
            try:
                sock.sendall(
                    b"POST "
                    + task.encode()
                    + b"/metadata HTTP/1.1\r\n"
                    + HOST
                    + b'Content-Length: 33\r\n\r\n[{"field_name": "a", "value": ""}]'[:-1]
                    + b""
                )
                got = sock.recv(65536)
            except OSError:
                got = b""
            inside.append(got[9:12])
        assert b"500" not in inside and inside.count(b"200") + inside.count(b"400") >= 8, inside
        for sock in socks:
            sock.close()
    finally:
        process.terminate()
        process.wait(60)
        log.close()
    assert "Traceback" not in Path(str(root) + ".log").read_text()


@pytest.mark.parametrize("how", ["stays", "says goodbye"])
def test_a_deaf_websocket_is_dropped(root: Path, how: str) -> None:
    """The queue of a client that does not read is bounded, and is not kept for one that closes without reading."""
    quick = {**QUICK, "WS_MAX_QUEUE": 200_000, "WS_PING_INTERVAL": 2.0, "WS_PING_TIMEOUT": 1.0}
    with Served(root, quick=quick, buffer=4096) as served:
        served.task()
        before = census(served)
        deaf, hears = served.websocket(receive=2048), served.websocket()
        wish = frame(TEXT, b'{"type": "SUBSCRIBE", "uuid": "a", "resource": "/runs"}')
        for sock in (deaf, hears):
            sock.sendall(wish)
        time.sleep(0.3)
        for number in range(8 if how == "says goodbye" else 60):
            served.client.post("/flows/F/run", {**BODY, "tags": [f"{number}" + "x" * 5000]})
        if how == "says goodbye":
            time.sleep(0.5)
            deaf.sendall(frame(CLOSE, b"\x03\xe8"))
        heard = b""
        hears.settimeout(10)
        while heard.count(b'"INSERT"') < 8:
            heard += hears.recv(65536)
        began = time.monotonic()
        wait_for(lambda: served.descriptors <= before[0] + 1)
        print(f"gone after {time.monotonic() - began:.1f} s")
        hears.close()
        deaf.close()
        served.settled(*before)


def tell_runs(served: Served, count: int) -> None:
    """Some runs of 5,000 bytes each."""
    for number in range(count):
        served.client.post("/flows/F/run", {**BODY, "tags": [f"{number}" + "x" * 5000]})


def heard_until(sock: socket.socket, word: bytes, count: int = 1) -> bool:
    """Whether a word comes so many times before the end; what it is said after may be megabytes."""
    tail = b""
    try:
        while count > 0:
            data = sock.recv(65536)
            if not data:
                return False
            tail += data
            count -= tail.count(word)
            tail = tail[tail.rfind(word) + len(word) :] if word in tail else tail[1 - len(word) :]
    except ConnectionError:
        return False
    return True


def test_many_deaf_websockets_have_small_queues(root: Path) -> None:
    """One may be far behind, as after a replay, but not all at once: only as many go as have to."""
    quick = {"WS_SMALL_QUEUE": 100_000, "WS_MAX_QUEUE": 10_000_000, "WS_ALL_QUEUES": 1_000_000}
    with Served(root, quick=quick, buffer=4096) as served:
        served.task()
        before = census(served)
        wish = frame(TEXT, b'{"type": "SUBSCRIBE", "uuid": "a", "resource": "/runs"}')
        deaf = [served.websocket(receive=2048)]
        deaf[0].sendall(wish)
        time.sleep(0.3)
        tell_runs(served, 60)  # 300 KB wait for it
        assert heard_until(deaf[0], b'"INSERT"', 60)
        deaf += [served.websocket(receive=2048) for _ in range(11)]
        hears = served.websocket()
        for sock in (*deaf[1:], hears):
            sock.sendall(wish)
        time.sleep(0.3)
        for _ in range(40):  # 200 KB for each of them would be 2.4 MB in all
            tell_runs(served, 1)
            assert heard_until(hears, b'"INSERT"')
        alive = 0
        for sock in deaf:
            with contextlib.suppress(ConnectionError):
                sock.sendall(frame(TEXT, b"__ping__"))
            alive += heard_until(sock, b"__pong__")
        assert 2 <= alive <= 8
        for sock in (hears, *deaf):
            sock.close()
        served.settled(*before)


def test_a_reader_who_is_late_gets_a_whole_replay(root: Path) -> None:
    """Of 8 MiB; it begins to read when all has been sent."""
    ms = int(time.time() * 1000) - 5000
    for number in range(800):
        make_tree.make_run(str(root / ".metaflow"), "F", ms + number, ["x" * 10_000])
    with Served(root, buffer=4096) as served, served.websocket(receive=4096) as sock:
        text = '{"type": "SUBSCRIBE", "uuid": "a", "resource": "/flows/F/runs", "since": %d}' % (
            ms // 1000
        )
        sock.sendall(frame(TEXT, text.encode()))
        time.sleep(1.2)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        assert heard_until(sock, b'"INSERT"', 800)


def test_a_slow_reader_is_no_deaf_one(root: Path) -> None:
    """Our pings wait behind what it still has to read, so its answers come late: reading is a sign of life."""
    ms = int(time.time() * 1000) - 5000
    for number in range(100):
        make_tree.make_run(str(root / ".metaflow"), "F", ms + number, ["x" * 10_000])
    quick = {"WS_PING_INTERVAL": 0.5, "WS_PING_TIMEOUT": 0.5}
    with Served(root, quick=quick, buffer=4096) as served, served.websocket(receive=4096) as sock:
        text = '{"type": "SUBSCRIBE", "uuid": "a", "resource": "/flows/F/runs", "since": %d}' % (
            ms // 1000
        )
        sock.sendall(frame(TEXT, text.encode()))
        heard = b""
        while heard.count(b'"INSERT"') < 100:
            data = sock.recv(8192)
            assert data, f"dropped after {heard.count(b'INSERT')} of 100 rows"
            heard += data
            time.sleep(0.02)


# -- searches


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(a root, a run in it) with artifacts that take seconds to search: 12 values, no two the same."""
    root = tmp_path_factory.mktemp("searched") / "root"
    root.mkdir()
    with Served(root) as served:
        step = served.task().rpartition("/tasks")[0]
        run = step.rpartition("/steps")[0]
        served.client.post(f"{run}/steps/_parameters/step", BODY)
        values: list[tuple[str, str, Any]] = [("_parameters", "n", 3)]
        values += [("start", "x", None)] * 12
        # Sets of numbers with one hash: each takes all the time that a value may have.
        slow = [b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") for n in range(1, 70_000)]
        for number, (name, artifact, value) in enumerate(values):
            task = served.client.post(f"{run}/steps/{name}/task", BODY)["task_id"]
            data = pickle.dumps(value, 4)
            if artifact == "x":
                data = b"\x80\x04\x8f(" + b"".join(slow[number:]) + b"\x90."
            sha = hashlib.sha1(data).hexdigest()
            file = root / ".metaflow/F/data" / sha[:2] / sha
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(gzip.compress(data, 1))
            row = {
                "name": artifact,
                "attempt_id": 0,
                "sha": sha,
                "ds_type": "local",
                "content_type": "pickle-v4",
            }
            served.client.post(f"{run}/steps/{name}/tasks/{task}/artifact", [row])
    return root, run


def test_searches_leave_room_for_others_and_end_with_their_clients(
    searched: tuple[Path, str],
) -> None:
    root, run = searched
    with Served(root) as served:
        assert served.client.get(f"/api{run}/parameters")["data"] == {"n": {"value": 3}}
        before = census(served)
        socks = [served.websocket(f"/api{run}/search?key=x&value=nowhere") for _ in range(3)]
        time.sleep(0.3)
        assert served.client.get(f"/api{run}/parameters")["data"] == {"n": {"value": 3}}
        for sock in socks:
            assert b'"result"' not in sock.recv(
                65536
            )  # no search has come to its end in the meantime
        for sock in socks[:2]:
            sock.sendall(frame(PING, b"still there?"))
            heard = b""
            while b"still there?" not in heard:
                data = sock.recv(65536)
                assert data, heard
                heard += data
            sock.sendall(frame(CLOSE, b"\x03\xe8"))
            heard += rest_of(sock)
            assert b'"result"' not in heard and closing_code(heard) == 1000
        socks[2].shutdown(socket.SHUT_WR)
        assert b'"result"' not in rest_of(socks[2])
        for sock in socks:
            sock.close()
        served.settled(*before)


def test_a_search_hears_that_its_client_is_there(searched: tuple[Path, str]) -> None:
    """It takes longer than silence is allowed to a WebSocket."""
    root, run = searched
    with Served(root, quick={"WS_PING_INTERVAL": 0.3, "WS_PING_TIMEOUT": 0.3}) as served:
        with served.websocket(f"/api{run}/search?key=x&value=77777") as sock:
            heard = b""
            while b'"result"' not in heard:
                data = sock.recv(65536)
                assert data, heard[-200:]
                heard += data
                if data[:2] == b"\x89\0":
                    sock.sendall(frame(10, b""))
            heard += rest_of(sock)
        assert heard.count(b'"searchable": false') == 12  # each took all its time
        assert closing_code(heard) == 1000


def test_websockets_are_pinged_and_told_of_the_end(root: Path) -> None:
    """Row 60: who answers pings stays, who does not is dropped, and a stop says 1001."""
    with Served(root, quick={"WS_PING_INTERVAL": 0.5, "WS_PING_TIMEOUT": 1.0}) as served:
        answers_pings, deaf = served.websocket(), served.websocket()
        pings = 0
        answers_pings.settimeout(10)
        while pings < 4:
            data = answers_pings.recv(100)
            assert data and set(data) == {0x89, 0}, data
            pings += len(data) // 2
            answers_pings.sendall(frame(10, b""))
        assert set(rest_of(deaf)) <= {0x89, 0}  # nothing but pings, then the end
        served.process.terminate()
        assert closing_code(rest_of(answers_pings)) == 1001
        assert served.process.wait(60) == 0


def test_a_stop_finishes_what_has_begun(root: Path) -> None:
    """Row 72: the request in flight is answered, one that is half here gets 503, nobody new gets in; exit 0."""
    with Served(root, quick={"DRAIN_TIMEOUT": 600.0}) as served:
        task = served.task()
        served.client.post(f"{task}/metadata", [{"field_name": "f", "value": "a" * 40 + "!"}])
        slow, half, idle = served.connect(), served.connect(), served.connect()
        step = task.rpartition("/tasks")[0].encode()
        slow.sendall(
            b"GET "
            + step
            + b"/filtered_tasks?pattern="
            + quote("(?=a)(a+)+$").encode()
            + b" HTTP/1.1\r\n"
            + HOST
            + b"\r\n"
        )
        half.sendall(b"POST /flows/Late HTTP/1.1\r\n" + HOST)
        wait_for(lambda: served.children)
        served.process.terminate()
        assert rest_of(idle) == b""
        with pytest.raises(OSError):
            wait_for(lambda: not served.connect())
        half.sendall(b"Content-Length: 2\r\n\r\n{}")
        assert answers(rest_of(half)) == [503] and answers(rest_of(slow)) in ([200], [400])
        # As soon as all is said, not when the time for it is up.
        assert served.process.wait(60) == 0 and "Traceback" not in served.log
    assert (
        not (served.metaflow / "Late").exists()
        and not (served.metaflow / ".mflocal/daemon.json").exists()
    )


def test_only_loopback_listens(served: Served) -> None:
    """Row 48: one address, 127.0.0.1."""
    rows = [
        line.split()
        for file in ("tcp", "tcp6")
        for line in Path(f"/proc/{served.pid}/net/{file}").read_text().splitlines()[1:]
    ]
    assert [
        row[1] for row in rows if row[3] == "0A" and row[1].endswith(":%04X" % served.port)
    ] == ["0100007F:%04X" % served.port]


def test_what_browsers_are_told(root: Path, tmp_path: Path) -> None:
    """Rows 41, 46, 47: types are not guessed, only friends may frame, logs are no pages, other sites embed nothing."""
    bundle = tmp_path / "bundle"
    (bundle / "static").mkdir(parents=True)
    (bundle / "index.html").write_text("<html>the UI</html>")
    (bundle / "static/x.js").write_text("1")
    env = clean_env(METAFLOW_LOCAL_SERVICE_UI_BUNDLE=str(bundle))
    with Served(root, "--allow-origin", "http://ui.example:3000", env=env) as served:
        task = served.task()
        _, _, flow, _, run, _, step, _, number = task.split("/")
        folder = served.metaflow.joinpath(
            "mf.cards", flow, "runs", run, "steps", step, "tasks", number, "cards"
        )
        folder.mkdir(parents=True)
        (folder / "default-abc123.html").write_text("<script>card</script>")
        log = served.metaflow.joinpath(flow, run, step, number, "0.task_stdout.log")
        log.write_text("<script>log</script>")
        served.client.post(f"{task}/metadata", [{"field_name": "ds-type", "value": "local"}, {"field_name": "ds-root", "value": str(served.metaflow)},
                                                {"field_name": "attempt", "value": "0"}])  # fmt: skip
        for path in (
            "/flows",
            "/nothing",
            f"/api{task}/cards/abc123",
            f"/api{task}/logs/out/download?attempt_id=0",
            "/",
            "/static/x.js",
            "/ping",
        ):
            answer = served.client("GET", path)
            assert (
                answer.headers["x-content-type-options"] == "nosniff"
                and answer.headers["cross-origin-resource-policy"] == "same-origin"
            ), path
            assert "access-control-allow-origin" not in answer.headers
        download = served.client("GET", f"/api{task}/logs/out/download?attempt_id=0")
        assert (
            download.status == 200
            and "html" not in download.headers["content-type"]
            and download.headers["content-disposition"].startswith("Attachment")
        )
        assert served.client("GET", "/").headers["x-frame-options"] == "SAMEORIGIN"
        card = served.client("GET", f"/api{task}/cards/abc123")
        assert card.status == 200 and "x-frame-options" not in card.headers
        policy = card.headers.get("content-security-policy", "")
        assert "frame-ancestors 'self'" in policy and "http://ui.example:3000" in policy


def test_ranges_of_files(root: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "index.html").write_text("0123456789")
    (bundle / "out.js").symlink_to("/etc/hostname")
    with Served(root, env=clean_env(METAFLOW_LOCAL_SERVICE_UI_BUNDLE=str(bundle))) as served:
        for ranges, status in (("bytes=2-4", 206), ("bytes=-3", 206), ("bytes=9-", 206), ("bytes=10-", 416), ("bytes=5-2", 416), ("bytes=", 200),
                               ("bytes=" + "9" * 5000 + "-", 416), ("bytes=-" + "9" * 5000, 206), ("bytes=0-" + "9" * 5000, 206),
                               ("bytes=0-1,3-4", 200), ("bytes=²-", 200), ("lines=1-2", 200), ("bytes=-0", 416)):  # fmt: skip
            got = served.raw(
                b"GET / HTTP/1.1\r\n" + HOST + b"Range: " + ranges.encode("latin-1") + b"\r\n\r\n"
            )
            assert answers(got)[0] == status, (ranges[:20], got[:200])
        for path in (
            "/out.js",
            "/..%2findex.html",
            "/static/../../x",
            "/%2e%2e/%2e%2e/etc/hostname",
        ):
            assert Path("/etc/hostname").read_text().strip() not in str(
                served.client("GET", path).body
            )
        assert "Traceback" not in served.log


# -- names: what reaches the disk


def page(served: Served, path: str = "/") -> tuple[int, str]:
    """(status, text) of a file of the UI."""
    answer = served.client("GET", path)
    return answer.status, str(answer.body)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_a_bundle_is_replaced_in_place(root: Path, tmp_path: Path, form: str) -> None:
    bundle = tmp_path / ("bundle.zip" if form == "zip" else "bundle")

    def build(number: int) -> None:
        files = {"index.html": f"build {number}", f"static/js/{number}.js": f"{number}"}
        if form == "zip":
            with zipfile.ZipFile(bundle, "w") as file:
                for name, text in files.items():
                    file.writestr(f"ui-{number}/{name}", text)
        else:
            shutil.rmtree(bundle, ignore_errors=True)
            for name, text in files.items():
                (bundle / name).parent.mkdir(parents=True, exist_ok=True)
                (bundle / name).write_text(text)

    build(1)
    with Served(root, env=clean_env(METAFLOW_LOCAL_SERVICE_UI_BUNDLE=str(bundle))) as served:
        assert page(served) == page(served, "/F/1/start") == (200, "build 1")
        build(22)
        assert page(served) == page(served, "/F/1/start") == (200, "build 22")
        assert page(served, "/static/js/22.js") == (200, "22")
        assert page(served, "/static/js/1.js")[0] == 404
        shutil.rmtree(bundle) if form == "folder" else bundle.unlink()
        status, text = page(served)
        assert status == 404 and str(bundle) in text
        bundle.write_text("no zip, and no folder")
        assert page(served)[0] == 404
        bundle.unlink()
        build(333)
        assert page(served) == (200, "build 333")
        assert "Traceback" not in served.log


def test_a_small_zip_that_unpacks_to_gigabytes(root: Path, tmp_path: Path) -> None:
    """It is refused by name, at the start and when it takes the place of a good one."""
    bundle, bomb = tmp_path / "bundle.zip", tmp_path / "bomb.zip"
    with zipfile.ZipFile(bundle, "w") as file:
        file.writestr("index.html", "the UI")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("index.html", "the UI")
        with file.open("static/x.js", "w", force_zip64=True) as member:
            for _ in range(80):
                member.write(bytes(1 << 20))
    assert bomb.stat().st_size < 200_000
    done = mflocal("serve", "--bundle", str(bomb), cwd=root)
    assert done.returncode == 3 and "bomb.zip unpacks to 80 MiB" in done.stderr
    with Served(root, env=clean_env(METAFLOW_LOCAL_SERVICE_UI_BUNDLE=str(bundle))) as served:
        assert page(served) == (200, "the UI")
        os.replace(bomb, bundle)
        before = served.memory()
        status, text = page(served, "/static/x.js")
        assert status == 404 and "80 MiB" in text
        assert served.memory() < before + 30


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_large_files_of_a_bundle_go_piece_by_piece(root: Path, tmp_path: Path, form: str) -> None:
    """A pipe among them is no file."""
    folder = tmp_path / "bundle"
    (folder / "static").mkdir(parents=True)
    (folder / "index.html").write_text("the UI")
    data = random.Random(1).randbytes(1 << 20) * 20
    (folder / "static/x.js").write_bytes(data)
    bundle = folder
    if form == "zip":
        bundle = Path(shutil.make_archive(str(tmp_path / "bundle"), "zip", folder))
    else:
        os.mkfifo(folder / "static/pipe.js")
    with Served(root, env=clean_env(METAFLOW_LOCAL_SERVICE_UI_BUNDLE=str(bundle))) as served:
        get = b"GET /static/x.js HTTP/1.1\r\n" + HOST + b"Connection: close\r\n"
        got = served.raw(get + b"\r\n", half_close=False)
        assert got.partition(b"\r\n\r\n")[2] == data and b"Content-Length: 20971520\r\n" in got
        got = served.raw(get + b"Range: bytes=3000001-3000005\r\n\r\n", half_close=False)
        assert got.partition(b"\r\n\r\n")[2] == data[3000001:3000006]
        assert b"Content-Range: bytes 3000001-3000005/20971520\r\n" in got
        assert page(served, "/static/pipe.js")[0] == 404
        before = served.memory()
        deaf = [served.connect(receive=4096) for _ in range(20)]
        for sock in deaf:
            sock.sendall(get + b"\r\n")
            assert sock.recv(12) == b"HTTP/1.1 200"
        assert served.memory() < before + 60  # not 400 MiB
        for sock in deaf:
            sock.close()


class Watch:
    """Every path that this process opens, lists, makes, renames or removes while it is on (audit hooks stay for life)."""

    EVENTS = {"open": 1, "os.listdir": 1, "os.scandir": 1, "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1,
              "os.symlink": 2, "os.link": 2, "os.chmod": 1, "os.truncate": 1, "os.chown": 1, "os.mknod": 1}  # fmt: skip

    def __init__(self) -> None:
        self.paths: list[str] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: Any) -> None:
        if self.paths is not None and event in self.EVENTS:
            for path in args[: self.EVENTS[event]]:
                if isinstance(path, (str, bytes)):
                    self.paths.append(os.fsdecode(path))


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


given = pytest.importorskip("hypothesis").given
example = pytest.importorskip("hypothesis").example
settings = pytest.importorskip("hypothesis").settings
st = pytest.importorskip("hypothesis.strategies")

NASTY = ["..", ".", "", "/", "//", "../../x", "..\\..", "a/b", "/etc/passwd", "\0", "a\0b", ".mflocal", ".tmp", "_meta", "data",
         "latest_run", "mf.cards", "*", "?", "[a]", "~", "-", "a\nb", "\ud800", "é", "e\u0301", "ﬁ", "K", "x" * 255, "x" * 256,
         "ü" * 127, "CON", "a:b", "C:", "%2e%2e", "%2F", "..%2f", "_self", "_mflocal", "0", "00", "١", "²", "1" * 40]  # fmt: skip
SERIAL = itertools.count(1)  # a run of its own for each example: none depends on those before
names = (
    st.sampled_from(NASTY)
    | st.text(max_size=12)
    | st.from_regex(r"[A-Za-z0-9._:-]{1,20}", fullmatch=True)
)


def ask(router: module.Router, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """One request through the routes, as section 14 does it; anything but a Problem is a bug."""
    data = b"" if body is None else json.dumps(body).encode()

    async def whole() -> tuple[int, Any]:
        path_only, _, query = path.partition("?")
        request = module.Request(
            method, path_only, query, {"host": "localhost"}, data, authority="localhost"
        )
        try:
            result = router.dispatch(request)
            if not isinstance(result, module.Response):
                result = await result
        except module.Problem as problem:
            return problem.status, problem.detail
        if result.stream is not None:
            return result.status, [piece async for piece in result.stream]
        try:
            return result.status, json.loads(result.body)
        except ValueError:
            return result.status, result.body

    return asyncio.run(whole())


def segment(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


def inside(path: str, metaflow_dir: str, flow: str) -> bool:
    """The rule: only .metaflow itself, its flow, the flow's cards, and the folder for temp files."""
    real = os.path.realpath(path)
    own = [
        os.path.join(metaflow_dir, *parts)
        for parts in ((flow,), ("mf.cards",), (".mflocal", "tmp"))
    ]
    return real == metaflow_dir or any(
        real == place or real.startswith(place + os.sep) for place in own
    )


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(pytest.importorskip("hypothesis").HealthCheck),
)
@example(flow="..", run="..", step="..", task="..", name="..", more="..")
@example(flow="\ud800", run="\ud800", step="\ud800", task="\ud800", name="\ud800", more="\ud800")
@given(flow=names, run=names, step=names, task=names, name=names, more=names)
def test_nothing_outside_is_opened(
    parts: Any, watch: Watch, flow: str, run: str, step: str, task: str, name: str, more: str
) -> None:
    """Whatever stands in the URL or in the body, for every route there is."""
    store, router = parts
    root, secret = os.path.realpath(store.root), os.path.join(os.path.dirname(store.root), "secret")
    if not os.path.exists(secret):
        os.makedirs(os.path.join(secret, "_meta"))
        Path(secret, "_meta", "_self.json").write_text('{"flow_id": "secret", "ts_epoch": 1}')
    values = {
        "flow": flow,
        "run": run,
        "step": step,
        "task": task,
        "name": name,
        "hash": more,
        "file": more,
        "attempt": more,
    }
    good = {"flow": "Flow", "run": f"r-{next(SERIAL)}", "step": "start", "task": "t-1", "name": "x"}
    ask(router, "POST", "/flows/Flow", BODY)
    base = f"/flows/Flow/runs/{good['run']}/steps/start"
    ask(router, "POST", "/flows/Flow/run", {**BODY, "run_number": good["run"]})
    ask(router, "POST", f"{base}/step", BODY)
    ask(router, "POST", f"{base}/task", {**BODY, "task_id": "t-1"})
    calls = []
    for method, pattern in router.patterns:
        if pattern.startswith("/api/metadata") or "{" not in pattern:
            continue
        for key in values:  # one hostile part at a time, then all
            if f"{{{key}}}" in pattern:
                calls.append(
                    (
                        method,
                        pattern,
                        {**good, "hash": "x", "file": "x", "attempt": "0", key: values[key]},
                    )
                )
        calls.append((method, pattern, values))
    own = [("POST", "/flows/Flow/run", {"run_number": run}), ("POST", f"{base}/task", {"task_id": task}),
           ("POST", f"{base}/tasks/t-1/metadata", [{"field_name": name, "value": more, "type": more, "user_name": more}]),
           ("POST", f"{base}/tasks/t-1/metadata", [{"field_name": "ds-root", "value": more}, {"field_name": "ds-type", "value": "local"}]),
           ("POST", f"{base}/tasks/t-1/artifact", [{"name": name, "location": more, "sha": more, "ds_type": "local"}]),
           ("GET", f"/api{base}/tasks/t-1/artifacts?postprocess=true", None), ("GET", f"/api{base}/tasks/t-1/logs/out", None)]  # fmt: skip
    watch.paths = heard = []
    try:
        results = [ask(router, method, pattern.format(**{k: segment(v) for k, v in vals.items()}), {} if method != "GET" else None)
                   for method, pattern, vals in calls]  # fmt: skip
        results += [ask(router, *call) for call in own]
    finally:
        watch.paths = None
    assert not [
        result for result in results if result[0] >= 500 and result[0] != 501
    ]  # 501: not a local datastore
    assert not [
        result for result in results if "secret" in str(result[1]) and "secret" not in str(values)
    ]
    flows = [name for name in os.listdir(root) if name.isidentifier()]
    wrong = [
        path
        for path in heard
        if not any(inside(path, root, name) for name in [*flows, "Flow", "x"])
    ]
    # Python's own imports and pseudo random sources of asyncio are no business of ours.
    known = ("/proc/self/mountinfo", "/proc/stat")  # since when the machine is up
    wrong = [
        path
        for path in wrong
        if not path.endswith((".py", ".pyc", ".so", *known)) and "python" not in path
    ]
    assert wrong == []
    assert set(os.listdir(os.path.dirname(root))) == {".metaflow", "secret"}
    assert [name for name in os.listdir(root) if not name.isidentifier()] == [".mflocal"]


READ_BACK = """
import glob
found = {}
for run in LocalMetadataProvider.get_object("flow", "run", {}, None, "Flow"):
    run_id = run["run_number"]
    found.setdefault(run_id, {})
    for step in LocalMetadataProvider.get_object("run", "step", {}, None, "Flow", run_id):
        for task in LocalMetadataProvider.get_object("step", "task", {}, None, "Flow", run_id, step["step_name"]):
            where = ("Flow", run_id, step["step_name"], task["task_id"])
            metadata = LocalMetadataProvider.get_object("task", "metadata", {}, None, *where)
            artifacts = LocalMetadataProvider.get_object("task", "artifact", {}, None, *where)
            artifacts = [artifacts] if isinstance(artifacts, dict) else artifacts  # a single one comes bare
            found[run_id]["/".join(where[2:])] = {
                "user": task["user_name"], "tags": run["tags"],
                "metadata": sorted([[m["field_name"], m["value"], m["type"]] for m in metadata]),
                "artifacts": sorted([[a["name"], a["sha"], a["attempt_id"]] for a in artifacts]),
            }
print(json.dumps(found))
"""


def write_task(
    router: Any, base: str, task: str, user: str, rows: list[tuple[str, str, str]]
) -> tuple[str, dict[str, Any]]:
    """Makes a task in a step, under its own name if that is taken; its id, and what was answered with 200."""
    status, answer = ask(router, "POST", f"{base}/task", {"user_name": user, "task_id": task})
    if status != 200:
        status, answer = ask(router, "POST", f"{base}/task", {"user_name": "plain"})
        assert status == 200
    place = f"{base}/tasks/{segment(str(answer['task_id']))}"
    # Without attempt-done local mode shows no artifact.
    facts, artifacts = [], []
    for name, value, kind in [("attempt-done", "0", "attempt-done"), *rows]:
        row = {"field_name": name, "value": value, "type": kind[:20]}
        if ask(router, "POST", f"{place}/metadata", [row])[0] == 200:
            facts.append([name, value, kind[:20]])
    for name, value, _ in rows:
        if (
            ask(
                router, "POST", f"{place}/artifact", [{"name": name, "sha": value, "attempt_id": 0}]
            )[0]
            == 200
        ):
            artifacts.append([name, value, 0])
    assert facts[0][0] == "attempt-done"
    found = {"user": answer["user_name"], "metadata": sorted(facts), "artifacts": sorted(artifacts)}
    return str(answer["task_id"]), found


def test_local_mode_reads_back_what_was_written(parts: Any, tmp_path: Path) -> None:
    """Each 200 of ours, whatever the names and values, is what the real LocalMetadataProvider finds."""
    store, router = parts
    ask(router, "POST", "/flows/Flow", BODY)
    written: dict[str, Any] = {}
    texts = names | st.text(max_size=30)
    words = names | st.sampled_from(["start", "größe", "_x", "a" * 200, "end"])
    odd_rows = [("[a]", "\ud800", "x"), ("*", "1", "y"), (" ", "", "")]

    @settings(max_examples=80, deadline=None, derandomize=True)
    @example(run=".hidden", step="start", task=".hidden", user="u", tag="t", rows=[("a", "b", "c")])
    @example(run="~", step="K", task="a:b", user="\ud800", tag="\udfff", rows=odd_rows)
    @given(
        names,
        words,
        names,
        texts,
        texts,
        st.lists(st.tuples(names, texts, texts), max_size=4, unique_by=lambda r: r[0]),
    )
    def write(
        run: str, step: str, task: str, user: str, tag: str, rows: list[tuple[str, str, str]]
    ) -> None:
        status, answer = ask(
            router, "POST", "/flows/Flow/run", {"user_name": user, "tags": [tag], "run_number": run}
        )
        if status != 200:
            status, answer = ask(router, "POST", "/flows/Flow/run", {"tags": ["t"]})
            assert status == 200
        run_id = str(answer["run_number"])
        mine = written[run_id] = {}
        base = f"/flows/Flow/runs/{segment(run_id)}/steps/{segment(step)}"
        if ask(router, "POST", f"{base}/step", BODY)[0] == 200:
            task_id, found = write_task(router, base, task, user, rows)
            mine[f"{step}/{task_id}"] = {**found, "tags": answer["tags"]}

    write()
    assert sum(bool(tasks) for tasks in written.values()) > 10
    found = script(READ_BACK, Path(store.root).parent)
    assert set(found) == set(written), sorted(set(found) ^ set(written))
    for run_id, tasks in written.items():
        for where, facts in tasks.items():
            assert found[run_id].get(where) == facts, (run_id, where)


# -- files: a hostile checkout


SHIPPED = [("fifo", name) for name in ("lock", "daemon.log", "daemon.json", "tmp", ".")]
SHIPPED += [("directory", name) for name in ("lock", "daemon.log", "tmp", "x.tmp")] + [
    ("socket", "lock"),
    ("device", "daemon.log"),
]
SHIPPED += [
    ("link", "tmp"),
    ("link", "x.tmp"),
    ("dangling", "lock"),
    ("dangling", "daemon.log"),
    ("dangling", "daemon.json"),
    ("dangling", "."),
]


@pytest.mark.parametrize("what, name", SHIPPED)
def test_a_checkout_that_ships_our_state_gains_nothing(
    tmp_path: Path, name: str, what: str
) -> None:
    """Either it starts, with private files of its own, or it says in one line why not; nothing is followed."""
    project, victim = tmp_path / "p", tmp_path / "victim"
    state = project / ".metaflow" / ".mflocal"
    place = state / name if name != "." else state
    place.parent.mkdir(parents=True)
    if name != ".":
        state.chmod(0o777)
    victim.mkdir()
    (victim / "precious").write_text("precious")
    if what == "fifo":
        os.mkfifo(place)
    elif what == "socket":
        short = Path(tempfile.mkdtemp(prefix="s"))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(short / "s"))
        os.rename(short / "s", place)
        short.rmdir()
    elif what == "directory":
        place.mkdir()
        (place / "full").write_text("x")
    elif what == "link":
        place.symlink_to(victim if name in ("tmp", ".") else victim / "precious")
    elif what == "dangling":
        place.symlink_to(victim / "new")
    elif os.geteuid() == 0:
        os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    else:
        pytest.skip("only root makes devices")
    done = mflocal("start", cwd=project, timeout=60)
    try:
        assert done.returncode in (0, 3), (done.returncode, done.stderr)
        assert "Traceback" not in done.stderr + done.stdout
        if done.returncode:
            assert done.stderr.count("\n") == 1 and ".mflocal" in done.stderr
        else:
            assert stat.S_IMODE(state.lstat().st_mode) == 0o700 and not state.is_symlink()
            told = json.loads((state / "daemon.json").read_text())
            assert mflocal("url", cwd=project).stdout.strip().endswith(":%d" % told["port"])
            for own in ("daemon.json", "lock", "daemon.log"):
                assert (
                    stat.S_ISREG((state / own).lstat().st_mode)
                    and stat.S_IMODE((state / own).lstat().st_mode) == 0o600
                )
            assert mflocal("stop", cwd=project).returncode == 0
    finally:
        mflocal("stop", "--force", cwd=project)
    assert (victim / "precious").read_text() == "precious" and os.listdir(victim) == ["precious"]


def test_flows_that_are_links_are_not_written_through(tmp_path: Path, root: Path) -> None:
    """Row 39, the writing side, each level a link to a task of another project."""
    with Served(root) as other:
        task = other.task()
    _, _, flow, _, run, _, step, _, number = task.split("/")
    before = tree(root)
    levels = [(flow,), (flow, run), (flow, run, step), (flow, run, step, number), (flow, "_meta"), (flow, run, "_meta"),
              (flow, run, step, "_meta"), (flow, run, step, number, "_meta")]  # fmt: skip
    for place, level in enumerate(levels):
        project = tmp_path / f"p{place}"
        shutil.copytree(root, project, ignore=shutil.ignore_patterns(".mflocal"))
        link = project.joinpath(".metaflow", *level)
        shutil.rmtree(link)
        link.symlink_to((root / ".metaflow").joinpath(*level))
        with Served(project) as served:
            for path, body in ((f"/flows/{flow}", {}), (f"/flows/{flow}/run", {"run_number": "new"}),
                               (f"/flows/{flow}/runs/{run}/steps/new/step", {}), (f"/flows/{flow}/runs/{run}/steps/{step}/task", {"task_id": "new"}),
                               (f"{task}/metadata", [{"field_name": "new", "value": "x"}]), (f"{task}/artifact", [{"name": "new"}]),
                               (f"{task}/heartbeat", {}), (f"/flows/{flow}/runs/{run}/heartbeat", {})):  # fmt: skip
                status = served.client("POST", path, body).status
                assert status in (200, 400, 404, 409, 500), (level, path, status)
            served.client("PATCH", f"/flows/{flow}/runs/{run}/tag/mutate", {"tags_to_add": ["new"]})
    assert tree(root) == before


def tree(root: Path) -> dict[str, Any]:
    """Every file below .metaflow but the state, with its content."""
    files = [
        path
        for path in (root / ".metaflow").rglob("*")
        if path.is_file() and ".mflocal" not in path.parts
    ]
    return {str(path): path.read_bytes() for path in files if path.name != "_mflocal.json"}


# -- pages in a browser, over the wire


EVIL = b"Origin: http://evil.example"
Sender = Callable[..., bytes]


@pytest.fixture
def send(served: Served) -> Sender:
    """One request as a browser would send it; all that comes back."""

    def sent(
        method: bytes, path: bytes, *fields: bytes, host: bytes = b"localhost", body: bytes = b""
    ) -> bytes:
        lines = [
            method + b" " + path + b" HTTP/1.1",
            b"Host: " + host,
            b"Connection: close",
            *fields,
        ]
        if body:
            lines.append(b"Content-Length: %d" % len(body))
        return served.raw(b"\r\n".join(lines) + b"\r\n\r\n" + body, half_close=False)

    return sent


def test_what_a_page_can_send(served: Served, send: Sender) -> None:
    """Origin, Sec-Fetch-Site, simple POSTs and WebSockets of a foreign page."""
    before = tree(served.root)
    ways: list[tuple[bytes, ...]] = [
        (EVIL,), (b"Origin: null",), (b"Origin: http://localhost.evil.example",), (b"Origin: http://localhost@evil.example",),
        (b"Origin: chrome-extension://abc",), (b"Origin: http://127.0.0.1.nip.io",), (b"Origin: http://2130706433",),
        (b"Origin: http://[::ffff:127.0.0.2]:1",), (b"Sec-Fetch-Site: cross-site", b"Sec-Fetch-Mode: no-cors"),
    ]  # fmt: skip
    for way in ways:
        for method, path, body in ((b"GET", b"/flows", b""), (b"GET", b"/api/flows", b""), (b"POST", b"/flows/Evil", b"{}"),
                                   (b"POST", b"/flows/F/run", b'{"a=": "b"}'), (b"PATCH", b"/flows/F/runs/1/tag/mutate", b"{}"),
                                   (b"POST", b"/_mflocal/stop", b'{"force": true}'), (b"GET", b"/_mflocal/id", b"")):  # fmt: skip
            simple = (b"Content-Type: text/plain",) if body else ()
            got = send(method, path, *way, *simple, body=body)
            assert answers(got) == [403], (way, path, got[:300])
            assert b"Access-Control-Allow" not in got and b'"flow_id"' not in got
        upgrade = send(
            b"GET",
            b"/api/ws",
            *way,
            UPGRADE[:-2].replace(b"Connection: Upgrade", b"Connection: close, Upgrade"),
        )
        assert b" 403 " in upgrade.split(b"\r\n")[0] or b" 400 " in upgrade.split(b"\r\n")[0], (
            upgrade[:200]
        )
        asked = served.raw(
            b"GET /api/ws HTTP/1.1\r\n" + HOST + b"\r\n".join(way) + b"\r\n" + UPGRADE + b"\r\n"
        )
        assert asked.startswith(b"HTTP/1.1 403 "), asked[:200]
    preflight = send(b"OPTIONS", b"/flows/F", EVIL, b"Access-Control-Request-Method: POST")
    assert answers(preflight) == [403] and b"Access-Control-Allow" not in preflight
    kind = b"Content-Type: application/x-www-form-urlencoded"
    assert answers(
        send(b"POST", b"/flows/Evil", b"Sec-Fetch-Site: same-site", kind, body=b"{}")
    ) == [403]
    assert tree(served.root) == before


def test_names_of_other_hosts_are_refused(served: Served, send: Sender) -> None:
    """DNS rebinding: the page's own name leads here."""
    for host in (b"evil.example", b"127.0.0.1.nip.io", b"localhost.evil.example:80", b"[::2]", b"0.0.0.0", b"2130706433",
                 b"[::ffff:7f00:1]"):  # fmt: skip
        for path in (b"/flows", b"/ping", b"/_mflocal/id", b"/api/ws", b"/nothing"):
            got = send(b"GET", path, host=host)
            assert answers(got) == [403] and b'"flow_id"' not in got, (host, path, got[:200])
        rebound = served.raw(
            b"GET /api/ws HTTP/1.1\r\nHost: "
            + host
            + b"\r\nOrigin: http://"
            + host
            + b"\r\n"
            + UPGRADE
            + b"\r\n"
        )
        assert rebound.startswith(b"HTTP/1.1 403 ")


def test_friends_are_served(served: Served, send: Sender) -> None:
    friend = send(b"GET", b"/flows", b"Origin: http://localhost:3000")
    assert (
        answers(friend) == [200]
        and b"Access-Control-Allow-Origin: http://localhost:3000\r\n" in friend
    )
    for host in (b"127.0.0.1:1", b"[::1]:99", b"LOCALHOST", b"x.localhost"):
        assert answers(send(b"GET", b"/flows", host=host)) == [200]
    with served.websocket(headers=b"Origin: http://localhost:3000\r\n"):
        pass


def test_no_page_writes_unless_it_was_named(root: Path) -> None:
    """Not even our own: cards are programs that run there. The UI never writes."""
    with Served(root, "--allow-origin", "http://ui.example:3000") as served:
        own = f"http://127.0.0.1:{served.port}"
        ways = [
            {"Origin": own, "Sec-Fetch-Site": "same-origin"},
            {"Origin": "http://localhost:3000"},
            {"Sec-Fetch-Site": "same-origin"},
            {"Sec-Fetch-Site": "none"},
        ]
        for headers in ways:
            for method, path in (("POST", "/flows/F"), ("PATCH", "/flows/F/runs/1/tag/mutate")):
                answer = served.client(method, path, {}, headers)
                assert answer.status == 403 and "--allow-origin" in str(answer.body), headers
            assert served.client("GET", "/flows", headers=headers).status == 200, headers
        assert not (served.metaflow / "F").exists()
        named = {"Origin": "http://ui.example:3000", "Sec-Fetch-Site": "cross-site"}
        assert served.client("POST", "/flows/F", {}, named).status == 200


def test_plugins_load_in_frames_without_an_origin(root: Path, tmp_path: Path) -> None:
    """The UI shows them in sandbox="allow-scripts": what such a frame loads looks like another site's."""
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "manifest.json").write_text('{"name": "p", "version": "1"}')
    (plugin / "index.html").write_text("<script type=module src=x.js></script>")
    (plugin / "x.js").write_text("1")
    (tmp_path / "plugins.json").write_text('[{"path": "plugin"}]')
    env = clean_env(
        METAFLOW_LOCAL_SERVICE_PLUGINS=str(tmp_path / "plugins.json"),
        METAFLOW_LOCAL_SERVICE_AUTH_KEY="key",
    )
    ways = [
        {"Origin": "null", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ]
    with Served(root, env=env) as served:
        for headers in ways:
            for name in ("index.html", "x.js"):
                answer = served.client("GET", f"/api/plugin/p/{name}", headers=headers)
                assert (
                    answer.status == 200 and answer.headers["access-control-allow-origin"] == "null"
                )
                assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
            for path in ("/api/plugin", "/api/plugin/p", "/api/flows", "/api/plugin/p/../../flows"):
                keyed = {**headers, "x-api-key": "key"}
                assert served.client("GET", path, headers=keyed).status in (403, 404), path
            assert served.client("POST", "/api/plugin/p/x.js", {}, headers).status == 403
        rebound = {**ways[0], "Host": "evil.example"}
        assert served.client("GET", "/api/plugin/p/x.js", headers=rebound).status == 403


def addresses() -> list[str]:
    """IP addresses of this machine that are not loopback."""
    found = []
    for family, far in ((socket.AF_INET, "192.0.2.99"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.connect((far, 9))
            found.append(sock.getsockname()[0])
    return found


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0", "127.1", "name"])
def test_what_we_listen_on_may_be_named(root: Path, host: str) -> None:
    """The address that a client reached (a kubelet probes by IP), and the one that commands speak to."""
    name = socket.gethostname()
    if host == "name":
        try:
            socket.getaddrinfo(name, None, socket.AF_INET)
        except OSError:
            pytest.skip("this machine does not know its own name")
        host = name
    env = clean_env(METAFLOW_LOCAL_SERVICE_AUTH_KEY="key")
    with Served(root, "--host", host, env=env) as served:

        def ping(address: str, *names: str) -> list[int]:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            found = []
            for text in names:
                with socket.socket(family) as sock:
                    sock.settimeout(20)
                    sock.connect((address, served.port))
                    sock.sendall(
                        b"GET /ping HTTP/1.1\r\nConnection: close\r\nHost: %s\r\n\r\n"
                        % text.encode()
                    )
                    found += answers(rest_of(sock))
            return found

        if host in ("0.0.0.0", "::", "0"):
            for address in addresses():
                if ":" in address and host != "::":
                    continue
                literal = f"[{address}]" if ":" in address else address
                assert ping(address, literal, f"{literal}:{served.port}", "10.9.8.7") == [
                    200,
                    200,
                    403,
                ]
        else:
            assert ping(socket.gethostbyname(host), served.state["address"]) == [200]


# -- another user of this machine

NOBODY = 65534


def as_nobody(act: Callable[[], Any]) -> Any:
    """What `act` returns in a child that has become another user."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    "localhost".encode("idna")  # whatever urllib imports later may lie where only we can read
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            try:
                answer = ["ok", act()]
            except Exception as error:
                answer = ["error", type(error).__name__]
            os.write(write, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    assert data, "the child has failed"
    return json.loads(data)


@pytest.fixture
def open_root() -> Iterator[Path]:
    """A project that everybody can enter; pytest's own folders are private."""
    with tempfile.TemporaryDirectory(prefix="mflocal-") as name:
        os.chmod(name, 0o755)
        root = Path(name).resolve() / "root"
        root.mkdir(mode=0o755)
        yield root


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_neighbour_reaches_no_state(open_root: Path) -> None:
    old = os.umask(0o000)  # the worst that the owner can have
    try:
        with Served(
            open_root, env=clean_env(METAFLOW_LOCAL_SERVICE_AUTH_KEY="secret-key")
        ) as served:
            state = open_root / ".metaflow" / ".mflocal"
            for act in (lambda: os.listdir(state), lambda: (state / "daemon.json").read_text(), lambda: (state / "lock").write_text("1"),
                        lambda: (state / "daemon.json").unlink(), lambda: (state / "x.tmp").write_text(""), lambda: os.listdir(state / "tmp"),
                        lambda: os.symlink("/etc/passwd", state / "tmp" / "0"), lambda: os.kill(served.pid, 15),
                        lambda: Path(f"/proc/{served.pid}/environ").read_bytes().hex(), lambda: os.listdir(f"/proc/{served.pid}/fd"),
                        lambda: os.chmod(state, 0o777)):  # fmt: skip
                assert as_nobody(act) == ["error", "PermissionError"]
            assert b"secret-key" not in Path(f"/proc/{served.pid}/cmdline").read_bytes()

            def talk() -> list[Any]:
                paths = ("/flows", "/api/flows", "/_mflocal/status", "/flows/F", "/api/ws")
                found = [served.client("GET", path).status for path in paths]
                found += [
                    served.client("GET", "/flows", headers={"x-api-key": key}).status
                    for key in ("", "x", "secret-kez", "secret-key ")
                ]
                found.append(served.client("POST", "/flows/Theirs", {}).status)
                found.append(
                    served.client(
                        "POST", "/_mflocal/stop", {"force": True}, {"x-mflocal-token": "0" * 48}
                    ).status
                )
                found.append(served.client("GET", "/ping").status)
                return found

            assert as_nobody(talk) == [
                "ok",
                [401, 401, 403, 401, 401, 401, 401, 401, 200, 401, 403, 200],
            ]
            assert served.client("GET", "/flows", headers={"x-api-key": "secret-key"}).status == 200
            assert served.process.poll() is None and not (open_root / ".metaflow/Theirs").exists()
    finally:
        os.umask(old)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("key", ["", "secret-key"])
def test_another_user_is_refused_without_the_key(open_root: Path, key: str) -> None:
    """Reads, writes, WebSockets; nothing of it reaches the disk. Who has the key is let in; our own user needs none."""
    env = clean_env(**({"METAFLOW_LOCAL_SERVICE_AUTH_KEY": key} if key else {}))
    with Served(open_root, env=env) as served:
        headers = {"x-api-key": key} if key else {}
        assert served.client("POST", "/flows/Ours", {}, headers).status == 200

        def ask(headers: dict[str, str]) -> list[Any]:
            got = [
                served.client("GET", path, headers=headers)
                for path in ("/flows", "/api/flows", "/")
            ]
            got.append(served.client("POST", "/flows/Theirs", {}, headers))
            got.append(served.client("PATCH", "/flows/Ours/runs/1/tag/mutate", {}, headers))
            sent = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
            asked = b"GET /api/ws HTTP/1.1\r\n" + HOST + sent + UPGRADE + b"\r\n"
            with served.connect() as sock:
                sock.sendall(asked)
                upgrade = sock.recv(12)
            return [
                *[answer.status for answer in got],
                int(upgrade[9:]),
                *[str(answer.body) for answer in got[:1]],
            ]

        word, refusal = as_nobody(lambda: ask({}))
        assert word == "ok" and refusal[:6] == [401 if key else 403] * 6, refusal
        if not key:
            assert "AUTH_KEY" in refusal[6] and "mflocal env" in refusal[6]
        assert as_nobody(lambda: served.client("GET", "/ping").status) == ["ok", 200]

        def leave(count: int) -> bool:
            """Whoever leaves at once belongs to nobody any more, and must not pass for root."""
            for number in range(count):
                with served.connect() as sock:
                    sock.sendall(
                        b"POST /flows/Left%d HTTP/1.1\r\n" % number
                        + HOST
                        + b"Content-Length: 2\r\n\r\n{}"
                    )
            return True

        assert as_nobody(lambda: leave(50)) == ["ok", True]
        assert served.client("GET", "/flows", headers=headers).status == 200  # has seen them all
        assert sorted(path.name for path in served.metaflow.iterdir()) == [".mflocal", "Ours"]
        if key:
            word, welcome = as_nobody(lambda: ask(headers))
            assert word == "ok" and welcome[:6] == [200, 200, 404, 200, 404, 101], welcome


def test_the_tables_of_sockets_agree() -> None:
    """By netlink, and where there is none by /proc/net/tcp."""
    if not os.path.exists("/proc/net/tcp"):
        pytest.skip("this system does not tell whose a connection is")
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as listener:
            try:
                listener.bind((host, 0))
            except OSError:
                continue  # no IPv6 here
            listener.listen()
            with socket.create_connection(listener.getsockname()[:2]) as client:
                with listener.accept()[0] as server:
                    near, far = client.getsockname(), server.getsockname()
                    ends = [(socket.inet_pton(family, end[0]), end[1]) for end in (near, far)]
                    by_table = module._socket_owner_in_table(family, ends)
                    assert by_table == module._socket_owner(near, far)
                    assert by_table is not None and by_table[0] == os.geteuid()
                    assert by_table[1] == os.fstat(client.fileno()).st_ino
                    assert module.other_user(far, near) is None
                    client.close()
                    assert module.other_user(far, near) == -1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_a_neighbour_plants_is_not_followed(open_root: Path) -> None:
    """In a .metaflow that others may write to, before our start: a state directory of theirs, links in place of flows."""
    victim = open_root.parent / "victim"
    victim.mkdir(mode=0o700)
    (victim / "_self.json").write_text(
        '{"flow_id": "F", "run_number": "1", "ts_epoch": 1, "tags": ["victim"]}'
    )
    metaflow = open_root / ".metaflow"
    metaflow.mkdir()
    metaflow.chmod(0o777)

    def plant() -> None:
        (metaflow / ".mflocal").mkdir(mode=0o777)
        (metaflow / ".mflocal/daemon.json").write_text("{}")
        os.symlink(victim, metaflow / ".mflocal/tmp")
        (metaflow / "F/_meta").mkdir(parents=True)
        (metaflow / "F/_meta/_self.json").write_text('{"flow_id": "F", "ts_epoch": 1}')
        (metaflow / "F/1").mkdir()
        os.symlink(victim, metaflow / "F/1/_meta")
        os.chmod(metaflow / "F", 0o777)

    assert as_nobody(plant) == ["ok", None]
    done = mflocal("start", cwd=open_root)
    assert done.returncode == 0, done.stderr
    theirs, ours = metaflow / ".mflocal", metaflow / f".mflocal-{os.geteuid()}"
    assert sorted(os.listdir(theirs)) == ["daemon.json", "tmp"] and os.listdir(victim) == [
        "_self.json"
    ]
    assert ours.stat().st_mode & 0o777 == 0o700 and (ours / "daemon.json").exists()
    assert mflocal("stop", cwd=open_root).returncode == 0
    shutil.rmtree(theirs)
    shutil.rmtree(ours)
    before = (victim / "_self.json").read_text()
    with Served(open_root) as served:
        assert served.client("GET", "/flows/F/runs/1").status == 404
        assert served.client("POST", "/flows/F/runs/1/heartbeat", {}).status == 404
        assert (
            served.client("PATCH", "/flows/F/runs/1/tag/mutate", {"tags_to_add": ["x"]}).status
            == 404
        )
        assert served.client("POST", "/flows/F/run", {"run_number": "1"}).status == 400
    assert os.listdir(victim) == ["_self.json"] and (victim / "_self.json").read_text() == before


@pytest.mark.parametrize("level", ["flow", "run", "step", "task", "_meta"])
def test_a_directory_replaced_by_a_link_is_not_followed(
    root: Path, tmp_path: Path, level: str
) -> None:
    """It was a directory when it was read; then somebody put a link in its place."""
    outside = tmp_path / "outside"
    with Served(root) as served:
        task = served.task()
        _, _, flow, _, run, _, step, _, number = task.split("/")
        paths = {
            "flow": (flow,),
            "run": (flow, run),
            "step": (flow, run, step),
            "task": (flow, run, step, number),
            "_meta": (flow, run, step, number, "_meta"),
        }
        place = served.metaflow.joinpath(*paths[level])
        os.rename(place, outside)
        os.symlink(outside, place)
        before = sorted(str(path) for path in outside.rglob("*") if path.name != "_mflocal.json")
        base = f"/flows/{flow}/runs/{run}/steps"
        for path, body in (
            (f"{base}/new/step", {}),
            (f"{base}/{step}/task", {}),
            (f"{task}/metadata", [{"field_name": "a"}]),
            (f"{task}/artifact", [{"name": "a"}]),
        ):
            served.client("POST", path, body)
        assert (
            sorted(str(path) for path in outside.rglob("*") if path.name != "_mflocal.json")
            == before
        )
