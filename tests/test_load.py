"""Many clients at once: nobody starves, nothing grows. The long ones are marked slow; figures are printed (-s)."""

from __future__ import annotations

import http.client
import json
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from conftest import clean_env, wait_for
from processes import daemon_state
from test_websocket import frame
from wire import BODY, HOST, Served

IDLE = int(os.environ.get("MFLOCAL_IDLE", "500"))
SOCKETS = int(os.environ.get("MFLOCAL_SOCKETS", "200"))
SOAK_SECONDS = float(os.environ.get("MFLOCAL_SOAK_SECONDS", "1200"))
TEXT = 1


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Room for the clients' ends, which are all in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * (IDLE + SOCKETS) + 400
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            pytest.skip("too few descriptors allowed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_runs(metaflow: Path, flow: str, count: int) -> None:
    """Runs as local mode leaves them, each with an end task that is done."""
    for number in range(count):
        run, ms = metaflow / flow / f"{1_700_000_000_000_000 + number}", 1_700_000_000_000 + number
        own = {
            "run_number": run.name,
            "flow_id": flow,
            "user_name": "u",
            "tags": ["t"],
            "system_tags": ["user:u"],
            "ts_epoch": ms,
        }
        put(run / "_meta/_self.json", own)
        put(run / "end/_meta/_self.json", {**own, "step_name": "end"})
        task = {**own, "step_name": "end", "task_id": "1"}
        put(run / "end/1/_meta/_self.json", task)
        put(
            run / f"end/1/_meta/sysmeta_attempt_ok_{ms}.json",
            {**task, "field_name": "attempt_ok", "value": "True", "tags": ["attempt_id:0"]},
        )
    put(metaflow / flow / "_meta/_self.json", {"flow_id": flow, "ts_epoch": 1_700_000_000_000})


def put(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


class Repeater(threading.Thread):
    """Does one thing on one connection until told to stop; how long each took, and every answer that was not 200."""

    def __init__(
        self, served: Served, method: str, path: str, body: Any = None, pause: float = 0.0
    ) -> None:
        super().__init__(daemon=True)
        self.connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        self.method, self.path, self.pause = method, path, pause
        self.data = None if body is None else json.dumps(body)
        self.times: list[float] = []
        self.wrong: list[Any] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(self.pause):
            began = time.monotonic()
            try:
                self.connection.request(self.method, self.path, self.data)
                response = self.connection.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException) as error:
                self.wrong.append(repr(error))
                return
            self.times.append(time.monotonic() - began)
            if response.status != 200:
                self.wrong.append((response.status, body[:200]))

    def stop(self) -> None:
        self.over.set()
        self.join(90)
        self.connection.close()


def share(times: list[float], part: float) -> float:
    """The time within which that part of all was answered."""
    return sorted(times)[min(int(len(times) * part), len(times) - 1)]


def crowd(served: Served, task: str) -> list[socket.socket]:
    """Idle keep-alive connections, WebSockets, readers that do not read and writers that do not write on."""
    ping = b"GET /ping HTTP/1.1\r\n" + HOST + b"\r\n"
    run = task.rpartition("/steps")[0]
    wish = json.dumps({"type": "SUBSCRIBE", "uuid": "a", "resource": f"{run}/tasks"}).encode()
    found = []
    for _ in range(IDLE):
        sock = served.connect(60)
        sock.sendall(ping)
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        found.append(sock)
    for _ in range(SOCKETS):
        sock = served.websocket()
        sock.sendall(frame(TEXT, wish))
        found.append(sock)
    for number in range(40):
        sock = served.connect(60, receive=4096 if number % 2 else 0)
        if number % 2:
            sock.sendall((b"GET /flows/Many/runs HTTP/1.1\r\n" + HOST + b"\r\n") * 20)
        else:
            sock.sendall(
                b"POST "
                + task.encode()
                + b"/metadata HTTP/1.1\r\n"
                + HOST
                + b"Content-Length: 1000000\r\n\r\n"
                + b"x" * number
            )
        found.append(sock)
    return found


def load(tmp_path: Path, runs: int, seconds: float) -> dict[str, Any]:
    """Heartbeats and writes in the midst of everything else; figures."""
    root = tmp_path / "root"
    root.mkdir()
    write_runs(root / ".metaflow", "Many", runs)
    with Served(root) as served:
        tasks = [served.task() for _ in range(4)]
        time.sleep(0.2)  # until the last of those connections is closed
        before = served.descriptors
        beats = [Repeater(served, "POST", f"{task}/heartbeat", {}, 0.05) for task in tasks]
        writers = [
            Repeater(
                served, "POST", f"{task}/metadata", [{"field_name": "f", "value": "v"}] * 3, 0.05
            )
            for task in tasks[:2]
        ]
        lists = [
            Repeater(served, "GET", path, None, 0.1)
            for path in ("/flows/Many/runs", "/api/flows/Many/runs?_limit=30")
        ]
        for path in ("/flows/Many/runs", "/api/flows/Many/runs?_limit=30"):
            served.client.get(path)
        others = crowd(served, tasks[0])
        inside = served.descriptors
        try:
            for thread in (*beats, *writers, *lists):
                thread.start()
            time.sleep(seconds)
            for thread in (*beats, *writers, *lists):
                thread.stop()
        finally:
            for sock in others:
                sock.close()
        wrong = [wrong for thread in (*beats, *writers, *lists) for wrong in thread.wrong]
        times = [took for thread in beats for took in thread.times]
        figures = {
            "connections": inside - before, "heartbeats": len(times), "writes": sum(len(t.times) for t in writers),
            "lists": [len(t.times) for t in lists], "beat p50": round(share(times, 0.5), 4), "beat p99": round(share(times, 0.99), 3),
            "beat max": round(max(times), 3), "list p50": round(share(lists[0].times, 0.5), 3), "MiB": round(served.memory(), 1),
        }  # fmt: skip
        print(figures)
        assert wrong == [] and inside - before >= IDLE + SOCKETS
        wait_for(lambda: served.descriptors <= before + 1, pause=0.1)
        assert "Traceback" not in served.log and served.process.poll() is None
        figures["MiB after"] = round(served.memory(), 1)
    return figures


def test_a_crowd(tmp_path: Path) -> None:
    """500 idle connections, 200 WebSockets, 40 slow peers, lists of 1,000 runs: heartbeats are answered meanwhile."""
    figures = load(tmp_path, 1000, 4)
    assert figures["heartbeats"] > 20 and figures["MiB"] < 200


@pytest.mark.slow
def test_a_crowd_and_ten_thousand_runs(tmp_path: Path) -> None:
    figures = load(tmp_path, 10_000, 30)
    assert figures["MiB"] < 300


FLOW = """
from metaflow import FlowSpec, step
class WideFlow(FlowSpec):
    @step
    def start(self):
        self.items = list(range(WIDTH))
        self.next(self.work, foreach="items")
    @step
    def work(self):
        self.square = self.input ** 2
        self.next(self.join)
    @step
    def join(self, inputs):
        self.total = sum(i.square for i in inputs)
        self.next(self.end)
    @step
    def end(self):
        assert self.total == sum(i * i for i in range(WIDTH))
if __name__ == "__main__":
    WideFlow()
"""


@pytest.mark.slow
def test_sixty_four_workers(project: Path) -> None:
    """A real flow, 128 tasks, --max-workers 64; every attempt is done, none was ever lost."""
    (project / "wide.py").write_text(FLOW.replace("WIDTH", "128"))
    command = [
        sys.executable,
        str(Path(__file__).resolve().parent.parent / "mflocal.py"),
        "run",
        sys.executable,
        "wide.py",
        "--no-pylint",
        "run",
    ]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--max-workers", "64", "--max-num-splits", "200"],
        cwd=project,
        env=clean_env(),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    flow = project / ".metaflow/WideFlow"
    good = [
        path
        for path in flow.rglob("sysmeta_attempt_ok_*")
        if json.loads(path.read_text())["value"] == "True"
    ]
    lost = [path for path in flow.rglob("_mflocal.json") if json.loads(path.read_text())["lost"]]
    port = daemon_state(project)["port"]
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
    connection.request("GET", "/api/flows/WideFlow/runs")
    rows = json.loads(connection.getresponse().read())["data"]
    print(f"{time.monotonic() - began:.0f} s, {len(good)} attempts done")
    assert len(good) == 131 and lost == [] and [row["status"] for row in rows] == ["completed"]
    assert "Traceback" not in (project / ".metaflow/.mflocal/daemon.log").read_text()


@pytest.mark.slow
def test_soak(tmp_path: Path) -> None:
    """MFLOCAL_SOAK_SECONDS (1200) of comings and goings: descriptors level off, nothing is logged, nobody waits.

    What memory grows by is the index: a daemon started afterwards that reads the same tree takes as much.
    """
    root = tmp_path / "root"
    root.mkdir()
    write_runs(root / ".metaflow", "Many", 2000)
    chance = random.Random(1)
    with Served(root) as served:
        task = served.task()
        beat = Repeater(served, "POST", f"{task}/heartbeat", {}, 0.5)
        beat.start()
        end, looks, next_look = time.monotonic() + SOAK_SECONDS, [], time.monotonic()
        actions = soak_actions(served, chance)
        laps = 0
        while time.monotonic() < end:
            chance.choice(actions)()
            laps += 1
            if time.monotonic() > next_look:
                looks.append((round(served.memory(), 1), served.descriptors))
                next_look += max(5.0, SOAK_SECONDS / 40)
            time.sleep(0.01)
        beat.stop()
        print(
            f"{laps} laps, {len(beat.times)} heartbeats, p99 {share(beat.times, 0.99):.3f} s, max {max(beat.times):.3f} s"
        )
        print("MiB and descriptors:", looks)
        assert beat.wrong == [] and "Traceback" not in served.log
        read_all(served)
        grown = served.memory()
        assert max(d for _, d in looks[len(looks) // 2 :]) < 80
    with Served(root) as served:
        read_all(served)
        fresh = served.memory()
    print(f"{grown:.1f} MiB after it, {fresh:.1f} MiB in a new daemon that has read the same")
    assert grown < 1.5 * fresh + 15


def read_all(served: Served) -> None:
    """Brings all of the tree into the index, as the soak has."""
    runs = served.client.get("/flows/F/runs")
    for path in (
        "/flows/Many/runs",
        "/api/flows/Many/runs?_limit=5000",
        "/api/flows/F/runs?_limit=5000",
    ):
        served.client.get(path)
    for run in runs:
        for step in served.client.get(f"/flows/F/runs/{run['run_number']}/steps"):
            served.client.get(f"/flows/F/runs/{run['run_number']}/steps/{step['step_name']}/tasks")


def soak_actions(served: Served, chance: random.Random) -> list[Callable[[], Any]]:
    def a_run() -> None:
        task = served.task()
        served.client.post(
            f"{task}/metadata",
            [{"field_name": "attempt", "value": "0"}, {"field_name": "x", "value": "v" * 500}],
        )
        served.client.post(
            f"{task}/artifact", [{"name": f"a{i}", "sha": "s", "attempt_id": 0} for i in range(5)]
        )
        served.client.post(
            f"{task}/metadata",
            [{"field_name": "attempt_ok", "value": "True", "tags": ["attempt_id:0"]}],
        )

    def a_list() -> None:
        served.client.get(
            chance.choice(
                (
                    "/flows",
                    "/flows/F/runs?_limit=50",
                    "/api/flows/Many/runs?_page=3",
                    "/api/runs",
                    "/api/flows/F/runs",
                )
            )
        )

    def a_socket() -> None:
        with served.websocket() as sock:
            sock.sendall(
                frame(TEXT, b'{"type": "SUBSCRIBE", "uuid": "a", "resource": "/flows/F/runs"}')
            )
            if chance.random() < 0.5:
                served.client.post("/flows/F/run", BODY)

    def noise() -> None:
        served.raw(
            chance.choice(
                (
                    b"\x16\x03\x01",
                    b"GET / HTTP/1.1\r\n\r\n",
                    b"POST /flows/F HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\n\r\n{",
                )
            )
        )

    return [a_run, a_list, a_list, a_socket, noise]
