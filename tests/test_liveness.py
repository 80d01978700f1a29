"""Who is alive: real flows and real deaths under `mflocal run`, and the rules of speaking on bare connections."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from conftest import FLOWS, Client, clean_env, mflocal, wait_for
from processes import (
    PYTHON,
    Plain,
    Seen,
    Started,
    Watch,
    client_of,
    daemon_state,
    flow_file,
    running,
    see,
    soon,
)

from mflocal import machine_booted

Start = Callable[..., Started]

# Before 2.14 Metaflow's client opens a connection for every request: then only wrapper, runtime and words tell.
POOLED = tuple(int(part) for part in metadata.version("metaflow").split(".")[:2]) >= (2, 14)
needs_pool = pytest.mark.skipif(not POOLED, reason="this Metaflow keeps no connection open")


@pytest.fixture
def start(project: Path) -> Iterator[Start]:
    """Starts flows of tests/flows under `mflocal run`; what is left of them is ended after the test."""
    started: list[Started] = []

    def start(
        name: str,
        *words: str,
        options: tuple[str, ...] = (),
        how: type[Started] = Started,
        **env: str,
    ) -> Started:
        path = flow_file(project, name)
        number = str(len(started)) if started else ""
        extra: dict[str, Any] = {"options": options} if how is Started else {}
        run = how(project, PYTHON, path.name, *words, name=number, **extra, **env)
        started.append(run)
        return run

    yield start
    for run in started:
        run.end()


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Sends the signal."""
    os.kill(pid, number)


def api_path(pathspec: str) -> str:
    """The path of a task in the metadata API."""
    flow, run, step, task = pathspec.split("/")
    return f"/flows/{flow}/runs/{run}/steps/{step}/tasks/{task}"


def died_at_once(row: dict[str, Any], killed: float) -> bool:
    """Whether finished_at (ms) is between the moment `killed` (s) and now, when it is known."""
    return killed * 1000 - 50 <= row["finished_at"] <= time.time() * 1000


# -- deaths


@pytest.mark.core
@needs_pool
def test_kill_9_of_a_task_is_seen_at_once(project: Path, start: Start) -> None:
    """The runtime is held, so that nobody but the task's own connection can tell."""
    run = start("live_sleep.py", "run")
    pid, runtime, pathspec = run.note("start-0")
    client = client_of(project)
    before = see(client, pathspec)
    assert (before.run, before.task()) == ("running", "running")
    kill(runtime, signal.SIGSTOP)
    clock = time.time()
    kill(pid)
    after = soon(client, pathspec, lambda s: s.task() == "failed")
    assert after.run == "running" and died_at_once(after.rows["start", 0], clock)
    clock = time.time()
    kill(runtime, signal.SIGCONT)
    assert run.wait() == 1
    ended = soon(client, pathspec, lambda s: s.run == "failed")
    assert (
        ended.task() == "failed"
        and ended.rows["start", 0]["finished_at"] == after.rows["start", 0]["finished_at"]
    )
    assert ended.run_row["finished_at"] >= clock * 1000


@pytest.mark.core
def test_a_killed_task_ends_its_run(project: Path, start: Start) -> None:
    """With every Metaflow: shown running while it lives, failed as soon as the command has ended."""
    run = start("live_sleep.py", "run")
    pid, _, pathspec = run.note("start-0")
    client = client_of(project)
    with Watch(client, "LiveSleep") as watch:
        wait_for(lambda: watch.looks > 10)
        assert running(pid) and not watch.ever("failed")
    seen = see(client, pathspec)
    assert (seen.run, seen.task()) == ("running", "running")
    kill(pid)
    assert run.wait() == 1
    soon(client, pathspec, lambda s: (s.run, s.task()) == ("failed", "failed"))


@pytest.mark.core
@needs_pool
def test_kill_9_of_the_runtime(project: Path, start: Start) -> None:
    """The run is over at once; its task lives on as an orphan and is shown as that."""
    run = start("live_sleep.py", "run")
    pid, runtime, pathspec = run.note("start-0")
    client, clock = client_of(project), time.time()
    kill(runtime)
    after = soon(client, pathspec, lambda s: s.run == "failed")
    assert died_at_once(after.run_row, clock)
    assert run.wait() == -signal.SIGKILL
    time.sleep(0.5)
    assert running(pid) and see(client, pathspec).task() == "running"
    clock = time.time()
    kill(pid)
    after = soon(client, pathspec, lambda s: s.task() == "failed")
    assert died_at_once(after.rows["start", 0], clock) and after.run == "failed"


@pytest.mark.core
@needs_pool
def test_kill_9_of_the_whole_group_and_it_stays_so(project: Path, start: Start) -> None:
    """Wrapper, runtime and task at once; after a restart of the daemon the answer is the same."""
    run = start("live_sleep.py", "run")
    pid, runtime, pathspec = run.note("start-0")
    client, clock = client_of(project), time.time()
    os.killpg(run.process.pid, signal.SIGKILL)
    after = soon(client, pathspec, lambda s: (s.run, s.task()) == ("failed", "failed"))
    assert died_at_once(after.run_row, clock) and died_at_once(after.rows["start", 0], clock)
    assert not running(pid) and not running(runtime)
    mflocal("restart", cwd=project, check=True)
    again = see(client_of(project), pathspec)
    assert (again.run, again.task()) == ("failed", "failed")
    assert again.rows["start", 0]["finished_at"] == after.rows["start", 0]["finished_at"]
    assert again.run_row["finished_at"] == after.run_row["finished_at"]
    os.kill(daemon_state(project)["pid"], signal.SIGKILL)
    mflocal("start", cwd=project, check=True)
    assert see(client_of(project), pathspec).rows["start", 0] == again.rows["start", 0]


@needs_pool
def test_kill_9_of_the_wrapper_alone(project: Path, start: Start) -> None:
    """The flow goes on without it, and the daemon, though nothing asks it, stays."""
    run = start("live_sleep.py", "run", options=("--idle-timeout", "2"))
    _, runtime, pathspec = run.note("start-0")
    client = client_of(project)
    with Watch(client, "LiveSleep") as watch:
        kill(run.process.pid)
        run.wait()
        wait_for(lambda: watch.looks > 5)
    time.sleep(3.5)  # longer than the idle timeout, without a request
    seen = see(client, pathspec)
    assert (seen.run, seen.task()) == ("running", "running") and not watch.ever("failed")
    told = json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)
    assert [str(r["run_number"]) for r in told["active_runs"]] == [pathspec.split("/")[1]]
    run.say()
    wait_for(lambda: not running(runtime))
    seen = see(client, pathspec)
    assert (seen.run, seen.task()) == ("completed", "completed")
    wait_for(lambda: not (project / ".metaflow/.mflocal/daemon.json").exists())


def test_ctrl_c(project: Path, start: Start) -> None:
    run = start("live_sleep.py", "run")
    pid, _, pathspec = run.note("start-0")
    client = client_of(project)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    assert run.wait() != 0
    seen = soon(client, pathspec, lambda s: (s.run, s.task()) == ("failed", "failed"))
    assert not running(pid) and seen.run_row["finished_at"] is not None
    assert (
        "Traceback" not in run.output.replace("KeyboardInterrupt", "")
        or "mflocal.py" not in run.output
    )


@needs_pool
def test_retry_after_a_kill(project: Path, start: Start) -> None:
    """The second attempt brings task and run back to running; the first stays failed."""
    run = start("live_sleep.py", "run", "--with", "retry:times=1,minutes_between_retries=0")
    pid, runtime, pathspec = run.note("start-0")
    client = client_of(project)
    kill(runtime, signal.SIGSTOP)
    kill(pid)
    after = soon(client, pathspec, lambda s: s.task() == "failed")
    assert after.run == "running"
    with Watch(client, "LiveSleep") as watch:
        kill(runtime, signal.SIGCONT)
        run.note("start-1")
        seen = soon(client, pathspec, lambda s: s.task(attempt=1) == "running")
        assert (seen.run, seen.task()) == ("running", "failed")
        run.say()
        assert run.wait() == 0
    seen = see(client, pathspec)
    assert (seen.run, seen.task(), seen.task(attempt=1), seen.task("end")) == (
        "completed", "failed", "completed", "completed",
    )  # fmt: skip
    assert watch.ever("failed") == [f"{pathspec}/0"]


def test_timeout(project: Path, start: Start) -> None:
    """@timeout ends the step from within: the task says itself that it failed."""
    run = start("live_sleep.py", "run", "--with", "timeout:seconds=3")
    _, _, pathspec = run.note("start-0")
    client = client_of(project)
    assert see(client, pathspec).task() == "running"
    assert run.wait() == 1
    seen = soon(client, pathspec, lambda s: (s.run, s.task()) == ("failed", "failed"))
    rows = client.get(f"{api_path(pathspec)}/metadata")
    assert [row["value"] for row in rows if row["field_name"] == "attempt_ok"] == ["False"]
    assert seen.rows["start", 0]["finished_at"] is not None


# -- what lives is never shown failed


@needs_pool
def test_a_long_task_without_a_request_lives(project: Path, start: Start) -> None:
    """Silent for many times the cutoff (2 s), and for longer than the idle timeout (4 s)."""
    run = start(
        "live_sleep.py", "run", "--seconds", "12", options=("--idle-timeout", "4"),
        METAFLOW_LOCAL_SERVICE_RUN_CUTOFF="2",
    )  # fmt: skip
    _, _, pathspec = run.note("start-0")
    time.sleep(9)  # nothing is asked meanwhile, which would count as use
    client = client_of(project)
    with Watch(client, "LiveSleep") as watch:
        seen = see(client, pathspec)
        assert (seen.run, seen.task()) == ("running", "running")
        now = int(time.time())
        wait_for(lambda: see(client, pathspec).run_row["last_heartbeat_ts"] >= now)
        assert run.wait() == 0
    assert not watch.ever("failed") and see(client, pathspec).run == "completed"


@pytest.mark.slow
def test_a_task_sleeps_90_seconds(project: Path, start: Start) -> None:
    """With the ordinary settings: longer than the cutoff (60 s) and than the keep-alive of other connections (75 s)."""
    run = start("live_sleep.py", "run", "--seconds", "90")
    run.note("start-0")
    client = client_of(project)
    with Watch(client, "LiveSleep") as watch:
        assert run.wait(150) == 0
    assert watch.looks > 20 and not watch.ever("failed")


@pytest.mark.parametrize("width", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_wide_foreach(project: Path, start: Start, width: int) -> None:
    run = start("live_many.py", "run", "--width", str(width), "--max-workers", "4")
    _, _, pathspec = run.note("work-0-0")
    client = client_of(project)
    with Watch(client, "LiveMany") as watch:
        flow, number = pathspec.split("/")[:2]
        finished = f"/api/flows/{flow}/runs/{number}/steps/work/tasks?status=completed&_limit=1000"
        wait_for(lambda: len(client.get(finished)["data"]) == width - 1, 120)
        seen = see(client, pathspec)
        assert seen.run == "running"
        run.say()
        assert run.wait() == 0
    tasks = {name for name, _ in watch.statuses if "/work/" in name}
    assert len(tasks) == width and not watch.ever("failed")
    assert len(client.get(finished)["data"]) == width


@pytest.mark.core
def test_the_daemon_is_killed_under_a_sleeping_task(project: Path, start: Start) -> None:
    """The wrapper brings it back and vouches: for a whole cutoff (2 s) and more nothing is shown failed."""
    run = start("live_sleep.py", "run", METAFLOW_LOCAL_SERVICE_RUN_CUTOFF="2")
    pid, _, pathspec = run.note("start-0")
    client, old = client_of(project), daemon_state(project)
    with Watch(client, "LiveSleep") as watch:
        wait_for(lambda: watch.looks > 3)
        kill(old["pid"])
        wait_for(lambda: daemon_state(project)["pid"] != old["pid"])
        looks = watch.looks
        wait_for(lambda: watch.looks > looks)
        time.sleep(5)
        seen = see(client, pathspec)
        assert (seen.run, seen.task()) == ("running", "running") and running(pid)
        told = json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)
        assert [str(r["run_number"]) for r in told["active_runs"]] == [pathspec.split("/")[1]]
        assert told["idle_left"] is None
        run.say()
        assert run.wait() == 0, run.output
    assert daemon_state(project)["port"] == old["port"] and not watch.ever("failed")
    assert see(client, pathspec).run == "completed"


def test_deaths_after_the_daemon_came_back(project: Path, start: Start) -> None:
    """Neither runtime nor task has a connection to the new daemon; the end of CMD still is the end of the run."""
    run = start("live_sleep.py", "run")
    pid, _, pathspec = run.note("start-0")
    client, old = client_of(project), daemon_state(project)
    kill(old["pid"])
    wait_for(
        lambda: (
            daemon_state(project)["pid"] != old["pid"] and daemon_state(project)["state"] == "ready"
        )
    )
    assert see(client, pathspec).task() == "running"
    kill(pid)
    assert run.wait() == 1
    soon(client, pathspec, lambda s: (s.run, s.task()) == ("failed", "failed"))


def test_the_daemon_is_restarted_by_hand_under_a_sleeping_task(project: Path, start: Start) -> None:
    """`restart --force` closes all connections in good order, which proves nothing about those behind them."""
    run = start("live_sleep.py", "run", METAFLOW_LOCAL_SERVICE_RUN_CUTOFF="2")
    _, _, pathspec = run.note("start-0")
    client = client_of(project)
    with Watch(client, "LiveSleep") as watch:
        mflocal("restart", "--force", cwd=project, check=True)
        looks = watch.looks
        wait_for(lambda: watch.looks > looks + 3)
        time.sleep(4)
        seen = see(client, pathspec)
        assert (seen.run, seen.task()) == ("running", "running")
        run.say()
        assert run.wait() == 0, run.output
    assert not watch.ever("failed")


# -- one process per task, as schedulers do


class Scheduled:
    """live_sleep.py driven by tests/flows/live_steps.sh."""

    def __init__(self, project: Path, how: type[Started], **env: str) -> None:
        flow_file(project, "live_sleep.py")
        shutil.copy(FLOWS / "live_steps.sh", project)
        self.run = how(project, "sh", "live_steps.sh", PYTHON, "sched-1", **env)

    def pause(self, after: str) -> None:
        """Waits until the process of that name has ended."""
        wait_for(
            lambda: (
                (self.run.notes / ("after-" + after)).exists()
                or self.run.process.poll() is not None
            )
        )
        assert (self.run.notes / ("after-" + after)).exists(), self.run.output

    def go_on(self, after: str) -> None:
        """Lets the next process begin."""
        self.run.say("then-" + after)


@pytest.mark.core
@pytest.mark.parametrize("sidecars", ["", "off"])
@pytest.mark.parametrize("how", [Started, Plain])
def test_one_process_per_task(project: Path, how: type[Started], sidecars: str) -> None:
    """The run is never shown failed between its tasks, however long the scheduler waits (twice the cutoff here)."""
    env = {"METAFLOW_LOCAL_SERVICE_RUN_CUTOFF": "1"}
    if sidecars == "off":
        env["METAFLOW_ENABLED_SIDECAR"] = ""
    flow = Scheduled(project, how, **env)
    try:
        flow.pause("init")
        client = client_of(project)
        with Watch(client, "LiveSleep") as watch:
            time.sleep(2)
            assert see(client, "LiveSleep/sched-1").run == "running"
            flow.go_on("init")
            flow.run.note("start-0")
            seen = see(client, "LiveSleep/sched-1")
            assert (seen.run, seen.task()) == ("running", "running")
            flow.run.say()
            flow.pause("start")
            seen = see(client, "LiveSleep/sched-1")
            assert (seen.run, seen.task()) == ("running", "completed")
            time.sleep(2)
            seen = see(client, "LiveSleep/sched-1")
            assert (seen.run, seen.task()) == ("running", "completed")
            flow.go_on("start")
            assert flow.run.wait() == 0, flow.run.output
        assert not watch.ever("failed") and see(client, "LiveSleep/sched-1").run == "completed"
    finally:
        flow.run.end()


@pytest.mark.core
def test_one_wrapper_per_task(project: Path) -> None:
    """Also where each process has an `mflocal run` of its own: the end of one says nothing about the run."""
    script = flow_file(project, "live_sleep.py").name
    steps = [
        ["init", "--task-id", "first"],
        ["step", "start", "--task-id", "second", "--input-paths", "sched-1/_parameters/first"],
        ["step", "end", "--task-id", "third", "--input-paths", "sched-1/start/second"],
    ]
    for number, words in enumerate(steps):
        run = Started(project, PYTHON, script, *words, "--run-id", "sched-1", name=str(number))
        try:
            run.say()
            assert run.wait() == 0, run.output
        finally:
            run.end()
        expected = "completed" if number == 2 else "running"
        time.sleep(0.2)
        assert see(client_of(project), "LiveSleep/sched-1").run == expected


@pytest.mark.core
@needs_pool
def test_a_killed_task_of_a_scheduler(project: Path) -> None:
    """Its task is failed at once, its run as soon as the script has ended, and `stop` knows that too."""
    flow = Scheduled(project, Started)
    try:
        flow.pause("init")
        flow.go_on("init")
        pid = flow.run.note("start-0")[0]
        client = client_of(project)
        kill(pid)
        soon(client, "LiveSleep/sched-1", lambda s: s.task() == "failed")
        assert flow.run.wait() == 1
    finally:
        flow.run.end()


@pytest.mark.core
def test_what_has_failed_is_not_active(project: Path, start: Start) -> None:
    """A flow outside of the wrapper sends heartbeats; `stop` need not wait until they are old."""
    run = start("live_sleep.py", "run", "--with", "timeout:seconds=1", how=Plain)
    _, _, pathspec = run.note("start-0")
    client = client_of(project)
    wait_for(lambda: beats(client, pathspec))
    assert run.wait() == 1
    wait_for(lambda: see(client, pathspec).run == "failed")
    told = json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)
    assert told["active_runs"] == []
    mflocal("stop", cwd=project, check=True)


# -- forked children


def test_a_forked_child_outlives_its_finished_task(project: Path, start: Start) -> None:
    """It holds the connection of a task that is done; that keeps nothing running and the daemon not awake."""
    run = start("live_fork.py", "run", "--how", "finish", options=("--idle-timeout", "2"))
    child = run.note("child-0")[0]
    _, _, pathspec = run.note("end-0")
    client = client_of(project)
    seen = see(client, pathspec)
    assert (seen.run, seen.task("start"), seen.task("end")) == ("running", "completed", "running")
    run.say()
    assert run.wait() == 0 and running(child)
    seen = see(client, pathspec)
    assert (seen.run, seen.task("start"), seen.task("end")) == (
        "completed",
        "completed",
        "completed",
    )
    told = json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)
    assert told["active_runs"] == [] and told["idle_left"] is not None
    wait_for(lambda: not (project / ".metaflow/.mflocal/daemon.json").exists())
    assert running(child)


def test_a_forked_child_outlives_its_killed_task(project: Path, start: Start) -> None:
    """It holds the connection of a dead task: the orderly end of the command decides."""
    run = start("live_fork.py", "run", "--how", "hold")
    child = run.note("child-0")[0]
    pid, _, pathspec = run.note("start-0")
    client = client_of(project)
    kill(pid)
    assert run.wait() == 1 and running(child)
    soon(client, pathspec, lambda s: (s.run, s.task()) == ("failed", "failed"))


def test_a_forked_child_and_the_next_attempt(project: Path, start: Start) -> None:
    """The next attempt of the task decides that the one before has died."""
    run = start(
        "live_fork.py", "run", "--how", "hold", "--with", "retry:times=1,minutes_between_retries=0"
    )
    child = run.note("child-0")[0]
    pid, _, pathspec = run.note("start-0")
    client = client_of(project)
    kill(pid)
    run.note("start-1")
    soon(client, pathspec, lambda s: (s.run, s.task(), s.task(attempt=1)) == ("running", "failed", "running"))  # fmt: skip
    run.say()
    assert run.wait() == 0 and running(child)
    seen = see(client, pathspec)
    assert (seen.run, seen.task(), seen.task(attempt=1)) == ("completed", "failed", "completed")


@needs_pool
def test_killed_command_with_living_orphans(project: Path, start: Start) -> None:
    """A command that died by a signal has waited for nobody: what still holds its connection is shown running."""
    run = start("live_sleep.py", "run")
    pid, runtime, pathspec = run.note("start-0")
    client = client_of(project)
    kill(runtime, signal.SIGTERM)
    assert run.wait() == -signal.SIGTERM
    time.sleep(0.5)
    if running(pid):
        assert see(client, pathspec).task() == "running"
        kill(pid)
    soon(client, pathspec, lambda s: (s.run, s.task()) == ("failed", "failed"))


# -- several at once


@needs_pool
def test_two_flows_under_one_daemon(project: Path, start: Start) -> None:
    """One dies, the other is not touched by it."""
    first, second = start("live_sleep.py", "run"), start("live_many.py", "run", "--width", "1")
    pid, _, pathspec = first.note("start-0")
    _, _, other = second.note("work-0-0")
    client = client_of(project)
    told = json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)
    active = {r["flow_id"]: r["how"] for r in told["active_runs"]}
    assert active == {"LiveSleep": "connection", "LiveMany": "connection"}
    with Watch(client, "LiveMany") as watch:
        kill(pid)
        assert first.wait() == 1
        soon(client, pathspec, lambda s: (s.run, s.task()) == ("failed", "failed"))
        seen = see(client, other)
        assert (seen.run, seen.task("work")) == ("running", "running")
        second.say()
        assert second.wait() == 0
    assert not watch.ever("failed") and see(client, other).run == "completed"


@needs_pool
def test_a_flow_left_in_the_background(project: Path, start: Start) -> None:
    """Its command ends before it (`mflocal run bash`, `flow &`, `exit`): it lives on, and its daemon with it."""
    flow_file(project, "live_sleep.py")
    code = (
        "import os, subprocess, sys; subprocess.Popen([sys.executable, 'live_sleep.py', 'run']);"
        "p = os.path.join(os.environ['NOTES'], 'start-0')\nwhile not os.path.exists(p): pass"
    )
    run = Started(project, PYTHON, "-c", code, options=("--idle-timeout", "2"))
    try:
        _, runtime, pathspec = run.note("start-0")
        assert run.wait() == 0
        client = client_of(project)
        with Watch(client, "LiveSleep") as watch:
            time.sleep(4)
            seen = see(client, pathspec)
            assert (seen.run, seen.task()) == ("running", "running") and not watch.ever("failed")
        run.say()
        soon(client, pathspec, lambda s: s.run == "completed")
    finally:
        run.end()


@needs_pool
def test_a_flow_left_in_the_background_that_dies(project: Path, start: Start) -> None:
    """Runtime and task killed after their command has ended: seen at once, as ever."""
    flow_file(project, "live_sleep.py")
    code = (
        "import os, subprocess, sys; subprocess.Popen([sys.executable, 'live_sleep.py', 'run']);"
        "p = os.path.join(os.environ['NOTES'], 'start-0')\nwhile not os.path.exists(p): pass"
    )
    run = Started(project, PYTHON, "-c", code)
    try:
        pid, runtime, pathspec = run.note("start-0")
        assert run.wait() == 0
        client = client_of(project)
        kill(pid, signal.SIGSTOP)  # it holds its connection
        kill(runtime)
        soon(client, pathspec, lambda s: (s.run, s.task()) == ("failed", "failed"))
        kill(pid)
    finally:
        run.end()


def test_what_a_living_wrapper_has_finished_is_not_active(project: Path) -> None:
    """Also after the daemon came back, which remembers nothing: `stop` needs no --force."""
    flow_file(project, "e2e_linear.py")
    run = Started(
        project, "sh", "-c", f"{PYTHON} e2e_linear.py run && touch $NOTES/done && sleep 60"
    )
    try:
        wait_for(lambda: (run.notes / "done").exists())
        mflocal("restart", cwd=project, check=True)
        time.sleep(1)  # the wrapper takes its lease again
        told = json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)
        assert told["active_runs"] == []
        mflocal("stop", cwd=project, check=True)
    finally:
        run.end()


@pytest.mark.parametrize("how", ["restart", "end"])
def test_a_wrapper_does_not_vouch_for_runs_with_heartbeats(project: Path, how: str) -> None:
    """They failed when these stayed away; neither a restart of the daemon nor the end of the wrapper changes it."""
    code = """
import http.client, json, os, sys, time, urllib.parse
def call(path, body={}):
    connection.request("POST", url.path + path, json.dumps(body), {"Content-Type": "application/json"})
    return json.loads(connection.getresponse().read())
url = urllib.parse.urlsplit(os.environ["METAFLOW_SERVICE_URL"])
connection = http.client.HTTPConnection(url.hostname, url.port)
call("/flows/F")
run = "/flows/F/runs/%s" % call("/flows/F/run")["run_number"]
call(run + "/steps/start/step")
task = run + "/steps/start/tasks/%s" % call(run + "/steps/start/task")["task_id"]
tags = ["attempt_id:0"]
call(task + "/metadata", [{"field_name": "attempt", "value": "0", "type": "attempt", "tags": tags}])
call(run + "/heartbeat")
call(task + "/heartbeat")
call(task + "/metadata", [{"field_name": "attempt_ok", "value": "False", "type": "x", "tags": tags}])
connection.close()
open(os.environ["NOTES"] + "/done", "w").close()
while not os.path.exists(os.environ["NOTES"] + "/go"): time.sleep(0.05)
"""
    run = Started(
        project,
        PYTHON,
        "-c",
        code,
        options=("--heartbeats", "sidecar"),
        METAFLOW_LOCAL_SERVICE_RUN_CUTOFF="1",
    )
    try:
        wait_for(lambda: (run.notes / "done").exists())
        client = client_of(project)
        row = wait_for(
            lambda: [r for r in client.get("/api/flows/F/runs")["data"] if r["status"] == "failed"]
        )[0]
        time.sleep(2)
        if how == "restart":
            mflocal("restart", cwd=project, check=True)
            time.sleep(1.5)
        else:
            (run.notes / "go").touch()
            assert run.wait() == 0
        after = client_of(project).get("/api/flows/F/runs")["data"][0]
        assert (after["status"], after["finished_at"]) == ("failed", row["finished_at"])
        assert (
            json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)["active_runs"]
            == []
        )
    finally:
        run.end()


def test_resume_of_a_killed_run(project: Path, start: Start) -> None:
    """The resumed run lives; the one it comes from stays failed, though resume reads it."""
    run = start("live_many.py", "run", "--width", "2")
    pid, _, pathspec = run.note("work-0-0")
    client = client_of(project)
    kill(pid)
    assert run.wait() == 1
    soon(client, pathspec, lambda s: s.run == "failed")
    before = see(client, pathspec)
    with Watch(client, "LiveMany") as watch:
        resumed = start("live_many.py", "resume")
        _, _, again = resumed.note("work-0-0")
        assert again.split("/")[1] != pathspec.split("/")[1]
        seen = see(client, again)
        assert (seen.run, seen.task("start"), see(client, pathspec).run) == (
            "running",
            "completed",
            "failed",
        )
        resumed.say()
        assert resumed.wait() == 0, resumed.output
    assert foreach_indexes(client, again) == ["0", "1"]  # one was run, one cloned
    flow_run = "/".join(again.split("/")[:2])
    assert see(client, again).run == "completed" and not [
        n for n in watch.ever("failed") if n.startswith(flow_run)
    ]
    assert see(client, pathspec).run_row == before.run_row


@needs_pool
def test_parallel_nodes(project: Path, start: Start) -> None:
    """@parallel runs its nodes as processes of the first one: each lives and dies for itself."""
    run = start("live_parallel.py", "run")
    _, _, first = run.note("work-0-0")
    pid, _, second = run.note("work-1-0")
    client = client_of(project)
    rows = nodes_of(client, first)
    assert {row["status"] for row in rows.values()} == {"running"} and len(rows) == 2
    assert foreach_indexes(client, first) == ["0", "1"]
    clock = time.time()
    kill(pid)
    name = second.split("/")[-1]
    soon(client, first, lambda s: nodes_of(client, first)[name]["status"] == "failed")
    assert died_at_once(nodes_of(client, first)[name], clock)
    assert (
        see(client, first).run == "running"
        and nodes_of(client, first)[first.split("/")[-1]]["status"] == "running"
    )
    run.say()
    assert run.wait() == 1
    soon(client, first, lambda s: s.run == "failed")


def foreach_indexes(client: Client, pathspec: str) -> list[str]:
    """What the labels of a step's tasks say of their place in the foreach."""
    flow, run, step, _ = pathspec.split("/")
    path = f"/api/flows/{flow}/runs/{run}/steps/{step}/tasks?postprocess=true&_limit=100"
    rows = client.get(path)["data"]
    labels = [row["foreach_label"] for row in rows if row["attempt_id"] == 0]
    assert all(
        label.startswith(f"{row['task_name'] or row['task_id']}[")
        for label, row in zip(labels, rows)
    )
    return sorted(label.rpartition("[")[2].rstrip("]") for label in labels)


def nodes_of(client: Client, pathspec: str) -> dict[str, Any]:
    flow, run, step, _ = pathspec.split("/")
    rows = client.get(f"/api/flows/{flow}/runs/{run}/steps/{step}/tasks?_limit=100")["data"]
    return {str(row["task_name"] or row["task_id"]): row for row in rows}


@pytest.mark.slow
def test_parallel_completes(project: Path, start: Start) -> None:
    run = start("live_parallel.py", "run")
    _, _, pathspec = run.note("work-0-0")
    run.note("work-1-0")
    client = client_of(project)
    with Watch(client, "LiveParallel") as watch:
        run.say()
        assert run.wait() == 0, run.output
    assert not watch.ever("failed") and see(client, pathspec).run == "completed"


def test_a_run_started_by_runner(project: Path, start: Start) -> None:
    flow_file(project, "live_sleep.py")
    run = start("live_runner.py")
    pid, _, pathspec = run.note("start-0")
    client = client_of(project)
    with Watch(client, "LiveSleep") as watch:
        seen = see(client, pathspec)
        assert (seen.run, seen.task()) == ("running", "running")
        run.say()
        assert run.wait() == 0, run.output
    assert not watch.ever("failed") and see(client, pathspec).run == "completed"
    assert "successful True" in run.output


@pytest.mark.slow
def test_the_death_of_a_run_started_by_runner(project: Path, start: Start) -> None:
    flow_file(project, "live_sleep.py")
    run = start("live_runner.py")
    pid, runtime, pathspec = run.note("start-0")
    client = client_of(project)
    kill(runtime)
    soon(client, pathspec, lambda s: s.run == "failed")
    kill(pid)
    soon(client, pathspec, lambda s: s.task() == "failed")
    assert run.wait() != 0


@needs_pool
def test_reading_is_not_speaking(project: Path, start: Start) -> None:
    """A program with the Client reads and tags a run on a connection that stays open when the run is killed."""
    run = start("live_sleep.py", "run")
    _, _, pathspec = run.note("start-0")
    client = client_of(project)
    name = "/".join(pathspec.split("/")[:2])
    reader = start("live_reader.py", name)
    reader.note("reader")
    assert see(client, pathspec).run == "running"
    os.killpg(run.process.pid, signal.SIGKILL)
    seen = soon(client, pathspec, lambda s: (s.run, s.task()) == ("failed", "failed"))
    assert "seen" in seen.run_row["tags"] and reader.process.poll() is None
    reader.say("end-reader")
    assert reader.wait() == 0, reader.output
    assert see(client, pathspec).run_row["finished_at"] == seen.run_row["finished_at"]


# -- sidecars


def sidecars(*pids: int) -> list[int]:
    """Heartbeat processes that Metaflow has started below these processes."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if (
            parent in pids
            and any(b"sidecar" in word for word in words)
            and b"heartbeat" in b" ".join(words)
        ):
            found.append(int(entry.name))
    return found


@pytest.mark.core
@pytest.mark.parametrize(("option", "expected"), [("auto", 0), ("sidecar", 2)])
def test_how_many_sidecars_metaflow_starts(
    project: Path, start: Start, option: str, expected: int
) -> None:
    """Detects a Metaflow that reads METAFLOW_ENABLED_SIDECAR differently: one per process there, none under us."""
    run = start("live_sleep.py", "run", options=("--heartbeats", option))
    pid, runtime, pathspec = run.note("start-0")
    if expected:
        wait_for(lambda: len(sidecars(pid, runtime)) == expected)
    else:
        time.sleep(1)
    assert len(sidecars(pid, runtime)) == expected
    assert see(client_of(project), pathspec).task() == "running"
    run.say()
    assert run.wait() == 0, run.output
    assert see(client_of(project), pathspec).run == "completed"


def test_an_ordinary_client_outside_the_wrapper(project: Path, start: Start) -> None:
    """It has its sidecars; their heartbeats are what its death is judged by: failed when they stay away."""
    cutoff = 4.0
    mflocal(
        "start",
        cwd=project,
        check=True,
        env=clean_env(METAFLOW_LOCAL_SERVICE_RUN_CUTOFF=str(cutoff)),
    )
    run = start("live_sleep.py", "run", how=Plain)
    pid, runtime, pathspec = run.note("start-0")
    client = client_of(project)
    wait_for(lambda: len(sidecars(pid, runtime)) == 2)
    wait_for(lambda: beats(client, pathspec))
    with Watch(client, "LiveSleep") as watch:
        time.sleep(1)
        told = json.loads(mflocal("status", "--json", cwd=project, check=True).stdout)
        assert [str(r["run_number"]) for r in told["active_runs"]] == [pathspec.split("/")[1]]
    assert not watch.ever("failed")
    os.killpg(run.process.pid, signal.SIGKILL)
    soon(
        client,
        pathspec,
        lambda s: (s.run, s.task()) == ("failed", "failed"),
    )


def beats(client: Client, pathspec: str) -> bool:
    return client.get(api_path(pathspec)).get("last_heartbeat_ts") is not None


# -- the rules of speaking, on bare connections


class Speaker:
    """One keep-alive connection of a client, which has shown by a first request that it keeps it."""

    def __init__(self, client: Client, fresh: bool = False) -> None:
        host, _, port = client.url.partition("://")[2].partition(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=30)
        if not fresh:
            self.connection.request("GET", "/ping")
            self.connection.getresponse().read()

    def __call__(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Content-Type": "application/json"}
        self.connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = self.connection.getresponse()
        data = response.read()
        assert response.status == 200, (response.status, data)
        return json.loads(data)

    def attempt(self, task: str, number: int) -> None:
        """Metadata `attempt`, as the process of an attempt writes it first."""
        self.metadata(task, "attempt", str(number), number)

    def done(self, task: str, number: int, ok: bool = True) -> None:
        """What a process writes when its attempt is over."""
        self.metadata(task, "attempt_ok", str(ok), number)
        self.metadata(task, "attempt-done", str(number), number)

    def metadata(self, task: str, field: str, value: str, attempt: int = 0) -> None:
        """One record of the task."""
        row = {
            "field_name": field,
            "value": value,
            "type": field,
            "user_name": "u",
            "tags": [f"attempt_id:{attempt}"],
        }
        self("POST", f"{task}/metadata", [row])

    def close(self, rudely: bool = False) -> None:
        """Ends the connection; rudely: with a reset."""
        if rudely:
            assert self.connection.sock is not None
            self.connection.sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        self.connection.close()


class Bare:
    """A run with one task, made on a `runtime` connection, its first attempt begun on a `worker` connection."""

    def __init__(self, client: Client) -> None:
        self.client = client
        client("POST", "/flows/F", {"user_name": "u", "tags": [], "system_tags": []})
        self.runtime, self.worker = Speaker(client), Speaker(client)
        body = {"user_name": "u", "tags": [], "system_tags": []}
        self.number = str(self.runtime("POST", "/flows/F/run", body)["run_number"])
        self.path = f"/flows/F/runs/{self.number}"
        self.runtime("POST", f"{self.path}/steps/start/step", body)
        self.task = str(self.runtime("POST", f"{self.path}/steps/start/task", body)["task_id"])
        self.name = api_path(f"F/{self.number}/start/{self.task}")
        self.worker.attempt(self.name, 0)

    @property
    def now(self) -> Seen:
        """How it looks."""
        return Seen(self.client, "F", self.number)

    @property
    def pathspec(self) -> str:
        return f"F/{self.number}"


@pytest.fixture
def bare(service: Client) -> Bare:
    return Bare(service)


@pytest.mark.core
@pytest.mark.parametrize("rudely", [False, True])
def test_the_last_connection_decides(bare: Bare, rudely: bool) -> None:
    second = Speaker(bare.client)
    second.attempt(bare.name, 0)  # a second connection of the same process, from its pool
    bare.worker.close(rudely)
    time.sleep(0.3)
    assert bare.now.task() == "running"
    clock = time.time()
    second.close(rudely)
    seen = soon(bare.client, bare.pathspec, lambda s: s.task() == "failed")
    assert seen.run == "running" and died_at_once(seen.rows["start", 0], clock)
    bare.runtime.close(rudely)
    soon(bare.client, bare.pathspec, lambda s: s.run == "failed")


@pytest.mark.core
def test_a_client_that_opens_a_connection_for_each_request(bare: Bare) -> None:
    """As Metaflow did before 2.14: the end of such a connection is no death, though the task has just begun."""

    def once(path: str, body: Any) -> Any:
        speaker = Speaker(bare.client, fresh=True)
        answer = speaker("POST", path, body)
        speaker.close()
        return answer

    body = {"user_name": "u", "tags": [], "system_tags": []}
    run = once("/flows/F/run", body)["run_number"]
    once(f"/flows/F/runs/{run}/steps/start/step", body)
    task = once(f"/flows/F/runs/{run}/steps/start/task", body)["task_id"]
    row = {
        "field_name": "attempt",
        "value": "0",
        "type": "attempt",
        "user_name": "u",
        "tags": ["attempt_id:0"],
    }
    once(f"/flows/F/runs/{run}/steps/start/tasks/{task}/metadata", [row])
    time.sleep(0.3)
    seen = Seen(bare.client, "F", str(run))
    assert (seen.run, seen.task()) == ("running", "running")


@pytest.mark.core
def test_what_speaks_for_nothing(bare: Bare) -> None:
    """GET, PATCH, other metadata, artifacts: their connection may close, and may not hold up a death."""
    others = [Speaker(bare.client) for _ in range(2)]
    for other in others:
        other("GET", bare.path)
        other("GET", f"{bare.path}/steps/start/tasks")
        other("PATCH", f"{bare.path}/tag/mutate", {"tags_to_add": [f"t{id(other)}"]})
        other.metadata(bare.name, "origin-run-id", "1")
        other.metadata(bare.name, "attempt-done", "no number")
        other("POST", f"{bare.name}/artifact", [{"name": f"a{id(other)}",
              "location": " ", "ds_type": "local", "sha": "0", "type": "metaflow.artifact",
              "content_type": "text", "attempt_id": 0, "user_name": "u"}])  # fmt: skip
    others[0].close()
    time.sleep(0.3)
    # attempt-done ends the attempt by what the client said, not by the connection
    assert bare.now.run == "running"
    bare.runtime.close()
    soon(bare.client, bare.pathspec, lambda s: s.run == "failed")
    assert others[1]("GET", bare.path)["run_number"] == int(bare.number)


def test_a_reader_neither_ends_nor_holds_up_a_task(bare: Bare) -> None:
    reader, other = Speaker(bare.client), Speaker(bare.client)
    for speaker in (reader, other):
        speaker("GET", bare.name)
        speaker.metadata(bare.name, "origin-task-id", "7")
    other.close()
    time.sleep(0.3)
    assert bare.now.task() == "running"
    bare.worker.close()
    soon(bare.client, bare.pathspec, lambda s: s.task() == "failed")
    reader("GET", bare.path)


def test_who_stands_for_the_run(bare: Bare) -> None:
    """Who has the service number a task is its runtime; who names the ids of run, step and task is not."""
    body = {"user_name": "u", "tags": [], "system_tags": []}
    second, other = Speaker(bare.client), Speaker(bare.client)
    second("POST", f"{bare.path}/steps/other/step", body)
    second("POST", f"{bare.path}/steps/other/task", body)
    bare.runtime.close()
    time.sleep(0.2)
    assert bare.now.run == "running"
    other("POST", f"{bare.path}/steps/more/step", body)
    other("POST", f"{bare.path}/steps/more/task", {**body, "task_id": "own"})
    second.close()
    soon(bare.client, bare.pathspec, lambda s: s.run == "failed")


@pytest.mark.core
def test_a_process_that_names_its_ids_ends_nothing(bare: Bare) -> None:
    """`flow.py step` registers run, step and task, works and leaves: the run goes on, live in the UI too."""
    body = {"user_name": "u", "tags": [], "system_tags": []}
    for step, ok in (("start", True), ("next", True)):
        process = Speaker(bare.client)
        if step == "start":
            process("POST", "/flows/F/run", {**body, "run_number": "sched-7"})
        process("POST", f"/flows/F/runs/sched-7/steps/{step}/step", body)
        process("POST", f"/flows/F/runs/sched-7/steps/{step}/task", {**body, "task_id": "t"})
        task = f"/flows/F/runs/sched-7/steps/{step}/tasks/t"
        process.attempt(task, 0)
        process.done(task, 0, ok)
        process.close()
        time.sleep(0.2)
        seen = Seen(bare.client, "F", "sched-7")
        assert (seen.run, seen.task(step)) == ("running", "completed")


@pytest.mark.parametrize("ok", [True, False])
def test_a_finished_task_keeps_its_connection(bare: Bare, ok: bool) -> None:
    bare.worker.done(bare.name, 0, ok)
    expected = "completed" if ok else "failed"
    seen = bare.now
    assert seen.task() == expected
    bare.worker.close()
    time.sleep(0.3)
    assert bare.now.rows["start", 0] == {**seen.rows["start", 0], "last_heartbeat_ts": ANY}
    assert bare.now.run == "running"


class _Any:
    def __eq__(self, other: object) -> bool:
        return True


ANY = _Any()


def test_the_next_attempt_brings_it_back(bare: Bare) -> None:
    bare.worker.close()
    soon(bare.client, bare.pathspec, lambda s: s.task() == "failed")
    again = Speaker(bare.client)
    again.attempt(bare.name, 1)
    seen = bare.now
    assert (seen.task(), seen.task(attempt=1), seen.run) == ("failed", "running", "running")
    again.done(bare.name, 1)
    seen = bare.now
    assert (seen.task(), seen.task(attempt=1)) == ("failed", "completed")


def test_a_task_that_outlives_its_run_does_not_raise_it(bare: Bare) -> None:
    """Neither its beats, while its connection is open, nor its own death make the failed run look running again."""
    bare.runtime.close()
    seen = soon(bare.client, bare.pathspec, lambda s: s.run == "failed")
    assert seen.task() == "running"
    time.sleep(5.5)  # the beats of what is open are noted every 5 s
    assert (bare.now.run, bare.now.task()) == ("failed", "running")
    bare.worker.close()
    after = soon(bare.client, bare.pathspec, lambda s: s.task() == "failed")
    assert after.run == "failed" and bare.now.run == "failed"


def test_a_run_and_its_task_die_in_two_different_seconds(bare: Bare) -> None:
    time.sleep(1 - time.time() % 1 + 0.9)
    bare.runtime.close()
    time.sleep(0.2)
    bare.worker.close()
    soon(
        bare.client,
        bare.pathspec,
        lambda s: (s.run, s.task()) == ("failed", "failed"),
    )
    time.sleep(0.5)
    assert (bare.now.run, bare.now.task()) == ("failed", "failed")


def test_a_dead_run_that_speaks_again_is_alive(bare: Bare) -> None:
    body = {"user_name": "u", "tags": [], "system_tags": []}
    bare.runtime.close()
    soon(bare.client, bare.pathspec, lambda s: s.run == "failed")
    again = Speaker(bare.client)
    again("POST", f"{bare.path}/steps/more/step", body)
    again("POST", f"{bare.path}/steps/more/task", body)
    assert bare.now.run == "running"


def test_a_connection_that_the_service_closes_proves_nothing(bare: Bare) -> None:
    """A request that ends the connection by our own decision."""
    assert bare.worker.connection.sock is not None
    bare.worker.connection.sock.sendall(b"nonsense\r\n\r\n")
    assert b" 400 " in bare.worker.connection.sock.recv(4096)
    assert bare.worker.connection.sock.recv(4096) == b""
    bare.worker.close()
    time.sleep(0.3)
    assert bare.now.task() == "running"


# A worker that has begun its second attempt on one connection, and there goes as far as the bytes in argv[2].
_WORKER = """
import json, socket, sys, time
port, rest, task = int(sys.argv[1]), bytes.fromhex(sys.argv[2]), sys.argv[3]
row = {"field_name": "attempt", "value": "1", "type": "attempt", "user_name": "u", "tags": ["attempt_id:1"]}
body = json.dumps([row]).encode()
sock = socket.create_connection(("127.0.0.1", port))
for path in ("/ping", None):
    head = "GET /ping" if path else "POST %s/metadata" % task
    data = b"" if path else body
    sock.sendall(("%s HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: %d\\r\\n\\r\\n" % (head, len(data))).encode() + data)
    assert sock.recv(4096).startswith(b"HTTP/1.1 200")
sock.sendall(rest)
print("there", flush=True)
time.sleep(600)
"""


@pytest.mark.core
@pytest.mark.parametrize(
    "rest",
    [
        "",
        "POST /x HT",
        "POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n[{",
        "POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n[{",
        "GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["between", "head", "body", "chunk", "answer"],
)
def test_a_worker_is_killed_wherever_it_is_in_a_request(bare: Bare, rest: str) -> None:
    """Every end that the client causes is the client's: the attempt has failed, at once."""
    large = [{"field_name": "big", "value": "x" * 4_000_000}]
    bare.client.post(f"{bare.name}/metadata", large)
    data = rest.replace("/large", f"{bare.name}/metadata").encode().hex()
    port = bare.client.url.rpartition(":")[2]
    worker = subprocess.Popen(
        [sys.executable, "-c", _WORKER, port, data, bare.name], stdout=subprocess.PIPE
    )
    assert worker.stdout is not None and worker.stdout.readline() == b"there\n"
    wait_for(lambda: bare.now.task(attempt=1) == "running")
    worker.kill()
    worker.wait()
    worker.stdout.close()
    soon(bare.client, bare.pathspec, lambda s: s.task(attempt=1) == "failed")


@pytest.mark.core
@pytest.mark.parametrize("rudely", [False, True])
@pytest.mark.parametrize("sent", ["POST /flows/F HT", "POST /flows/F HTTP/1.1\r\nHost: localhost\r\n"
    "Content-Type: application/json\r\nContent-Length: 900\r\n\r\n[1,"])  # fmt: skip
def test_killed_in_the_middle_of_a_request(bare: Bare, sent: str, rudely: bool) -> None:
    """Whatever a client had begun to send, its end is its own."""
    assert bare.worker.connection.sock is not None
    bare.worker.connection.sock.sendall(sent.encode())
    time.sleep(0.1)  # so that it is read before the end is
    bare.worker.close(rudely)
    soon(bare.client, bare.pathspec, lambda s: s.task() == "failed")


def test_the_heartbeat_follows_the_connection(bare: Bare) -> None:
    path = bare.name
    first = bare.client.get(path)["last_heartbeat_ts"]
    wait_for(lambda: bare.client.get(path)["last_heartbeat_ts"] > first)
    wait_for(lambda: bare.client.get(bare.path)["last_heartbeat_ts"] > first)
    bare.worker.close()
    time.sleep(0.2)
    last = bare.client.get(path)["last_heartbeat_ts"]
    time.sleep(1.2)
    assert bare.client.get(path)["last_heartbeat_ts"] == last


def test_heartbeats_bring_a_lost_task_back(bare: Bare) -> None:
    """A client with sidecars: once it beats, its beats decide and not its connections."""
    bare.worker.close()
    soon(bare.client, bare.pathspec, lambda s: s.task() == "failed")
    answer = bare.client.post(f"{bare.name}/heartbeat", {})
    assert json.loads(answer)["wait_time_in_seconds"] == 10
    seen = bare.now
    assert (seen.task(), seen.run) == ("running", "running")
    bare.runtime.close()
    time.sleep(0.3)
    assert bare.now.run == "running"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_lost_survives_a_restart_and_the_living_too(
    make_service: Callable[..., Client], tmp_path: Path, number: int
) -> None:
    """What had died stays dead with the same times; whose connection the daemon itself has cut is not dead."""
    client = make_service(tmp_path)
    dead, living = Bare(client), Bare(client)
    dead.worker.close()
    dead.runtime.close()
    soon(client, dead.pathspec, lambda s: s.run == "failed")
    before = dead.now
    os.kill(client.pid, number)  # type: ignore[attr-defined]
    wait_for(lambda: not running(client.pid))  # type: ignore[attr-defined]
    again = make_service(tmp_path)
    after = Seen(again, "F", dead.number)
    assert after.rows == before.rows and after.run_row == before.run_row and after.run == "failed"
    seen = Seen(again, "F", living.number)
    assert (seen.run, seen.task()) == ("running", "running")


def test_local_mode_reads_what_was_lost(bare: Bare) -> None:
    """What mflocal notes about a death is not in the way of local mode."""
    bare.worker.close()
    soon(bare.client, bare.pathspec, lambda s: s.task() == "failed")
    code = (
        "from metaflow import Run, namespace; namespace(None); r = Run(%r); "
        "print([t.id for t in r['start']], r.finished, len(r['start'].task.metadata))"
        % bare.pathspec
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=bare.client.root, env=clean_env(), text=True,
                          stdout=subprocess.PIPE, timeout=60)  # fmt: skip
    assert done.stdout.strip() == f"['{bare.task}'] False 1"


# -- plain local mode


def test_a_local_run_from_before_the_boot(
    make_service: Callable[..., Client], tmp_path: Path
) -> None:
    """It is failed, though it may be silent for longer by the settings; one begun since may compute for days."""
    booted = machine_booted(str(tmp_path))
    if booted is None:
        pytest.skip("this file system does not say who writes to it")
    for flow, at in (("Old", booted - 60_000), ("New", booted + 60_000)):
        parts = [flow, str(at * 1000), "start", "1"]
        keys = ["flow_id", "run_number", "step_name", "task_id"]
        for depth in range(1, 5):
            meta = tmp_path.joinpath(".metaflow", *parts[:depth], "_meta")
            meta.mkdir(parents=True)
            record = {**dict(zip(keys, parts[:depth])), "user_name": "u", "ts_epoch": at}
            (meta / "_self.json").write_text(json.dumps(record))
        record = {**record, "field_name": "attempt", "type": "attempt", "value": "0", "tags": []}
        (meta / f"sysmeta_attempt_{at}.json").write_text(json.dumps(record))
        for path in (*meta.iterdir(), meta):
            os.utime(path, (at / 1000, at / 1000))
    client = make_service(tmp_path, METAFLOW_LOCAL_SERVICE_LOCAL_CUTOFF="30000000")
    for flow, status in (("Old", "failed"), ("New", "running")):
        (run,) = client.get(f"/api/flows/{flow}/runs")["data"]
        seen = Seen(client, flow, str(run["run_number"]))
        assert (seen.run, seen.task()) == (status, status)


# -- numbers in files

ODD_NUMBERS = [
    "1" + "0" * 400,
    "NaN",
    "Infinity",
    "-Infinity",
    "-5",
    '"5"',
    "[5]",
    "1e400",
    "true",
    "null",
]


def test_odd_numbers_in_files(make_service: Callable[..., Client], tmp_path: Path) -> None:
    """Whatever a file claims as a time, every page and command that shows it still answers, in valid JSON."""
    client = make_service(tmp_path)
    body = {"user_name": "u", "tags": [], "system_tags": []}
    client.post("/flows/F", {})
    runs = []
    for _ in ODD_NUMBERS:
        number = client.post("/flows/F/run", body)["run_number"]
        client.post(f"/flows/F/runs/{number}/steps/start/step", body)
        task = client.post(f"/flows/F/runs/{number}/steps/start/task", body)["task_id"]
        path = f"/flows/F/runs/{number}/steps/start/tasks/{task}"
        row = {"value": "0", "type": "x", "tags": ["attempt_id:0"]}
        client.post(
            f"{path}/metadata", [{**row, "field_name": "attempt"}, {**row, "field_name": "x"}]
        )
        art = {"name": "a", "location": " ", "ds_type": "local", "sha": "0", "attempt_id": 0}
        client.post(f"{path}/artifact", [{**art, "type": "metaflow.artifact", "content_type": "t"}])
        client.post(f"{path}/heartbeat", {})
        runs.append((number, path))
    os.kill(client.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    for (number, _), odd in zip(runs, ODD_NUMBERS):
        for path in (tmp_path / f".metaflow/F/{number}").rglob("*.json"):
            record = json.loads(path.read_text())
            for key in ("ts_epoch", "last_heartbeat_ts"):
                if key in record:
                    record[key] = "ODD"
            if record.get("lost") is not None:
                record["lost"] = {"0": "ODD", "1": "ODD"}
            path.write_text(json.dumps(record).replace('"ODD"', odd))
    client = make_service(tmp_path)
    for number, path in runs:
        for url in (f"/flows/F/runs/{number}", path, f"{path}/metadata", f"{path}/artifacts",
                    f"/flows/F/runs/{number}/metadata", f"/api/flows/F/runs/{number}",
                    f"/api/flows/F/runs/{number}/steps", f"/api/flows/F/runs/{number}/tasks",
                    f"/api{path}/attempts", f"/api{path}/metadata", f"/api{path}/artifacts"):  # fmt: skip
            body = client.get(url)
            json.dumps(body, allow_nan=False)
            assert "e+" not in str(body) and "0" * 100 not in str(body)
        client.post(f"{path}/heartbeat", {})
    for url in (
        "/flows/F/runs",
        "/flows/F/runs?status=running",
        "/api/runs?_order=-ts_epoch&_limit=100",
    ):
        assert len(client.get(url) if "api" not in url else client.get(url)["data"]) == len(runs)
    for words in (["status"], ["status", "--json"], ["stop", "--force"]):
        done = mflocal(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
