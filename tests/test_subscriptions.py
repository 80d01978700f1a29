"""Subscriptions: what is told, to whom, in which order; on real trees, written by this store or by another."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import pickle
import time
from pathlib import Path
from typing import Any, Callable, Coroutine

import pytest

import mflocal

TAGS = {
    "user_name": "tester",
    "tags": ["t1"],
    "system_tags": ["user:tester", "metaflow_version:2.19.39"],
}


class Ear:
    """The client's end of a socket: keeps what it hears; `deaf` once it is to be dropped."""

    def __init__(self) -> None:
        self.request = mflocal.Request("GET", "/api/ws")
        self.heard: list[Any] = []
        self.deaf = False

    async def receive(self) -> str | None:
        return None

    def send_text(self, text: str) -> bool:
        if not self.deaf:
            self.heard.append(text if text == "__pong__" else json.loads(text))
        return not self.deaf

    def close(self, code: int = 1000, reason: str = "") -> None:
        self.deaf = True


class Hub:
    """Store, liveness and subscriptions of one root, and `other`: a second process's store on the same root."""

    def __init__(self, root: Path, **settings: Any) -> None:
        temp = root / ".metaflow" / ".mflocal" / "tmp"
        temp.mkdir(parents=True, exist_ok=True)
        (temp / "other").mkdir(exist_ok=True)
        self.settings = mflocal.Settings(root=str(root), **settings)
        self.root = root
        self.store = mflocal.Store(self.settings.metaflow_dir, str(temp))
        self.other = mflocal.Store(self.settings.metaflow_dir, str(temp / "other"))
        self.liveness = mflocal.Liveness(self.store)
        self.trouble: list[str] = []
        self.site = mflocal.Site(self.store, self.liveness, self.settings)
        self.subscriptions = mflocal.Subscriptions(self.site, self.trouble.append)

    def client(self, *resources: str, **more: Any) -> Ear:
        """A client that subscribes to resources; the uuids are 0, 1, 2."""
        ear = Ear()
        ear.client = self.subscriptions.connect(ear)  # type: ignore[attr-defined]
        for number, resource in enumerate(resources):
            self.say(ear, type="SUBSCRIBE", resource=resource, uuid=str(number), **more)
        return ear

    def say(self, ear: Ear, **message: Any) -> None:
        self.subscriptions.receive(ear.client, json.dumps(message))  # type: ignore[attr-defined]

    def make_run(self, store: Any = None, flow: str = "HubFlow", tags: Any = TAGS) -> Any:
        store = store or self.store
        node = store.flow(flow) or store.create_flow(flow, {})
        return store.create_run(node, tags)


async def wait_for(check: Callable[[], Any], seconds: float = 60.0) -> None:
    """Waits until a condition holds."""
    limit = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < limit, "in vain"
        await asyncio.sleep(0.02)


async def settle() -> None:
    """Long enough for events to be told, too short for the watch."""
    await asyncio.sleep(mflocal.COALESCE * 4)


def attempt(number: int) -> dict[str, Any]:
    return {
        "field_name": "attempt",
        "value": str(number),
        "type": "attempt",
        "tags": [f"attempt_id:{number}"],
    }


def said(number: int, ok: bool) -> dict[str, Any]:
    tags = [f"attempt_id:{number}"]
    return {
        "field_name": "attempt_ok",
        "value": str(ok),
        "type": "internal_attempt_status",
        "tags": tags,
    }


def artifact(name: str, number: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "attempt_id": number,
        "ds_type": "local",
        "sha": "aa",
        "content_type": "pickle-v4",
        **more,
    }


def blob(root: Path, flow: str, value: Any) -> str:
    data = pickle.dumps(value, 4)
    sha = hashlib.sha1(data).hexdigest()
    folder = root / ".metaflow" / flow / "data" / sha[:2]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / sha).write_bytes(gzip.compress(data))
    return sha


@pytest.fixture
def go(tmp_path: Path) -> Any:
    """Runs a test's body with a hub on an empty root; fails it when the hub logged trouble."""

    def run(body: Callable[[Hub], Coroutine[Any, Any, None]], **settings: Any) -> None:
        async def whole() -> None:
            hub = Hub(tmp_path, **settings)
            try:
                await body(hub)
            finally:
                hub.subscriptions.stop()
            assert not hub.trouble

        asyncio.run(whole())

    return run


@pytest.mark.parametrize(
    "path, expected",
    [
        ("/flows", ("flows",)),
        ("/flows/F", ("flows", "F")),
        ("/runs", ("runs",)),
        ("/flows/F/runs", ("runs", "F")),
        ("/flows/F/runs/1", ("runs", "F", "1")),
        ("/flows/F/runs/a%3Ab/steps", ("steps", "F", "a:b")),
        ("/flows/F/runs/1/steps/s", ("steps", "F", "1", "s")),
        ("/flows/F/runs/1/tasks", ("tasks", "F", "1")),
        ("/flows/F/runs/1/steps/s/tasks", ("tasks", "F", "1", "s")),
        ("/flows/F/runs/1/steps/s/tasks/2", ("tasks", "F", "1", "s", "2", True)),
        ("/flows/F/runs/1/steps/s/tasks/2/attempts", ("tasks", "F", "1", "s", "2")),
        ("/flows/F/runs/1/metadata", ("metadata", "F", "1")),
        ("/flows/F/runs/1/steps/s/tasks/2/metadata", ("metadata", "F", "1", "s", "2")),
        ("/flows/F/runs/1/artifacts", ("artifacts", "F", "1")),
        ("/flows/F/runs/1/steps/s/artifacts", ("artifacts", "F", "1", "s")),
        ("/flows/F/runs/1/steps/s/tasks/2/artifacts", ("artifacts", "F", "1", "s", "2")),
        ("/flows/F/runs/1/parameters", ("parameters", "F", "1")),
    ],
)
def test_resources(path: str, expected: tuple[Any, ...]) -> None:
    target = mflocal.parse_resource(path)
    assert target is not None
    assert tuple(target) == expected + (None,) * (5 - len(expected)) + (
        () if len(expected) == 6 else (False,)
    )


@pytest.mark.parametrize(
    "path",
    "/runs/ /flows/ / runs flows/F /nosuch /runs/1 /flows/F/runs/1/dag /flows/F/runs/1/tasks/2 /flows//runs "
    "/flows/F/runs/1/steps/s/tasks/2/logs/out /flows/F/runs/1/parameters/x /flows/F/runs/1/steps/s/metadata".split(),
)
def test_resources_that_are_silent(path: str) -> None:
    assert mflocal.parse_resource(path) is None


def test_ping_and_junk(go: Any) -> None:
    async def body(hub: Hub) -> None:
        ear = hub.client(
            "/runs/", "/nosuch", "/runs?ts_epoch=abc", "/runs?run=%zz", "/flows/F/runs/1/dag"
        )
        for text in (
            "__ping__",
            "not json",
            "[]",
            "1",
            '{"type": "SUBSCRIBE"}',
            '{"type": "NOPE", "uuid": "x"}',
        ):
            hub.subscriptions.receive(ear.client, text)  # type: ignore[attr-defined]
        hub.say(ear, type="SUBSCRIBE", resource=7, uuid="x")
        hub.say(ear, type="SUBSCRIBE", resource="/runs", uuid=["x"])
        hub.make_run()
        await settle()
        assert ear.heard == ["__pong__"]

    go(body)


def test_bad_filters_are_silent(go: Any) -> None:
    async def body(hub: Hub) -> None:
        few, many = (
            ",".join([".*"] * count) for count in (mflocal.MAX_PATTERNS, mflocal.MAX_PATTERNS + 1)
        )
        ear = hub.client(
            f"/runs?flow_id:re={many}",
            f"/runs?flow_id:re={few}",
            f"/runs?flow_id:re={few}&user:re=t",
        )
        for resource in (
            '/runs?tags=["\ud800"]',
            "/runs?_tags=\ud800",
            "/flows/\ud800/runs",
            "/runs?tags:ne=[\ud800]",
        ):
            hub.say(ear, type="SUBSCRIBE", resource=resource, uuid="x")
        await settle()
        hub.make_run()
        await settle()
        assert {m["uuid"] for m in ear.heard if m["uuid"] != "x"} == {"1"}

    go(body)


def test_nothing_is_kept_while_nobody_listens(go: Any) -> None:
    async def body(hub: Hub) -> None:
        run = hub.make_run()
        assert not hub.subscriptions._pending and not hub.subscriptions._tasks
        ear = hub.client("/runs")
        await settle()
        assert hub.subscriptions._tasks
        hub.say(ear, type="UNSUBSCRIBE", uuid="0")
        hub.store.replace_tags(run, ["x"])
        assert (
            not hub.subscriptions._pending
            and not hub.subscriptions._tasks
            and not hub.subscriptions._sent
        )

    go(body)


def test_a_whole_run_in_order(go: Any) -> None:
    async def body(hub: Hub) -> None:
        ear = hub.client("/runs", "/flows")
        await settle()
        run = hub.make_run()
        await wait_for(lambda: len(ear.heard) == 2)
        assert [(m["type"], m["resource"]) for m in ear.heard] == [
            ("INSERT", "/flows"),
            ("INSERT", "/runs"),
        ]
        row = await mflocal.ui_run_row(hub.site, run)
        told = ear.heard[1]["data"]
        assert (
            list(told) == list(row)
            and told["run_number"] == int(run.id)
            and told["status"] == "running"
        )

        base = f"/flows/HubFlow/runs/{run.id}"
        page = hub.client(
            base, base + "/steps", base + "/tasks", base + "/metadata?field_name=attempt_ok"
        )
        await settle()
        step = hub.store.create_step(run, "end", TAGS)
        task = hub.store.create_task(step, TAGS)
        await settle()
        await hub.store.add_metadata(task, [attempt(0)])
        await settle()
        await hub.store.add_metadata(task, [said(0, True)])
        await wait_for(lambda: page.heard[-1]["uuid"] == "0")
        kinds = [
            (m["type"], m["uuid"], m["data"].get("status"), m["data"].get("field_name"))
            for m in page.heard
        ]
        assert kinds == [
            ("INSERT", "1", None, None),
            ("INSERT", "2", "running", None),
            ("UPDATE", "2", "running", None),
            ("INSERT", "3", None, "attempt_ok"),
            ("UPDATE", "2", "completed", None),
            ("UPDATE", "0", "completed", None),
        ]
        assert (ear.heard[-1]["type"], ear.heard[-1]["data"]["status"]) == ("UPDATE", "completed")

    go(body)


def test_attempts_are_inserted_and_supersede(go: Any) -> None:
    async def body(hub: Hub) -> None:
        run = hub.make_run()
        task = hub.store.create_task(hub.store.create_step(run, "start", TAGS), TAGS)
        await hub.store.add_metadata(task, [attempt(0)])
        where = f"/flows/HubFlow/runs/{run.id}/steps/start/tasks"
        ear = hub.client(
            where,
            where + f"/{task.id}",
            where + f"/{task.id}/attempts",
            where + "?status=completed",
        )
        await settle()
        await hub.store.add_metadata(task, [said(0, False)])
        await settle()
        await hub.store.add_metadata(task, [attempt(1)])
        await settle()
        await hub.store.add_metadata(task, [said(1, True)])
        await settle()

        def told(uuid: str) -> list[tuple[Any, ...]]:
            rows = [m for m in ear.heard if m["uuid"] == uuid]
            return [(m["type"], m["data"]["attempt_id"], m["data"]["status"]) for m in rows]

        everything = [("UPDATE", 0, "failed"), ("INSERT", 1, "running"), ("UPDATE", 1, "completed")]
        assert told("0") == told("1") == told("2") == everything
        assert told("3") == [("UPDATE", 1, "completed")]

    go(body)


def test_one_burst_is_one_row(go: Any) -> None:
    async def body(hub: Hub) -> None:
        run = hub.make_run()
        ear = hub.client(f"/flows/HubFlow/runs/{run.id}/tasks")
        await settle()
        task = hub.store.create_task(hub.store.create_step(run, "start", TAGS), TAGS)
        await hub.store.add_metadata(task, [attempt(0)])
        await hub.store.add_metadata(task, [said(0, True)])
        await settle()
        assert [(m["type"], m["data"]["status"]) for m in ear.heard] == [("INSERT", "completed")]

    go(body)


def test_filters_apply_to_what_is_told(go: Any) -> None:
    resources = (
        "/runs?flow_id=HubFlow", "/runs?flow_id=Other", "/runs?_tags=t1", "/runs?_tags=t2", "/runs?status=completed",
        "/runs?status=running", "/runs?user=tester", "/runs?user=null", "/runs?flow_id:co=hub&_limit=1&_order=-run",
        "/flows/Other/runs", "/runs?_tags:likeany=user:te", "/runs?ts_epoch:ge=1", "/runs?ts_epoch%3Age=99999999999999",
    )  # fmt: skip

    async def body(hub: Hub) -> None:
        ear = hub.client(*resources)
        await settle()
        hub.make_run()
        await settle()
        assert {int(m["uuid"]) for m in ear.heard} == {0, 2, 5, 6, 8, 10, 11}
        assert {m["resource"] for m in ear.heard} == {"/runs"}

    go(body)


def test_a_uuid_is_replaced_and_unsubscribed(go: Any) -> None:
    async def body(hub: Hub) -> None:
        ear = hub.client("/runs")
        hub.say(ear, type="SUBSCRIBE", resource="/flows", uuid="0")
        await settle()
        hub.make_run()
        await settle()
        assert [m["resource"] for m in ear.heard] == ["/flows"]
        hub.say(ear, type="UNSUBSCRIBE", uuid="0")
        hub.make_run(flow="Other")
        await settle()
        assert len(ear.heard) == 1 and hub.subscriptions.clients == 0

    go(body)


def test_there_is_a_limit_to_subscriptions(go: Any) -> None:
    async def body(hub: Hub) -> None:
        ear = hub.client(*["/flows"] * (mflocal.WS_MAX_SUBSCRIPTIONS + 10))
        hub.say(ear, type="SUBSCRIBE", resource="/flows?" + "x" * mflocal.WS_MAX_RESOURCE, uuid="0")
        assert len(ear.client.subscriptions) == mflocal.WS_MAX_SUBSCRIPTIONS - 1  # type: ignore[attr-defined]

    go(body)


def test_tags_are_told(go: Any) -> None:
    async def body(hub: Hub) -> None:
        run = hub.make_run()
        ear = hub.client(f"/flows/HubFlow/runs/{run.id}", "/runs?_tags=fresh")
        await settle()
        hub.store.replace_tags(run, ["fresh"])
        await settle()
        assert sorted((m["type"], m["uuid"], m["data"]["tags"]) for m in ear.heard) == [
            ("UPDATE", "0", ["fresh"]),
            ("UPDATE", "1", ["fresh"]),
        ]
        hub.store.replace_tags(run, ["fresh"])
        await settle()
        assert len(ear.heard) == 2  # an unchanged row is not told again

    go(body)


def test_what_happens_right_after_subscribing_is_told(go: Any) -> None:
    """Its baseline is made a little later, and must not swallow it."""

    async def body(hub: Hub) -> None:
        run = hub.make_run()
        task = hub.store.create_task(hub.store.create_step(run, "start", TAGS), TAGS)
        base = f"/flows/HubFlow/runs/{run.id}"
        ear = hub.client(base, base + "/tasks", base + "/metadata", base + "/artifacts", "/runs")
        hub.store.replace_tags(run, ["fresh"])
        await hub.store.add_metadata(task, [attempt(0)])
        await hub.store.add_artifacts(task, [artifact("a")])
        await settle()
        assert sorted(m["uuid"] for m in ear.heard) == ["0", "1", "2", "3", "4"]

    go(body)


def test_a_lost_connection_is_told_at_once(go: Any) -> None:
    async def body(hub: Hub) -> None:
        run = hub.make_run()
        connection = object()
        hub.liveness.bind_run(connection, run, None)
        task = hub.store.create_task(hub.store.create_step(run, "start", TAGS), TAGS)
        await hub.store.add_metadata(task, [attempt(0)])
        hub.liveness.bind_attempt(connection, task, 0, None)
        base = f"/flows/HubFlow/runs/{run.id}"
        ear = hub.client(base, base + "/tasks", "/runs")
        await settle()
        assert ear.heard == []
        hub.liveness.connection_closed(connection, by_client=True)
        await settle()
        assert sorted((m["uuid"], m["data"]["status"]) for m in ear.heard) == [
            ("0", "failed"),
            ("1", "failed"),
            ("2", "failed"),
        ]

    go(body)


def test_old_heartbeats_are_told(go: Any) -> None:
    async def body(hub: Hub) -> None:
        run = hub.make_run()
        task = hub.store.create_task(hub.store.create_step(run, "start", TAGS), TAGS)
        hub.liveness.heartbeat(run)
        hub.liveness.heartbeat(task)
        base = f"/flows/HubFlow/runs/{run.id}"
        ear, home = hub.client(base, base + "/tasks"), hub.client("/runs")
        await wait_for(lambda: len(ear.heard) == 2 and len(home.heard) == 1)
        assert {m["data"]["status"] for m in ear.heard + home.heard} == {"failed"}
        assert {m["type"] for m in ear.heard + home.heard} == {"UPDATE"}
        await asyncio.sleep(mflocal.JUDGE_INTERVAL + 0.5)
        assert len(ear.heard) == 2 and len(home.heard) == 1

    go(body, run_cutoff=1.0)


def test_a_running_run_is_not_told_again_and_again(go: Any) -> None:
    async def body(hub: Hub) -> None:
        run = hub.make_run()
        hub.store.create_task(hub.store.create_step(run, "start", TAGS), TAGS)
        base = f"/flows/HubFlow/runs/{run.id}"
        ear = hub.client(base, base + "/tasks", "/runs")
        for _ in range(4):
            await asyncio.sleep(1.0)
            hub.liveness.heartbeat(run)
        assert ear.heard == []

    go(body)


def test_what_another_process_writes_is_told(go: Any) -> None:
    """As local mode does: no heartbeats, no request, only files."""
    nobody = {"user_name": "tester", "tags": [], "system_tags": []}

    async def body(hub: Hub) -> None:
        home = hub.client("/runs", "/flows")
        await settle()
        run = hub.make_run(hub.other, tags=nobody)
        await wait_for(lambda: len(home.heard) == 2)
        assert [(m["type"], m["uuid"]) for m in home.heard] == [("INSERT", "1"), ("INSERT", "0")]
        base = f"/flows/HubFlow/runs/{run.id}"
        page = hub.client(
            base, base + "/steps", base + "/tasks", base + "/metadata?step_name=start"
        )
        await settle()
        step = hub.other.create_step(run, "start", nobody)
        task = hub.other.create_task(step, nobody)
        await wait_for(lambda: len(page.heard) == 2)
        assert [(m["type"], m["uuid"], m["data"].get("status")) for m in page.heard] == [
            ("INSERT", "1", None),
            ("INSERT", "2", "pending"),
        ]
        await hub.other.add_metadata(task, [attempt(0)])
        await wait_for(lambda: len(page.heard) == 4)
        assert {(m["type"], m["uuid"]) for m in page.heard[2:]} == {
            ("UPDATE", "2"),
            ("INSERT", "3"),
        }
        await hub.other.add_metadata(task, [said(0, True)])
        end = hub.other.create_task(hub.other.create_step(run, "end", nobody), nobody)
        await hub.other.add_metadata(end, [attempt(0), said(0, True)])
        await wait_for(lambda: page.heard[-1]["uuid"] == "0")
        await asyncio.sleep(2.5)
        assert [m["data"]["status"] for m in page.heard if m["uuid"] == "0"] == ["completed"]
        assert [m["data"]["status"] for m in home.heard if m["uuid"] == "0"] == [
            "running",
            "completed",
        ]
        fields = [m["data"]["field_name"] for m in page.heard if m["uuid"] == "3"]
        assert fields == ["attempt", "attempt_ok"]
        statuses = [
            (m["data"]["step_name"], m["data"]["status"]) for m in page.heard if m["uuid"] == "2"
        ]
        assert statuses[-2:] == [("start", "completed"), ("end", "completed")]

    go(body)


def test_a_run_that_somebody_waits_for(go: Any) -> None:
    nobody = {"user_name": "tester", "tags": [], "system_tags": []}

    async def body(hub: Hub) -> None:
        flow = hub.other.create_flow("HubFlow", {})
        ear = hub.client("/flows/HubFlow/runs/later", "/flows/HubFlow/runs/later/tasks")
        await settle()
        run = hub.other.create_run(flow, nobody, "later")
        hub.other.create_task(hub.other.create_step(run, "start", nobody), nobody)
        await wait_for(lambda: len(ear.heard) == 2)
        assert sorted((m["type"], m["uuid"]) for m in ear.heard) == [
            ("INSERT", "0"),
            ("INSERT", "1"),
        ]
        assert ear.heard[0]["data"]["run_id"] == "later"

    go(body)


def test_runs_that_nobody_waits_for_any_more_are_forgotten(go: Any) -> None:
    async def body(hub: Hub) -> None:
        hub.other.create_flow("HubFlow", {})
        where = "/flows/HubFlow/runs/"
        ear, gone = (
            hub.client("/flows", where + "later"),
            hub.client(*[f"{where}never{n}" for n in range(50)]),
        )
        hub.say(ear, type="SUBSCRIBE", resource=where + "unwanted/tasks", uuid="x")
        await wait_for(lambda: len(hub.subscriptions._absent) == 52)
        hub.say(ear, type="UNSUBSCRIBE", uuid="x")
        hub.subscriptions.disconnect(gone.client)  # type: ignore[attr-defined]
        await wait_for(lambda: hub.subscriptions._absent == {("HubFlow", "later")})

    go(body)


@pytest.mark.parametrize("own", [True, False])
def test_artifacts_are_told_exactly_once(go: Any, own: bool) -> None:
    tags = TAGS if own else {"user_name": "tester", "tags": [], "system_tags": []}

    async def body(hub: Hub) -> None:
        store = hub.store if own else hub.other
        run = hub.make_run(store, tags=tags)
        task = store.create_task(store.create_step(run, "start", tags), tags)
        sha = blob(hub.root, "HubFlow", [1, 2])
        await store.add_artifacts(task, [artifact("before", sha=sha)])
        base = f"/flows/HubFlow/runs/{run.id}"
        where = f"{base}/steps/start/tasks/{task.id}/artifacts"
        ear = hub.client(
            where + "?attempt_id=0&postprocess=true&_limit=50", where, base + "/artifacts?ds_type=local&_limit=1",
            where + "?attempt_id=1",
        )  # fmt: skip
        await settle()
        await store.add_metadata(task, [attempt(0)])
        await store.add_artifacts(task, [artifact("a", sha=sha), artifact("b", 1, sha=sha)])
        await wait_for(lambda: len(ear.heard) == 4)
        await store.add_metadata(task, [said(0, True)])
        await asyncio.sleep(2.5)
        told = [
            (m["type"], m["uuid"], m["data"]["name"], m["data"].get("content")) for m in ear.heard
        ]
        assert sorted(told) == [
            ("INSERT", "0", "a", "[1, 2]"),
            ("INSERT", "1", "a", None),
            ("INSERT", "1", "b", None),
            ("INSERT", "3", "b", None),
        ]

    go(body)


def test_parameters_are_told_as_one_object(go: Any) -> None:
    async def body(hub: Hub) -> None:
        run = hub.make_run()
        ear = hub.client(f"/flows/HubFlow/runs/{run.id}/parameters")
        await settle()
        task = hub.store.create_task(hub.store.create_step(run, "_parameters", TAGS), TAGS)
        rows = [
            artifact(name, sha=blob(hub.root, "HubFlow", value))
            for name, value in (("n", 3), ("_x", 1))
        ]
        await hub.store.add_artifacts(task, rows)
        await settle()
        hub.store.create_step(run, "start", TAGS)
        await settle()
        assert [(m["type"], m["data"]) for m in ear.heard] == [("UPDATE", {"n": {"value": 3}})]

    go(body)


def test_since_replays_what_changed(go: Any) -> None:
    async def body(hub: Hub) -> None:
        old = hub.make_run()
        began = time.time() - 10
        old.record["ts_epoch"] = int((began - 1000) * 1000)
        task = hub.store.create_task(hub.store.create_step(old, "end", TAGS), TAGS)
        await hub.store.add_metadata(task, [attempt(0), said(0, True)])
        run = hub.make_run()
        base = f"/flows/HubFlow/runs/{old.id}"
        resources = (
            "/runs",
            base,
            base + "/steps",
            base + "/tasks",
            base + "/metadata?field_name=attempt_ok",
        )
        for since, answers in (
            (str(int(began)), True),
            (began, True),
            (0, False),
            ("x", False),
            (True, False),
        ):
            ear = hub.client(*resources, since=since)
            await settle()
            told = sorted((m["uuid"], m["type"], m["data"].get("status")) for m in ear.heard)
            assert told == (
                [
                    ("0", "INSERT", "running"), ("0", "UPDATE", "completed"), ("1", "UPDATE", "completed"),
                    ("2", "INSERT", None), ("3", "INSERT", "completed"), ("4", "INSERT", None),
                ]
                if answers
                else []
            )  # fmt: skip
            hub.subscriptions.disconnect(ear.client)  # type: ignore[attr-defined]
        ear = hub.client(*resources, since=time.time() + 5 + mflocal.UNNOTICED)
        await settle()
        assert [m["data"]["run"] for m in ear.heard] == [
            run.id
        ]  # it runs: whatever was missed, this is how it stands

    go(body)


def test_a_replay_gives_way(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have their turn between its rows: ten thousand of them are 8 MiB."""
    monkeypatch.setattr(mflocal, "WALK_SLICE", -1.0)  # every chance is taken
    turn, turns = 0, []

    async def others() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def body(hub: Hub) -> None:
        for _ in range(40):
            hub.make_run()
        ear = hub.client()
        ear.send_text = lambda text: turns.append(turn) or True  # type: ignore[method-assign, func-returns-value]
        counting = asyncio.ensure_future(others())
        hub.say(ear, type="SUBSCRIBE", resource="/runs", uuid="0", since=time.time() - 10)
        await wait_for(lambda: len(turns) == 40)
        counting.cancel()
        assert len(set(turns)) == 40

    go(body)


def test_a_deaf_client_holds_nobody_up(go: Any) -> None:
    async def body(hub: Hub) -> None:
        deaf, ear = hub.client("/runs", "/flows"), hub.client("/runs")
        await settle()
        deaf.deaf = True
        hub.make_run()
        await settle()
        hub.make_run()
        await settle()
        assert len(ear.heard) == 2
        assert deaf.client.subscriptions == {} and hub.subscriptions.clients == 1  # type: ignore[attr-defined]

    go(body)


def test_two_hundred_clients(go: Any) -> None:
    async def body(hub: Hub) -> None:
        run = hub.make_run()
        base = f"/flows/HubFlow/runs/{run.id}"
        ears = [
            hub.client("/runs?_tags=user:tester", base, base + "/tasks", base + "/steps")
            for _ in range(200)
        ]
        await settle()
        step = hub.store.create_step(run, "start", TAGS)
        for _ in range(20):
            hub.store.create_task(step, TAGS)
        await wait_for(
            lambda: all(len(ear.heard) == 23 for ear in ears)
        )  # its run, for two resources, and 21
        assert [m["data"]["task_id"] for m in ears[7].heard if m["uuid"] == "2"] == list(
            range(1, 21)
        )

    go(body)


def test_one_broken_object_does_not_end_the_telling(tmp_path: Path) -> None:
    async def body() -> None:
        hub = Hub(tmp_path)
        ear = hub.client("/runs", "/flows")
        await settle()
        flow = hub.store.create_flow("HubFlow", {})
        for listener in hub.store.listeners:
            listener(mflocal.Event("run", flow, None))
        hub.store.create_run(flow, TAGS)
        await settle()
        assert [m["resource"] for m in ear.heard] == ["/flows", "/runs"] and hub.trouble
        hub.subscriptions.stop()

    asyncio.run(body())


def test_a_socket_from_open_to_close(go: Any) -> None:
    class Talker(Ear):
        def __init__(self, *texts: str) -> None:
            super().__init__()
            self.texts = list(texts)

        async def receive(self) -> str | None:
            await asyncio.sleep(0.05)
            return self.texts.pop(0) if self.texts else None

    async def body(hub: Hub) -> None:
        ear = Talker(
            '{"type": "SUBSCRIBE", "resource": "/flows", "uuid": "a"}',
            "__ping__",
            "__ping__",
            "__ping__",
            "",
        )
        serving = asyncio.ensure_future(mflocal.ui_socket(hub.subscriptions, ear))
        await asyncio.sleep(0.07)
        hub.make_run()
        await serving
        assert [m for m in ear.heard if m != "__pong__"][0]["data"]["flow_id"] == "HubFlow"
        assert ear.heard.count("__pong__") == 3 and hub.subscriptions.clients == 0

    go(body)
