"""The rows of the UI over HTTP, made from what a real flow wrote in local mode."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import Client

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a completed run."""
    root = tmp_path_factory.mktemp("finished")
    run_flow(root)
    return root


@pytest.fixture
def ui(make_service: Callable[..., Client], finished: Path, tmp_path: Path) -> Client:
    """A service on a copy of it."""
    ignore = shutil.ignore_patterns(".mflocal")
    shutil.copytree(finished / ".metaflow", tmp_path / ".metaflow", ignore=ignore)
    return make_service(tmp_path)


def rows(ui: Client, path: str) -> list[dict[str, Any]]:
    """A list below the run, oldest first."""
    run = ui.get("/api/runs")["data"][0]["run"]
    query = "_order=%2Bts_epoch&_limit=1000" + ("&" if "?" in path else "")
    where, _, more = path.partition("?")
    found: list[dict[str, Any]] = ui.get(f"/api/flows/UiTinyFlow/runs/{run}/{where}?{query}{more}")[
        "data"
    ]
    return found


def test_rows_of_a_completed_run(ui: Client) -> None:
    (run,) = ui.get("/api/runs")["data"]
    assert list(run) == RUN_KEYS
    assert (run["status"], run["user"], run["run_id"]) == ("completed", "tester", None)
    assert str(run["run_number"]) == run["run"]
    assert run["finished_at"] - run["ts_epoch"] == run["duration"] > 0
    assert "user:tester" in run["system_tags"] and run["tags"] == []
    steps = rows(ui, "steps")
    assert [row["step_name"] for row in steps] == ["_parameters", "start", "unit", "join", "end"]
    assert all(list(row) == STEP_KEYS and row["duration"] >= 0 for row in steps)
    assert {(row["run_number"], row["run_id"]) for row in steps} == {
        (run["run_number"], run["run"])
    }


def test_one_row_per_attempt(ui: Client) -> None:
    tasks = rows(ui, "tasks")
    assert all(list(row) == TASK_KEYS for row in tasks)
    unit = [row for row in tasks if row["step_name"] == "unit"]
    first = min(row["task_id"] for row in unit)
    retried = [row for row in unit if row["task_id"] == first]
    assert len(unit) == 4
    assert [(row["attempt_id"], row["status"]) for row in retried] == [
        (0, "failed"),
        (1, "completed"),
    ]
    for row in unit:
        assert row["ts_epoch"] <= row["started_at"] <= row["finished_at"]
        assert row["duration"] == row["finished_at"] - row["started_at"]
        assert row["task_name"] is None
    parameters = tasks[0]
    assert (parameters["status"], parameters["started_at"], parameters["task_id"]) == (
        "completed",
        None,
        0,
    )
    assert parameters["task_ok"].endswith("/.metaflow")


def test_details_add_the_foreach_label(ui: Client) -> None:
    detailed = rows(ui, "tasks?postprocess=true")
    labels = {row["task_id"]: row.get("foreach_label") for row in detailed}
    unit = sorted({row["task_id"] for row in detailed if row["step_name"] == "unit"})
    assert [labels[id] for id in unit] == [f"{id}[{index}]" for index, id in enumerate(unit)]
    assert labels[0] is None and labels[1] is None
    assert all("foreach_label" not in row for row in rows(ui, "tasks"))


def test_details_settle_what_is_unknown(ui: Client) -> None:
    """An old client writes no attempt_ok: only the `_task_ok` artifact knows."""
    for path in ui.root.glob(".metaflow/UiTinyFlow/*/start/*/_meta/sysmeta_attempt_ok_*"):
        path.unlink()
    assert [row["status"] for row in rows(ui, "steps/start/tasks")] == ["unknown"]
    settled = rows(ui, "steps/start/tasks?postprocess=true")
    assert [row["status"] for row in settled] == ["completed"]
    assert [row["status"] for row in rows(ui, "steps/start/tasks")] == ["completed"]


def test_rows_follow_the_files(ui: Client) -> None:
    """What was shown is remembered only as long as it is true: tags, a new attempt."""
    (task,) = rows(ui, "steps/start/tasks")
    run = f"/flows/UiTinyFlow/runs/{task['run_number']}"
    assert ui("PATCH", f"{run}/tag/mutate", {"tags_to_add": ["new"]}).status == 200
    assert [row["tags"] for row in rows(ui, "steps/start/tasks")] == [["new"]]
    meta = ui.root / f".metaflow/UiTinyFlow/{task['run_number']}/start/{task['task_id']}/_meta"
    ahead = int(time.time() * 1000)
    record = {"field_name": "attempt", "value": "1", "type": "attempt", "ts_epoch": ahead}
    (meta / f"sysmeta_attempt_{ahead}.json").write_text(json.dumps(record))
    assert [row["attempt_id"] for row in rows(ui, "steps/start/tasks")] == [1, 0]


def test_metadata_artifacts_and_parameters(ui: Client) -> None:
    task = min(row["task_id"] for row in rows(ui, "steps/unit/tasks"))
    metadata = rows(ui, f"steps/unit/tasks/{task}/metadata")
    assert all(list(row) == METADATA_KEYS for row in metadata)
    said = {row["attempt_id"] for row in metadata if row["field_name"] == "attempt_ok"}
    assert said == {0, 1}
    stacks = {row["value"] for row in metadata if row["field_name"] == "foreach-stack"}
    assert stacks <= {"{items=0}"}  # Metaflow 2.12 writes none
    artifacts = rows(ui, f"steps/unit/tasks/{task}/artifacts")
    assert all(list(row) == ARTIFACT_KEYS for row in artifacts)
    assert {row["attempt_id"] for row in artifacts if row["name"] == "x"} == {0, 1}
    run = f"/api/flows/UiTinyFlow/runs/{artifacts[0]['run_number']}"
    assert ui.get(f"{run}/parameters")["data"] == {"fail": {"value": False}, "n": {"value": 3}}


def test_a_failed_run_without_heartbeats_is_failed_at_once(
    make_service: Callable[..., Client], tmp_path: Path
) -> None:
    run_flow(tmp_path, "--fail", "True", ok=False)
    ui = make_service(tmp_path)
    (run,) = ui.get("/api/runs")["data"]
    (join,) = rows(ui, "steps/join/tasks")
    assert (run["status"], run["last_heartbeat_ts"], join["status"]) == ("failed", None, "failed")
    assert run["finished_at"] == join["finished_at"]


def test_string_ids_and_missing_tags(service: Client) -> None:
    service.post("/flows/UiTinyFlow", {})
    service.post("/flows/UiTinyFlow/run", {"run_number": "argo-abc.1"})
    run = "/flows/UiTinyFlow/runs/argo-abc.1"
    service.post(f"{run}/steps/start/step", {})
    service.post(f"{run}/steps/start/task", {"task_id": "pod-7"})
    row = service.get(f"/api{run}")["data"]
    assert (row["run_number"], row["run_id"], row["run"]) == ("argo-abc.1",) * 3
    assert (row["tags"], row["system_tags"], row["user"]) == ([], [], None)
    (task,) = service.get(f"/api{run}/tasks")["data"]
    assert (task["task_id"], task["task_name"], task["run_id"]) == ("pod-7", "pod-7", "argo-abc.1")
    assert task["system_tags"] == []


def test_a_run_that_failed_long_ago_runs_again_when_it_moves(service: Client) -> None:
    service.post("/flows/UiTinyFlow", {})
    number = service.post("/flows/UiTinyFlow/run", {"system_tags": []})["run_number"]
    path = service.root / f".metaflow/UiTinyFlow/{number}/_meta/_self.json"
    os.rename(path.parent.parent, path.parent.parent.with_name("1700000000000000"))
    path = service.root / ".metaflow/UiTinyFlow/1700000000000000/_meta/_self.json"
    record = {**json.loads(path.read_text()), "run_number": "1700000000000000"}
    path.write_text(json.dumps({**record, "ts_epoch": 1_700_000_000_000}))
    run = "/flows/UiTinyFlow/runs/1700000000000000"
    os.utime(path, (1_700_000_000, 1_700_000_000))
    for _ in range(2):
        assert service.get(f"/api{run}")["data"]["status"] == "failed"
    service.post(f"{run}/heartbeat", {})
    assert service.get(f"/api{run}")["data"]["status"] == "running"
