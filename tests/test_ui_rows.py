"""The rows of the UI, made from trees that real flows wrote in local mode."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Coroutine

import pytest

import mflocal

FLOW = Path(__file__).resolve().parent / "flows" / "ui_tiny.py"
RUN_KEYS = (
    "flow_id run_number run_id user_name user run status ts_epoch finished_at duration last_heartbeat_ts "
    "tags system_tags"
).split()
STEP_KEYS = (
    "flow_id run_number run_id step_name user_name ts_epoch duration tags system_tags".split()
)
TASK_KEYS = (
    "flow_id run_number run_id step_name task_id task_name user_name status task_ok ts_epoch started_at "
    "finished_at duration attempt_id tags system_tags last_heartbeat_ts"
).split()
METADATA_KEYS = (
    "id flow_id run_number run_id step_name task_id task_name attempt_id field_name value type user_name "
    "ts_epoch tags system_tags"
).split()
ARTIFACT_KEYS = (
    "flow_id run_number run_id step_name task_id task_name name location ds_type sha type content_type "
    "user_name attempt_id ts_epoch tags system_tags"
).split()


class Root:
    """A root as the service sees it, and the row builders bound to it."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.settings = mflocal.Settings(root=str(root), **settings)
        temp = root / ".metaflow" / ".mflocal" / "tmp"
        temp.mkdir(parents=True, exist_ok=True)
        self.store = mflocal.Store(self.settings.metaflow_dir, str(temp))
        self.liveness = mflocal.Liveness(self.store)
        self.site = mflocal.Site(self.store, self.liveness, self.settings)

    async def state(self, run: Any, **options: Any) -> Any:
        return await mflocal.run_state(self.site, run, **options)

    async def run_row(self, run: Any) -> dict[str, Any]:
        return await mflocal.ui_run_row(self.site, run)

    async def task_rows(self, task: Any) -> list[dict[str, Any]]:
        facts = self.store.facts(task)
        return mflocal.ui_task_rows(self.site, task, facts, await self.state(task.run))

    async def details(self, task: Any) -> list[dict[str, Any]]:
        facts = self.store.facts(task)
        return await mflocal.ui_task_details(self.site, task, facts, await self.state(task.run))

    async def the_run(self) -> Any:
        flow = self.store.flow("UiTinyFlow")
        assert flow is not None
        return (await self.store.runs(flow))[0]

    async def tasks(self, step: str) -> list[Any]:
        """A step's tasks, oldest first."""
        run = await self.the_run()
        node = self.store.step(run, step)
        assert node is not None
        return (await self.store.tasks(node))[::-1]


def run_flow(root: Path, *options: str, ok: bool = True) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("METAFLOW")}
    env.update(
        USERNAME="tester",
        METAFLOW_USER="tester",
        METAFLOW_HOME=str(root),
        METAFLOW_DEFAULT_METADATA="local",
        METAFLOW_DATASTORE_SYSROOT_LOCAL=str(root),
    )
    command = [sys.executable, str(FLOW), "--quiet", "run", "--max-workers", "2", *options]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=180)
    assert (done.returncode == 0) is ok, done.stdout + done.stderr


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    run_flow(root)
    return root


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("broken")
    run_flow(root, "--fail", "True", ok=False)
    return root


def test(
    root: Path, **settings: Any
) -> Callable[[Callable[[Root], Coroutine[Any, Any, None]]], None]:
    """Runs a coroutine function at once on a fresh view of a root."""

    def run(body: Callable[[Root], Coroutine[Any, Any, None]]) -> None:
        asyncio.run(body(Root(root, **settings)))

    return run


test.__test__ = False  # type: ignore[attr-defined]


def write_run(root: Path, tags: Any = ()) -> tuple[Root, Any]:
    """A run that nobody heartbeats for, made through the store as local mode lays it out."""
    (root / ".metaflow").mkdir(exist_ok=True)
    made = Root(root)
    flow = made.store.create_flow("UiTinyFlow", {})
    return made, made.store.create_run(
        flow, {"user_name": "tester", "tags": tags, "system_tags": []}
    )


def test_completed_run(finished: Path) -> None:
    @test(finished)
    async def _(root: Root) -> None:
        run = await root.the_run()
        row = await root.run_row(run)
        assert list(row) == RUN_KEYS
        assert (row["status"], row["flow_id"], row["user"], row["run_id"]) == (
            "completed",
            "UiTinyFlow",
            "tester",
            None,
        )
        assert row["run_number"] == int(run.id) and row["run"] == run.id
        assert row["finished_at"] - row["ts_epoch"] == row["duration"] > 0
        assert "user:tester" in row["system_tags"] and row["tags"] == []


def test_completed_run_is_remembered_until_its_end_changes(finished: Path) -> None:
    @test(finished)
    async def _(root: Root) -> None:
        run = await root.the_run()
        first = await root.state(run)
        assert await root.state(run) is first and await root.state(run, cheap=True) is first
        end = (await root.tasks("end"))[0]
        ahead = mflocal.now_ms() + 1000
        path = Path(end.path) / "_meta" / f"sysmeta_attempt_{ahead}.json"
        try:
            path.write_text(
                json.dumps(
                    {"field_name": "attempt", "value": "1", "type": "attempt", "ts_epoch": ahead}
                )
            )
            again = await root.state(run)
            assert (
                again is not first and again.status == "completed"
            )  # attempt_ok has been said, as recorded
        finally:
            path.unlink()


def test_failed_run_without_heartbeats_is_failed_at_once(broken: Path) -> None:
    @test(broken)
    async def _(root: Root) -> None:
        run = await root.the_run()
        row = await root.run_row(run)
        assert (row["status"], row["last_heartbeat_ts"]) == ("failed", None)
        join = (await root.tasks("join"))[0]
        assert [r["status"] for r in await root.task_rows(join)] == ["failed"]
        assert row["finished_at"] == (await root.task_rows(join))[0]["finished_at"]


def test_one_row_per_attempt(finished: Path) -> None:
    @test(finished)
    async def _(root: Root) -> None:
        by_attempts = {task.id: await root.task_rows(task) for task in await root.tasks("unit")}
        assert sorted(len(rows) for rows in by_attempts.values()) == [1, 1, 2]
        retried = next(rows for rows in by_attempts.values() if len(rows) == 2)
        assert [(r["attempt_id"], r["status"]) for r in retried] == [
            (0, "failed"),
            (1, "completed"),
        ]
        for row in retried:
            assert list(row) == TASK_KEYS
            assert row["ts_epoch"] <= row["started_at"] <= row["finished_at"]
            assert row["duration"] == row["finished_at"] - row["started_at"]
            assert isinstance(row["task_id"], int) and row["task_name"] is None


def test_parameters_task_is_completed(finished: Path) -> None:
    @test(finished)
    async def _(root: Root) -> None:
        rows = await root.task_rows((await root.tasks("_parameters"))[0])
        assert [(r["status"], r["started_at"], r["task_id"]) for r in rows] == [
            ("completed", None, 0)
        ]
        assert rows[0]["task_ok"].endswith("/.metaflow")


def test_rows_of_finished_tasks_are_remembered(finished: Path) -> None:
    @test(finished)
    async def _(root: Root) -> None:
        task = (await root.tasks("start"))[0]
        rows = await root.task_rows(task)
        assert await root.task_rows(task) is rows
        encoded = mflocal.encoded_task_rows(task, rows)
        assert json.loads(encoded[0]) == rows[0]
        assert mflocal.encoded_task_rows(task, rows) is encoded
        root.store.replace_tags(task.run, ["new"])
        try:
            changed = await root.task_rows(task)
            assert changed[0]["tags"] == ["new"] and rows[0]["tags"] == []
            assert json.loads(mflocal.encoded_task_rows(task, changed)[0])["tags"] == ["new"]
        finally:
            root.store.replace_tags(task.run, [])


def test_details_add_the_foreach_label(finished: Path) -> None:
    @test(finished)
    async def _(root: Root) -> None:
        labels = [
            (await root.details(task))[-1]["foreach_label"] for task in await root.tasks("unit")
        ]
        ids = [task.id for task in await root.tasks("unit")]
        assert labels == [f"{id}[{index}]" for index, id in enumerate(ids)]
        assert "foreach_label" not in (await root.details((await root.tasks("start"))[0]))[0]
        assert all(
            "foreach_label" not in row
            for row in await root.task_rows((await root.tasks("unit"))[0])
        )


def test_details_settle_what_is_unknown(finished: Path, tmp_path: Path) -> None:
    """An old client writes no attempt_ok: only the `_task_ok` artifact knows."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(finished), str(copy)], check=True)
    for path in copy.glob(".metaflow/UiTinyFlow/*/start/*/_meta/sysmeta_attempt_ok_*"):
        path.unlink()

    @test(copy)
    async def _(root: Root) -> None:
        task = (await root.tasks("start"))[0]
        assert [r["status"] for r in await root.task_rows(task)] == ["unknown"]
        assert [r["status"] for r in await root.details(task)] == ["completed"]
        assert [r["status"] for r in await root.task_rows(task)] == ["completed"]


def test_step_rows(finished: Path) -> None:
    @test(finished)
    async def _(root: Root) -> None:
        run = await root.the_run()
        state = await root.state(run)
        rows = [await mflocal.ui_step_row(root.site, step, state) for step in root.store.steps(run)]
        assert [row["step_name"] for row in rows] == ["_parameters", "start", "unit", "join", "end"]
        for row in rows:
            assert list(row) == STEP_KEYS
            assert row["run_number"] == int(run.id) and row["run_id"] == run.id
            assert row["duration"] >= 0


def test_metadata_and_artifact_rows(finished: Path) -> None:
    @test(finished)
    async def _(root: Root) -> None:
        task = next(t for t in await root.tasks("unit") if len(root.store.facts(t).attempts) == 2)
        metadata = [mflocal.ui_metadata_row(record) for record in await root.store.metadata(task)]
        assert all(list(row) == METADATA_KEYS for row in metadata)
        assert {row["attempt_id"] for row in metadata if row["field_name"] == "attempt_ok"} == {
            0,
            1,
        }
        stacks = [row["value"] for row in metadata if row["field_name"] == "foreach-stack"]
        assert set(stacks) <= {"{items=0}"}  # Metaflow 2.12 writes none
        artifacts = [
            mflocal.ui_artifact_row(record, task.run) for record in await root.store.artifacts(task)
        ]
        assert all(list(row) == ARTIFACT_KEYS for row in artifacts)
        assert {row["attempt_id"] for row in artifacts if row["name"] == "x"} == {0, 1}


def test_parameters(finished: Path) -> None:
    @test(finished)
    async def _(root: Root) -> None:
        run = await root.the_run()
        told = await mflocal.ui_parameters(root.site, run)
        assert told == {"fail": {"value": False}, "n": {"value": 3}}


def test_string_ids_and_missing_tags(tmp_path: Path) -> None:
    (tmp_path / ".metaflow").mkdir()
    root = Root(tmp_path)

    async def body() -> None:
        flow = root.store.create_flow("UiTinyFlow", {})
        run = root.store.create_run(flow, {}, "argo-abc.1")
        step = root.store.create_step(run, "start", {})
        task = root.store.create_task(step, {}, "pod-7")
        row = await root.run_row(run)
        assert (row["run_number"], row["run_id"], row["run"]) == ("argo-abc.1",) * 3
        assert (row["tags"], row["system_tags"], row["user"]) == ([], [], None)
        task_row = (await root.task_rows(task))[0]
        assert (task_row["task_id"], task_row["task_name"], task_row["run_id"]) == (
            "pod-7",
            "pod-7",
            "argo-abc.1",
        )
        assert task_row["system_tags"] == []

    asyncio.run(body())


def test_running_and_lost_by_connection(tmp_path: Path) -> None:
    root, run = write_run(tmp_path)
    step = root.store.create_step(run, "start", {})
    task = root.store.create_task(step, {"system_tags": []})
    connection = object()

    async def body() -> None:
        root.liveness.bind_run(connection, run, None)
        await root.store.add_metadata(
            task, [{"field_name": "attempt", "value": "0", "type": "attempt"}]
        )
        root.liveness.bind_attempt(connection, task, 0, None)
        assert (await root.run_row(run))["status"] == "running"
        row = (await root.task_rows(task))[0]
        assert (row["status"], row["finished_at"]) == ("running", None)
        root.liveness.connection_closed(connection, by_client=True)
        assert (await root.run_row(run))["status"] == "failed"
        row = (await root.task_rows(task))[0]
        assert row["status"] == "failed" and abs(row["finished_at"] - time.time() * 1000) < 60_000

    asyncio.run(body())


def test_long_failed_run_is_trusted_only_until_it_moves(tmp_path: Path) -> None:
    root, run = write_run(tmp_path)

    async def body() -> None:
        past = mflocal.now_ms() - 3_600_000
        run.record["ts_epoch"] = past
        root.store.beat(run, past // 1000)
        assert (await root.state(run)).status == "failed"
        root.liveness.heartbeat(run)
        assert (await root.state(run)).status == "running"

    asyncio.run(body())


def test_local_artifact_question() -> None:
    assert mflocal.asks_for_local_artifacts([("ds_type", "local"), ("_limit", "1")])
    assert not mflocal.asks_for_local_artifacts([("ds_type", "local"), ("_limit", "10")])
    assert not mflocal.asks_for_local_artifacts(
        [("ds_type", "local"), ("_limit", "1"), ("name", "x")]
    )
