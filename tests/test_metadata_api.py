"""Every route of the metadata API against a real service, and Metaflow's own client on top of it."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import REPO, Answer, Client
from meta_shared import script

SYSTEM = [
    "metaflow_version:2.19.39",
    "runtime:dev",
    "user:tester",
    "python_version:3.11.7",
    "date:2026-11-21",
]
BODY = {"user_name": "tester", "tags": ["ta", "tb"], "system_tags": SYSTEM}
BEAT = '{"wait_time_in_seconds": 10}'

# Keys in the order in which the real service sends them; the types that it sends.
FLOW = {"flow_id": str, "user_name": (str, type(None)), "ts_epoch": int, "tags": (list, type(None)),
        "system_tags": (list, type(None))}  # fmt: skip
RUN = {"flow_id": str, "run_number": (int, str), "user_name": (str, type(None)), "ts_epoch": int,
       "tags": (list, type(None)), "system_tags": (list, type(None)), "last_heartbeat_ts": (int, type(None))}  # fmt: skip
STEP = {"flow_id": str, "run_number": str, "step_name": str, "user_name": str, "ts_epoch": int,
        "tags": (list, type(None)), "system_tags": (list, type(None))}  # fmt: skip
TASK = {"flow_id": str, "run_number": (int, str), "step_name": str, "task_id": (int, str),
        "user_name": (str, type(None)), "ts_epoch": int, "tags": (list, type(None)),
        "system_tags": (list, type(None)), "last_heartbeat_ts": (int, type(None))}  # fmt: skip
METADATA = {"id": int, "flow_id": str, "run_number": (int, str), "step_name": str, "task_id": (int, str),
            "field_name": str, "value": str, "type": str, "user_name": (str, type(None)), "ts_epoch": int,
            "tags": (list, type(None)), "system_tags": (list, type(None))}  # fmt: skip
ARTIFACT = {"flow_id": str, "run_number": (int, str), "step_name": str, "task_id": (int, str), "name": str,
            "location": str, "ds_type": str, "sha": str, "type": str, "content_type": str,
            "user_name": (str, type(None)), "attempt_id": int, "ts_epoch": int, "tags": (list, type(None)),
            "system_tags": (list, type(None))}  # fmt: skip


def check(row: Any, shape: dict[str, Any], **values: Any) -> None:
    """A row has exactly these keys in this order, values of these types, and where given these values."""
    assert list(row) == list(shape), row
    for key, kind in shape.items():
        assert isinstance(row[key], kind) and not isinstance(row[key], bool), (key, row[key])
    assert {key: row[key] for key in values} == values


def refused(answer: Answer, status: int, *words: str) -> None:
    """A refusal is JSON that names the problem, and tells nothing of our insides."""
    assert answer.status == status, answer
    assert answer.headers["content-type"].startswith("application/json")
    assert (
        answer.body["status"] == status
        and answer.body["detail"]
        and answer.body["title"]
        and answer.body["id"]
    )
    assert answer.body["type"] == "about:blank"
    text = json.dumps(answer.body)
    assert "Traceback" not in text and ".py" not in text
    for word in words:
        assert word in answer.body["detail"], answer.body


def metadata(field: str, value: Any, attempt: int = 0, **more: Any) -> dict[str, Any]:
    return {"field_name": field, "type": "t", "value": value, "user_name": "tester", "tags": [f"attempt_id:{attempt}"],
            "system_tags": SYSTEM, **more}  # fmt: skip


ROOT = os.path.realpath(tempfile.gettempdir())  # above all roots of these tests


def artifact(name: str, attempt: Any = 0, **more: Any) -> dict[str, Any]:
    return {"name": name, "location": f"{ROOT}/{name}/{attempt}", "ds_type": "local", "sha": "abc", "user_name": "tester",
            "type": "metaflow.artifact", "content_type": "gzip+pickle-v2", "attempt_id": attempt, **more}  # fmt: skip


def files(root: Path) -> list[str]:
    """What lies in .metaflow, apart from mflocal's own."""
    found = []
    for folder, folders, names in os.walk(root / ".metaflow"):
        folders[:] = [name for name in folders if name != ".mflocal"]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in [*folders, *names]]
    return sorted(path for path in found if not path.endswith("_mflocal.json"))


class World:
    """A service with flow F, a run, a step and a task in it."""

    def __init__(self, service: Client) -> None:
        self.service = service
        self.flow = service.post("/flows/F", BODY)
        self.run_row = service.post("/flows/F/run", BODY)
        self.run = f"/flows/F/runs/{self.run_row['run_number']}"
        self.step_row = service.post(f"{self.run}/steps/start/step", BODY)
        self.step = f"{self.run}/steps/start"
        self.task_row = service.post(f"{self.step}/task", BODY)
        self.task = f"{self.step}/tasks/{self.task_row['task_id']}"


@pytest.fixture
def world(make_service: Callable[..., Client]) -> World:
    return World(make_service(METAFLOW_DATASTORE_SYSROOT_LOCAL=ROOT))


# -- flows, runs, steps, tasks


@pytest.mark.core
def test_admin_routes(service: Client) -> None:
    answer = service("GET", "/ping")
    assert (answer.status, answer.body) == (200, "pong")
    assert answer.headers["metadata_service_version"] == "2.5.0"
    answer = service("GET", "/version")
    assert answer.status == 200 and re.fullmatch(r"\d+\.\d+\.\d+", str(answer.body))
    answer = service("GET", "/healthcheck")
    assert (answer.status, answer.body) == (200, '{"status": "UP"}')
    for path in (
        "/nope",
        "/flows/",
        "//flows",
        "/api/doc",
        "/flows/F/nope",
        "/flows/F/runs/1/",
        "/auth/token",
    ):
        refused(service("GET", path), 404)
    for method, path in (
        ("POST", "/ping"), ("PUT", "/ping"), ("DELETE", "/flows/F1"), ("PATCH", "/flows/F1"), ("PUT", "/flows/F1/runs/1"),
        ("GET", "/flows/F/run"), ("POST", "/flows/F/runs/1"), ("GET", "/flows/F/runs/1/tag/mutate"),
        ("POST", "/flows/F/runs/1/tag/mutate"), ("POST", "/flows/F/runs/1/steps/s"), ("GET", "/flows/F/runs/1/heartbeat"),
        ("POST", "/flows/F/runs/1/steps/s/tasks/1"), ("POST", "/flows/F/runs/1/steps/s/tasks/1/artifacts"),
        ("GET", "/flows/F/runs/1/steps/s/tasks/1/artifact"), ("PUT", "/flows/F/runs/1/steps/s/tasks/1/metadata"),
    ):  # fmt: skip
        answer = service(method, path, {} if method != "GET" else None)
        refused(answer, 405, method)
        assert answer.headers["allow"], path
    head = service("HEAD", "/flows")
    assert head.status == 200 and head.body == "" and int(head.headers["content-length"]) == 2
    options = service("OPTIONS", "/flows/F1")
    assert options.status in (200, 204) and "POST" in options.headers["allow"]
    assert service.get("/flows") == []


@pytest.mark.core
def test_flows(service: Client) -> None:
    assert service.get("/flows") == []
    refused(service("GET", "/flows/F1"), 404, "F1")
    before = time.time_ns() // 1_000_000
    answer = service(
        "POST", "/flows/F1", {**BODY, "ts_epoch": 5, "flow_id": "other", "unknown": {}}
    )
    assert answer.status == 200
    check(
        answer.body, FLOW, flow_id="F1", user_name="tester", tags=["ta", "tb"], system_tags=SYSTEM
    )
    assert before <= answer.body["ts_epoch"] <= time.time_ns() // 1_000_000
    refused(service("POST", "/flows/F1", BODY), 409, "F1")
    check(
        service.post("/flows/F2", {"user_name": "other"}),
        FLOW,
        user_name="other",
        tags=None,
        system_tags=None,
    )
    check(
        service.post("/flows/F3", {}),
        FLOW,
        flow_id="F3",
        user_name=None,
        tags=None,
        system_tags=None,
    )
    check(service.post("/flows/F7", {"user_name": 123}), FLOW, user_name="123")
    check(service.post("/flows/Gr%C3%B6%C3%9Fe", {}), FLOW, flow_id="Größe")
    assert (
        service("GET", "/flows/Gr%C3%B6%C3%9Fe")
        .headers["content-type"]
        .startswith("application/json")
    )
    for headers in (
        {"Content-Type": "text/plain"},
        {"Content-Type": ""},
        {"Accept": "application/xml"},
    ):
        name = f"H{len(service.get('/flows'))}"
        assert service("POST", f"/flows/{name}", {}, headers).status == 200
    rows = service.get("/flows")
    assert len(rows) == 8 and [row["ts_epoch"] for row in rows] == sorted(
        (r["ts_epoch"] for r in rows), reverse=True
    )
    for row in rows:
        check(row, FLOW)
        assert service.get(f"/flows/{urllib.parse.quote(row['flow_id'])}") == row


@pytest.mark.core
def test_runs(service: Client) -> None:
    service.post("/flows/F", BODY)
    assert service.get("/flows/F/runs") == [] and service.get("/flows/NoSuch/runs") == []
    answer = service("POST", "/flows/F/run", {**BODY, "ts_epoch": 5})
    assert answer.status == 200
    run = answer.body
    check(run, RUN, flow_id="F", user_name="tester", tags=["ta", "tb"], system_tags=SYSTEM)
    assert type(run["run_number"]) is int and abs(run["run_number"] / 1e6 - time.time()) < 60
    assert (
        abs(run["last_heartbeat_ts"] - time.time()) < 60
        and abs(run["ts_epoch"] - time.time() * 1000) < 60_000
    )
    got = service.get(f"/flows/F/runs/{run['run_number']}")
    check(
        got,
        {**RUN, "user": str},
        user="tester",
        run_number=run["run_number"],
        ts_epoch=run["ts_epoch"],
    )
    check(service.post("/flows/F/run", {}), RUN, user_name=None, tags=None, system_tags=None)
    for version, beats in (
        ("2.0.0", False),
        ("1.13.0", False),
        ("1.14.0", True),
        ("2.2.12+x.git", True),
        ("abc", True),
    ):
        tags = [f"metaflow_version:{version}"]
        row = service.post("/flows/F/run", {"user_name": "u", "tags": [], "system_tags": tags})
        check(
            row, RUN, system_tags=tags
        )  # alive as long as the connection that made it: see the tasks for the rest
        service.post(f"/flows/F/runs/{row['run_number']}/steps/s/step", {})
        task = service.post(
            f"/flows/F/runs/{row['run_number']}/steps/s/task", {"system_tags": tags}
        )
        assert (task["last_heartbeat_ts"] is not None) is beats, version
    own = service.post("/flows/F/run", {**BODY, "run_number": "argo-abc"})
    check(own, RUN, run_number="argo-abc")
    assert service.get("/flows/F/runs/argo-abc")["run_number"] == "argo-abc"
    refused(service("POST", "/flows/F/run", {**BODY, "run_number": "argo-abc"}), 409, "argo-abc")
    service.post("/flows/G", {})
    check(service.post("/flows/G/run", {"run_number": "argo-abc"}), RUN, flow_id="G")
    rows = service.get("/flows/F/runs")
    assert (
        len(rows) == 8
        and rows[0]["run_number"] == "argo-abc"
        and rows[-1]["run_number"] == run["run_number"]
    )
    assert [row["ts_epoch"] for row in rows] == sorted(
        (row["ts_epoch"] for row in rows), reverse=True
    )
    for row in rows:
        check({k: v for k, v in row.items() if k != "user"}, RUN)
        assert ("user" in row) is (f"user:{row['user_name']}" in (row["system_tags"] or []))
        assert service.get(f"/flows/F/runs/{row['run_number']}") == row


BAD_OBJECTS = [
    (b"", "JSON"), (b"{bad", "JSON"), (b"nope", "JSON"), (b"[]", "list"), (b"null", "null"), (b'"x"', "string"), (b"5", "number"),
    (b'{"user_name": "\xff"}', "UTF-8"), (b'\xef\xbb\xbf{"user_name": "x"}', "JSON"), (b'{"tags": [NaN]}', "JSON"),
    (b'{"user_name": "a\\u0000b"}', "NUL"), (b'{"tags": ["a\\u0000b"]}', "NUL"), (b'{"tags": "notalist"}', "tags"),
    (b'{"system_tags": [1]}', "system_tags"), (b'{"user_name": ["u"]}', "user_name"),
    (json.dumps({"user_name": "u" * 256}).encode(), "255"), (b"[" * 100_000, "JSON"),
]  # fmt: skip


@pytest.mark.core
def test_bad_objects_are_refused_and_leave_nothing(world: World) -> None:
    service, before = world.service, files(world.service.root)
    for body, word in BAD_OBJECTS:
        for path in (
            "/flows/New",
            "/flows/F/run",
            f"{world.run}/steps/new/step",
            f"{world.step}/task",
        ):
            refused(service("POST", path, body), 400, word)
    for path in ("/flows/New", f"{world.run}/steps/new"):
        assert service("GET", path).status == 404
    assert files(service.root) == before
    # and a number is used up for none of them
    assert service.post(f"{world.step}/task", {})["task_id"] == world.task_row["task_id"] + 1


BAD_NAMES = ["..", ".", "%2e%2e", "a%2Fb", "..%2F..%2Fetc", "a%20b", "a-b", "1a", "a%00b", "%C2%B2", "*", "x" * 256,
             ".mflocal", "~", "a.b", "%0a"]  # fmt: skip
BAD_IDS = [
    "a\x1bb",
    "a\x85b",
    "ü" * 128,
    "_meta",
    "12",
    "0",
    "²",
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "a\0b",
    "a\n",
    "x" * 256,
    5,
    0,
    True,
    1.5,
    [],
    {},
]


@pytest.mark.core
def test_bad_names_are_refused_and_leave_nothing(world: World) -> None:
    service, before = world.service, files(world.service.root.parent)
    for name in BAD_NAMES:
        assert service("POST", f"/flows/{name}", {}).status in (400, 404), name
        assert service("GET", f"/flows/{name}").status in (400, 404), name
        assert service("POST", f"{world.run}/steps/{name}/step", {}).status in (400, 404), name
        for path in (
            f"{world.run}/steps/{name}",
            f"/flows/F/runs/{name}",
            f"{world.step}/tasks/{name}",
        ):
            assert service("GET", path).status in (400, 404, 405), path
    for own in BAD_IDS:
        refused(service("POST", "/flows/F/run", {"run_number": own}), 400, "run_number")
        refused(service("POST", f"{world.step}/task", {"task_id": own}), 400, "task_id")
    assert files(service.root.parent) == before


GOOD_IDS = ["nightly@2026", "a b", "a~b", "a+b", "\u00fc1", "x" * 200, "a%2Fb", "[a]*", "-1"]


@pytest.mark.core
def test_ids_are_any_one_part_of_a_path(world: World) -> None:
    service = world.service
    for own in GOOD_IDS:
        quoted = urllib.parse.quote(own, safe="")
        run = f"/flows/F/runs/{quoted}"
        task = f"{run}/steps/start/tasks/{quoted}"
        assert service.post("/flows/F/run", {"run_number": own})["run_number"] == own
        service.post(f"{run}/steps/start/step", {})
        assert service.post(f"{run}/steps/start/task", {"task_id": own})["task_id"] == own
        service.post(f"{task}/metadata", [metadata("attempt", "0")])
        assert service.get(run)["run_number"] == own
        assert service.get(f"{task}/metadata")[0]["task_id"] == own
        assert service.get(f"/api{task}/metadata")["data"][0]["task_id"] == own
        assert (service.root / ".metaflow/F" / own / "start" / own / "_meta/_self.json").is_file()
    listed = {row["run_number"] for row in service.get("/api/flows/F/runs?_limit=100")["data"]}
    assert set(GOOD_IDS) <= listed


@pytest.mark.core
def test_no_metadata_row_fails_its_step(world: World) -> None:
    """A decorator may write anything: what local mode would keep is kept, what cannot be a file is left out."""
    odd = [
        ("none", None, None), ("dict", {"a": [1]}, '{"a": [1]}'), ("nested", [[1], "a"], '[[1], "a"]'), ("nul", "a\0b", "a\0b"),
        ("", "no name", "no name"), ("a\nb", "v", "v"), ("f" * 220, "long", "long"), ("nan", True, "true"),
    ]  # fmt: skip
    rows = [metadata(field, value) for field, value, _ in odd]
    unwritable = [metadata(name, "v") for name in ("gpu/0", "f" * 240, "../x", "a\0")]
    created = world.service.post(f"{world.task}/metadata", [*unwritable, *rows, *unwritable])
    assert created == {"metadata_created": len(rows)}
    found = world.service.get(f"{world.task}/metadata")
    assert {(row["field_name"], row["value"]) for row in found} >= {(f, text) for f, _, text in odd}
    assert world.service.get(f"/api{world.task}/metadata")["data"]


def test_rows_of_one_request_keep_their_order(world: World) -> None:
    fields = [f"field{i * 7 % 40}" for i in range(40)]
    world.service.post(f"{world.task}/metadata", [metadata(field, "v") for field in fields])
    found = [row["field_name"] for row in world.service.get(f"{world.task}/metadata")]
    assert [field for field in found if field in fields] == fields


def test_artifacts_elsewhere_are_refused(service: Client) -> None:
    """Metaflow's client unpickles what it finds at a location: nobody may aim it at a folder of theirs."""
    world = World(service)
    inside = f":root:{service.root}/.metaflow"
    for place in (
        ":root:/tmp/evil",
        "/tmp/evil",
        f":root:{service.root}/../evil",
        "s3://evil/x",
        "x",
    ):
        row = artifact("a", location=place, ds_type="s3" if "://" in place else "local")
        refused(service("POST", f"{world.task}/artifact", [row]), 400, "METAFLOW_DATASTORE_SYSROOT")
        root = metadata("ds-root", place.replace(":root:", ""))
        refused(
            service("POST", f"{world.task}/metadata", [root]), 400, "METAFLOW_DATASTORE_SYSROOT"
        )
    assert service.get(f"{world.task}/artifacts") == []
    row = artifact("a", location=inside)
    assert service.post(f"{world.task}/artifact", [row]) == {"artifacts_created": 1}
    assert service.post(f"{world.task}/metadata", [metadata("ds-root", inside[6:])])


def test_artifacts_in_configured_places_are_taken(make_service: Callable[..., Client]) -> None:
    world = World(make_service(METAFLOW_DATASTORE_SYSROOT_S3="s3://ours/flows"))
    for place, status in (("s3://ours/flows/F/data/1", 200), ("s3://ours/flows2/x", 400)):
        row = artifact(f"a{status}", location=place, ds_type="s3")
        assert world.service("POST", f"{world.task}/artifact", [row]).status == status


@pytest.mark.core
def test_unknown_parents_and_objects(world: World) -> None:
    service, run, step = world.service, world.run, world.step
    before = files(service.root)
    for path, word in (
        ("/flows/NoSuch/run", "NoSuch"), ("/flows/F/runs/9999/steps/s/step", "9999"), ("/flows/NoSuch/runs/1/steps/s/step", "NoSuch"),
        ("/flows/F/runs/nosuch/steps/s/task", "nosuch"), (f"{run}/steps/zzz/task", "zzz"),
        ("/flows/F/runs/9999/heartbeat", "9999"), (f"{step}/tasks/9999/heartbeat", "9999"),
    ):  # fmt: skip
        refused(service("POST", path, BODY), 404, word)
    for path in ("/flows/NoSuch", "/flows/F/runs/9999", "/flows/F/runs/no-such", "/flows/NoSuch/runs/1", f"{run}/steps/zzz",
                 "/flows/F/runs/9999/steps/start", f"{step}/tasks/9999", f"{step}/tasks/-1", f"{run}/steps/zzz/tasks/1",
                 "/flows/F/runs/99999999999999999999", f"{step}/tasks/{'9' * 40}", "/flows/F/runs/NULL",
                 f"{world.task}/artifacts/x", f"{world.task}/artifacts/x/attempt/0", f"{step}/tasks/9/artifacts/x"):  # fmt: skip
        refused(service("GET", path), 404)
    for path in ("/flows/NoSuch/runs", "/flows/F/runs/9/steps", "/flows/F/runs/9/steps/s/tasks", f"{run}/steps/zzz/tasks",
                 "/flows/F/runs/9/metadata", "/flows/F/runs/9/artifacts", f"{run}/steps/zzz/artifacts",
                 f"{step}/tasks/9/metadata", f"{step}/tasks/9/artifacts", f"{step}/tasks/9/attempt/0/artifacts",
                 f"{run}/steps/zzz/filtered_tasks", "/flows/F/runs/9/steps/s/filtered_tasks",
                 "/flows/F/runs/99999999999999999999/steps"):  # fmt: skip
        assert service.get(path) == [], path
    for kind, row in (("metadata", metadata("a", "b")), ("artifact", artifact("a"))):
        for task in (
            f"{step}/tasks/9",
            "/flows/F/runs/9/steps/start/tasks/1",
            f"{run}/steps/zzz/tasks/1",
        ):
            refused(
                service("POST", f"{task}/{kind}", [row]),
                400,
                "need to register run_id and task_id first",
            )
    assert files(service.root) == before


@pytest.mark.core
def test_steps_and_tasks(service: Client) -> None:
    service.post("/flows/F", BODY)
    run = service.post("/flows/F/run", BODY)["run_number"]
    base = f"/flows/F/runs/{run}"
    assert service.get(f"{base}/steps") == []
    step = service.post(
        f"{base}/steps/start/step", {**BODY, "tags": ["steptag"], "system_tags": ["own"]}
    )
    check(
        step,
        STEP,
        flow_id="F",
        run_number=str(run),
        step_name="start",
        tags=["ta", "tb"],
        system_tags=SYSTEM,
    )
    refused(service("POST", f"{base}/steps/start/step", BODY), 409, "start")
    check(service.post(f"{base}/steps/end/step", {}), STEP, user_name="")
    assert service.get(f"{base}/steps/start") == step
    assert [row["step_name"] for row in service.get(f"{base}/steps")] == ["end", "start"]
    assert service.get(f"{base}/steps?_limit=1") == service.get(f"{base}/steps")

    task = service.post(f"{base}/steps/start/task", {**BODY, "tags": ["tasktag"]})
    check(task, TASK, run_number=run, step_name="start", tags=["ta", "tb"], system_tags=SYSTEM)
    assert type(task["task_id"]) is int and abs(task["last_heartbeat_ts"] - time.time()) < 60
    named = service.post(f"{base}/steps/start/task", {**BODY, "task_id": "my-task"})
    check(named, TASK, task_id="my-task")
    refused(
        service("POST", f"{base}/steps/start/task", {**BODY, "task_id": "my-task"}), 409, "my-task"
    )
    silent = service.post(f"{base}/steps/start/task", {"user_name": "u", "system_tags": []})
    check(silent, TASK, user_name="u", last_heartbeat_ts=None, task_id=task["task_id"] + 1)
    other = service.post(f"{base}/steps/end/task", {})
    check(other, TASK, user_name=None, task_id=task["task_id"] + 2)
    rows = service.get(f"{base}/steps/start/tasks")
    assert {str(row["task_id"]) for row in rows} == {
        str(row["task_id"]) for row in (task, named, silent)
    }
    assert [row["ts_epoch"] for row in rows] == sorted(
        (row["ts_epoch"] for row in rows), reverse=True
    )
    for row in rows:
        check(row, TASK)
        assert service.get(f"{base}/steps/start/tasks/{row['task_id']}") == row
    assert service("GET", f"{base}/steps/end/tasks/{task['task_id']}").status == 404

    service.post("/flows/F/run", {**BODY, "run_number": "argo-abc"})
    check(
        service.post("/flows/F/runs/argo-abc/steps/start/step", BODY), STEP, run_number="argo-abc"
    )
    row = service.post(
        "/flows/F/runs/argo-abc/steps/start/task", {**BODY, "task_id": "argo-task-1"}
    )
    check(row, TASK, run_number="argo-abc", task_id="argo-task-1")
    service.post(
        "/flows/F/runs/argo-abc/steps/start/tasks/argo-task-1/metadata", [metadata("a", "b")]
    )
    check(
        service.get("/flows/F/runs/argo-abc/metadata")[0],
        METADATA,
        run_number="argo-abc",
        task_id="argo-task-1",
    )


# -- heartbeats


@pytest.mark.core
def test_heartbeats_are_always_200_and_move_both_clocks(world: World) -> None:
    service = world.service
    silent = service.post("/flows/F/run", {"system_tags": ["metaflow_version:2.0.0"]})
    path = f"/flows/F/runs/{silent['run_number']}"
    for body in ({}, b"", b"{{", None):
        assert service("POST", f"{path}/heartbeat", body)[:2] == (200, BEAT)
    assert abs(service.get(path)["last_heartbeat_ts"] - time.time()) < 60
    service.post(f"{path}/steps/s/step", {})
    task = service.post(f"{path}/steps/s/task", {"system_tags": []})
    assert task["last_heartbeat_ts"] is None
    before = service.get(path)["last_heartbeat_ts"]
    time.sleep(1.1)
    for _ in range(3):
        assert service("POST", f"{path}/steps/s/tasks/{task['task_id']}/heartbeat", {})[:2] == (
            200,
            BEAT,
        )
    beat = service.get(f"{path}/steps/s/tasks/{task['task_id']}")["last_heartbeat_ts"]
    assert type(beat) is int and abs(beat - time.time()) < 60
    assert service.get(path)["last_heartbeat_ts"] > before


# -- tags


@pytest.mark.core
def test_tag_mutation(world: World) -> None:
    service, path = world.service, f"{world.run}/tag/mutate"

    def patch(body: Any) -> list[str]:
        answer = service("PATCH", path, body)
        assert answer.status == 200 and list(answer.body) == ["tags"], answer
        tags: list[str] = answer.body["tags"]
        assert sorted(service.get(world.run)["tags"]) == sorted(tags) and len(set(tags)) == len(
            tags
        )
        return sorted(tags)

    assert patch({"tags_to_add": ["new1", "größe"]}) == ["größe", "new1", "ta", "tb"]
    assert patch({"tags_to_add": ["new1", "new1"]}) == ["größe", "new1", "ta", "tb"]
    assert patch({"tags_to_add": ["user:tester"]}) == ["größe", "new1", "ta", "tb"]
    assert patch({"tags_to_remove": ["ta"]}) == ["größe", "new1", "tb"]
    assert patch({"tags_to_remove": ["absent"]}) == ["größe", "new1", "tb"]
    assert patch({"tags_to_add": ["both", "tb"], "tags_to_remove": ["both", "tb"]}) == [
        "both",
        "größe",
        "new1",
        "tb",
    ]
    for nothing in ({}, {"tags_to_add": [], "tags_to_remove": []}, {"unknown": 1}):
        assert patch(nothing) == ["both", "größe", "new1", "tb"]
    assert patch({"tags_to_add": ["", "L" * 1000]}) == [
        "",
        "L" * 1000,
        "both",
        "größe",
        "new1",
        "tb",
    ]
    before = service.get(world.run)
    for body, word in (
        ({"tags_to_add": None}, "tags_to_add must be a list"), ({"tags_to_add": "x"}, "tags_to_add must be a list"),
        ({"tags_to_remove": {"a": 1}}, "tags_to_remove must be a list"), ({"tags_to_add": [1]}, "must be strings"),
        ({"tags_to_remove": [None]}, "must be strings"), ({"tags_to_add": ["a\0b"]}, "NUL"), ([], "list"), (b"x", "JSON"),
        (b"", "JSON"),
    ):  # fmt: skip
        refused(service("PATCH", path, body), 400, word)
    for body in (
        {"tags_to_remove": ["user:tester"]},
        {"tags_to_remove": ["runtime:dev", "x"], "tags_to_add": ["zz"]},
    ):
        refused(
            service("PATCH", path, body), 422, "Cannot remove tags that are existing system tags"
        )
    for unknown in ("/flows/F/runs/9999", "/flows/NoSuch/runs/1"):
        refused(service("PATCH", f"{unknown}/tag/mutate", {"tags_to_add": ["x"]}), 404)
    assert service.get(world.run) == before and before["system_tags"] == SYSTEM
    # steps, tasks and artifacts carry the run's tags; a run without any takes them too
    service.post(f"{world.task}/artifact", [artifact("x", tags=["own"])])
    for row in (
        service.get(world.step),
        service.get(world.task),
        service.get(f"{world.task}/artifacts/x"),
    ):
        assert sorted(row["tags"]) == sorted(before["tags"]) and row["system_tags"] == SYSTEM
    bare = service.post("/flows/F/run", {})["run_number"]
    assert service("PATCH", f"/flows/F/runs/{bare}/tag/mutate", {"tags_to_add": ["x"]}).body == {
        "tags": ["x"]
    }


def test_many_tags_at_once(world: World) -> None:
    """Looking for each of them among the others would take minutes, longer than a client waits."""
    path, first, second = (
        f"{world.run}/tag/mutate",
        *([f"{i}tag{n}" for n in range(100_000)] for i in "12"),
    )
    for tags in (
        {"tags_to_add": first},
        {"tags_to_add": second},
        {"tags_to_add": second, "tags_to_remove": first},
    ):
        answer = world.service("PATCH", path, tags)
        assert answer.status == 200
    assert answer.body["tags"] == ["ta", "tb", *second]


# -- metadata


@pytest.mark.core
def test_metadata_rows(world: World) -> None:
    service, path = world.service, f"{world.task}/metadata"
    assert service.get(path) == [] and service.get(f"{world.run}/metadata") == []

    def post(*rows: Any) -> None:
        assert service.post(path, list(rows)) == {"metadata_created": len(rows)}

    post(metadata("attempt", "0"), metadata("größe", "ü"))
    post(metadata("attempt", "0"))
    post()
    assert service.post(path, {}) == {"metadata_created": 0}
    post({})
    post(
        metadata("intv", 5),
        metadata("boolv", True),
        metadata("lst", [1, 2]),
        metadata("float", 1.5),
    )
    post(metadata("long", "v" * 3_000_000))
    post(metadata("nosys", "v", system_tags=None, tags=None))
    rows = service.get(path)
    for row in rows:
        check(row, METADATA, flow_id="F", run_number=world.run_row["run_number"], step_name="start",
              task_id=world.task_row["task_id"])  # fmt: skip
    assert [(-r["ts_epoch"], r["id"]) for r in rows] == sorted(
        (-r["ts_epoch"], r["id"]) for r in rows
    )
    assert len({row["id"] for row in rows}) == len(rows) == 10
    values = {row["field_name"]: row for row in rows}
    assert {k: values[k]["value"] for k in ("intv", "boolv", "lst", "float", "größe", " ")} == {
        "intv": "5", "boolv": "true", "lst": "{1,2}", "float": "1.5", "größe": "ü", " ": " ",
    }  # fmt: skip
    assert (
        values["attempt"]["tags"] == ["attempt_id:0"] and values["attempt"]["system_tags"] == SYSTEM
    )
    assert len(values["long"]["value"]) == 3_000_000
    assert service.get(f"{path}?field_name=attempt&_order=id") == rows
    other = f"{world.step}/tasks/{service.post(f'{world.step}/task', {})['task_id']}"
    service.post(f"{other}/metadata", [metadata("late", "x")])
    everything = service.get(f"{world.run}/metadata")
    assert len(everything) == 11 and everything[0]["field_name"] == "late"
    assert sorted(
        row["id"] for row in everything if row["task_id"] == world.task_row["task_id"]
    ) == sorted(row["id"] for row in rows)


@pytest.mark.core
def test_bad_rows_are_refused_together_with_the_good_ones(world: World) -> None:
    service, before = world.service, files(world.service.root)
    good = {"metadata": metadata("good", "v"), "artifact": artifact("good")}
    for kind, bad in (
        ("metadata", "x"), ("metadata", None), ("metadata", []), ("artifact", artifact("../../x")), ("artifact", artifact("a/b")),
        ("artifact", artifact("f" * 256)), ("artifact", artifact("f", "abc")), ("artifact", artifact("f", -1)),
        ("artifact", artifact("f", 99999)), ("artifact", artifact("f", sha={})), ("artifact", 5), ("artifact", []),
    ):  # fmt: skip
        refused(service("POST", f"{world.task}/{kind}", [good[kind], bad]), 400, "row 1")
        refused(service("POST", f"{world.task}/{kind}", [bad, good[kind]]), 400, "row 0")
    for kind in ("metadata", "artifact"):
        for body in (
            b"",
            b"[",
            b"null",
            b'"x"',
            b"5",
            json.dumps(good[kind]).encode(),
            b'[{"value": NaN}]',
        ):
            refused(service("POST", f"{world.task}/{kind}", body), 400)
    assert files(service.root) == before


@pytest.mark.core
def test_tasks_filtered_by_metadata(world: World) -> None:
    service, path = world.service, f"{world.step}/filtered_tasks"
    run = world.run_row["run_number"]
    tasks = [world.task_row["task_id"]] + [
        service.post(f"{world.step}/task", {})["task_id"] for _ in range(10)
    ]
    service.post(f"{world.step}/task", {"task_id": "my-task"})
    for number, task in enumerate([*tasks, "my-task"]):
        if number != 3:
            rows = [
                metadata("path", f"a:{number},b:x"),
                metadata("attempt", "0"),
                metadata("stack", ["i=1", f"j={number}"]),
            ]
            service.post(f"{world.step}/tasks/{task}/metadata", rows)
    names = [f"F/{run}/start/{task}" for task in [*tasks, "my-task"]]
    listed = names[:3] + names[4:]

    def found(query: str) -> Any:
        return service.get(f"{path}?{query}")

    assert service.get(path) == listed
    assert found("metadata_field_name=attempt") == listed and found("_limit=1") == listed
    assert found("metadata_field_name=path&pattern=a:1") == [names[1], names[10], names[11]]
    assert found("metadata_field_name=path&pattern=^a:1,") == [names[1]]
    assert found("metadata_field_name=path&pattern=" + urllib.parse.quote("a:(2|4),b.*x$")) == [
        names[2],
        names[4],
    ]
    assert found("metadata_field_name=path&pattern=.*") == listed and found("pattern=j%3D7") == [
        names[7]
    ]
    assert (
        found("metadata_field_name=nosuch") == []
        and found("metadata_field_name=attempt&pattern=9") == []
    )
    for bad in ("%28", "%5B", "*"):
        refused(service("GET", f"{path}?pattern={bad}"), 400, "pattern")
    service.post(f"{world.task}/metadata", [metadata("evil", "a" * 40)])
    answer = service(
        "GET", f"{path}?metadata_field_name=evil&pattern=" + urllib.parse.quote("(a+)+$b|(?:a|a)*c")
    )
    assert answer.status in (200, 400)
    assert service("GET", "/ping").status == 200


# -- artifacts


@pytest.mark.core
def test_artifact_rows(world: World) -> None:
    service, path = world.service, f"{world.task}/artifact"
    assert service.get(f"{world.task}/artifacts") == []

    def post(*rows: Any) -> Any:
        return service.post(path, list(rows))["artifacts_created"]

    assert post(artifact("x"), artifact("y"), artifact("größe a-b", tags=["own"])) == 3
    assert post(artifact("x", sha="later"), artifact("new")) == 1
    assert post() == 0 and service.post(path, {}) == {"artifacts_created": 0}
    assert (
        post(artifact("long", location=f"{ROOT}/" + "l" * 5000), artifact("nullsha", sha=None)) == 2
    )
    rows = service.get(f"{world.task}/artifacts")
    for row in rows:
        check(row, ARTIFACT, flow_id="F", run_number=world.run_row["run_number"], step_name="start", attempt_id=0,
              task_id=world.task_row["task_id"], tags=["ta", "tb"], system_tags=SYSTEM)  # fmt: skip
        one = f"{world.task}/artifacts/{urllib.parse.quote(row['name'])}"
        assert service.get(one) == row == service.get(f"{one}/attempt/0")
    assert sorted(row["name"] for row in rows) == sorted(
        ["x", "y", "größe a-b", "new", "long", "nullsha"]
    )
    assert [row["sha"] for row in rows if row["name"] == "x"] == ["abc"]
    assert post({}) == 1
    check(
        service.get(f"{world.task}/artifacts/%20"),
        ARTIFACT,
        name=" ",
        location=" ",
        sha=" ",
        attempt_id=0,
    )
    for wrong in ("abc", "99999", "1.0", "%D9%A1", ""):
        assert service("GET", f"{world.task}/attempt/{wrong}/artifacts").status in (400, 404)
        assert service("GET", f"{world.task}/artifacts/x/attempt/{wrong}").status in (400, 404)
    refused(service("GET", f"{world.task}/attempt/abc/artifacts"), 400, "attempt")
    assert (
        service.get(f"{world.task}/attempt/-1/artifacts")
        == service.get(f"{world.task}/attempt/7/artifacts")
        == []
    )
    refused(service("GET", f"{world.task}/artifacts/with%20space%2Fx"), 404)


@pytest.mark.core
def test_the_newest_attempt_counts_whatever_the_artifacts_are_called(world: World) -> None:
    """Not the newest attempt that happens to have an artifact called `name`."""
    service, path = world.service, f"{world.task}/artifact"
    service.post(path, [artifact("name"), artifact("x"), artifact("only0")])
    service.post(path, [artifact("name", 1), artifact("x", "1"), artifact("only1", 1)])
    assert {row["name"] for row in service.get(f"{world.task}/artifacts")} == {"name", "x", "only1"}
    assert service.get(f"{world.task}/artifacts/x")["location"] == f"{ROOT}/x/1"
    assert service("GET", f"{world.task}/artifacts/only0").status == 404
    for attempt in range(2, 11):
        service.post(path, [artifact("x", attempt)])
    other = f"{world.step}/tasks/{service.post(f'{world.step}/task', {})['task_id']}"
    service.post(f"{other}/artifact", [artifact("x", 0), artifact("z", 0)])
    assert service.get(f"{world.task}/artifacts/x")["attempt_id"] == 10  # not 9, as by the alphabet
    for gone in ("name", "only0", "only1"):
        refused(service("GET", f"{world.task}/artifacts/{gone}"), 404, gone)
    assert service.get(f"{world.task}/artifacts/only0/attempt/0")["attempt_id"] == 0
    assert {row["name"] for row in service.get(f"{world.task}/attempt/1/artifacts")} == {
        "name",
        "x",
        "only1",
    }
    for parent in (world.step, world.run):
        rows = service.get(f"{parent}/artifacts")
        assert sorted((row["task_id"], row["name"], row["attempt_id"]) for row in rows) == [
            (world.task_row["task_id"], "x", 10),
            (world.task_row["task_id"] + 1, "x", 0),
            (world.task_row["task_id"] + 1, "z", 0),
        ]


# -- paging and filters


def pages(service: Client, path: str, limit: int) -> list[list[Any]]:
    """All pages of a list, by its cursors."""
    found, cursor = [], ""
    while True:
        sign = "&" if "?" in path else "?"
        answer = service("GET", f"{path}{sign}_limit={limit}{cursor}")
        assert answer.status == 200 and answer.headers["x-limit"] == str(limit), answer
        found.append(answer.body)
        following = answer.headers.get("x-next-cursor")
        if following is None:
            return found
        assert len(found) < 50 and isinstance(
            json.loads(base64.b64decode(following))["ts_epoch"], int
        )
        cursor = f"&_cursor={urllib.parse.quote(following)}"


@pytest.mark.core
def test_cursor_paging(world: World) -> None:
    service = world.service
    for number in range(6):
        service.post(f"/flows/F{number}", {})
        service.post("/flows/F/run", {} if number % 2 else {"run_number": f"argo-{number}"})
        task = service.post(
            f"{world.step}/task", {} if number % 2 else {"task_id": f"task-{number}"}
        )["task_id"]
        service.post(f"{world.step}/tasks/{task}/artifact", [artifact("x"), artifact("y")])
        service.post(
            f"{world.step}/tasks/{task}/metadata", [metadata(f"f{i}", "v") for i in range(3)]
        )
    service.post(f"{world.task}/metadata", [metadata("same", str(i)) for i in range(7)])
    service.post(f"{world.task}/artifact", [artifact(f"a{i}") for i in range(7)])
    keys = {"/flows": "flow_id", "/flows/F/runs": "run_number", f"{world.step}/tasks": "task_id",
            f"{world.task}/metadata": "id", f"{world.run}/metadata": "id"}  # fmt: skip
    lists = [*keys, f"{world.task}/artifacts", f"{world.step}/artifacts", f"{world.run}/artifacts"]
    for path in lists:
        whole = service("GET", path)
        assert "x-limit" not in whole.headers and "x-next-cursor" not in whole.headers

        def name(row: Any) -> str:
            return json.dumps(
                [row.get(key) for key in ("flow_id", "run_number", "task_id", "name", "id")]
            )

        for limit in (2, 3, 50):
            parts = pages(service, path, limit)
            assert [len(part) for part in parts[:-1]] == [limit] * (len(parts) - 1) and 0 < len(
                parts[-1]
            ) <= limit
            rows = [row for part in parts for row in part]
            assert [row["ts_epoch"] for row in rows] == sorted(
                (row["ts_epoch"] for row in rows), reverse=True
            ), path
            assert sorted(map(name, rows)) == sorted(map(name, whole.body)), path
        exact = service("GET", f"{path}?_limit={len(whole.body)}")
        assert len(exact.body) == len(whole.body) and "x-next-cursor" not in exact.headers
        for query, count, limit in (("_limit=0", 0, 0), ("_limit=501", None, 500), ("_limit=1000000", None, 500),
                                    ("_limit=", None, 50), ("_cursor=", None, 50), ("_limit=1&_limit=2", 1, 1)):  # fmt: skip
            answer = service("GET", f"{path}?{query}")
            assert answer.status == 200 and answer.headers["x-limit"] == str(limit), (path, query)
            assert len(answer.body) == (min(len(whole.body), limit) if count is None else count)
        for query in ("_limit=abc", "_limit=1.5", "_limit=-1", "_limit=-5"):
            refused(service("GET", f"{path}?{query}"), 400, "_limit")
        for cursor in ("bad", base64.b64encode(b"12").decode(), base64.b64encode(b'{"ts_epoch": "x", "flow_id": 1}').decode(),
                       base64.b64encode(b"{}").decode(), "%F0%9F%98%80"):  # fmt: skip
            answer = service("GET", f"{path}?_cursor={cursor}")
            assert answer.status == 400 and "Invalid cursor" in json.dumps(answer.body), (
                path,
                cursor,
            )


@pytest.mark.core
def test_runs_without_a_time_can_be_paged(service: Client) -> None:
    """Anybody may have written the tree."""
    service.post("/flows/N", {})
    written = [
        {},
        {"ts_epoch": None},
        {"ts_epoch": "x"},
        {"ts_epoch": 1.5},
        {"ts_epoch": True},
        {"ts_epoch": []},
    ]
    for number, record in enumerate(written, 1):
        meta = service.root / f".metaflow/N/{number}/_meta"
        meta.mkdir(parents=True)
        (meta / "_self.json").write_text(
            json.dumps({"run_number": str(number), "flow_id": "N", **record})
        )
    dated = service.post("/flows/N/run", {})["run_number"]
    found, path = [], "/flows/N/runs?_limit=2"
    while path:
        answer = service("GET", path)
        assert answer.status == 200 and len(found) < 7, answer
        found += [row["run_number"] for row in answer.body]
        following = answer.headers.get("x-next-cursor")
        path = (
            "/flows/N/runs?_limit=2&_cursor=" + urllib.parse.quote(following) if following else ""
        )
    assert found == [dated, 6, 5, 4, 3, 2, 1]


@pytest.mark.core
def test_filters_of_runs(service: Client) -> None:
    service.post("/flows/F", {})
    sent = [
        {"user_name": "tester", "tags": ["ta", "tb"], "system_tags": ["user:tester"]},
        {"user_name": "other", "tags": ["tb", "100%_x"], "system_tags": ["user:someone", "metaflow_version:2.0.0"]},
        {"user_name": None, "tags": None, "system_tags": None},
        {"user_name": "Tester2", "tags": [], "system_tags": ["user:Tester2", "metaflow_version:2.19.0"], "run_number": "argo-x"},
    ]  # fmt: skip
    ids = [service.post("/flows/F/run", body)["run_number"] for body in sent]
    one, two, three, argo = ids
    first = service.get(f"/flows/F/runs/{one}")["ts_epoch"]
    table: list[tuple[str, list[Any]]] = [
        (f"run_number={one}", [one]), (f"run_number={one},{two}", [one, two]), (f"run_number:ne={one}", [two, three, argo]),
        (f"run_number:gt={one}", [two, three]), (f"run_number:ge={one}&run_number:lt={three}", [one, two]),
        (f"run_number={one}&run_number={two}", []), ("run_id=argo-x", [argo]), ("run_id:co=RGO", [argo]),
        ("run_id:ne=null", [one, two, three]), ("run_id=null", [one, two, three]),
        ("user_name=tester", [one]), ("user_name:co=EST", [one, argo]), ("user_name:sw=te", [one, argo]),
        ("user_name:ew=er", [one, two]), ("user_name:li=t%25", [one, argo]), ("user_name:is=null", [three]),
        ("user_name=null", [three]), ("user_name:ne=tester", [two, argo]), ("user_name=tester,other", [one, two]),
        ("user=tester", [one]), ("user=other", []), ("user=null", [two, three]), ("user_name=%27%3B--", []),
        (f"ts_epoch:ge={first}", ids), ("ts_epoch:gt=0", ids), ("ts_epoch:lt=9999999999999", ids), ("ts_epoch=null", []),
        ("ts_epoch:lt=5", []), ("last_heartbeat_ts=null", [one, two]), ("last_heartbeat_ts:gt=0", [three, argo]), ("last_heartbeat_ts:lt=5", []),
        ("_tags=ta", [one]), ("_tags=ta,tb", [one]), ("_tags:all=tb,user:tester", [one]), ("_tags:any=ta,100%25_x,zz", [one, two]),
        ("_tags:bogus=ta", [one]), ("_tags=", []), ("_tags=nope", []), ("_tags:likeany=use,zz", [one, two, argo]),
        ("_tags:likeall=user:te,tb", [one]), ("_tags=tb&user_name=other", [two]), ("flow_id=F", ids), ("flow_id:ne=F", []),
        ("status=running,failed,completed", ids), ("status=completed", []), ("status=null", []),
        ("nosuch=1", ids), ("finished_at=1", ids), ("_page=2", ids), ("_order=run_number", ids),
    ]  # fmt: skip
    wrong = {}
    for query, expected in table:
        answer = service("GET", f"/flows/F/runs?{query}")
        got = [row["run_number"] for row in answer.body] if answer.status == 200 else answer
        if answer.status != 200 or sorted(map(str, got)) != sorted(map(str, expected)):
            wrong[query] = got
        elif ("x-limit" in answer.headers) is query.startswith(
            ("nosuch", "finished", "_page", "_order")
        ):
            wrong[query] = "paging"
    assert wrong == {}
    assert all("status" in row for row in service.get("/flows/F/runs?status=running,failed"))
    assert all("status" not in row for row in service.get("/flows/F/runs?user_name=tester"))
    answer = service("GET", "/flows/F/runs?ts_epoch:gt=0&_limit=1")
    assert len(answer.body) == 1 and answer.headers["x-next-cursor"]
    for query, word in (
        ("status=bogus", "unsupported status filter: bogus"), ("status:co=run", "unsupported status filter: run"),
        ("status:zz=failed", "unsupported operator 'zz' for field 'status'"), ("run_number:foo=1", "unsupported operator 'foo'"),
        ("ts_epoch:gt=abc", "invalid ts_epoch: expected integer epoch milliseconds, got 'abc'"),
        ("last_heartbeat_ts:gt=x", "invalid last_heartbeat_ts"), ("run_number=abc", "run_number"),
        ("run_number:co=1", "run_number"), ("user_name=a%00b", "%00"), ("user_name:is=text", "user_name"),
    ):  # fmt: skip
        answer = service("GET", f"/flows/F/runs?{query}")
        assert answer.status == 400 and word in json.dumps(answer.body), (query, answer)


@pytest.mark.core
def test_filters_of_tasks(world: World) -> None:
    service, path = world.service, f"{world.step}/tasks"
    one = world.task_row["task_id"]
    two = service.post(f"{world.step}/task", {"system_tags": []})["task_id"]
    service.post(f"{world.step}/task", {"task_id": "my-task", "user_name": "u"})
    ids = [one, two, "my-task"]
    for query, expected in (
        (f"task_id={one},{two}", [one, two]), (f"task_id:gt={one}", [two]), ("task_name=my-task", ["my-task"]),
        ("task_name=null", [one, two]), ("user_name=null", [two]), ("user_name=u,tester", [one, "my-task"]),
        ("ts_epoch:gt=0", ids), ("last_heartbeat_ts=null", [two]), ("last_heartbeat_ts:gt=0", [one, "my-task"]),
        ("nosuch=1", ids), ("_tags=nope", ids), ("run_id=nope", ids),
    ):  # fmt: skip
        got = [row["task_id"] for row in service.get(f"{path}?{query}")]
        assert sorted(map(str, got)) == sorted(map(str, expected)), query
    for query in ("task_id:zz=1", "task_id=abc", "ts_epoch:gt=x"):
        answer = service("GET", f"{path}?{query}")
        assert answer.status == 400 and query.partition("=")[0].partition(":")[0] in json.dumps(
            answer.body
        )


@pytest.mark.core
def test_the_status_of_runs_can_be_asked_for(service: Client) -> None:
    service.post("/flows/F", {})
    runs = {}
    for name, verdict in (("done", "True"), ("bad", "False"), ("odd", "maybe"), ("going", None)):
        runs[name] = run = service.post("/flows/F/run", BODY)["run_number"]
        service.post(f"/flows/F/runs/{run}/steps/end/step", BODY)
        task = service.post(f"/flows/F/runs/{run}/steps/end/task", BODY)["task_id"]
        path = f"/flows/F/runs/{run}/steps/end/tasks/{task}/metadata"
        service.post(path, [metadata("attempt", "0")])
        if verdict:
            service.post(path, [metadata("attempt_ok", verdict)])

    def having(status: str) -> set[int]:
        return {row["run_number"] for row in service.get(f"/flows/F/runs?status={status}")}

    assert having("completed") - {runs["odd"]} == {runs["done"]}
    assert runs["bad"] in having("failed") and runs["going"] in having("running")
    assert sorted([*having("running"), *having("failed"), *having("completed")]) == sorted(
        runs.values()
    )
    assert having("completed,failed") == having("completed") | having("failed")
    assert {row["run_number"] for row in service.get("/flows/F/runs?status:ne=completed")} == set(
        runs.values()
    ) - having("completed")


# -- the faults of the service that this one replaces


@pytest.mark.core
def test_fault_01_heartbeat_is_double_encoded(world: World) -> None:
    """Metaflow's client does json.loads(response.json()): the body is a JSON string that holds JSON."""
    for path in (world.run, world.task):
        answer = world.service("POST", f"{path}/heartbeat", {})
        assert answer.status == 200 and isinstance(answer.body, str)
        assert json.loads(answer.body)["wait_time_in_seconds"] == 10


def test_fault_05_nothing_is_written_or_read_outside(world: World, tmp_path: Path) -> None:
    service = world.service
    before = files(service.root.parent)
    secret = service.root / "secret.json"
    secret.write_text(json.dumps({"flow_id": "x", "name": "x", "ts_epoch": 1, "attempt_id": 0}))
    (service.root / "_meta").mkdir()
    (service.root / "_meta/_self.json").write_text('{"flow_id": "outside", "ts_epoch": 1}')
    dots = [
        "..",
        "%2e%2e",
        "%2E.",
        "..%2f..",
        "%2e%2e%2f%2e%2e",
        "....//",
        "..%5c..",
        "..;",
        "%252e%252e",
        "%c0%ae%c0%ae",
    ]
    port = int(service.url.rpartition(":")[2])
    for dot in dots:
        for method, path in (
            ("POST", f"/flows/{dot}"), ("GET", f"/flows/{dot}"), ("POST", f"/flows/{dot}/run"),
            ("POST", f"{world.run}/steps/{dot}/step"), ("GET", f"/flows/F/runs/{dot}"), ("GET", f"{world.step}/tasks/{dot}"),
            ("GET", f"{world.task}/artifacts/{dot}"), ("POST", f"/flows/F/runs/{dot}/heartbeat"),
        ):  # fmt: skip
            # sent raw, because clients tidy up dots before they send them
            with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
                request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}"
                raw.sendall(request.encode())
                got = b""
                while True:
                    more = raw.recv(65536)
                    if not more:
                        break
                    got += more
            assert int(got.split()[1]) in (400, 404, 405), (method, path, got[:200])
            assert b"outside" not in got
    for name in ("../../../x", "/etc/x", "a/../../x", "..\\x/", "\0", "x\0/../y"):
        service.post(f"{world.task}/metadata", [metadata(name, "v")])
        refused(service("POST", f"{world.task}/artifact", [artifact(name)]), 400, "name")
        refused(service("POST", "/flows/F/run", {"run_number": name}), 400, "run_number")
        refused(service("POST", f"{world.step}/task", {"task_id": name}), 400, "task_id")
    assert files(service.root.parent) == before
    assert secret.exists() and not (service.root / "x.json").exists()


def test_fault_06_no_star_for_other_origins_and_no_strange_hosts(world: World) -> None:
    service = world.service
    before = files(service.root)
    for path in ("/ping", "/flows", world.run, "/flows/NoSuch"):
        plain = service("GET", path)
        assert "access-control-allow-origin" not in plain.headers
        for origin in (
            "https://evil.example",
            "null",
            "http://localhost.evil.example",
            "http://127.0.0.1.evil.example",
        ):
            answer = service("GET", path, headers={"Origin": origin})
            assert answer.status == 403 and answer.headers.get(
                "access-control-allow-origin"
            ) not in ("*", origin)
        answer = service("GET", path, headers={"Origin": "http://localhost:3000"})
        assert answer.status == plain.status
        assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
        for host in (
            "evil.example",
            "evil.example:80",
            "127.0.0.1.nip.io",
            "10.0.0.1",
            "localhost.evil.example",
        ):
            refused(service("GET", path, headers={"Host": host}), 403, host.partition(":")[0])
    for headers in (
        {"Origin": "https://evil.example"},
        {"Host": "evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert (
            service("POST", "/flows/Evil", {}, {**headers, "Content-Type": "text/plain"}).status
            == 403
        )
        assert (
            service("PATCH", f"{world.run}/tag/mutate", {"tags_to_add": ["evil"]}, headers).status
            == 403
        )
    assert files(service.root) == before and service.get(world.run)["tags"] == ["ta", "tb"]


@pytest.mark.core
def test_fault_07_no_route_of_the_client_is_missing(world: World) -> None:
    """GET /flows and GET .../artifacts/{name}, run metadata, artifacts of runs and steps, filtered tasks."""
    service = world.service
    service.post(f"{world.task}/artifact", [artifact("x")])
    service.post(f"{world.task}/metadata", [metadata("f", "v")])
    assert [row["flow_id"] for row in service.get("/flows")] == ["F"]
    assert service.get(f"{world.task}/artifacts/x")["name"] == "x"
    for path in (
        f"{world.run}/metadata",
        f"{world.run}/artifacts",
        f"{world.step}/artifacts",
        f"{world.task}/artifacts",
    ):
        assert len(service.get(path)) == 1, path
    assert len(service.get(f"{world.step}/filtered_tasks?metadata_field_name=f&pattern=v")) == 1
    for path in ("/flows", "/flows/F", "/flows/F/runs", world.run, f"{world.run}/steps", world.step, f"{world.step}/tasks",
                 world.task, f"{world.task}/metadata", f"{world.task}/artifacts", f"{world.task}/artifacts/x",
                 f"{world.task}/attempt/0/artifacts", f"{world.task}/artifacts/x/attempt/0", "/ping", "/version",
                 "/healthcheck"):  # fmt: skip
        plain, below = service("GET", path), service("GET", f"/api/metadata{path}")
        assert plain.status == below.status == 200 and plain.body == below.body, path


@pytest.mark.core
def test_fault_08_bad_bodies_create_nothing_and_parents_must_exist(service: Client) -> None:
    for body in (b"", b"not json", b"[]", b"null", b"\xff"):
        refused(service("POST", "/flows/F", body), 400)
    assert service.get("/flows") == [] and not (service.root / ".metaflow/F").exists()
    assert service("POST", "/flows/F", {}).status == 200
    for path in ("/flows/F/runs/1/steps/s/task", "/flows/F/runs/1/steps/s/step", "/flows/G/run"):
        refused(service("POST", path, BODY), 404)
    assert sorted(os.listdir(service.root / ".metaflow")) == [".mflocal", "F"]
    assert os.listdir(service.root / ".metaflow/F") == ["_meta"]


READS_RUN = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[1])
import mflocal
touched = []
sys.addaudithook(lambda event, args: touched.append(str(args[0])) if event in ("open", "os.listdir", "os.scandir") else None)
store = mflocal.Store(sys.argv[2], sys.argv[2] + "/.mflocal/tmp")
settings = mflocal.Settings(root=os.path.dirname(sys.argv[2]))
api = mflocal.MetadataApi(mflocal.Site(store, mflocal.Liveness(store), settings))

async def main():
    run = store.run("F", "1000")
    assert api.run_row(run)["user"] == "u"
    runs = await store.runs(store.flow("F"))
    assert len([api.run_row(node) for node in runs]) == 20
    assert len(touched) > 20
    assert not [path for path in touched if "/s" in path[len(sys.argv[2]):]], "a task was read for a run"
    turns = 0

    async def others():
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    beside = asyncio.ensure_future(others())
    assert len(await store.run_facts(run)) == 400
    assert turns > 1, "others had to wait for the whole walk"
    beside.cancel()

asyncio.run(main())
"""


def test_fault_09_reading_runs_does_not_read_their_tasks(tmp_path: Path) -> None:
    """GET run and the list of runs open no task, and a walk over 400 tasks lets others have their turn."""
    record = json.dumps(
        {"flow_id": "F", "user_name": "u", "tags": [], "system_tags": ["user:u"], "ts_epoch": 1000}
    )
    metaflow_dir = tmp_path / ".metaflow"
    places = [
        "F",
        *[f"F/{1000 + run}" for run in range(20)],
        *[f"F/{1000 + run}/s" for run in range(20)],
    ]
    for place in [*places, *[f"F/1000/s/{task}" for task in range(400)]]:
        (metaflow_dir / place / "_meta").mkdir(parents=True)
        (metaflow_dir / place / "_meta/_self.json").write_text(record)
    done = subprocess.run(
        [sys.executable, "-c", READS_RUN, str(REPO), str(metaflow_dir)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


# -- Metaflow's own client


CLIENT = """
from metaflow import Flow, Metaflow, Run, Step, Task, DataArtifact as Artifact, metadata, namespace
namespace(None)
metadata(sys.argv[1])
told = {}
told["flows"] = [flow.id for flow in Metaflow().flows]
told["runs"] = sorted(run.id for run in Flow("MetaFlow"))
told["by_tag"] = sorted(run.id for run in Flow("MetaFlow").runs("t1"))
told["no_tag"] = [run.id for run in Flow("MetaFlow").runs("nosuch")]
told["latest"] = Flow("MetaFlow").latest_run.id
told["latest_ok"] = Flow("MetaFlow").latest_successful_run.id
run = Run("MetaFlow/" + sys.argv[2])
told["run"] = {"successful": run.successful, "finished": run.finished, "tags": sorted(run.user_tags),
               "created": run.created_at.timestamp(), "system": sorted(run.system_tags), "end": run.end_task.step if False else run.end_task.parent.id,
               "values": run["join"].task.data.values, "odd": getattr(run["join"].task.data, "col a-b"),
               "umlaut": run.data.größe if hasattr(run.data, "größe") else None}
told["steps"] = sorted(step.id for step in run)
told["in_step"] = {step.id: sorted(task.id for task in step) for step in run}
body = [task for task in Step(run.pathspec + "/body")]
told["body"] = []
for task in sorted(body, key=lambda task: int(task.id)):
    fields = {}
    for datum in task.metadata:
        fields.setdefault(datum.name, []).append(datum.value)
    told["body"].append({"id": task.id, "value": task["value"].data, "again": task.data.value, "attempt": task.current_attempt,
        "artifacts": sorted(a.id for a in task.artifacts), "fields": {k: sorted(map(str, v)) for k, v in fields.items()},
        "tags": sorted(task.user_tags), "ok": task.successful, "created": task.created_at.timestamp(), "index": task.index,
        "environment": sorted(task.metadata_dict)})
retried = [task for task in body if task.current_attempt == 1][0]
old = Task(retried.pathspec, attempt=0)
told["old"] = {"artifacts": sorted(a.id for a in old.artifacts), "only": old["only_in_first"].data, "ok": old.successful}
told["gone"] = "only_in_first" in [a.id for a in Task(retried.pathspec).artifacts]
told["artifact"] = [Artifact(retried.pathspec + "/value").data, Artifact(retried.pathspec + "/value").sha]
try:
    Artifact(retried.pathspec + "/nosuch"); told["missing"] = "found"
except Exception as error:
    told["missing"] = type(error).__name__
try:
    Run("MetaFlow/12345"); told["norun"] = "found"
except Exception as error:
    told["norun"] = type(error).__name__
join = run["join"].task
told["parents"] = told["children"] = None
if hasattr(join, "parent_tasks"):
    told["parents"] = sorted(task.pathspec for task in join.parent_tasks)
    told["children"] = sorted(task.pathspec for task in run["start"].task.child_tasks)
    told["parent"] = [[task.pathspec for task in t.parent_tasks] for t in sorted(body, key=lambda t: int(t.id))]
    told["child"] = [[task.pathspec for task in t.child_tasks] for t in sorted(body, key=lambda t: int(t.id))]
print(json.dumps(told))
"""


def body_ids(told: Any) -> list[str]:
    return [task["id"] for task in told["body"]]


@pytest.mark.core
@pytest.mark.parametrize("made", ["http", "local"])
def test_metaflows_client_sees_the_same_over_http_as_in_local_mode(
    ran: dict[str, Any], make_service: Callable[..., Client], made: str
) -> None:
    """Whoever wrote the run: every answer of the client is the same with either provider, and is right."""
    service, run = make_service(ran["root"]), ran[made]
    http = script(CLIENT, ran["root"], service.url, service.url, run)
    local = script(CLIENT, ran["root"], None, f"local@{ran['root']}", run)
    assert (
        http["flows"] == ["MetaFlow"]
        and http["runs"] == sorted([ran["local"], ran["http"]]) == http["by_tag"]
    )
    assert (
        http["no_tag"] == []
        and http["latest"] == max(ran["local"], ran["http"]) == http["latest_ok"]
    )
    assert (
        http["run"]["successful"] is True
        and http["run"]["finished"] is True
        and http["run"]["end"] == "end"
    )
    assert http["run"]["tags"] == ["größe", "t1"] and "user:tester" in http["run"]["system"]
    assert http["run"]["values"] == ["aaa", "b cb cb c"] and http["run"]["odd"] == 7
    assert http["steps"] == ["body", "end", "join", "start"] and len(http["in_step"]["body"]) == 2
    first, second = http["body"]
    assert (
        [first["value"], second["value"]]
        == ["aaa", "b cb cb c"]
        == [first["again"], second["again"]]
    )
    assert [first["attempt"], second["attempt"]] == [1, 0] and first["ok"] and second["ok"]
    assert first["tags"] == ["größe", "t1"] and first["index"] == 0 and second["index"] == 1
    assert {"attempt", "attempt_ok", "ds-root", "python_version", "runtime"} <= set(
        first["environment"]
    )
    assert first["fields"]["attempt"] == ["0", "1"] or first["fields"]["attempt"] == ["1"]
    assert http["old"]["only"] is True and http["old"]["ok"] is False and http["gone"] is False
    assert http["artifact"][0] == "aaa" and http["missing"] == http["norun"] == "MetaflowNotFound"
    if http["parents"] is not None:
        here = f"MetaFlow/{run}"
        assert (
            http["parents"]
            == http["children"]
            == sorted(f"{here}/body/{task}" for task in body_ids(http))
        )
        assert http["parent"] == [[f"{here}/start/{http['in_step']['start'][0]}"]] * 2
        assert http["child"] == [[f"{here}/join/{http['in_step']['join'][0]}"]] * 2
    for ours, theirs in zip(http.pop("body"), local.pop("body")):
        for told in (ours, theirs):  # a list in the file; the service's values are text
            told["fields"]["foreach-stack"] = len(told["fields"].get("foreach-stack", ()))
        assert {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]} == {}
    assert http == local


def test_tags_by_client_and_command_line(
    ran: dict[str, Any], make_service: Callable[..., Client]
) -> None:
    code = """
from metaflow import Run, namespace
namespace(None)
run = Run("MetaFlow/" + sys.argv[1])
run.add_tags(["one", "two"]); run.add_tag("three"); run.remove_tag("t1"); run.replace_tags(["two"], ["four"])
first = sorted(run.user_tags)
try:
    run.remove_tag("user:tester"); refused = "no"
except Exception as error:
    refused = type(error).__name__
print(json.dumps([first, sorted(Run("MetaFlow/" + sys.argv[1]).user_tags), sorted(next(iter(run)).task.user_tags), refused]))
"""
    service = make_service(ran["root"])
    before = service.get(f"/flows/MetaFlow/runs/{ran['http']}")
    told = script(code, ran["root"], service.url, ran["http"])
    assert told[:3] == [["four", "größe", "one", "three"]] * 3 and told[3] != "no"
    after = service.get(f"/flows/MetaFlow/runs/{ran['http']}")
    assert {k: v for k, v in after.items() if k != "tags"} == {
        k: v for k, v in before.items() if k != "tags"
    }
    local = script("""
from metaflow import Run, metadata, namespace
namespace(None); metadata("local@" + os.getcwd())
print(json.dumps(sorted(Run("MetaFlow/" + sys.argv[1]).user_tags)))
""", ran["root"], None, ran["http"])  # fmt: skip
    assert local == told[0]
