"""What grows with what: calls of the file system, memory, and who waits for whom. Nothing here is measured in time."""

from __future__ import annotations

import asyncio
import collections
import inspect
import json
import re
import socket
import stat
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any, Callable, Iterator

import make_tree
import pytest

import mflocal

FILE_CALLS = frozenset(
    (
        "access",
        "close",
        "fstat",
        "listdir",
        "lstat",
        "mkdir",
        "open",
        "pwrite",
        "read",
        "rename",
        "scandir",
        "stat",
    )
    + ("unlink", "write", "replace", "readlink", "fsync")
)
BODY = {"user_name": "tester", "tags": [], "system_tags": ["user:tester"]}
HEARD: list[str] | None = None  # the paths that were opened or listed, while somebody wants to know


def _hear(event: str, values: tuple[Any, ...]) -> None:
    if (
        HEARD is not None
        and event in ("open", "os.scandir", "os.listdir")
        and isinstance(values[0], str)
    ):
        HEARD.append(values[0])


sys.addaudithook(_hear)


class Site:
    """The service of one root in this process, without its sockets."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metaflow_dir = str(root / ".metaflow")
        (root / ".metaflow/.mflocal/tmp").mkdir(parents=True, exist_ok=True)
        self.loop = asyncio.new_event_loop()
        self.service = self.open()

    def open(self) -> mflocal.Service:
        """A service that has read nothing yet."""
        self.service = mflocal.Service(mflocal.Settings(root=str(self.root)), {}, print)
        return self.service

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of one answer."""
        raw, _, query = path.partition("?")
        data = b"" if body is None else json.dumps(body).encode()
        request = mflocal.Request(
            method, raw, query, {"host": "127.0.0.1"}, data, authority="127.0.0.1:1"
        )
        request.connection = object()
        answer = self.service.router.dispatch(request)
        if inspect.isawaitable(answer):
            answer = self.loop.run_until_complete(_whole(answer))
        assert answer.status == 200, answer.body
        return json.loads(answer.body)

    def calls(self, method: str, path: str, body: Any = None) -> dict[str, int]:
        """How often each call of the file system was made for one answer."""
        counted: collections.Counter[str] = collections.Counter()

        def hook(frame: Any, event: str, function: Any) -> None:
            if (
                event == "c_call"
                and function.__module__ == "posix"
                and function.__name__ in FILE_CALLS
            ):
                counted[function.__name__] += 1

        sys.setprofile(hook)
        try:
            self.ask(method, path, body)
        finally:
            sys.setprofile(None)
        return dict(counted)

    def opened(self, method: str, path: str) -> list[str]:
        """What was opened or listed below `.metaflow` for one answer, relative to it."""
        global HEARD
        HEARD = []
        try:
            self.ask(method, path)
            return [
                p[len(self.metaflow_dir) + 1 :] for p in HEARD if p.startswith(self.metaflow_dir)
            ]
        finally:
            HEARD = None


async def _whole(answer: Any) -> Any:
    return await answer


@pytest.fixture
def make_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """A maker of sites on roots of their own; `fill` gets the new .metaflow and puts something there."""
    sites: list[Site] = []

    def make(fill: Callable[[str], Any]) -> Site:
        root = tmp_path / f"root{len(sites)}"
        (root / ".metaflow").mkdir(parents=True)
        fill(str(root / ".metaflow"))
        settle()
        sites.append(Site(root))
        return sites[-1]

    yield make
    for site in sites:
        site.loop.close()


def settle() -> None:
    """Waits until what was written is too old to change again within the same tick of a file's clock."""
    time.sleep(mflocal.RACY_NS / 1e9 + 0.02)


def only_run(site: Site, flow: str) -> str:
    """The path of the newest run of a flow."""
    runs = [path.name for path in (site.root / ".metaflow" / flow).iterdir() if path.name.isdigit()]
    return f"/flows/{flow}/runs/{max(runs, key=int)}"


# -- flat: what a flow asks costs the same, however much there is


def costs_of_a_flow(site: Site, flow: str, step: str, task: str) -> dict[str, dict[str, int]]:
    """The calls that each request of a flow makes the second time."""
    run = only_run(site, flow)
    path = f"{run}/steps/{step}/tasks/{task}"
    found: dict[str, dict[str, int]] = {}
    for number in range(2):
        rows = [{"field_name": f"f{number}", "type": "t", "value": "v", "tags": ["attempt_id:0"]}]
        artifacts = [
            {
                "name": f"x{number}",
                "attempt_id": 0,
                "sha": "0" * 40,
                "ds_type": "local",
                "location": " ",
            }
        ]
        settle()
        asked: dict[str, tuple[Any, ...]] = {
            "GET flow": ("GET", f"/flows/{flow}"),
            "GET run": ("GET", run),
            "GET step": ("GET", f"{run}/steps/{step}"),
            "GET task": ("GET", path),
            "run heartbeat": ("POST", f"{run}/heartbeat", {}),
            "heartbeat": ("POST", f"{path}/heartbeat", {}),
            "tags": ("PATCH", f"{run}/tag/mutate", {"tags_to_add": [f"t{number}"]}),
            "POST run": ("POST", f"/flows/{flow}/run", BODY),
            "POST step": ("POST", f"{run}/steps/s{number}/step", BODY),
            "POST task": ("POST", f"{run}/steps/{step}/task", BODY),
            "POST metadata": ("POST", f"{path}/metadata", rows),
            "POST artifact": ("POST", f"{path}/artifact", artifacts),
        }
        for name, ask in asked.items():
            found[name] = site.calls(*ask)
    return found


def test_the_requests_of_a_flow_do_not_cost_more_in_a_wide_run(
    make_site: Callable[..., Site],
) -> None:
    small = make_site(lambda path: make_tree.make_foreach(path, 3))
    large = make_site(lambda path: make_tree.make_foreach(path, 300))
    expected = costs_of_a_flow(small, "WideRun", "work", "3")
    assert costs_of_a_flow(large, "WideRun", "work", "3") == expected
    assert expected["GET task"] and expected["POST task"]["mkdir"] >= 2  # the calls are really seen


def test_the_requests_of_a_flow_do_not_cost_more_after_many_runs(
    make_site: Callable[..., Site],
) -> None:
    small = make_site(lambda path: make_tree.make_runs(path, 3))
    large = make_site(lambda path: make_tree.make_runs(path, 100))
    assert costs_of_a_flow(large, "ManyRuns", "start", "1") == costs_of_a_flow(
        small, "ManyRuns", "start", "1"
    )


def test_a_task_with_many_artifacts_takes_one_more_as_cheaply(
    make_site: Callable[..., Site],
) -> None:
    small = make_site(lambda path: make_tree.make_artifacts(path, 3))
    large = make_site(lambda path: make_tree.make_artifacts(path, 1000))
    costs = [costs_of_a_flow(site, "ManyArtifacts", "start", "1") for site in (small, large)]
    assert costs[0] == costs[1]


def test_a_task_costs_at_most_one_look_into_each_step_more(make_site: Callable[..., Site]) -> None:
    """Task numbers are the run's: another process may have given the next one to a task of another step."""
    costs = []
    for steps in (3, 43):
        site = make_site(lambda path: make_tree.make_foreach(path, 3))
        run = only_run(site, "WideRun")
        for number in range(steps):
            site.ask("POST", f"{run}/steps/s{number}/step", BODY)
        settle()
        for _ in range(2):  # the first looks for the numbers that are taken
            site.ask("POST", f"{run}/steps/work/task", BODY)
        costs.append(sum(site.calls("POST", f"{run}/steps/work/task", BODY).values()))
    assert costs[1] - costs[0] <= 40


# -- a page costs what is on it


PAGE = "/api/flows/ManyRuns/runs?_order=-ts_epoch&_limit=10&_page=1"


def test_a_warm_page_of_runs_costs_what_is_on_it(make_site: Callable[..., Site]) -> None:
    costs = []
    for count in (20, 200):
        site = make_site(lambda path, count=count: make_tree.make_runs(path, count))
        rows = site.ask("GET", PAGE)["data"]
        assert len(rows) == 10 and rows[0]["status"] == "completed"
        costs.append(site.calls("GET", PAGE))
    assert costs[0] == costs[1]


def test_a_warm_page_of_runs_opens_nothing_of_others(make_site: Callable[..., Site]) -> None:
    site = make_site(lambda path: make_tree.make_runs(path, 60))
    shown = {f"ManyRuns/{row['run_number']}" for row in site.ask("GET", PAGE)["data"]}
    settle()
    others = [
        p
        for p in site.opened("GET", PAGE)
        if "/".join(p.split("/")[:2]) not in shown and p != "ManyRuns"
    ]
    assert len(shown) == 10 and others == []


def test_the_first_page_opens_one_file_of_each_other_run(make_site: Callable[..., Site]) -> None:
    site = make_site(lambda path: make_tree.make_runs(path, 60))
    opened = site.opened("GET", PAGE)
    shown = {str(row["run_number"]) for row in site.ask("GET", PAGE)["data"]}
    others = collections.Counter(
        p.split("/")[1] for p in opened if p.count("/") and p.split("/")[1] not in shown
    )
    del others["_meta"]
    assert len(others) == 50 and set(others.values()) == {1}


def test_a_flow_is_listed_without_looking_into_the_other_flows(
    make_site: Callable[..., Site],
) -> None:
    site = make_site(lambda path: make_tree.make_flows(path, 30))
    site.ask("GET", "/api/flows?_limit=1000")
    opened = site.opened("GET", "/flows/Flow00008/runs")
    assert opened and not [p for p in opened if not p.startswith("Flow00008")]


def test_warm_task_rows_open_no_file(make_site: Callable[..., Site]) -> None:
    site = make_site(lambda path: make_tree.make_foreach(path, 250))
    path = f"/api{only_run(site, 'WideRun')}/tasks?_order=%2Bts_epoch&_limit=1000&postprocess=false"
    rows = site.ask("GET", path)["data"]
    assert len(rows) == 254 and {row["status"] for row in rows} == {"completed"}
    assert [p for p in site.opened("GET", path) if p.endswith(".json")] == []


# -- memory


def held(site: Site, work: Callable[[], Any]) -> int:
    """Bytes that are kept after some work."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_a_listed_run_takes_few_bytes(make_site: Callable[..., Site]) -> None:
    def fill(path: str) -> None:
        for number in range(1000):
            make_tree.make_run(path, "ManyRuns", 1_700_000_000_000 + number * 60_000)

    site = make_site(fill)
    kept = held(site, lambda: site.ask("GET", "/flows/ManyRuns/runs"))
    assert kept / 1000 < 4096  # 10,000 of them fit into 40 MB


def test_a_list_that_is_asked_for_again_keeps_nothing_more(make_site: Callable[..., Site]) -> None:
    site = make_site(lambda path: make_tree.make_runs(path, 100))
    path = "/api/flows/ManyRuns/runs?_limit=1000&status=failed"
    first = held(site, lambda: site.ask("GET", path))
    assert first > 100_000
    assert held(site, lambda: [site.ask("GET", path) for _ in range(5)]) < first / 5


def test_records_kept_of_tasks_are_bounded(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(path: str) -> None:
        run = make_tree.make_foreach(path, 40, full=True)
        assert run

    site = make_site(fill)
    run = only_run(site, "WideRun")
    paths = [f"{run}/steps/work/tasks/{number}/artifacts" for number in range(2, 42)]
    for path in paths:  # the nodes and facts of all tasks are known before
        site.ask("GET", path.rpartition("/")[0])

    def read_all() -> None:
        for path in paths:
            site.ask("GET", path)

    monkeypatch.setattr(mflocal, "ROWS_KEPT", 10_000)
    unbounded = held(site, read_all)
    site.open()
    monkeypatch.setattr(mflocal, "ROWS_KEPT", 60)
    for path in paths:
        site.ask("GET", path.rpartition("/")[0])
    assert held(site, read_all) < unbounded / 4


def test_of_a_tasks_records_only_what_is_shown_is_kept(make_site: Callable[..., Site]) -> None:
    """There may be a million tasks: whatever else a record holds, it takes no memory."""

    def fill(metaflow_dir: str, padding: str) -> None:
        make_tree.make_foreach(metaflow_dir, 50)
        for name in ("_self.json", "0_artifact__task_ok.json"):
            for path in Path(metaflow_dir).glob(f"WideRun/*/work/*/_meta/{name}"):
                path.write_text(
                    json.dumps(
                        {**json.loads(path.read_text()), "system_tags": [padding], "more": padding}
                    )
                )

    rows, kept = [], []
    for size in (1, 50_000):
        site = make_site(lambda path, size=size: fill(path, "x" * size))
        run, found = only_run(site, "WideRun"), []
        paths = (f"{run}/steps/work/tasks", f"/api{run}/tasks?_limit=1000")

        def ask(
            site: Site = site, paths: tuple[str, ...] = paths, found: list[Any] = found
        ) -> None:
            found += [site.ask("GET", path) for path in paths]
            found[:] = [len(found[0]), {row["status"] for row in found[1]["data"]}]

        kept.append(held(site, ask))
        rows.append(found)
    assert rows == [[50, {"completed"}]] * 2
    assert kept[1] < kept[0] + 50 * 50_000 / 4  # of one padding each it would be 50 * 50,000


# -- a walk gives way


async def turns_of_others(work: Any) -> int:
    """How often others have their turn on the event loop until some work is done."""
    task, turns = asyncio.ensure_future(_whole(work)), 0
    while not task.done():
        turns += 1
        await asyncio.sleep(0)
    task.result()
    return turns


def test_completion_gives_way(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = [f"tag{number}" for number in range(200)]
    site = make_site(lambda path: make_tree.make_run(path, "ManyRuns", 1_700_000_000_000, tags))
    monkeypatch.setattr(mflocal, "WALK_SLICE", -1.0)
    request = mflocal.Request(
        "GET", "/api/tags/autocomplete", "tag:re=no.*", {"host": "127.0.0.1"}, b""
    )
    assert (
        site.loop.run_until_complete(turns_of_others(site.service.router.dispatch(request))) >= 200
    )


def served_in_order(root: Path, requests: list[bytes]) -> list[int]:
    """The places of the requests, each on a connection of its own, in the order in which they were answered.

    All of them wait at the server before it looks at the first.
    """
    (root / ".metaflow/.mflocal/tmp").mkdir(parents=True, exist_ok=True)
    order: list[int] = []

    async def scene() -> None:
        service = mflocal.Service(mflocal.Settings(root=str(root)), {}, print)
        server = socket.create_server(("127.0.0.1", 0))
        clients = [socket.create_connection(server.getsockname()) for _ in requests]
        loop, answered = asyncio.get_running_loop(), asyncio.Event()

        def hear(place: int) -> None:
            loop.remove_reader(clients[place])
            assert clients[place].recv(12).startswith(b"HTTP/1.1 200")
            order.append(place)
            if len(order) == len(requests):
                answered.set()

        for place, request in enumerate(requests):
            clients[place].sendall(request)
            loop.add_reader(clients[place], hear, place)
        serving = loop.create_task(service.serve(server, ready=lambda: None))
        await asyncio.wait_for(answered.wait(), 120)
        for client in clients:
            client.close()
        service.stop(now=True)
        await serving

    asyncio.run(scene())
    return order


def plain_request(method: str, path: str) -> bytes:
    """A request without a body."""
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n".encode()


@pytest.fixture(scope="module")
def many_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(a root with a long list of runs, a run to beat for)"""
    root = tmp_path_factory.mktemp("many")
    for number in range(3000):
        make_tree.make_run(str(root / ".metaflow"), "ManyRuns", 1_700_000_000_000 + number * 60_000)
    return root, make_tree.make_foreach(str(root / ".metaflow"), 1)


@pytest.mark.parametrize(
    "path",
    ["/flows/ManyRuns/runs", "/api/runs?_limit=30", "/api/flows/ManyRuns/runs?status=failed"],
)
def test_a_heartbeat_does_not_wait_for_a_cold_list(many_runs: tuple[Path, str], path: str) -> None:
    root, run = many_runs
    beat = plain_request("POST", f"/flows/WideRun/runs/{run}/heartbeat")
    assert served_in_order(root, [plain_request("GET", path), beat, beat]) == [1, 2, 0]


def test_a_heartbeat_does_not_wait_for_the_tasks_of_a_wide_run(tmp_path: Path) -> None:
    (tmp_path / ".metaflow").mkdir()
    run = make_tree.make_foreach(str(tmp_path / ".metaflow"), 1000)
    beat = plain_request("POST", f"/flows/WideRun/runs/{run}/heartbeat")
    for path in (
        f"/api/flows/WideRun/runs/{run}/tasks?_limit=1000",
        f"/flows/WideRun/runs/{run}/metadata",
    ):
        assert served_in_order(tmp_path, [plain_request("GET", path), beat]) == [1, 0]


# -- the trees are like real ones


def kinds_of(run: Path) -> dict[str, tuple[Any, ...]]:
    """What there is of each kind of file in a run's `_meta` directories: mode, keys in order, types of the values."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(run.glob("**/_meta/*.json")):
        level, *below = path.relative_to(run).parts[:-2] or ("run",)
        step = level if level in ("run", "_parameters") else "step"
        kind = " ".join([step, "task" if below else "", re.sub(r"_\d{13}\.json", "", path.name)])
        shape = [
            (key, type(value).__name__) for key, value in json.loads(path.read_bytes()).items()
        ]
        found[kind] = (stat.S_IMODE(path.stat().st_mode), shape)
    return found


def test_made_trees_are_as_local_mode_writes_them(ran: dict[str, Any], tmp_path: Path) -> None:
    real = kinds_of(Path(ran["root"]) / ".metaflow/MetaFlow" / ran["local"])
    (tmp_path / ".metaflow").mkdir()
    run = make_tree.make_foreach(str(tmp_path / ".metaflow"), 3, full=True)
    made = kinds_of(tmp_path / ".metaflow/WideRun" / run)
    common = {
        kind for kind in made if not kind.endswith(("_artifact_r.json", "_artifact_n.json"))
    }  # that flow's own
    assert len(common) > 30 and common - real.keys() == set()
    assert {kind: made[kind] for kind in common} == {kind: real[kind] for kind in common}
