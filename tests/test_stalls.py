"""The event loop gives way: whoever asks for little does not wait for those who ask for much."""

from __future__ import annotations

import http.client
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import pytest
from test_load import write_runs
from test_websocket import frame
from wire import BODY, Served


class Bystander:
    """Pings all the time; how much the daemon's main thread worked at most while one ping waited, and in all.

    This is time on a processor, so that it does not matter what else the machine does.
    """

    def __init__(self, served: Served) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        self.stat = Path(f"/proc/{served.pid}/task/{served.pid}/schedstat")
        self.over = threading.Event()
        self.worst = self.total = 0
        self.thread = threading.Thread(target=self._ping, daemon=True)

    def worked(self) -> int:
        """ns that the main thread has been on a processor."""
        return int(self.stat.read_text().split()[0])

    def _ping(self) -> None:
        while not self.over.wait(0.001):
            before = self.worked()
            self.connection.request("GET", "/ping")
            self.connection.getresponse().read()
            self.worst = max(self.worst, self.worked() - before)

    def __enter__(self) -> Bystander:
        self.total = -self.worked()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.total += self.worked()
        self.connection.close()
        print(f"{self.worst / 1e6:.1f} of {self.total / 1e6:.1f} ms")

    @property
    def share(self) -> float:
        """The part of all the work that a single ping had to wait for."""
        return self.worst / self.total


needs_schedstat = pytest.mark.skipif(
    not os.path.exists("/proc/self/schedstat"), reason="the system does not tell"
)
pytestmark = needs_schedstat


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service with a flow of 1,000 runs."""
    root = tmp_path_factory.mktemp("root")
    write_runs(root / ".metaflow", "Many", 1000)
    with Served(root) as service:
        yield service


def ask(served: Served, *paths: str) -> None:
    """All of them at once, and that each is answered."""
    with ThreadPoolExecutor(len(paths)) as pool:
        assert {answer.status for answer in pool.map(lambda p: served.client("GET", p), paths)} == {
            200
        }


def test_twenty_long_lists_at_once(served: Served) -> None:
    """Each gives way after a few ms; if all went on before a ping is answered, it would wait for all of them."""
    served.client.get("/flows/Many/runs")
    with Bystander(served) as bystander:
        ask(served, *["/flows/Many/runs"] * 20, *["/api/flows/Many/runs?status=failed"] * 20)
    assert bystander.share < 0.1


@pytest.mark.xfail(strict=False, reason="a directory is listed in one go")
def test_a_directory_of_many_names(served: Served) -> None:
    step = Path(served.metaflow, "Many", "1700000000000000", "end")
    for number in range(20_000):
        os.mkdir(step / f"{number + 2}")
    with Bystander(served) as bystander:
        ask(served, "/flows/Many/runs/1700000000000000/steps/end/tasks")
    assert bystander.share < 0.1


def test_many_rows_in_one_post(served: Served) -> None:
    task = served.task()
    rows: list[dict[str, Any]] = [
        {"field_name": f"f{n}", "type": "t", "value": "v", "tags": []} for n in range(3000)
    ]
    with Bystander(served) as bystander:
        assert served.client("POST", f"{task}/metadata", rows).status == 200
    assert bystander.share < 0.25
    with Bystander(served) as bystander:
        assert len(served.client.get(f"{task}/metadata")) == 3000
    assert bystander.share < 0.25


def test_runs_pushed_to_many_clients(served: Served) -> None:
    """A hundred WebSockets are told of each new run."""
    wish = json.dumps({"type": "SUBSCRIBE", "uuid": "a", "resource": "/runs"}).encode()
    served.task()
    socks = [served.websocket() for _ in range(100)]
    try:
        for sock in socks:
            sock.sendall(frame(1, wish))
        served.client.get("/api/runs?_limit=1")
        with Bystander(served) as bystander:
            for _ in range(300):
                last = served.client.post("/flows/F/run", BODY)["run_number"]
            for sock in socks:
                heard = b""
                while b'"run_number": %d' % last not in heard:
                    more = sock.recv(65536)
                    assert more, heard[-300:]
                    heard += more
        assert bystander.share < 0.3
    finally:
        for sock in socks:
            sock.close()
