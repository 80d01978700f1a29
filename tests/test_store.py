"""The store: local mode's own files. In process, beside the real LocalMetadataProvider, and across kills."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import REPO, Client, wait_for
from meta_shared import script

import mflocal

SYSTEM = ["metaflow_version:2.19.39", "user:tester", "runtime:dev"]
BODY = {"user_name": "tester", "tags": ["t1"], "system_tags": SYSTEM}


@pytest.fixture
def metaflow_dir(tmp_path: Path) -> Path:
    path = tmp_path / ".metaflow"
    path.mkdir()
    return path


def open_store(metaflow_dir: Path, name: str = "tmp") -> mflocal.Store:
    """A store as a daemon has it; `name` keeps the temp files of two of them apart."""
    temp = metaflow_dir / ".mflocal" / name
    temp.mkdir(parents=True, exist_ok=True)
    return mflocal.Store(str(metaflow_dir), str(temp))


@pytest.fixture
def store(metaflow_dir: Path) -> mflocal.Store:
    return open_store(metaflow_dir)


def a_task(store: mflocal.Store, step: str = "start") -> mflocal.TaskNode:
    """A task of a new run of flow F."""
    flow = store.flow("F") or store.create_flow("F", {})
    run = store.create_run(flow, BODY)
    made = store.create_step(run, step, BODY)
    return store.create_task(made, BODY)


def meta_of(node: Any) -> Path:
    return Path(node.path) / "_meta"


def write_record(path: Path, record: Any) -> None:
    """As local mode writes: a temp file beside it, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.parent / f"tmp{threading.get_ident()}"
    temp.write_text(record if isinstance(record, str) else json.dumps(record))
    temp.rename(path)


def foreign_run(metaflow_dir: Path, run: str, flow: str = "F", **more: Any) -> Path:
    own = {
        "run_number": run,
        "flow_id": flow,
        "user_name": "u",
        "tags": [],
        "system_tags": [],
        "ts_epoch": 1000,
    }
    write_record(metaflow_dir / flow / "_meta/_self.json", {"flow_id": flow, "ts_epoch": 1000})
    write_record(metaflow_dir / flow / run / "_meta/_self.json", {**own, **more})
    return metaflow_dir / flow / run


def foreign_task(run: Path, step: str, task: str, **more: Any) -> Path:
    own = {
        "run_number": run.name,
        "step_name": step,
        "flow_id": run.parent.name,
        "user_name": "u",
        "ts_epoch": 1000,
    }
    own.update(tags=[], system_tags=[])
    write_record(run / step / "_meta/_self.json", own)
    write_record(run / step / task / "_meta/_self.json", {**own, "task_id": task, **more})
    return run / step / task


def children(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def parts_of(root: Path) -> list[str]:
    """All paths below a .metaflow but mflocal's own and signs of life."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != ".mflocal"]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in [*folders, *names]]
    return sorted(path for path in found if not path.endswith("_mflocal.json"))


# -- ids


@pytest.mark.core
def test_run_ids_are_microseconds_and_strictly_rising(store: mflocal.Store) -> None:
    flow = store.create_flow("F", {})
    ids = [int(store.create_run(flow, BODY).id) for _ in range(200)]
    assert ids == sorted(set(ids))
    assert abs(ids[0] / 1e6 - time.time()) < 60


CREATOR = """
import sys; sys.path.insert(0, sys.argv[1])
import mflocal
store = mflocal.Store(sys.argv[2], sys.argv[3])
flow = store.flow("F"); run = store.run("F", sys.argv[4]); step = store.step(run, "start")
print("ready", flush=True)
sys.stdin.readline()
print(*[store.create_run(flow, {}).id for _ in range(150)], *[store.create_task(step, {}).id for _ in range(150)])
"""


@pytest.mark.core
def test_ids_never_collide_between_processes(store: mflocal.Store, metaflow_dir: Path) -> None:
    flow = store.create_flow("F", {})
    run = store.create_run(flow, {})
    step = store.create_step(run, "start", {})
    processes = []
    for name in ("a", "b", "c"):
        open_store(metaflow_dir, name)
        temp = str(metaflow_dir / ".mflocal" / name)
        processes.append(subprocess.Popen(
            [sys.executable, "-c", CREATOR, str(REPO), str(metaflow_dir), temp, run.id],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    own = [store.create_task(step, {}).id for _ in range(150)]
    told = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [len(ids) for ids in told] == [300, 300, 300]
    runs = [id for ids in told for id in ids[:150]]
    tasks = own + [id for ids in told for id in ids[150:]]
    assert len(set(runs)) == 450 and len(set(tasks)) == 600
    assert sorted(map(int, tasks)) == list(range(1, 601))
    for task in tasks:
        assert (
            json.loads((Path(step.path) / task / "_meta/_self.json").read_text())["task_id"] == task
        )


def test_task_numbers_are_the_runs_not_the_steps(store: mflocal.Store, metaflow_dir: Path) -> None:
    """Two writers of one run, each in a step of its own, do not give out a number twice."""
    run = store.create_run(store.create_flow("F", {}), {})
    first, second = store.create_step(run, "a", {}), store.create_step(run, "b", {})
    ids = [store.create_task(first, {}).id]
    other = open_store(metaflow_dir, "other")
    theirs = other.step(other.run("F", run.id), "b")
    for _ in range(3):
        ids += [
            other.create_task(theirs, {}).id,
            store.create_task(first, {}).id,
            store.create_task(second, {}).id,
        ]
    assert len(set(ids)) == len(ids)


@pytest.mark.core
def test_a_restarted_store_goes_on_counting_from_the_disk(
    store: mflocal.Store, metaflow_dir: Path
) -> None:
    task = a_task(store)
    run = task.run
    ids = [task.id] + [store.create_task(task.step, {}).id for _ in range(4)]
    end = store.create_step(run, "end", {})
    store.create_task(end, {}, "my-task")
    again = open_store(metaflow_dir)
    step = again.step(again.run("F", run.id), "end")
    ids.append(again.create_task(step, {}).id)
    assert ids == ["1", "2", "3", "4", "5", "6"]
    assert int(again.create_run(again.flow("F"), {}).id) > int(run.id)


@pytest.mark.core
def test_local_modes_numbers_are_served_and_passed(
    store: mflocal.Store, metaflow_dir: Path
) -> None:
    run = foreign_run(metaflow_dir, "1700000000000000")
    foreign_task(run, "_parameters", "0")
    foreign_task(run, "start", "7")
    found = store.find_task("F", run.name, "_parameters", "0")
    assert found is not None and found.pathspec == "F/1700000000000000/_parameters/0"
    assert store.create_task(store.step(found.run, "_parameters"), {}).id == "8"


@pytest.mark.core
def test_ids_chosen_by_the_client_are_kept_and_taken_once(
    store: mflocal.Store, metaflow_dir: Path
) -> None:
    flow = store.create_flow("F", {})
    run = store.create_run(flow, BODY, "argo-abc")
    assert run.id == "argo-abc" and store.create_run(flow, {}, "argo-abc") is None
    assert open_store(metaflow_dir, "x").create_run(flow, {}, "argo-abc") is None
    assert json.loads((meta_of(run) / "_self.json").read_text())["tags"] == ["t1"]
    step = store.create_step(run, "start", BODY)
    assert store.create_step(run, "start", {}) is None
    assert store.create_task(step, {}, "clone-1").id == "clone-1"
    assert store.create_task(step, {}, "clone-1") is None
    assert store.create_task(step, {}).id == "1"
    assert store.create_flow("F", {}) is None


@pytest.mark.parametrize("name", ["_meta", "data", "latest_run"])
def test_local_modes_own_names_are_no_ids(service: Client, name: str) -> None:
    """FLOW/data holds artifacts, FLOW/latest_run is a file, `_meta` is every object's own directory."""
    service.post("/flows/F", {})
    before = parts_of(service.root / ".metaflow")
    answers = [service("POST", "/flows/F/run", {"run_number": name}).status]
    run = service.post("/flows/F/run", {})["run_number"]
    if name == "_meta":
        answers.append(service("POST", f"/flows/F/runs/{run}/steps/_meta/step", {}).status)
        service.post(f"/flows/F/runs/{run}/steps/s/step", {})
        answers.append(
            service("POST", f"/flows/F/runs/{run}/steps/s/task", {"task_id": "_meta"}).status
        )
        assert not (service.root / f".metaflow/F/{run}/s/_meta/_meta").exists()
    assert set(answers) == {400}
    assert not (service.root / ".metaflow/F" / name / "_meta").exists(), before


# -- what is written


@pytest.mark.core
def test_fields_of_one_millisecond_are_all_kept(store: mflocal.Store) -> None:
    task = a_task(store)
    rows = mflocal.metadata_body(
        [{"field_name": "same", "value": str(i), "type": "t"} for i in range(20)]
    )
    assert asyncio.run(store.add_metadata(task, rows)) == 20
    names = [name for name in children(meta_of(task)) if name.startswith("sysmeta_same_")]
    assert len(names) == 20
    read = asyncio.run(store.metadata(task))
    assert sorted(int(row["value"]) for row in read) == list(range(20))
    assert len({row["id"] for row in read}) == 20
    for name in names:
        record = json.loads((meta_of(task) / name).read_text())
        assert 0 <= mflocal.split_metadata_file(name)[1] - record["ts_epoch"] < 20


def test_metadata_ids_are_the_same_after_a_restart(
    store: mflocal.Store, metaflow_dir: Path
) -> None:
    task = a_task(store)
    rows = mflocal.metadata_body([{"field_name": f"f{i % 7}", "value": str(i)} for i in range(40)])
    asyncio.run(store.add_metadata(task, rows))
    again = open_store(metaflow_dir)
    other = again.find_task("F", task.run.id, "start", task.id)
    seen = [
        {row["id"]: row["value"] for row in asyncio.run(s.metadata(t))}
        for s, t in ((store, task), (again, other))
    ]
    assert seen[0] == seen[1] and len(seen[0]) == 40


@pytest.mark.core
def test_an_artifact_is_written_once_per_attempt(store: mflocal.Store) -> None:
    task = a_task(store)

    def add(*rows: Any) -> int:
        return asyncio.run(store.add_artifacts(task, mflocal.artifact_body(list(rows))))

    assert add({"name": "x", "sha": "1"}, {"name": "y", "sha": "1"}) == 2
    assert add({"name": "x", "sha": "2"}, {"name": "z", "sha": "2"}, {"name": "z", "sha": "3"}) == 1
    assert add({"name": "x", "sha": "4", "attempt_id": 1}) == 1
    rows = asyncio.run(store.artifacts(task))
    assert [(r["attempt_id"], r["name"], r["sha"]) for r in rows] == [
        (1, "x", "4"), (0, "x", "1"), (0, "y", "1"), (0, "z", "2"),
    ]  # fmt: skip


def test_names_with_glob_characters_are_only_names(service: Client) -> None:
    run, task = api_task(service)
    names = ["*", "a?", "[ab]", "a", "b", "col a-b", "größe", "..", "x_artifact_y"]
    answer = service.post(f"{task}/artifact", [{"name": name, "sha": name} for name in names])
    assert answer == {"artifacts_created": len(names)}
    assert sorted(row["name"] for row in service.get(f"{task}/artifacts")) == sorted(names)
    for name, quoted in (
        ("*", "*"),
        ("[ab]", "%5Bab%5D"),
        ("a?", "a%3F"),
        ("größe", "gr%C3%B6%C3%9Fe"),
    ):
        assert service.get(f"{task}/artifacts/{quoted}")["sha"] == name
    assert service("GET", f"{task}/artifacts/c*").status == 404


@pytest.mark.core
def test_tagging_keeps_everything_else_of_the_run(store: mflocal.Store, metaflow_dir: Path) -> None:
    run = store.create_run(store.create_flow("F", {}), BODY)
    own = meta_of(run) / "_self.json"
    before = {
        **json.loads(own.read_text()),
        "user_name": "someone",
        "ts_epoch": 12345,
        "mine": {"a": [1]},
    }
    write_record(own, before)
    node = store.run("F", run.id)
    store.replace_tags(node, ["new", "größe"])
    assert json.loads(own.read_text()) == {**before, "tags": ["new", "größe"]}
    assert store.run("F", run.id).self_record["ts_epoch"] == 12345
    assert open_store(metaflow_dir).run("F", run.id).self_record["mine"] == {"a": [1]}


def test_concurrent_patches_lose_nothing(service: Client) -> None:
    service.post("/flows/F", {})
    row = service.post("/flows/F/run", {**BODY, "tags": ["old", "gone"]})
    path = f"/flows/F/runs/{row['run_number']}/tag/mutate"
    statuses: list[int] = []

    def patch(number: int) -> None:
        for turn in range(5):
            body = {
                "tags_to_add": [f"t{number}-{turn}"],
                "tags_to_remove": ["gone", f"t{number}-{turn - 1}"],
            }
            statuses.append(service("PATCH", path, body).status)

    threads = [threading.Thread(target=patch, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 80
    after = service.get(f"/flows/F/runs/{row['run_number']}")
    assert sorted(after["tags"]) == sorted(["old"] + [f"t{number}-4" for number in range(16)])
    assert after["ts_epoch"] == row["ts_epoch"]
    disk = json.loads(
        (service.root / f".metaflow/F/{row['run_number']}/_meta/_self.json").read_text()
    )
    assert sorted(disk["tags"]) == sorted(after["tags"])


def test_readers_never_meet_a_half_file(store: mflocal.Store) -> None:
    """One thread rewrites a big record, this one reads it as local mode does: plain open and json.load."""
    run = store.create_run(store.create_flow("F", {}), BODY)
    own, stop = meta_of(run) / "_self.json", threading.Event()

    def rewrite() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            store.replace_tags(run, [f"tag-{i}-{number}" for i in range(2000 + number % 7 * 500)])

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        until, reads = time.monotonic() + 0.6, 0
        while time.monotonic() < until:
            record = json.loads(own.read_text())
            assert len({tag.rpartition("-")[2] for tag in record["tags"]}) == 1
            reads += 1
    finally:
        stop.set()
        writer.join()
    assert reads > 5
    assert [name for name in children(meta_of(run)) if not name.startswith("_")] == []


# -- what others write meanwhile


@pytest.mark.core
def test_what_others_write_is_seen_at_once(store: mflocal.Store, metaflow_dir: Path) -> None:
    """No sleep between writing and reading: a directory's mtime may not have moved on."""
    run = foreign_run(metaflow_dir, "1")
    for number in range(60):
        foreign_run(metaflow_dir, f"r{number}")
        flow = store.flow("F")
        assert store.run("F", f"r{number}") is not None
        assert len(asyncio.run(store.runs(flow))) == number + 2
        task = foreign_task(run, f"s{number % 3}", str(number))
        node = store.find_task("F", "1", f"s{number % 3}", str(number))
        assert (
            node is not None
            and len(asyncio.run(store.run_tasks(store.run("F", "1")))) == number + 1
        )
        for turn in range(3):
            record = {
                "field_name": "attempt",
                "value": str(turn),
                "type": "t",
                "ts_epoch": 5000 + turn,
                "tags": [],
            }
            write_record(task / f"_meta/sysmeta_attempt_{5000 + turn}.json", record)
            assert len(asyncio.run(store.metadata(node))) == turn + 1
            assert sorted(store.facts(node).attempts) == list(range(turn + 1))
            write_record(
                task / f"_meta/{turn}_artifact_x.json",
                {"name": "x", "attempt_id": turn, "ts_epoch": 1},
            )
            assert [row["attempt_id"] for row in asyncio.run(store.artifacts(node))][0] == turn


@pytest.mark.core
def test_a_change_within_one_tick_of_the_clock_is_seen(
    store: mflocal.Store, metaflow_dir: Path
) -> None:
    """Two changes of a directory may leave the same mtime behind: a young one proves nothing."""
    run = foreign_run(metaflow_dir, "1")
    task = foreign_task(run, "start", "1")
    node = store.find_task("F", "1", "start", "1")

    def look() -> list[int]:
        runs, tasks = asyncio.run(store.runs(store.flow("F"))), asyncio.run(store.tasks(node.step))
        steps, rows = store.steps(node.run), asyncio.run(store.metadata(node))
        return [len(runs), len(tasks), len(steps), len(rows), len(store.facts(node).attempts)]

    tried = 0
    for number in range(40):
        folders = (run.parent, run, run / "start", task / "_meta")
        now = time.time_ns()
        for folder in folders:
            os.utime(folder, ns=(now, now))
        before = look()
        in_time = time.time_ns() - now < 40_000_000  # else the machine was too busy for this turn
        foreign_run(metaflow_dir, f"r{number}")
        foreign_task(run, "start", f"t{number}")
        foreign_task(run, f"s{number}", "1")
        record = {"field_name": "attempt", "value": str(number), "ts_epoch": 1, "tags": []}
        write_record(task / f"_meta/sysmeta_attempt_{number}.json", record)
        if in_time:
            tried += 1
            for folder in folders:
                os.utime(folder, ns=(now, now))
            assert look() == [count + 1 for count in before]
    if not tried:
        pytest.skip("this machine is too busy to do two things within 40 ms")


@pytest.mark.core
def test_a_run_rewritten_by_local_mode_is_read_again(
    store: mflocal.Store, metaflow_dir: Path
) -> None:
    run = foreign_run(metaflow_dir, "1")
    for number in range(50):
        foreign_run(metaflow_dir, "1", tags=[f"t{number % 10}"])  # the same size each time
        assert store.run("F", "1").self_record["tags"] == [f"t{number % 10}"]
    shutil.rmtree(run)
    assert store.run("F", "1") is None
    assert asyncio.run(store.runs(store.flow("F"))) == []


def test_tags_given_by_local_mode_are_in_every_answer(service: Client) -> None:
    """Lists too show what another process wrote a moment ago."""
    metaflow_dir = service.root / ".metaflow"
    run = foreign_run(metaflow_dir, "1", system_tags=["user:u"])
    foreign_task(run, "start", "1")
    paths = [
        "/flows/F/runs/1/steps",
        "/flows/F/runs/1/steps/start/tasks",
        "/flows/F/runs",
        "/flows/F/runs?_tags=b",
    ]
    for path in paths[:3]:
        assert service.get(path)[0]["tags"] == []
    foreign_run(metaflow_dir, "1", tags=["b"], system_tags=["user:u"])
    for path in paths:
        assert [row["tags"] for row in service.get(path)] == [["b"]], path
    foreign_run(metaflow_dir, "1", tags=["c"], system_tags=["user:u"])
    for path in reversed(paths):
        assert [row["tags"] for row in service.get(path)] == (
            [] if path.endswith("=b") else [["c"]]
        ), path


def test_a_flow_that_is_deleted_and_made_again_is_served_afresh(service: Client) -> None:
    run, task = api_task(service)
    service.post(f"{task}/metadata", [{"field_name": "a", "value": "old"}])
    shutil.rmtree(service.root / ".metaflow/F")
    for path in ("/flows/F", run, task):
        assert service("GET", path).status == 404
    assert service.get("/flows") == [] and service.get(f"{task}/metadata") == []
    assert service("POST", f"{task}/metadata", [{"field_name": "a", "value": "v"}]).status == 400
    run, task = api_task(service)
    assert service.get(f"{task}/metadata") == [] and [
        f["flow_id"] for f in service.get("/flows")
    ] == ["F"]


@pytest.mark.core
def test_a_file_that_is_not_whole_yet_waits(store: mflocal.Store, metaflow_dir: Path) -> None:
    task = foreign_task(foreign_run(metaflow_dir, "1"), "start", "1")
    whole = json.dumps(
        {"field_name": "attempt", "value": "0", "type": "t", "ts_epoch": 7, "tags": []}
    )
    path = task / "_meta/sysmeta_attempt_7.json"
    node = store.find_task("F", "1", "start", "1")
    for text in ("", "{", whole[:-1], "[]", "null", "\xff"):
        path.write_text(text, encoding="latin-1")
        assert asyncio.run(store.metadata(node)) == [] and store.facts(node).attempts == {}
    path.write_text(whole)
    time.sleep(0.1)
    assert [row["value"] for row in asyncio.run(store.metadata(node))] == ["0"]
    assert list(store.facts(node).attempts) == [0]
    (task / "_meta/_self.json").write_text('{"task_id":')
    assert store.find_task("F", "1", "start", "1") is None
    write_record(task / "_meta/_self.json", {"task_id": "1", "ts_epoch": 1000})
    assert store.find_task("F", "1", "start", "1") is not None


def test_a_file_completed_in_place_is_read_when_it_is_whole(
    store: mflocal.Store, metaflow_dir: Path
) -> None:
    """rsync --inplace and the like: the directory's mtime tells only of the beginning."""
    task = foreign_task(foreign_run(metaflow_dir, "1"), "start", "1")
    path = task / "_meta/sysmeta_attempt_7.json"
    node = store.find_task("F", "1", "start", "1")
    path.write_text('{"field_name": "attempt"')
    time.sleep(0.12)
    assert asyncio.run(store.metadata(node)) == [] and store.facts(node).attempts == {}
    with open(path, "a") as file:
        file.write(', "value": "0", "ts_epoch": 7, "tags": []}')
    assert len(asyncio.run(store.metadata(node))) == 1
    assert list(store.facts(node).attempts) == [0]


def test_listeners_hear_of_what_local_mode_made(store: mflocal.Store, metaflow_dir: Path) -> None:
    foreign_run(metaflow_dir, "1")
    heard: list[tuple[str, str]] = []
    store.listeners.append(
        lambda event: heard.append((event.kind, event.run.id if event.run else event.flow.name))
    )
    asyncio.run(store.runs(store.flow("F")))
    asyncio.run(store.flows())
    assert heard == []
    foreign_run(metaflow_dir, "2")
    foreign_run(metaflow_dir, "1", flow="G")
    asyncio.run(store.refresh())
    assert ("run", "2") in heard and ("flow", "G") in heard
    foreign_run(metaflow_dir, "1", tags=["x"])
    store.run("F", "1")
    assert heard.count(("tags", "1")) == 1


# -- what does not belong there


@pytest.mark.core
@pytest.mark.parametrize("level", ["flow", "run", "step", "task"])
@pytest.mark.parametrize("what", ["directory", "_meta", "_self.json"])
def test_links_out_of_the_tree_are_not_followed(
    store: mflocal.Store, tmp_path: Path, level: str, what: str
) -> None:
    """A checkout may have shipped them; what they point to lies outside of .metaflow."""
    outside = foreign_task(foreign_run(tmp_path / "elsewhere", "1"), "start", "1")
    inside = foreign_task(foreign_run(tmp_path / ".metaflow", "1"), "start", "1")
    up = {"flow": 2, "run": 1, "step": 0, "task": -1}[level]
    node, target = (path if up < 0 else path.parents[up] for path in (inside, outside))
    tail = {"directory": "", "_meta": "_meta", "_self.json": "_meta/_self.json"}[what]
    link, target = node / tail, target / tail
    shutil.rmtree(link) if link.is_dir() else link.unlink()
    link.symlink_to(target)
    assert store.find_task("F", "1", "start", "1") is None or (
        level == "flow" and what != "directory"
    )
    flows = asyncio.run(store.flows())
    seen = [[flow.name for flow in flows]]
    for flow in flows:
        for run in asyncio.run(store.runs(flow)):
            seen.append([run.id])
            for step in store.steps(run):
                seen.append([step.name])
                for task in asyncio.run(store.tasks(step)):
                    seen.append([task.id])
    depth = ["flow", "run", "step", "task"].index(level)
    assert seen == [["F"], ["1"], ["start"], ["1"]][:depth] or (depth == 0 and seen == [[]])


@pytest.mark.core
def test_links_and_pipes_among_the_records_are_not_read(
    store: mflocal.Store, metaflow_dir: Path
) -> None:
    task = foreign_task(foreign_run(metaflow_dir, "1"), "start", "1")
    secret = metaflow_dir.parent / "secret.json"
    secret.write_text(
        json.dumps({"field_name": "x", "value": "secret", "ts_epoch": 1, "name": "x"})
    )
    (task / "_meta/sysmeta_attempt_1.json").symlink_to(secret)
    (task / "_meta/0_artifact_x.json").symlink_to(secret)
    (task / "_meta/0_artifact__task_ok.json").symlink_to("/dev/zero")
    (task / "_meta/_mflocal.json").symlink_to(secret)
    os.mkfifo(task / "_meta/sysmeta_attempt_2.json")
    os.mkfifo(task / "_meta/1_artifact_x.json")
    (task / "_meta/sysmeta_attempt_3.json").mkdir()
    node = store.find_task("F", "1", "start", "1")
    assert asyncio.run(store.metadata(node)) == [] and asyncio.run(store.artifacts(node)) == []
    assert store.facts(node).attempts == {}
    store.beat(node, 5)
    store.flush_signs()
    assert "secret" in secret.read_text()
    own = metaflow_dir / "F/2/_meta"
    own.mkdir(parents=True)
    os.mkfifo(own / "_self.json")
    assert store.run("F", "2") is None
    assert [run.id for run in asyncio.run(store.runs(store.flow("F")))] == ["1"]


def test_a_pipe_in_the_place_of_signs_holds_up_nobody(service: Client) -> None:
    """A FIFO named `_mflocal.json`: opening it for writing would wait for a reader for ever."""
    client = KeptConnection(service.url)
    client.post("/flows/F", {})
    run = f"/flows/F/runs/{client.post('/flows/F/run', BODY)['run_number']}"
    client.post(f"{run}/steps/start/step", BODY)
    task = f"{run}/steps/start/tasks/{client.post(f'{run}/steps/start/task', BODY)['task_id']}"
    client.post(f"{task}/metadata", [{"field_name": "attempt", "value": "0"}])
    for folder in (f"{run[14:]}", f"{run[14:]}/start/1"):
        signs = service.root / ".metaflow/F" / folder / "_meta/_mflocal.json"
        signs.unlink(missing_ok=True)
        os.mkfifo(signs)
    client.socket.close()  # the attempt's process is gone, and that goes to disk at once
    wait_for(lambda: service.get("/flows/F/runs?status=failed"))
    assert service("POST", f"{task}/heartbeat", {}).status == 200


def test_a_regular_file_or_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("12345")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "pipe")
    read = mflocal.read_regular
    assert read(str(tmp_path / "file"), 5) == b"12345"
    assert read(str(tmp_path / "link"), 5, follow=True) == b"12345"
    for name, text in (
        ("link", "symbolic link"),
        ("pipe", "not a regular file"),
        ("dir", "not a regular file"),
        ("none", "No such file"),
    ):
        with pytest.raises(OSError, match=text):
            read(str(tmp_path / name), 5)
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read(str(tmp_path / "file"), 4)
    for flags in (os.O_WRONLY, os.O_RDWR):
        with pytest.raises(OSError):
            os.close(mflocal.open_regular(str(tmp_path / "pipe"), flags))


@pytest.mark.core
def test_siblings_that_are_no_objects_are_skipped(store: mflocal.Store, metaflow_dir: Path) -> None:
    run = foreign_run(metaflow_dir, "1")
    foreign_task(run, "start", "1")
    for name in (
        "mf.cards/F",
        "F/data/ab",
        "F/.tmp",
        "data",
        "F/1/x-y",
        "F/1/start/a b",
        "F/empty/_meta",
    ):
        (metaflow_dir / name).mkdir(parents=True)
    (metaflow_dir / "F/latest_run").write_text("1")
    (metaflow_dir / "config.json").write_text("{}")
    (metaflow_dir / "F/1/start/1/0.task_stdout.log").write_text("x")
    assert [flow.name for flow in asyncio.run(store.flows())] == ["F"]
    assert [run.id for run in asyncio.run(store.runs(store.flow("F")))] == ["1"]
    assert [task.pathspec for task in asyncio.run(store.run_tasks(store.run("F", "1")))] == [
        "F/1/start/1"
    ]
    for name in ("data", ".mflocal", "mf.cards", "..", "F/1", "F\0"):
        assert store.flow(name) is None


BAD_RECORDS = [
    {"ts_epoch": "yesterday"}, {"ts_epoch": None}, {"ts_epoch": [1]}, {"ts_epoch": 1.5}, {"tags": "x"}, {"tags": 5},
    {"system_tags": 5}, {"system_tags": [{}], "user_name": "u"}, {"tags": [["a"]]}, {"user_name": {"a": 1}},
]  # fmt: skip


def test_a_spoilt_record_spoils_nothing_else(service: Client) -> None:
    """One odd `_self.json` must not take the lists of all others with it."""
    metaflow_dir = service.root / ".metaflow"
    good = foreign_task(foreign_run(metaflow_dir, "good"), "start", "1")
    for number, bad in enumerate(BAD_RECORDS):
        run = foreign_run(metaflow_dir, f"bad{number}", **bad)
        foreign_task(run, "start", "1", **bad)
        foreign_task(good.parents[1], "start", f"bad{number}", **bad)
    foreign_run(metaflow_dir, "1", flow="G")
    write_record(metaflow_dir / "G/_meta/_self.json", {"flow_id": 5, "ts_epoch": "x", "tags": 7})
    wrong = {}
    for path in ("/flows", "/flows/F/runs", "/flows/F/runs?status=failed,running", "/flows/F/runs?_tags=x",
                 "/flows/F/runs?_limit=3", "/flows/F/runs/good/steps/start/tasks", "/flows/F/runs/good/metadata",
                 "/flows/F/runs/good/steps/start/tasks?_limit=3", "/flows/G", "/flows/F/runs?user=u"):  # fmt: skip
        answer = service("GET", path)
        if answer.status != 200 or (
            path.count("?") == 0 and path.endswith("runs") and len(answer.body) < 2
        ):
            wrong[path] = answer.status
    for number in range(len(BAD_RECORDS)):
        for path in (
            f"/flows/F/runs/bad{number}",
            f"/flows/F/runs/bad{number}/steps/start/tasks/1",
        ):
            if service("GET", path).status >= 500:
                wrong[path] = BAD_RECORDS[number]
    assert wrong == {}


# -- temp files, modes, disks that refuse


def test_temp_files_of_a_killed_daemon_are_swept(
    make_service: Callable[..., Client], tmp_path: Path
) -> None:
    temp = tmp_path / ".metaflow/.mflocal/tmp"
    temp.mkdir(parents=True)
    os.chmod(temp.parent, 0o700)
    for name in ("0", "17", "x.json"):
        (temp / name).write_text("half")
    service = make_service(tmp_path)
    assert children(temp) == []
    service.post("/flows/F", {})
    assert children(temp) == []
    assert children(tmp_path / ".metaflow/F/_meta") == ["_self.json"]


def test_the_sweep_deletes_nothing_behind_a_link(
    make_service: Callable[..., Client], tmp_path: Path
) -> None:
    """A hostile checkout ships .metaflow/.mflocal/tmp as a link to somebody's files."""
    victim = tmp_path / "documents"
    victim.mkdir()
    (victim / "thesis").write_text("precious")
    (tmp_path / ".metaflow/.mflocal").mkdir(parents=True)
    os.chmod(tmp_path / ".metaflow/.mflocal", 0o700)
    (tmp_path / ".metaflow/.mflocal/tmp").symlink_to(victim)
    try:
        make_service(tmp_path)
    except AssertionError:
        pass  # refusing to start is fine too
    assert (victim / "thesis").read_text() == "precious"


def test_something_odd_among_the_temp_files_stops_nothing(
    make_service: Callable[..., Client], tmp_path: Path
) -> None:
    temp = tmp_path / ".metaflow/.mflocal/tmp"
    (temp / "0/deep").mkdir(parents=True)
    os.mkfifo(temp / "1")
    (temp / "2").symlink_to("/etc/hostname")
    os.chmod(temp.parent, 0o700)
    service = make_service(tmp_path)
    for number in range(4):
        assert service.post(f"/flows/F{number}", {})["flow_id"] == f"F{number}"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_follow_the_umask_but_never_for_our_own(
    make_service: Callable[..., Client], umask: int
) -> None:
    old = os.umask(umask)
    try:
        service = make_service()
    finally:
        os.umask(old)
    run, task = api_task(service)
    service.post(f"{task}/metadata", [{"field_name": "a", "value": "v"}])
    metaflow_dir = service.root / ".metaflow"
    assert {stat.S_IMODE(p.stat().st_mode) for p in (metaflow_dir / "F").rglob("*.json")} == {
        0o666 & ~umask
    }
    folders = [p for p in (metaflow_dir / "F").rglob("*") if p.is_dir()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in folders} == {0o777 & ~umask}
    own = metaflow_dir / ".mflocal"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) & 0o077 for p in own.rglob("*")} == {0}
    assert children(own / "tmp") == []


FULL_DISK = """
import asyncio, json, os, sys; sys.path.insert(0, sys.argv[1])
import mflocal
root = sys.argv[2]
if len(sys.argv) > 3:
    os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[3]))
store = mflocal.Store(root, root + "/.mflocal/tmp")
told = []
def attempt(act):
    try:
        told.append(str(act()))
    except mflocal.Problem as problem:
        told.append([problem.status, problem.id, problem.detail])
run = store.run("F", "1"); step = store.step(run, "start"); task = store.task(step, "1")
rows = [{"field_name": "f%d" % i, "value": "v" * 5000, "tags": []} for i in range(200)]
attempt(lambda: asyncio.run(store.add_metadata(task, rows)))
art = [{"name": "a%d" % i, "location": "v" * 5000, "attempt_id": 0} for i in range(200)]
attempt(lambda: asyncio.run(store.add_artifacts(task, art)))
attempt(lambda: store.replace_tags(run, ["t" * 100] * 10000))
attempt(lambda: store.create_task(step, {"tags": ["x" * 1000000]}).id)
attempt(lambda: store.create_run(store.flow("F"), {"tags": ["x" * 1000000]}).id)
attempt(lambda: store.create_flow("G", {"tags": ["x" * 1000000]}).name)
store.beat(task, 5); store.flush_signs()
print(json.dumps(told))
"""


def refused(metaflow_dir: Path, *uid: str) -> list[Any]:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(REPO), str(metaflow_dir), *uid],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    if uid and "mflocal" in done.stderr and done.returncode:
        pytest.skip("another user cannot read this checkout")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_a_full_disk_is_told_and_leaves_nothing_behind() -> None:
    disk = Path(tempfile.mkdtemp(prefix="mflocal-full-"))
    mount = shutil.which("mount")
    done = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if not done or done.returncode:
        disk.rmdir()
        pytest.skip("no small file system can be mounted here")
    try:
        (disk / ".metaflow/.mflocal/tmp").mkdir(parents=True)
        foreign_task(foreign_run(disk / ".metaflow", "1"), "start", "1")
        before = parts_of(disk / ".metaflow")
        told = refused(disk / ".metaflow")
        assert [answer[:2] for answer in told] == [[507, "no-space"]] * 6
        assert all("No space left" in answer[2] for answer in told)
        assert children(disk / ".metaflow/.mflocal/tmp") == []
        assert parts_of(disk / ".metaflow") == before
        assert json.loads((disk / ".metaflow/F/1/_meta/_self.json").read_text())["tags"] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        disk.rmdir()


def test_a_directory_that_refuses_is_told() -> None:
    root = Path(tempfile.mkdtemp(prefix="mflocal-eacces-"))
    try:
        foreign_task(foreign_run(root / ".metaflow", "1"), "start", "1")
        (root / ".metaflow/.mflocal/tmp").mkdir(parents=True)
        subprocess.run(["chmod", "-R", "a+rX", str(root)], check=True)
        uid = ()
        if os.geteuid() == 0:
            uid = ("65534",)
            os.chown(root / ".metaflow/.mflocal/tmp", 65534, 65534)
        else:
            subprocess.run(["chmod", "-R", "a-w", str(root / ".metaflow/F")], check=True)
            os.chmod(root / ".metaflow", 0o555)
        before = parts_of(root / ".metaflow")
        told = refused(root / ".metaflow", *uid)
        assert [answer[:2] for answer in told] == [[500, "disk-error"]] * 6
        assert all(
            "Permission denied" in answer[2] and ".metaflow/" in answer[2] for answer in told
        )
        assert (
            parts_of(root / ".metaflow") == before
            and children(root / ".metaflow/.mflocal/tmp") == []
        )
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(root)], check=False)
        shutil.rmtree(root)


def test_a_deleted_tree_is_not_made_again(store: mflocal.Store, metaflow_dir: Path) -> None:
    task = a_task(store)
    flow = store.flow("F")
    shutil.rmtree(metaflow_dir)
    for act in (lambda: store.create_flow("G", {}), lambda: store.create_run(flow, {}),
                lambda: store.create_task(task.step, {}), lambda: store.replace_tags(task.run, ["x"])):  # fmt: skip
        with pytest.raises(mflocal.Problem):
            act()
    store.beat(task, 5)
    store.flush_signs()
    assert not metaflow_dir.exists()


# -- signs of life


def api_task(service: Client) -> tuple[str, str]:
    """Paths of a new run of flow F and of a task in it."""
    service("POST", "/flows/F", {})
    run = f"/flows/F/runs/{service.post('/flows/F/run', BODY)['run_number']}"
    service.post(f"{run}/steps/start/step", BODY)
    return (
        run,
        f"{run}/steps/start/tasks/{service.post(f'{run}/steps/start/task', BODY)['task_id']}",
    )


@pytest.mark.core
def test_signs_of_life_are_read_back(store: mflocal.Store, metaflow_dir: Path) -> None:
    task, now = a_task(store), int(time.time()) + 100
    before = os.stat(meta_of(task)).st_mtime_ns
    store.beat(task, now)
    store.mark_lost(task, 2, now * 1000)
    store.set_lease(task.run, "lease-1")
    store.flush_signs()
    again = open_store(metaflow_dir)
    node = again.find_task("F", task.run.id, "start", task.id)
    assert again.signs(node).heartbeat == now
    assert again.signs(node).lost == {2: now * 1000}
    assert again.facts(node).attempts[2].lost_at == now * 1000
    assert again.signs(node.run).lease == "lease-1"
    again.mark_lost(node, 2, None)
    assert open_store(metaflow_dir).signs(node).lost == {}
    assert again.facts(node).attempts[2].lost_at is None
    after = os.stat(meta_of(task)).st_mtime_ns
    for at in range(5):
        again.beat(node, now + at)
        again.flush_signs()
    assert os.stat(meta_of(task)).st_mtime_ns == after >= before, (
        "beating must not look like a change"
    )
    third = open_store(metaflow_dir)
    assert third.signs(third.find_task("F", task.run.id, "start", task.id)).heartbeat == now + 4


def test_a_shorter_sign_leaves_nothing_of_a_longer_one(
    store: mflocal.Store, metaflow_dir: Path
) -> None:
    task = a_task(store)
    for attempt in range(40):
        store.mark_lost(task, attempt, 1_790_000_000_000 + attempt)
    for attempt in range(39):
        store.mark_lost(task, attempt, None)
    store.flush_signs()
    again = open_store(metaflow_dir)
    assert again.signs(again.find_task("F", task.run.id, "start", task.id)).lost == {
        39: 1_790_000_000_039
    }


def test_heartbeats_survive_kill_9(make_service: Callable[..., Client]) -> None:
    service = make_service()
    run, task = api_task(service)
    time.sleep(1.1)
    for path in (run, task):
        assert service.post(f"{path}/heartbeat", {})
    beats = [service.get(path)["last_heartbeat_ts"] for path in (run, task)]
    time.sleep(5.5)  # within one interval of heartbeats
    os.kill(service.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    wait_gone(service.pid)  # type: ignore[attr-defined]
    again = make_service(service.root)
    assert [again.get(path)["last_heartbeat_ts"] for path in (run, task)] == beats
    statuses = again.get("/flows/F/runs?status=running,failed,completed")
    assert [row["status"] for row in statuses] == ["running"]


def wait_gone(pid: int) -> None:
    """Until a child process of ours has ended (it may stay a zombie)."""
    for _ in range(500):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.01)
    raise AssertionError("it lives on")


class KeptConnection:
    """A client that holds one connection, as Metaflow's does."""

    def __init__(self, url: str) -> None:
        self.port = int(url.rpartition(":")[2])
        self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def post(self, path: str, body: Any) -> Any:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Length: {len(data)}\r\n\r\n"
        self.socket.sendall(head.encode() + data)
        got = b""
        while b"\r\n\r\n" not in got:
            got += self.socket.recv(65536)
        head, _, rest = got.partition(b"\r\n\r\n")  # type: ignore[assignment]
        length = int(re.search(rb"content-length: *(\d+)", head.lower())[1])  # type: ignore
        while len(rest) < length:
            rest += self.socket.recv(65536)
        assert b" 200 " in head.split(b"\r\n")[0], (head, rest)
        return json.loads(rest)


def test_a_lost_process_stays_lost_over_kill_9(make_service: Callable[..., Client]) -> None:
    service = make_service()
    service.post("/flows/F", {})
    client = KeptConnection(service.url)
    run = f"/flows/F/runs/{client.post('/flows/F/run', BODY)['run_number']}"
    client.post(f"{run}/steps/start/step", BODY)
    task = f"{run}/steps/start/tasks/{client.post(f'{run}/steps/start/task', BODY)['task_id']}"
    client.post(
        f"{task}/metadata", [{"field_name": "attempt", "value": "0", "tags": ["attempt_id:0"]}]
    )
    assert [row["status"] for row in service.get("/flows/F/runs?status=running")] == ["running"]
    client.socket.close()
    until = time.monotonic() + 60
    while not service.get("/flows/F/runs?status=failed") and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(service.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    wait_gone(service.pid)  # type: ignore[attr-defined]
    again = make_service(service.root)
    assert [row["status"] for row in again.get("/flows/F/runs?status=failed")] == ["failed"]
    assert again.get("/flows/F/runs?status=running") == []


# -- beside the real LocalMetadataProvider


DRIVE = """
kind = sys.argv[1]
provider = {"local": LocalMetadataProvider, "service": ServiceMetadataProvider}[kind]
flow = type("Flow", (), {"name": "DiffFlow"})()
p = provider(MetaflowEnvironment(None), flow, None, None)
p.add_sticky_tags(tags=["sticky"], sys_tags=["made:by-test"])
run = p.new_run_id(tags=["t1", "größe"], sys_tags=["extra:1"])
p.new_task_id(run, "_parameters")
for step in ("start", "middle"):
    task = p.new_task_id(run, step, tags=["own"])
    p.register_metadata(run, step, task, [
        MetaDatum(field="attempt", value="0", type="attempt", tags=["attempt_id:0"]),
        MetaDatum(field="field with space", value="größe \\n\\t", type="type", tags=[]),
        MetaDatum(field="foreach-stack", value=["a=1", "b=2 c"], type="foreach-stack", tags=["attempt_id:0"]),
        MetaDatum(field="attempt_ok", value="True", type="internal_attempt_status", tags=["attempt_id:0"]),
    ])
    for attempt in (0, 1):
        p.register_data_artifacts(run, step, task, attempt, [
            DataArtifact(name=name, ds_type="local", ds_root="/x/.metaflow", url=None, type="gzip+pickle-v4", sha="ab" * 20)
            for name in ("x", "_task_ok", "col a-b", "größe", "*")])
    p.register_metadata(run, step, task, [MetaDatum(field="attempt-done", value="1", type="attempt-done", tags=["attempt_id:1"])])
for _ in range(2):
    p.register_run_id("argo-x", tags=["a"])
    p.register_task_id("argo-x", "start", "t-one", 0)
provider.mutate_user_tags_for_run("DiffFlow", run, tags_to_add=["new", "user:tester"], tags_to_remove=["t1"])
print(json.dumps({"run": run}))
"""


def normal_tree(metaflow_dir: Path, run: str) -> dict[str, Any]:
    """Every record below a .metaflow by its place; numbers of runs and tasks, times and orders made alike."""
    numbers = sorted(
        int(p.name) for p in (metaflow_dir / "DiffFlow" / run).glob("*/*") if p.name.isdigit()
    )
    ranks = {str(number): f"<task {rank}>" for rank, number in enumerate(numbers)}
    tree: dict[str, Any] = {}
    for path in sorted((metaflow_dir / "DiffFlow").rglob("*.json")):
        if path.name == "_mflocal.json":
            continue
        parts = list(path.relative_to(metaflow_dir).parts)
        parts[1:4] = ["<run>" if part == run else ranks.get(part, part) for part in parts[1:4]]
        field = re.fullmatch(r"(sysmeta_.+)_(\d{13})\.json", parts[-1])
        record = json.loads(path.read_text())
        assert abs(record.pop("ts_epoch") - time.time() * 1000) < 120_000
        if field:
            parts[-1] = field[1]
        for key in ("run_number", "task_id"):
            if key in record:
                assert isinstance(record[key], str)
                record[key] = "<run>" if record[key] == run else ranks.get(record[key], record[key])
        for key in ("tags", "system_tags"):
            if key in record:
                record[key] = sorted(record[key])
        tree.setdefault("/".join(parts), []).append(record)
    return tree


@pytest.mark.core
def test_the_real_client_over_http_writes_what_local_mode_writes(
    make_service: Callable[..., Client], tmp_path: Path
) -> None:
    """The same calls to Metaflow's two providers leave the same files with the same keys and values."""
    service = make_service(METAFLOW_DATASTORE_SYSROOT_LOCAL="/x")
    (tmp_path / ".metaflow").mkdir()
    local = script(DRIVE, tmp_path, None, "local")
    http = script(DRIVE, service.root, service.url, "service")
    theirs = normal_tree(tmp_path / ".metaflow", local["run"])
    ours = normal_tree(service.root / ".metaflow", str(http["run"]))
    assert set(ours) == set(theirs)
    for place in theirs:
        for record in theirs[place]:
            assert record in ours[place], place
        for record in ours[place]:
            assert record in theirs[place], place


READ = """
get = LocalMetadataProvider.get_object
flow, run = sys.argv[1:3]
told = {"flow": get("flow", "self", {}, None, flow), "run": get("run", "self", {}, None, flow, run), "tasks": {}}
told["runs"] = get("flow", "run", {}, None, flow)
told["steps"] = get("run", "step", {}, None, flow, run)
for step in told["steps"]:
    for task in get("step", "task", {}, None, flow, run, step["step_name"]):
        path = (flow, run, step["step_name"], task["task_id"])
        told["tasks"]["/".join(path[2:])] = {
            "self": get("task", "self", {}, None, *path), "metadata": get("task", "metadata", {}, None, *path),
            "artifacts": [get("task", "artifact", {}, attempt, *path) for attempt in (0, 1)],
            "latest": get("task", "artifact", {}, None, *path)}
print(json.dumps(told))
"""


def alike(served: Any, read: Any) -> bool:
    """Whether a served row holds what local mode reads: ids as text, lists of tags in any order."""
    for key, value in read.items():
        got = served[key]
        if key in ("run_number", "task_id"):
            got, value = str(got), str(value)
        elif key in ("tags", "system_tags"):
            got, value = sorted(got), sorted(value)
        elif key == "value":
            value = mflocal.value_text(value)
        if got != value:
            return False
    return True


def many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@pytest.mark.core
@pytest.mark.parametrize("made", ["local", "http"])
def test_a_real_run_is_served_as_local_mode_reads_it(
    ran: dict[str, Any], make_service: Any, made: str
) -> None:
    """Whoever wrote it: local mode's get_object and our answers agree on every record of the run."""
    service, run = make_service(ran["root"]), ran[made]
    read = script(READ, ran["root"], None, "MetaFlow", run)
    base = f"/flows/MetaFlow/runs/{run}"
    assert alike(service.get("/flows/MetaFlow"), read["flow"])
    assert alike(service.get(base), read["run"])
    assert {str(row["run_number"]) for row in service.get("/flows/MetaFlow/runs")} == {
        ran["local"],
        ran["http"],
    }
    assert {row["run_number"] for row in read["runs"]} == {ran["local"], ran["http"]}
    steps = {row["step_name"]: row for row in service.get(f"{base}/steps")}
    assert (
        set(steps)
        == {"_parameters", "start", "body", "join", "end"}
        == {row["step_name"] for row in read["steps"]}
    )
    assert all(alike(steps[row["step_name"]], row) for row in read["steps"])
    seen = set()
    for step in steps:
        for row in service.get(f"{base}/steps/{step}/tasks"):
            task = f"{step}/{row['task_id']}"
            seen.add(task)
            theirs, path = read["tasks"][task], f"{base}/steps/{step}/tasks/{row['task_id']}"
            assert alike(row, theirs["self"]) and service.get(path) == row
            metadata = service.get(f"{path}/metadata")
            assert len(metadata) == len(theirs["metadata"])
            assert all(
                any(alike(mine, record) for mine in metadata) for record in theirs["metadata"]
            )
            for attempt in (0, 1):
                artifacts = {
                    a["name"]: a for a in service.get(f"{path}/attempt/{attempt}/artifacts")
                }
                assert set(artifacts) == {
                    record["name"] for record in many(theirs["artifacts"][attempt])
                }
                assert all(
                    alike(artifacts[record["name"]], record)
                    for record in many(theirs["artifacts"][attempt])
                )
            latest = {a["name"] for a in service.get(f"{path}/artifacts")}
            assert latest == {record["name"] for record in many(theirs["latest"])}
    assert seen == set(read["tasks"])
    assert sorted(row["id"] for row in service.get(f"{base}/metadata")) == sorted(
        row["id"] for step in steps for task in service.get(f"{base}/steps/{step}/tasks")
        for row in service.get(f"{base}/steps/{step}/tasks/{task['task_id']}/metadata"))  # fmt: skip


def test_both_ways_of_running_leave_the_same_files(ran: dict[str, Any]) -> None:
    """The run over HTTP has the files and keys of the run in local mode, task by task."""
    shapes: list[dict[str, Any]] = []
    for made in ("local", "http"):
        run = ran["root"] / ".metaflow/MetaFlow" / ran[made]
        shape: dict[str, Any] = {}
        for step in ("_parameters", "start", "body", "join", "end"):
            tasks = sorted(
                (p for p in (run / step).iterdir() if p.name != "_meta"), key=lambda p: int(p.name)
            )
            for rank, task in enumerate(tasks):
                for path in (task / "_meta").iterdir():
                    name = re.sub(r"_\d{13}\.json$", "", path.name)
                    shape[f"{step}/{rank}/{name}"] = (
                        frozenset(json.loads(path.read_text())) if name != "_mflocal.json" else None
                    )
        shapes.append({k: v for k, v in shape.items() if v is not None})
    assert shapes[0] == shapes[1]


@pytest.mark.core
def test_local_mode_writes_beside_us_and_is_seen(service: Client) -> None:
    """A real provider in a process of its own creates, reports and tags while we serve the same root."""
    service.get("/flows")
    told = script(DRIVE, service.root, None, "local")
    base = f"/flows/DiffFlow/runs/{told['run']}"
    assert sorted(service.get(base)["tags"]) == ["größe", "new", "sticky"]
    assert {row["run_number"] for row in service.get("/flows/DiffFlow/runs")} == {
        int(told["run"]),
        "argo-x",
    }
    rows = service.get(f"{base}/steps/start/tasks/1/metadata")
    assert {"attempt", "attempt_ok", "attempt-done", "foreach-stack", "runtime"} <= {
        row["field_name"] for row in rows
    }
    assert [row["value"] for row in rows if row["field_name"] == "foreach-stack"] == [
        '{a=1,"b=2 c"}'
    ]
    assert len(service.get(f"{base}/steps/start/tasks/1/artifacts")) == 5
    again = script(DRIVE, service.root, None, "local")
    assert len(service.get("/flows/DiffFlow/runs")) == 3
    tag = f"/flows/DiffFlow/runs/{again['run']}/tag/mutate"
    before = service.get(f"/flows/DiffFlow/runs/{again['run']}")
    assert service("PATCH", tag, {"tags_to_add": ["ours"]}).status == 200
    code = """
got = LocalMetadataProvider.mutate_user_tags_for_run("DiffFlow", sys.argv[1], tags_to_add=["theirs"], tags_to_remove=["new"])
print(json.dumps(sorted(got)))
"""
    assert script(code, service.root, None, again["run"]) == ["größe", "ours", "sticky", "theirs"]
    after = service.get(f"/flows/DiffFlow/runs/{again['run']}")
    assert sorted(after["tags"]) == ["größe", "ours", "sticky", "theirs"]
    assert sorted(after["system_tags"]) == sorted(before["system_tags"])


def test_a_moment_without_descriptors_loses_no_flow(
    store: mflocal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EMFILE for one look at `.metaflow`: what was known stays, and the next look is a whole one."""
    store.create_flow("F", {})
    os.utime(store.root, ns=(1, 1))  # so that its time is not of this moment

    def names() -> list[str]:
        return [flow.name for flow in asyncio.run(store.flows())]

    assert names() == ["F"]
    os.mkdir(f"{store.root}/G")
    os.makedirs(f"{store.root}/G/_meta")
    Path(store.root, "G/_meta/_self.json").write_text('{"flow_id": "G", "ts_epoch": 1}')
    os.utime(store.root, ns=(2, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    loop = asyncio.new_event_loop()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        found = [flow.name for flow in loop.run_until_complete(store.flows())]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        loop.close()
    assert found == ["F"] and highest > 2
    assert sorted(names()) == ["F", "G"]


def test_tasks_nobody_asked_for_are_forgotten(store: mflocal.Store) -> None:
    """Only in memory: lists, ids and events are as if they had been there all the time."""
    heard: list[tuple[str, str]] = []
    flow = store.create_flow("F", {})
    assert flow is not None
    runs = []
    for _ in range(4):
        run = store.create_run(flow, {})
        assert run is not None
        runs.append(run)
        for name in ("start", "end"):
            step = store.create_step(run, name, {})
            assert step is not None
            for _ in range(3):
                assert store.create_task(step, {}) is not None
        time.sleep(0.002)

    def listed() -> list[list[str]]:
        return [[task.path for task in asyncio.run(store.run_tasks(run))] for run in runs]

    before = listed()
    store.flush_signs()
    store.listeners.append(
        lambda event: heard.append((event.kind, event.run.id if event.run else ""))
    )
    assert (
        store.trim(set(), 100, 0) == 0 and store.trim(set(), 12, 60) == 0
    )  # few enough; all just asked for
    assert store.trim({runs[1]}, 12, 0) == 12  # the oldest, but not the one that is held
    assert [bool(run.children) for run in runs] == [False, True, False, True]
    assert listed() == before and heard == []
    store.trim(set(), 0, 0)
    step = store.step(runs[0], "start")
    assert step is not None and (task := store.create_task(step, {})) is not None
    assert task.id == "7" and heard == [("task", runs[0].id)]
    store.flush_signs()
    store.beat(runs[2], int(time.time()) + 5)  # not on disk yet
    for run in (runs[0], runs[2]):
        asyncio.run(store.run_tasks(run))
    assert store.trim(set(), 0, 0) == 7 and runs[2].children
