"""Flows as real processes under `mflocal run`, and what the service says about them meanwhile."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable

from conftest import FLOWS, MODULE, Client, clean_env, wait_for

PYTHON = sys.executable
SLOW = 60.0  # s for what only a very busy machine needs


def daemon_state(root: Path) -> dict[str, Any]:
    """What daemon.json says."""
    return json.loads((root / ".metaflow" / ".mflocal" / "daemon.json").read_text())  # type: ignore[no-any-return]


def client_of(root: Path) -> Client:
    """A client of the daemon of this root."""
    return Client("http://127.0.0.1:%d" % daemon_state(root)["port"], root)


def flow_env(**extra: str) -> dict[str, str]:
    """The environment of a flow: @parallel and @card start further processes as `python`, which must be this one."""
    return clean_env(
        **{"PATH": os.pathsep.join([str(Path(PYTHON).parent), os.environ["PATH"]]), **extra}
    )


def running(pid: int) -> bool:
    """Whether the process is there (a zombie is not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def flow_file(project: Path, name: str) -> Path:
    """A copy of tests/flows/NAME in the project, with what it imports."""
    for source in (name, "live_notes.py"):
        shutil.copy(FLOWS / source, project / source)
    return project / name


class Started:
    """A command under `mflocal run` in a process group of its own; everything in it is ended by `end`."""

    def __init__(
        self,
        project: Path,
        *command: str,
        options: tuple[str, ...] = (),
        name: str = "",
        **env: str,
    ) -> None:
        self.project = project
        self.notes = project / ("notes" + name)
        self.notes.mkdir(exist_ok=True)
        self.log = project / f"output{name}.txt"
        words = [PYTHON, str(MODULE), "run", *options, *command]
        self._start(words, flow_env(NOTES=str(self.notes), **env))

    def _start(self, words: list[str], env: dict[str, str]) -> None:
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                words, cwd=self.project, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        """What was printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 2 * SLOW) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    def note(self, name: str) -> tuple[int, int, str]:
        """(pid, pid of the parent, text) that the flow has noted; waits for it."""
        path = self.notes / name
        wait_for(
            lambda: (
                path.exists() or self.process.poll() is not None and not running(self.process.pid)
            )
        )
        assert path.exists(), self.output
        pid, parent, text = path.read_text().split(" ", 2)
        return int(pid), int(parent), text

    def say(self, word: str = "go") -> None:
        """Lets the flow go on."""
        (self.notes / word).touch()

    def end(self) -> None:
        """Ends whatever of it is still there."""
        self.say("go")
        self.say("end-children")
        self.say("end-reader")
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


class Plain(Started):
    """The same without the wrapper, with the variables that `mflocal env` prints."""

    def __init__(self, project: Path, *command: str, name: str = "", **env: str) -> None:
        self.project = project
        self.notes = project / ("notes" + name)
        self.notes.mkdir(exist_ok=True)
        self.log = project / f"output{name}.txt"
        script = 'eval "$("$0" "$1" env -q)" && shift && exec "$@"'
        words = ["sh", "-c", script, PYTHON, str(MODULE), *command]
        self._start(words, flow_env(NOTES=str(self.notes), **env))


class Seen:
    """How one run looks now: by the metadata API's status filter, and as rows of the UI's API."""

    def __init__(self, client: Client, flow: str, run: str) -> None:
        self.by_filter = [
            status
            for status in ("running", "completed", "failed")
            if any(
                str(r["run_number"]) == run
                for r in client.get(f"/flows/{flow}/runs?status={status}")
            )
        ]
        self.run_row = client.get(f"/api/flows/{flow}/runs/{run}")["data"]
        self.rows = {
            (row["step_name"], row["attempt_id"]): row
            for row in client.get(f"/api/flows/{flow}/runs/{run}/tasks?_limit=1000")["data"]
            if row["step_name"] != "_parameters"
        }

    @property
    def run(self) -> str:
        """The status of the run; both ways of asking, shortly after each other, must agree."""
        words = {*self.by_filter, self.run_row["status"]}
        return (
            words.pop()
            if len(words) == 1 and self.by_filter
            else f"{self.by_filter} or {self.run_row['status']}"
        )

    def task(self, step: str = "start", attempt: int = 0) -> str:
        """The status of an attempt of the only task of a step, `none` where there is no such row."""
        row = self.rows.get((step, attempt))
        return str(row["status"]) if row else "none"


def see(client: Client, text: str) -> Seen:
    """The run of a pathspec, now."""
    flow, run = text.split("/")[:2]
    return Seen(client, flow, run)


def soon(client: Client, text: str, condition: Callable[[Seen], bool]) -> Seen:
    """Waits until a run looks like that."""
    end = (
        time.monotonic() + 45
    )  # below the cutoff of 60 s after which whoever is silent counts as dead
    while True:
        found = see(client, text)
        if condition(found):
            return found
        assert time.monotonic() < end, (found.run_row, found.rows)
        time.sleep(0.02)


class Watch:
    """Looks at all runs and tasks of the flows all the time; `statuses` is everything that was ever shown."""

    def __init__(self, client: Client, *flows: str) -> None:
        self.client = client
        self.flows = flows
        self.statuses: set[tuple[str, str]] = set()
        self.looks = 0
        self.problems: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        assert not self.problems, self.problems

    def _look(self) -> None:
        while not self._over.wait(0.05):
            for flow in self.flows:
                try:
                    runs = self._rows(f"/api/flows/{flow}/runs")
                    for run in runs:
                        self.statuses.add((f"{flow}/{run['run_number']}", run["status"]))
                        for row in self._rows(
                            f"/api/flows/{flow}/runs/{run['run_number']}/tasks?_limit=1000"
                        ):
                            name = (
                                "{flow_id}/{run_number}/{step_name}/{task_id}/{attempt_id}".format(
                                    **row
                                )
                            )
                            self.statuses.add((name, row["status"]))
                    self.looks += bool(runs)
                except (OSError, http.client.HTTPException):
                    continue  # the daemon is down for a moment

    def _rows(self, path: str) -> Any:
        answer = self.client("GET", path)
        if answer.status == 200:
            return answer.body["data"]
        if answer.status != 503:  # draining
            self.problems.append(str(answer))
        return []

    def ever(self, status: str) -> list[str]:
        """Everything that was shown with this status."""
        return sorted(name for name, shown in self.statuses if shown == status)
