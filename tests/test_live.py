"""Subscriptions over the WebSocket: what is pushed, to whom, in which order; written over HTTP or by local mode."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import itertools
import json
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from conftest import Client, clean_env
from make_tree import make_flow
from wire import Served

ws = pytest.importorskip("websockets.sync.client")
TAGS = {
    "user_name": "tester",
    "tags": ["t1"],
    "system_tags": ["user:tester", "metaflow_version:2.19.39"],
}
SERIAL = itertools.count(1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One service for all tests of this file: each has a flow of its own."""
    root = tmp_path_factory.mktemp("live")
    with Served(root) as served:
        yield served
        assert "Traceback" not in served.log


@pytest.fixture
def flow(served: Served) -> Flow:
    return Flow(served.client, served.root)


@pytest.fixture
def page(served: Served) -> Iterator[Page]:
    with Page(served.client) as page:
        yield page


def attempt(number: int) -> dict[str, Any]:
    return {
        "field_name": "attempt",
        "value": str(number),
        "type": "attempt",
        "tags": [f"attempt_id:{number}"],
    }


def said(number: int, ok: bool) -> dict[str, Any]:
    return {
        "field_name": "attempt_ok",
        "value": str(ok),
        "type": "internal_attempt_status",
        "tags": [f"attempt_id:{number}"],
    }


class Flow:
    """A flow of its own, written over HTTP."""

    def __init__(self, client: Client, root: Path) -> None:
        self.client = client
        self.root = root
        self.name = f"Live{next(SERIAL)}"
        self.begun()

    def begun(self) -> None:
        self.client.post(f"/flows/{self.name}", {})

    def run(self) -> str:
        """The path of a new run."""
        number = self.client.post(f"/flows/{self.name}/run", TAGS)["run_number"]
        return f"/flows/{self.name}/runs/{number}"

    def step(self, run: str, step: str) -> str:
        self.client.post(f"{run}/steps/{step}/step", TAGS)
        return f"{run}/steps/{step}"

    def task(self, step: str) -> str:
        return f"{step}/tasks/{self.client.post(f'{step}/task', TAGS)['task_id']}"

    def metadata(self, task: str, *rows: dict[str, Any]) -> None:
        self.client.post(f"{task}/metadata", list(rows))

    def artifacts(self, task: str, **values: Any) -> None:
        rows = []
        for name, value in values.items():
            sha = blob(self.root, self.name, value)
            rows.append(
                {
                    "name": name, "attempt_id": 0, "sha": sha, "ds_type": "local", "type": "t",
                    "location": f":root:{self.root}", "content_type": "gzip+pickle-v4",
                }
            )  # fmt: skip
        self.client.post(f"{task}/artifact", rows)

    def tags(self, run: str, *tags: str) -> None:
        answer = self.client("PATCH", f"{run}/tag/mutate", {"tags_to_add": list(tags)})
        assert answer.status == 200, answer


class LocalFlow(Flow):
    """The same written as local mode does: no request, no heartbeat, only files."""

    def begun(self) -> None:
        make_flow(str(self.root / ".metaflow"), self.name)

    def run(self) -> str:
        number = str(time.time_ns() // 1000)
        self._object({"run_number": number})
        return f"/flows/{self.name}/runs/{number}"

    def step(self, run: str, step: str) -> str:
        self._object({"run_number": run.split("/")[4], "step_name": step})
        return f"{run}/steps/{step}"

    def task(self, step: str) -> str:
        parts, task = step.split("/"), str(next(SERIAL))
        self._object({"run_number": parts[4], "step_name": parts[6], "task_id": task})
        return f"{step}/tasks/{task}"

    def metadata(self, task: str, *rows: dict[str, Any]) -> None:
        for row in rows:
            at = time.time_ns() // 1_000_000
            self._put(self._ids(task), f"sysmeta_{row['field_name']}_{at}", {**row, "ts_epoch": at})

    def artifacts(self, task: str, **values: Any) -> None:
        for name, value in values.items():
            row = {
                "name": name, "attempt_id": 0, "sha": blob(self.root, self.name, value), "ds_type": "local",
                "type": "t", "location": "", "content_type": "gzip+pickle-v4",
                "ts_epoch": time.time_ns() // 1_000_000,
            }  # fmt: skip
            self._put(self._ids(task), f"0_artifact_{name}", row)

    def tags(self, run: str, *tags: str) -> None:
        ids = {"run_number": run.split("/")[4]}
        path = self._meta(ids) / "_self.json"
        self._put(ids, "_self", {**json.loads(path.read_text()), "tags": ["t1", *tags]})

    def _ids(self, task: str) -> dict[str, str]:
        parts = task.split("/")
        return {"run_number": parts[4], "step_name": parts[6], "task_id": parts[8]}

    def _meta(self, ids: dict[str, str]) -> Path:
        return self.root.joinpath(".metaflow", self.name, *ids.values(), "_meta")

    def _object(self, ids: dict[str, str]) -> None:
        self._meta(ids).mkdir(parents=True)
        at = time.time_ns() // 1_000_000
        record = {"user_name": "tester", "tags": ["t1"], "system_tags": ["user:tester"]}
        self._put(ids, "_self", {**record, "ts_epoch": at})

    def _put(self, ids: dict[str, str], name: str, record: dict[str, Any]) -> None:
        temp = self._meta(ids) / "temp"
        temp.write_text(json.dumps({"flow_id": self.name, **ids, **record}))
        os.rename(temp, self._meta(ids) / f"{name}.json")


def blob(root: Path, flow: str, value: Any) -> str:
    """Stores an artifact's content as Metaflow does; returns its sha."""
    data = gzip.compress(pickle.dumps(value, 4), 3, mtime=0)
    sha = hashlib.sha1(data).hexdigest()
    path = root / ".metaflow" / flow / "data" / sha[:2]
    path.mkdir(parents=True, exist_ok=True)
    (path / sha).write_bytes(data)
    return sha


class Page:
    """A page of the UI: one WebSocket with subscriptions named 0, 1, 2; `heard` are its frames."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.socket = ws.connect(client.url.replace("http", "ws") + "/api/ws", max_size=None)
        self.heard: list[dict[str, Any]] = []

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def subscribe(self, *resources: str, **more: Any) -> Page:
        """Subscribes, and waits until what is there now counts as known."""
        for number, resource in enumerate(resources):
            self.send(type="SUBSCRIBE", resource=resource, uuid=str(number), **more)
        return self.fence()

    def until(self, condition: Callable[[list[dict[str, Any]]], Any]) -> None:
        """Takes frames until the condition holds of those that were heard."""
        end = time.monotonic() + 60
        while not condition(self.heard):
            assert time.monotonic() < end, self.heard
            try:
                text = self.socket.recv(0.1)
            except TimeoutError:
                continue
            frame = json.loads(text) if text != "__pong__" else {"uuid": "pong", "data": {}}
            # A page that watches all flows is told of the fences too.
            fences = str(frame["data"].get("flow_id")).startswith("Fence")
            if frame["uuid"].startswith("Fence") or not fences:
                self.heard.append(frame)

    def fence(self) -> Page:
        """Waits until all that has happened so far was pushed: what happens after it is, in two rounds."""
        for _ in range(2):
            name = f"Fence{next(SERIAL)}"
            self.send(type="SUBSCRIBE", resource=f"/flows/{name}", uuid=name)
            self.socket.send("__ping__")
            self.until(lambda heard: any(frame["uuid"] == "pong" for frame in heard))
            self.client.post(f"/flows/{name}", {})
            self.until(lambda heard, name=name: any(frame["uuid"] == name for frame in heard))  # type: ignore[misc]
            self.send(type="UNSUBSCRIBE", uuid=name)
            self.heard = [f for f in self.heard if f["uuid"] not in (name, "pong")]
        return self

    def of(self, uuid: str) -> list[dict[str, Any]]:
        return [frame for frame in self.heard if frame["uuid"] == uuid]

    def told(self, uuid: str, *columns: str) -> list[tuple[Any, ...]]:
        """(type, columns...) of the frames of one subscription."""
        return [(f["type"], *[f["data"].get(c) for c in columns]) for f in self.of(uuid)]


def test_every_resource_of_the_ui_is_live(flow: Flow, page: Page) -> None:
    run = flow.run()
    step = flow.step(run, "start")
    task = flow.task(step)
    silent = [
        "/runs/", "/nosuch", f"{run}/dag", f"{run}/tasks/1", f"{task}/logs/out", f"{step}/metadata", "runs",
        f"{run}/parameters/x", "/flows//runs", f"/runs?ts_epoch=abc&flow_id={flow.name}", "/runs?run=%zz",
        f"{run}/artifacts?ds_type=local&_limit=1",
    ]  # fmt: skip
    live = [
        f"/runs?flow_id={flow.name}", f"/flows/{flow.name}/runs", run, f"{run}/tasks", f"{step}/tasks", task,
        f"{task}/attempts", f"{run}/metadata", f"{task}/metadata", f"{run}/artifacts", f"{step}/artifacts",
        f"{task}/artifacts", step, f"{run}/steps",
    ]  # fmt: skip
    page.subscribe(*live, *silent)
    flow.tags(run, "fresh")
    flow.metadata(task, attempt(0))
    flow.artifacts(task, a=1)
    page.until(lambda heard: len(heard) >= len(live) - 2)
    page.fence()
    assert sorted(int(f["uuid"]) for f in page.heard) == list(range(len(live) - 2))
    assert [f["resource"] for f in page.of("2") + page.of("7")] == [run, f"{run}/metadata"]


def test_junk_and_pings(page: Page) -> None:
    for text in ("not json", "[]", "1", '{"type": "SUBSCRIBE"}', '{"type": "NOPE", "uuid": "x"}'):
        page.socket.send(text)
    page.send(type="SUBSCRIBE", resource=7, uuid="x")
    page.send(type="SUBSCRIBE", resource="/runs", uuid=["x"])
    for resource in ('/runs?tags=["\ud800"]', "/runs?_tags=\ud800", "/flows/\ud800/runs"):
        page.send(type="SUBSCRIBE", resource=resource, uuid="y")
    page.socket.send("__ping__")
    page.until(lambda heard: [frame["uuid"] for frame in heard] == ["pong"])


def test_a_whole_run_in_order(flow: Flow, page: Page) -> None:
    page.subscribe("/runs", "/flows")
    new = Flow(flow.client, flow.root)
    run = new.run()
    page.until(lambda heard: len(heard) == 2)
    assert {(m["type"], m["resource"]) for m in page.heard} == {
        ("INSERT", "/flows"),
        ("INSERT", "/runs"),
    }
    told = page.of("0")[0]["data"]
    row = new.client.get(f"/api{run}")["data"]
    assert list(told) == list(row) and told["status"] == "running"
    assert told["run_number"] == row["run_number"]

    with Page(flow.client) as open_run:
        open_run.subscribe(
            run, f"{run}/steps", f"{run}/tasks", f"{run}/metadata?field_name=attempt_ok"
        )
        task = new.task(new.step(run, "end"))
        open_run.fence()
        new.metadata(task, attempt(0))
        open_run.fence()
        new.metadata(task, said(0, True))
        open_run.until(lambda heard: heard[-1]["uuid"] == "0")
        open_run.fence()
        assert open_run.told("0", "status") == [("UPDATE", "completed")]
        assert open_run.told("1", "step_name") == [("INSERT", "end")]
        statuses = [("INSERT", "running"), ("UPDATE", "running"), ("UPDATE", "completed")]
        assert open_run.told("2", "status") == statuses
        assert open_run.told("3", "field_name") == [("INSERT", "attempt_ok")]
    page.until(lambda heard: heard[-1]["data"].get("status") == "completed")


def test_attempts_are_inserted_and_supersede(flow: Flow, page: Page) -> None:
    run = flow.run()
    step = flow.step(run, "start")
    task = flow.task(step)
    flow.metadata(task, attempt(0))
    page.subscribe(f"{step}/tasks", task, f"{task}/attempts", f"{step}/tasks?status=completed")
    for row in (said(0, False), attempt(1), said(1, True)):
        flow.metadata(task, row)
        page.fence()
    everything = [("UPDATE", 0, "failed"), ("INSERT", 1, "running"), ("UPDATE", 1, "completed")]
    for uuid in "012":
        assert page.told(uuid, "attempt_id", "status") == everything
    assert page.told("3", "attempt_id", "status") == [("UPDATE", 1, "completed")]


def test_filters_apply_to_what_is_pushed(flow: Flow, page: Page) -> None:
    name = f"flow_id={flow.name}"
    expected = {
        f"/runs?{name}": True, "/runs?flow_id=Other": False, f"/runs?{name}&_tags=t1": True,
        f"/runs?{name}&_tags=t2": False, f"/runs?{name}&status=completed": False,
        f"/runs?{name}&status=running": True, f"/runs?{name}&user=tester": True, f"/runs?{name}&user=null": False,
        f"/runs?flow_id:co={flow.name.lower()}&_limit=1&_order=-run": True, "/flows/Other/runs": False,
        f"/runs?{name}&_tags:likeany=user:te": True, f"/runs?{name}&ts_epoch:ge=1": True,
        f"/runs?{name}&ts_epoch%3Age=99999999999999": False,
    }  # fmt: skip
    page.subscribe(*expected)
    flow.run()
    page.fence()
    assert {int(m["uuid"]) for m in page.heard} == {
        n for n, hit in enumerate(expected.values()) if hit
    }
    assert {m["resource"] for m in page.heard} == {"/runs"}


def test_a_uuid_is_replaced_and_unsubscribed(flow: Flow, page: Page) -> None:
    page.send(type="SUBSCRIBE", resource="/runs", uuid="0")
    page.subscribe(f"/flows/{flow.name}/runs")
    flow.run()
    page.fence()
    assert [m["resource"] for m in page.heard] == [f"/flows/{flow.name}/runs"]
    page.send(type="UNSUBSCRIBE", uuid="0")
    page.fence()
    flow.run()
    page.fence()
    assert len(page.heard) == 1


def test_there_is_a_limit_to_subscriptions(flow: Flow, page: Page) -> None:
    where = f"/flows/{flow.name}/runs"
    for number in range(300):
        page.send(type="SUBSCRIBE", resource=where, uuid=f"s{number}")
    page.send(type="SUBSCRIBE", resource=where + "?" + "x" * 9000, uuid="s0")
    page.socket.send("__ping__")
    page.until(lambda heard: heard)
    page.heard.clear()
    flow.run()
    page.until(lambda heard: len(heard) == 255)
    time.sleep(0.2)
    page.socket.send("__ping__")
    page.until(lambda heard: heard[-1]["uuid"] == "pong")
    assert len(page.heard) == 256  # 255 subscriptions and the answer to the ping


@pytest.mark.parametrize("kind", [Flow, LocalFlow])
def test_tags_are_pushed(served: Served, page: Page, kind: type[Flow]) -> None:
    flow = kind(served.client, served.root)
    run = flow.run()
    page.subscribe(run, f"/runs?_tags=fresh&flow_id={flow.name}")
    flow.tags(run, "fresh")
    page.until(lambda heard: len(heard) == 2)
    flow.tags(run, "fresh")
    page.fence()
    assert page.told("0", "tags") == page.told("1", "tags") == [("UPDATE", ["t1", "fresh"])]


def test_a_tag_of_another_process_is_found_at_once(served: Served) -> None:
    """Though nobody watches the run, and it was listed before."""
    flow = LocalFlow(served.client, served.root)
    run, tag = flow.run(), f"tag-of-{flow.name}"
    assert served.client.get(f"/api/flows/{flow.name}/runs")["data"]
    flow.tags(run, tag)
    found = served.client.get(f"/api/runs?_tags={tag}")["data"]
    assert [row["run"] for row in found] == [run.split("/")[4]]
    flow.tags(run, tag, f"{tag}-too")
    assert f"{tag}-too" in served.client.get(f"/api/tags/autocomplete?tag:co={tag}")["data"]


def test_what_happens_right_after_subscribing_is_pushed(flow: Flow, page: Page) -> None:
    run = flow.run()
    task = flow.task(flow.step(run, "start"))
    resources = [run, f"{run}/tasks", f"{run}/metadata", f"{run}/artifacts", "/runs"]
    for number, resource in enumerate(resources):
        page.send(type="SUBSCRIBE", resource=resource, uuid=str(number))
    page.socket.send("__ping__")
    page.until(lambda heard: heard)
    flow.tags(run, "fresh")
    flow.metadata(task, attempt(0))
    flow.artifacts(task, a=1)
    page.until(lambda heard: {frame["uuid"] for frame in heard} >= set("01234"))


def test_a_lost_connection_is_pushed_at_once(flow: Flow, page: Page) -> None:
    runtime = http.client.HTTPConnection(flow.client.url[7:])

    def post(path: str, body: Any) -> Any:
        runtime.request("POST", path, json.dumps(body))
        return json.loads(runtime.getresponse().read())

    run = f"/flows/{flow.name}/runs/{post(f'/flows/{flow.name}/run', TAGS)['run_number']}"
    post(f"{run}/steps/start/step", TAGS)
    task = f"{run}/steps/start/tasks/{post(f'{run}/steps/start/task', TAGS)['task_id']}"
    post(f"{task}/metadata", [attempt(0)])
    page.subscribe(run, f"{run}/tasks", f"/flows/{flow.name}/runs")
    assert page.heard == []
    runtime.close()
    page.until(lambda heard: len(heard) == 3)
    assert {m["data"]["status"] for m in page.heard} == {"failed"}
    assert {m["uuid"] for m in page.heard} == set("012")


def test_old_heartbeats_are_pushed_once(tmp_path: Path) -> None:
    with Served(tmp_path, env=clean_env(METAFLOW_LOCAL_SERVICE_RUN_CUTOFF="4")) as served:
        flow = Flow(served.client, tmp_path)
        run = flow.run()
        flow.task(flow.step(run, "start"))
        with Page(served.client) as page:
            page.subscribe(run, f"{run}/tasks", "/runs")
            page.until(lambda heard: len(heard) == 3)
            time.sleep(2.5)  # long enough for the next look at what runs
            page.fence()
            statuses = [(m["type"], m["data"]["status"]) for m in page.heard]
            assert statuses == [("UPDATE", "failed")] * 3


def test_a_running_run_is_not_pushed_again_and_again(flow: Flow, page: Page) -> None:
    run = flow.run()
    flow.task(flow.step(run, "start"))
    page.subscribe(run, f"{run}/tasks", f"/flows/{flow.name}/runs")
    for _ in range(3):
        time.sleep(1.0)
        flow.client("POST", f"{run}/heartbeat", {})
    page.fence()
    assert page.heard == []


def test_what_local_mode_writes_is_pushed(served: Served, page: Page) -> None:
    page.subscribe("/runs", "/flows")
    flow = LocalFlow(served.client, served.root)
    run = flow.run()
    page.until(lambda heard: len(heard) == 2)
    assert {(m["type"], m["uuid"]) for m in page.heard} == {("INSERT", "1"), ("INSERT", "0")}
    with Page(served.client) as open_run:
        open_run.subscribe(
            run,
            f"{run}/steps",
            f"{run}/tasks",
            f"{run}/metadata?step_name=start",
            f"{run}/artifacts",
        )
        task = flow.task(flow.step(run, "start"))
        open_run.until(lambda heard: len(heard) == 2)
        assert open_run.told("1", "step_name") == [("INSERT", "start")]
        assert open_run.told("2", "status") == [("INSERT", "pending")]
        flow.metadata(task, attempt(0))
        flow.artifacts(task, a=[1, 2])
        open_run.until(lambda heard: len(heard) == 5)
        assert open_run.told("2", "status")[1:] == [("UPDATE", "running")]
        assert open_run.told("4", "name", "content") == [("INSERT", "a", "[1, 2]")]
        flow.metadata(task, said(0, True))
        end = flow.task(flow.step(run, "end"))
        flow.metadata(end, attempt(0), said(0, True))
        open_run.until(lambda heard: any(f["uuid"] == "0" for f in heard))
        open_run.until(
            lambda heard: (
                ("end", "completed")
                in [(f["data"].get("step_name"), f["data"].get("status")) for f in heard]
            )
        )
        open_run.fence()
        assert open_run.told("0", "status") == [("UPDATE", "completed")]
        assert open_run.told("3", "field_name") == [("INSERT", "attempt"), ("INSERT", "attempt_ok")]
    page.until(lambda heard: heard[-1]["data"].get("status") == "completed")


def test_a_run_that_somebody_waits_for(served: Served, page: Page) -> None:
    flow = LocalFlow(served.client, served.root)
    run = f"/flows/{flow.name}/runs/later"
    page.subscribe(run, f"{run}/tasks")
    flow._object({"run_number": "later"})
    flow.task(flow.step(run, "start"))
    page.until(lambda heard: len(heard) == 2)
    assert sorted((m["type"], m["uuid"]) for m in page.heard) == [("INSERT", "0"), ("INSERT", "1")]
    assert page.of("0")[0]["data"]["run_id"] == "later"


@pytest.mark.parametrize("kind", [Flow, LocalFlow])
def test_artifacts_are_pushed_once_with_their_content(
    served: Served, page: Page, kind: type[Flow]
) -> None:
    flow = kind(served.client, served.root)
    run = flow.run()
    task = flow.task(flow.step(run, "start"))
    flow.artifacts(task, before=0)
    # What is written while a subscription begins may be told once more: the page has it in its list already.
    time.sleep(0.2)
    page.subscribe(
        f"{task}/artifacts?attempt_id=0&postprocess=true&_limit=50", f"{task}/artifacts",
        f"{run}/artifacts?ds_type=local&_limit=1", f"{task}/artifacts?attempt_id=1",
    )  # fmt: skip
    flow.metadata(task, attempt(0))
    flow.artifacts(task, a=[1, 2], b="x")
    page.until(lambda heard: len(heard) == 4)
    flow.metadata(task, said(0, True))
    page.fence()
    told = [("INSERT", "a", "[1, 2]"), ("INSERT", "b", "x")]
    assert sorted(page.told("0", "name", "content")) == sorted(page.told("1", "name", "content"))
    assert sorted(page.told("0", "name", "content")) == told
    assert page.of("2") == page.of("3") == []


def test_parameters_are_pushed_as_one_object(flow: Flow, page: Page) -> None:
    run = flow.run()
    page.subscribe(f"{run}/parameters")
    task = flow.task(flow.step(run, "_parameters"))
    flow.artifacts(task, n=3, _x=1)
    page.until(lambda heard: heard)
    flow.step(run, "start")
    page.fence()
    assert [(m["type"], m["data"]) for m in page.heard] == [("UPDATE", {"n": {"value": 3}})]


def test_since_replays_what_changed(flow: Flow, page: Page) -> None:
    local = LocalFlow(flow.client, flow.root)
    began = time.time() - 10
    old = local.run()
    ids = {"run_number": old.split("/")[4]}
    local._put(ids, "_self", {"tags": [], "system_tags": [], "ts_epoch": int(began - 1000) * 1000})
    task = local.task(local.step(old, "end"))
    local.metadata(task, attempt(0), said(0, True))
    run = flow.run()
    resources = [
        f"/flows/{local.name}/runs", old, f"{old}/steps", f"{old}/tasks",
        f"{old}/metadata?field_name=attempt_ok", f"/flows/{flow.name}/runs",
    ]  # fmt: skip
    for since, answers in (
        (str(int(began)), True), (began, True), (0, False), ("x", False), (True, False),
    ):  # fmt: skip
        with Page(flow.client) as again:
            again.subscribe(*resources, since=since)
            told = sorted((m["uuid"], m["type"], m["data"].get("status")) for m in again.heard)
            everything = [
                ("0", "UPDATE", "completed"), ("1", "UPDATE", "completed"), ("2", "INSERT", None),
                ("3", "INSERT", "completed"), ("4", "INSERT", None), ("5", "INSERT", "running"),
            ]  # fmt: skip
            assert told == (everything if answers else [])
    page.subscribe(*resources, since=time.time() + 60)
    # It runs: whatever was missed, this is how it stands.
    assert [m["data"]["run"] for m in page.heard] == [run.split("/")[4]]


def test_a_bad_record_costs_its_own_row(served: Served, page: Page) -> None:
    """In lists, in a replay and in what is pushed."""
    flow = LocalFlow(served.client, served.root)
    run = flow.run()
    good, bad = (flow.task(flow.step(run, step)) for step in ("start", "next"))
    began = time.time() - 1
    flow.metadata(good, attempt(0))
    flow.artifacts(good, a=1)
    deep = '{"value": ' + "[" * 900 + "]" * 900 + ', "ts_epoch": "soon", "tags": [NaN]}'
    meta = flow._meta(flow._ids(bad))
    (meta / f"sysmeta_deep_{int(time.time() * 1000)}.json").write_text(deep)
    (meta / "0_artifact_b.json").write_text(
        '{"ts_epoch": "soon", "sha": NaN, "ds_type": ' + "[" * 900 + "]" * 900 + "}"
    )
    flow.metadata(bad, attempt(0))
    flow.artifacts(bad, c=2)
    for kind, names in (
        ("metadata", {"attempt"}),
        ("artifacts", {"a", "c"}),
        ("tasks", {"start", "next"}),
    ):
        rows = served.client.get(f"/api{run}/{kind}")["data"]
        column = {"metadata": "field_name", "artifacts": "name", "tasks": "step_name"}[kind]
        assert {row[column] for row in rows} >= names
    page.subscribe(f"{run}/metadata", f"{run}/artifacts", f"{run}/tasks", since=began)
    assert {("INSERT", "attempt", "start"), ("INSERT", "attempt", "next")} <= set(
        page.told("0", "field_name", "step_name")
    )
    assert {("INSERT", "a"), ("INSERT", "c")} <= set(page.told("1", "name"))
    assert len(page.of("2")) == 2


def test_directories_deleted_while_listed_and_watched(served: Served, page: Page) -> None:
    flow = LocalFlow(served.client, served.root)
    run, other = flow.run(), flow.run()
    step = flow.step(run, "start")
    tasks = [flow.task(step) for _ in range(250)]
    flow.task(flow.step(run, "next"))
    flow.task(flow.step(other, "start"))
    paths = [
        "",
        "/steps",
        "/tasks?_limit=1000",
        "/tasks?postprocess=true&_limit=1000",
        "/metadata",
        "/artifacts",
        "/parameters",
        "/dag",
    ]
    paths = [f"/api{run}{path}" for path in paths] + [
        "/api/runs",
        f"/api/flows/{flow.name}/runs",
        "/api/flows",
    ]
    page.subscribe(run, f"{run}/tasks", f"{run}/metadata", f"{run}/steps", "/runs", "/flows")
    top = served.root / ".metaflow" / flow.name
    number = run.split("/")[4]
    for victim in (tasks[0].split("/")[8], "", None):
        for path in paths:
            served.client("GET", path)
        gone = (
            top
            if victim is None
            else top / number / "start" / victim
            if victim
            else top / number / "start"
        )
        shutil.rmtree(gone)
        for path in paths:
            assert served.client("GET", path).status in (200, 404), path
            if victim is not None and path.endswith("/steps"):
                assert "next" in {row["step_name"] for row in served.client.get(path)["data"]}
    page.fence()
    again = Flow(served.client, served.root)
    again.run()
    page.until(lambda heard: any(f["data"].get("flow_id") == again.name for f in heard))


def test_two_hundred_clients(flow: Flow) -> None:
    run = flow.run()
    pages = [Page(flow.client) for _ in range(100)]
    try:
        for page in pages:
            for number, resource in enumerate((f"{run}/tasks", f"{run}/steps")):
                page.send(type="SUBSCRIBE", resource=resource, uuid=str(number))
        pages[-1].fence()
        step = flow.step(run, "start")
        for _ in range(20):
            flow.task(step)
        for page in pages:
            page.until(lambda heard: len(heard) == 21)
            assert [m["data"]["task_id"] for m in page.of("0")] == list(range(1, 21))
    finally:
        for page in pages:
            page.socket.close()


def test_a_page_that_does_not_read_holds_nobody_up(flow: Flow, page: Page, served: Served) -> None:
    deaf = served.websocket(receive=4096)
    body = json.dumps(
        {"type": "SUBSCRIBE", "resource": f"/flows/{flow.name}/runs", "uuid": "d"}
    ).encode()
    deaf.sendall(bytes([0x81, 0xFE]) + len(body).to_bytes(2, "big") + bytes(4) + body)
    page.subscribe(f"/flows/{flow.name}/runs")
    for _ in range(50):
        flow.run()
    page.until(lambda heard: len(heard) == 50)
    deaf.close()
