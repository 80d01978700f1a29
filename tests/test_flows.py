"""Real flows, end to end: Metaflow's own client and command line against the service, and what local mode then reads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Iterator

import pytest
from conftest import FLOWS, REPO, Client, clean_env, mflocal, wait_for
from processes import PYTHON, Started, client_of, daemon_state, flow_env, flow_file

import mflocal as mflocal_module


def flow(
    project: Path, name: str, *words: str, code: int = 0, cwd: Path | None = None, **kwargs: Any
) -> str:
    """Runs a flow of tests/flows under `mflocal run`; what it printed."""
    options = kwargs.pop("options", ())
    path = flow_file(project, name)
    env = flow_env(**kwargs)
    done = mflocal("run", *options, PYTHON, str(path), *words, cwd=cwd or project, env=env)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def plain(project: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python program without mflocal."""
    return subprocess.run(
        [PYTHON, *command], cwd=project, env=flow_env(**env), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=120, check=False,
    )  # fmt: skip


def run_id_of(output: str) -> str:
    """The id that Metaflow printed at its start."""
    found = re.search(r"Workflow starting \(run-id ([^)]+)\)", output)
    assert found, output
    return found[1]


def read(root: Path, pathspec: str) -> dict[str, Any]:
    """The run as the Client describes it: over HTTP and from the files must be the same."""
    url = "http://127.0.0.1:%d" % daemon_state(root)["port"]
    done = subprocess.run(
        [PYTHON, str(FLOWS / "e2e_read.py"), pathspec, url, str(root)],
        cwd=root, env=clean_env(), text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert differences(seen["service"], seen["local"]) == []
    return seen["service"]  # type: ignore[no-any-return]


def differences(ours: Any, local: Any, where: str = "") -> list[str]:
    """Where two descriptions part."""
    if isinstance(ours, dict) and isinstance(local, dict):
        keys = sorted({*ours, *local})
        return [
            line
            for key in keys
            for line in differences(ours.get(key), local.get(key), f"{where}/{key}")
        ]
    return [] if ours == local else [f"{where}: {ours!r}, in local mode {local!r}"]


def only_task(step: dict[str, Any]) -> Any:
    """The description of the only task of a step."""
    (task,) = step.values()
    return task


# -- one run and all that it leaves


@pytest.mark.core
def test_hello_flow_of_the_readme(project: Path) -> None:
    """The README's line: the flow succeeds, over HTTP and in local mode, and `status` shows the daemon."""
    shutil.copytree(REPO / "docs", project / "docs")
    done = mflocal(
        "run", PYTHON, "docs/hello_flow.py", "run", cwd=project, check=True, env=flow_env()
    )
    assert re.match(
        r"mflocal: http://127\.0\.0\.1:\d+, root \S+, started, pid \d+\n", done.stderr
    ), done.stderr
    assert "the sum of the squares is 14" in done.stdout
    seen = read(project, f"HelloFlow/{run_id_of(done.stdout)}")
    assert seen["successful"] and seen["finished"] and seen["data"]["total"] == 14
    assert len(seen["steps"]["square"]) == 3 and seen["latest_successful"] == seen["latest"]
    told = mflocal("status", cwd=project, check=True).stdout
    assert re.search(r"^pid +\d+$", told, re.M) and re.search(r"^active runs +none$", told, re.M)
    row = client_of(project).get("/api/flows/HelloFlow/runs")["data"][0]
    assert row["status"] == "completed"


@pytest.mark.core
def test_linear_flow_and_its_surroundings(project: Path) -> None:
    output = flow(
        project,
        "e2e_linear.py",
        "run",
        "--greeting",
        "good morning",
        "--tag",
        "first",
        "--run-id-file",
        "id.txt",
    )
    run = run_id_of(output)
    assert (project / "id.txt").read_text() == run
    seen = read(project, f"LinearFlow/{run}")
    assert seen["successful"] and seen["runs"] == [run] and seen["user_tags"] == ["first"]
    assert "user:tester" in seen["system_tags"] and seen["end"].startswith(f"LinearFlow/{run}/end/")
    data = seen["data"]
    assert (data["text"], data["length"], data["before"]) == ("good morning world", 18, 18)
    assert data["seen"] == ["end", "middle", "start"] and data["finished_while_running"] is False
    assert "the end of good morning world" in only_task(seen["steps"]["end"])["stdout"]
    env = data["env"]
    url = "http://127.0.0.1:%d" % daemon_state(project)["port"]
    assert env["METAFLOW_SERVICE_INTERNAL_URL"] == url
    assert env["METAFLOW_SERVICE_URL"].startswith(url + "/_lease/")
    assert env["METAFLOW_DEFAULT_METADATA"] == "service" and env["METAFLOW_ENABLED_SIDECAR"] == ""
    assert "METAFLOW_SERVICE_HEADERS" not in env
    assert "127.0.0.1" in env["no_proxy"] and env["NO_PROXY"] == env["no_proxy"]
    assert "METAFLOW_DATASTORE_SYSROOT_LOCAL" not in env and "METAFLOW_SERVICE_AUTH_KEY" not in env


@pytest.mark.core
def test_branch_foreach_retry_and_catch(project: Path) -> None:
    run = run_id_of(flow(project, "e2e_shapes.py", "run", "--max-workers", "3"))
    seen = read(project, f"ShapesFlow/{run}")
    data, steps = seen["data"], seen["steps"]
    assert seen["successful"]
    assert data["sides"] == ["left", "right"] and data["right_attempt"] == 1
    assert data["uppers"] == ["A", None, "C"] and data["caught"] == [False, True, False]
    right = only_task(steps["right"])
    assert right["successful"] and right["attempt"] == 1
    assert sorted(value for name, value, _ in right["metadata"] if name == "attempt") == ["0", "1"]
    assert sorted(task["successful"] for task in steps["each"].values()) == [False, True, True]
    assert all(task["finished"] for task in steps["each"].values())
    rows = client_of(project).get(f"/api/flows/ShapesFlow/runs/{run}/tasks?_limit=100")["data"]
    shown = sorted(
        (r["step_name"], r["attempt_id"], r["status"]) for r in rows if r["step_name"] == "right"
    )
    assert shown == [("right", 0, "failed"), ("right", 1, "completed")]


@pytest.mark.core
def test_a_failing_flow_is_resumed_here_and_in_a_later_job(project: Path, tmp_path: Path) -> None:
    """The later job has nothing but the restored .metaflow, at another place, with the first daemon's files in it."""
    output = flow(project, "e2e_broken.py", "run", code=1)
    assert "not mended yet" in output
    run = run_id_of(output)
    seen = read(project, f"BrokenFlow/{run}")
    assert not seen["successful"] and seen["end"] is None and seen["latest_successful"] is None
    middle = only_task(seen["steps"]["middle"])
    assert not middle["successful"] and "not mended yet" in middle["exception"]
    client = client_of(project)
    assert client.get("/flows/BrokenFlow/runs?status=failed")[0]["run_number"] == int(run)

    later = tmp_path / "later"
    shutil.copytree(project, later)
    for place in (project, later):
        (place / "mended").touch()
        output = flow(place, "e2e_broken.py", "resume")
        again = run_id_of(output)
        assert int(again) > int(run)
        seen = read(place, f"BrokenFlow/{again}")
        assert seen["successful"] and seen["runs"] == [again, run]
        start = only_task(seen["steps"]["start"])
        assert ["origin-run-id", run, "origin-run-id"] in start["metadata"]
        assert "got 43" in only_task(seen["steps"]["end"])["stdout"]
        assert not read(place, f"BrokenFlow/{run}")["successful"]
    assert daemon_state(later)["pid"] != daemon_state(project)["pid"]
    mflocal("stop", "--force", cwd=later, check=True)


@pytest.mark.core
def test_tags_by_command_line_and_client(project: Path) -> None:
    run = run_id_of(
        flow(project, "live_sleep.py", "run", "--seconds", "0", "--tag", "one", NOTES=str(project))
    )
    created = read(project, f"LiveSleep/{run}")["created_at"]
    flow(project, "live_sleep.py", "tag", "add", "--run-id", run, "two", "three")
    flow(project, "live_sleep.py", "tag", "remove", "--run-id", run, "one")
    code = (
        f"from metaflow import Run, namespace; namespace(None); run = Run('LiveSleep/{run}')\n"
        "run.add_tags(['four', 'größe']); run.remove_tag('two'); run.replace_tag('three', 'drei')\n"
        "run.add_tag('four')\n"
        "try:\n    run.remove_tag('user:tester')\nexcept Exception as e:\n    print(type(e).__name__)\n"
        "print(sorted(run.user_tags))"
    )
    done = mflocal("run", "-q", PYTHON, "-c", code, cwd=project, check=True)
    assert (
        done.stdout.splitlines()[-1] == "['drei', 'four', 'größe']"
        and len(done.stdout.splitlines()) == 2
    )
    assert "three" not in flow(project, "live_sleep.py", "tag", "list", "--run-id", run)
    seen = read(project, f"LiveSleep/{run}")
    assert seen["user_tags"] == ["drei", "four", "größe"]
    assert seen["created_at"] == created and "user:tester" in seen["system_tags"]
    assert only_task(seen["steps"]["end"])["tags"] == sorted(
        seen["user_tags"] + seen["system_tags"]
    )


# -- how long the daemon stays, and for whom


def test_fault_2_a_step_longer_than_the_idle_timeout(project: Path) -> None:
    """One daemon serves the run to its end, then leaves in time."""
    output = flow(
        project,
        "live_sleep.py",
        "run",
        "--seconds",
        "7",
        options=("--idle-timeout", "2"),
        NOTES=str(project),
    )
    assert "started it again" not in output and "Done!" in output
    log = (project / ".metaflow/.mflocal/daemon.log").read_text()
    wait_for(lambda: not (project / ".metaflow/.mflocal/daemon.json").exists())
    assert "Traceback" not in log
    mflocal("start", cwd=project, check=True)
    assert read(project, f"LiveSleep/{run_id_of(output)}")["successful"]


@pytest.mark.slow
def test_fault_2_the_same_with_ordinary_heartbeats(project: Path) -> None:
    output = flow(
        project, "live_sleep.py", "run", "--seconds", "25",
        options=("--idle-timeout", "12", "--heartbeats", "sidecar"), NOTES=str(project),
    )  # fmt: skip
    assert "started it again" not in output and "Done!" in output


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two projects side by side."""
    places = tmp_path / "a", tmp_path / "b"
    for place in places:
        place.mkdir()
    yield places
    for place in places:
        mflocal("stop", "--force", "--root", str(place), cwd=place)


@pytest.mark.core
def test_fault_3_two_projects_at_once(two: tuple[Path, Path]) -> None:
    """Each has its own daemon, its own runs and its own artifacts."""
    started = [
        Started(place, PYTHON, flow_file(place, "live_sleep.py").name, "run") for place in two
    ]
    try:
        notes = [run.note("start-0") for run in started]
        assert daemon_state(two[0])["pid"] != daemon_state(two[1])["pid"]
        for (_, _, pathspec), place, other in zip(notes, two, reversed(two)):
            mine = client_of(place).get("/flows/LiveSleep/runs")
            assert [str(row["run_number"]) for row in mine] == [pathspec.split("/")[1]]
            assert (
                client_of(other)("GET", "/flows/" + "/runs/".join(pathspec.split("/")[:2])).status
                == 404
            )
            told = json.loads(mflocal("status", "--json", cwd=place, check=True).stdout)
            assert told["root"] == str(place.resolve())
        for run in started:
            run.say()
        assert [run.wait() for run in started] == [0, 0]
    finally:
        for run in started:
            run.end()
    for (_, _, pathspec), place in zip(notes, two):
        assert len([p for p in (place / ".metaflow/LiveSleep").iterdir() if p.name.isdigit()]) == 1
        assert read(place, "/".join(pathspec.split("/")[:2]))["successful"]


def test_status_and_stop_while_a_flow_runs(project: Path) -> None:
    run = Started(project, PYTHON, flow_file(project, "live_sleep.py").name, "run", name="1")
    try:
        _, _, pathspec = run.note("start-0")
        number = pathspec.split("/")[1]
        told = json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)
        (active,) = told["active_runs"]
        assert (active["flow_id"], str(active["run_number"]), active["how"]) == (
            "LiveSleep",
            number,
            "connection",
        )
        assert told["idle_left"] is None and told["pid"] == daemon_state(project)["pid"]
        assert (
            f"LiveSleep/{number} (connection)" in mflocal("status", cwd=project, check=True).stdout
        )
        refused = mflocal("stop", cwd=project)
        assert refused.returncode == 4 and f"LiveSleep/{number}" in refused.stderr
        run.say()
        assert run.wait() == 0, run.output
    finally:
        run.end()
    assert (
        json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)["active_runs"] == []
    )
    assert mflocal("stop", cwd=project).returncode == 0


# -- which .metaflow


@pytest.mark.core
def test_start_in_a_subdirectory(project: Path) -> None:
    """The nearest .metaflow upward is the one, as in local mode."""
    (project / ".metaflow").mkdir()
    deep = project / "src" / "flows"
    deep.mkdir(parents=True)
    output = flow(project, "e2e_linear.py", "run", cwd=deep)
    assert f"root {project.resolve()}," in output
    assert not (deep / ".metaflow").exists() and not (project / "src/.metaflow").exists()
    assert (project / ".metaflow/LinearFlow" / run_id_of(output) / "end").is_dir()
    assert read(project, f"LinearFlow/{run_id_of(output)}")["successful"]


def test_an_explicit_root_holds_everything(project: Path, tmp_path: Path) -> None:
    """Metadata, artifacts and cards, though the flow runs elsewhere."""
    work = tmp_path / "work"
    work.mkdir()
    output = flow(work, "e2e_linear.py", "run", "--with", "card", options=("--root", str(project)))
    run = run_id_of(output)
    assert not (work / ".metaflow").exists()
    assert read(project, f"LinearFlow/{run}")["successful"]
    assert len(list((project / ".metaflow").rglob("*/tasks/*/cards/*.html"))) == 3
    task = client_of(project).get(f"/api/flows/LinearFlow/runs/{run}/steps/end/tasks")["data"][0][
        "task_id"
    ]
    path = f"/api/flows/LinearFlow/runs/{run}/steps/end/tasks/{task}/cards"
    assert len(client_of(project).get(path)["data"]) == 1


def test_local_mode_and_the_service_share_their_runs(project: Path) -> None:
    """A run of local mode, before and while the daemon runs, is served; each reads the other's."""
    path = flow_file(project, "e2e_linear.py")
    local = [run_id_of(plain(project, path.name, "run").stdout)]
    served = run_id_of(flow(project, "e2e_linear.py", "run"))
    local.append(run_id_of(plain(project, path.name, "run").stdout))
    seen = read(project, f"LinearFlow/{served}")
    assert seen["successful"] and seen["runs"] == [local[1], served, local[0]]
    for run in local:
        assert read(project, f"LinearFlow/{run}")["successful"]
    rows = client_of(project).get("/api/flows/LinearFlow/runs")["data"]
    assert [(str(row["run_number"]), row["status"]) for row in rows] == [
        (run, "completed") for run in (local[1], served, local[0])
    ]
    # Local mode under the wrapper stays local mode.
    inside = run_id_of(flow(project, "e2e_linear.py", "--metadata", "local", "run"))
    assert read(project, f"LinearFlow/{inside}")["successful"]


def test_tags_of_local_mode_do_not_move_a_run_in_time(project: Path) -> None:
    """Local mode writes the moment of the tagging over the moment of the start; we show the true one."""
    script = flow_file(project, "e2e_tagged.py").name
    local = ("--metadata", "local")

    def look() -> tuple[Any, ...]:
        client = client_of(project)
        rows = client.get("/api/runs?_order=-ts_epoch&_limit=10")["data"]
        row = next(row for row in rows if str(row["run_number"]) == tagged)
        tasks = client.get(f"/api/flows/TaggedFlow/runs/{tagged}/tasks?_limit=100")["data"]
        meta = client.get(f"/flows/TaggedFlow/runs/{tagged}")
        assert row["ts_epoch"] == meta["ts_epoch"] <= min(task["ts_epoch"] for task in tasks)
        assert row["ts_epoch"] // 100 <= int(tagged) // 100_000 + 1
        assert row["finished_at"] - row["ts_epoch"] == row["duration"] > 1000
        order = [str(row["run_number"]) for row in rows if row["flow_id"] == "TaggedFlow"]
        pages = client("GET", "/flows/TaggedFlow/runs?_limit=1")
        return (
            row["ts_epoch"],
            row["finished_at"],
            row["duration"],
            order,
            pages.headers["x-next-cursor"],
        )

    tagged = run_id_of(plain(project, script, *local, "run").stdout)
    mflocal("start", cwd=project, check=True)
    later = run_id_of(plain(project, script, *local, "run").stdout)
    before = look()
    assert before[3] == [later, tagged]
    done = plain(project, script, *local, "tag", "add", "--run-id", tagged, "new")
    assert done.returncode == 0, done.stdout
    assert look() == before
    mflocal("restart", cwd=project, check=True)
    assert look() == before
    client_of(project)(
        "PATCH", f"/flows/TaggedFlow/runs/{tagged}/tag/mutate", {"tags_to_add": ["x"]}
    )
    assert look() == before
    tags = client_of(project).get(f"/flows/TaggedFlow/runs/{tagged}")["tags"]
    assert {"from-within", "new", "x"} <= set(tags)


def test_a_key_is_handed_to_the_client(project: Path) -> None:
    key = "a-key-of-some-length"
    output = flow(project, "e2e_linear.py", "run", METAFLOW_LOCAL_SERVICE_AUTH_KEY=key)
    client: Client = client_of(project)
    assert client("GET", "/flows/LinearFlow/runs").status in (401, 403)
    answer = client("GET", "/flows/LinearFlow/runs", headers={"x-api-key": key})
    assert answer.status == 200 and str(answer.body[0]["run_number"]) == run_id_of(output)


def test_outside_the_wrapper_with_env(project: Path) -> None:
    """`eval "$(mflocal env)"`, then the flow by itself."""
    path = flow_file(project, "e2e_linear.py")
    exports = mflocal("env", cwd=project, check=True).stdout
    env = dict(re.findall(r"^export (\w+)='?([^'\n]*)'?$", exports, re.M))
    done = plain(project, path.name, "run", **env)
    assert done.returncode == 0, done.stdout
    assert read(project, f"LinearFlow/{run_id_of(done.stdout)}")["successful"]


def test_many_runs_at_once_of_one_project(project: Path) -> None:
    """Three wrappers started at the same moment share one daemon and collide in nothing."""
    path = flow_file(project, "live_sleep.py")
    started = [
        Started(project, PYTHON, path.name, "run", "--seconds", "0", name=str(n)) for n in range(3)
    ]
    try:
        assert [run.wait() for run in started] == [0, 0, 0], [run.output for run in started]
    finally:
        for run in started:
            run.end()
    runs = {run_id_of(run.output) for run in started}
    assert len(runs) == 3
    assert sum(", started, " in run.output for run in started) == 1
    rows = client_of(project).get("/flows/LiveSleep/runs?status=completed")
    assert {str(row["run_number"]) for row in rows} == runs


@pytest.mark.parametrize(
    "variable", ["METAFLOW_DATASTORE_SYSROOT_LOCAL", "METAFLOW_CARD_LOCALROOT"]
)
def test_cards_outside_the_root_are_found(project: Path, variable: str) -> None:
    """Metaflow puts them where the flow was started, wherever its datastore is; the wrapper tells the daemon."""
    shutil.copy(FLOWS / "readers_cards.py", project / "flow.py")
    place = project / "elsewhere"
    place.mkdir()
    env = flow_env(**{variable: str(place)})
    root = place if variable.endswith("SYSROOT_LOCAL") else project
    mflocal(
        "run",
        PYTHON,
        "flow.py",
        "--no-pylint",
        "run",
        "--run-id-file",
        "id",
        cwd=project,
        env=env,
        check=True,
    )
    run = (project / "id").read_text()
    for turn in ("at once", "after a restart"):
        client = client_of(root)
        found = []
        for task in client.get(f"/api/flows/{flow_name(root)}/runs/{run}/tasks")["data"]:
            path = f"/api/flows/{task['flow_id']}/runs/{run}/steps/{task['step_name']}/tasks/{task['task_id']}/cards"
            found += client.get(path)["data"]
        assert found, turn
        mflocal("restart", "--root", str(root), cwd=project, check=True)
    mflocal("stop", "--root", str(root), cwd=project, check=True)
    state = root / ".metaflow/.mflocal"
    # A checkout that ships cards.json gains nothing: it names the place it was made in.
    shutil.copytree(state, project / "copy", copy_function=shutil.copy2)
    assert mflocal_module.read_card_roots(str(state)) and not mflocal_module.read_card_roots(
        str(project / "copy")
    )


def flow_name(root: Path) -> str:
    return next(path.parent.parent.name for path in (root / ".metaflow").glob("*/*/_meta"))
