"""Makes trees of `.metaflow` as Metaflow's local mode writes them, thousands of runs in seconds.

    python tests/make_tree.py ROOT flows 1000           1,000 flows with one run each
    python tests/make_tree.py ROOT runs 10000           10,000 runs of one flow
    python tests/make_tree.py ROOT tasks 10000          one run with a foreach of 10,000 tasks
    python tests/make_tree.py ROOT artifacts 1000       one run with a task of 1,000 artifacts

File names, keys, their order and the modes are those of Metaflow 2.19 (checked by test_scale.py against a flow
that really ran). A tree is slim by default: of the records of a task only those about its attempts are made,
for these decide what a reader sees; `--full` makes all of them. The contents of artifacts are never made.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any, Iterator, NamedTuple, Sequence

Record = dict[str, Any]

USER = "tester"
METAFLOW = "2.19.39"
PYTHON = "3.13.0"
RUN_TAGS = [
    f"user:{USER}",
    f"metaflow_version:{METAFLOW}",
    f"python_version:{PYTHON}",
    "runtime:dev",
]
ARTIFACT_TAGS = [
    f"metaflow_version:{METAFLOW}",
    f"python_version:{PYTHON}",
    "runtime:dev",
    f"user:{USER}",
]
SHA = "868436778cb011a1c6230bc12534683ab0b7f1c3"
SPACING = 60_000  # ms between two runs
# What a task with a foreach above it keeps beside its own artifacts.
INNER_ARTIFACTS = (
    "_configs_processed", "_current_step", "_exception", "_foreach_num_splits", "_foreach_stack", "_foreach_values",
    "_foreach_var", "_graph_info", "_iteration_stack", "_success", "_task_ok", "_transition", "items", "n", "name", "r",
)  # fmt: skip


class Place(NamedTuple):
    """A task: where it is and when it was made (ms)."""

    root: str
    flow: str
    run: str
    step: str
    task: str
    at: int

    @property
    def ids(self) -> Record:
        """The ids of a record, in the order of local mode's."""
        return {"run_number": self.run, "step_name": self.step, "task_id": self.task}

    @property
    def meta(self) -> str:
        """Its `_meta`."""
        return f"{self.root}/{self.flow}/{self.run}/{self.step}/{self.task}/_meta"


def _write(path: str, record: Record) -> None:
    # Local mode writes by mkstemp and rename: mode 0600.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(fd, json.dumps(record).encode())
    os.close(fd)


def _object(path: str, ids: Record, flow: str, at: int, tags: Sequence[str] = ()) -> None:
    os.mkdir(path)
    os.mkdir(f"{path}/_meta")
    record = {
        **ids,
        "flow_id": flow,
        "user_name": USER,
        "tags": list(tags),
        "system_tags": RUN_TAGS,
        "ts_epoch": at,
    }
    _write(f"{path}/_meta/_self.json", record)


def make_flow(metaflow_dir: str, flow: str, at: int | None = None) -> str:
    """A flow's directory and record, unless it is there; returns its path."""
    path = f"{metaflow_dir}/{flow}"
    if not os.path.isdir(path):
        os.makedirs(f"{path}/_meta")
        _write(
            f"{path}/_meta/_self.json", {"flow_id": flow, "ts_epoch": _now() if at is None else at}
        )
    return path


def make_run(metaflow_dir: str, flow: str, at: int, tags: Sequence[str] = ()) -> str:
    """A run without steps; returns its id, microseconds since the epoch."""
    run = str(at * 1000)
    path = f"{make_flow(metaflow_dir, flow, at)}/{run}"
    _object(path, {"run_number": run}, flow, at, tags)
    with open(f"{metaflow_dir}/{flow}/latest_run", "w") as file:
        file.write(run)
    return run


def make_step(metaflow_dir: str, flow: str, run: str, step: str, at: int) -> None:
    """A step without tasks."""
    _object(f"{metaflow_dir}/{flow}/{run}/{step}", {"run_number": run, "step_name": step}, flow, at)


def make_metadata(place: Place, field: str, value: Any, at: int, kind: str = "") -> None:
    """One metadata record."""
    record = {
        "flow_id": place.flow, **place.ids, "field_name": field, "type": kind or field, "value": value,
        "tags": ["attempt_id:0"], "user_name": USER, "ts_epoch": at,
    }  # fmt: skip
    _write(f"{place.meta}/sysmeta_{field}_{at}.json", record)


def make_artifact(place: Place, name: str, at: int) -> None:
    """One artifact record."""
    record = {
        **place.ids, "attempt_id": 0, "name": name, "content_type": "pickle-v4", "type": "metaflow.artifact",
        "sha": SHA, "ds_type": "local", "location": f":root:{place.root}", "flow_id": place.flow, "user_name": USER,
        "tags": [], "system_tags": ARTIFACT_TAGS, "ts_epoch": at,
    }  # fmt: skip
    _write(f"{place.meta}/0_artifact_{name}.json", record)


def make_task(place: Place, *, split: int = -1, finished: bool = True, full: bool = False) -> None:
    """A task of one attempt, well ended or still at work; `split` is its place in the foreach around it."""
    _object(os.path.dirname(place.meta), place.ids, place.flow, place.at)
    at = place.at + 11
    if full:
        for moment in (at, at + 7):
            for field, value in _about(place.step):
                make_metadata(place, field, value, moment)
    at += 20
    make_metadata(place, "attempt", "0", at)
    make_metadata(place, "ds-root", place.root, at)
    make_metadata(place, "ds-type", "local", at)
    if full:
        make_metadata(place, "origin-run-id", "None", at)
    if split >= 0:
        make_metadata(place, "foreach-execution-path", f"{place.step}:{split}", at)
        make_metadata(place, "foreach-stack", [f"items={split}"], at)
    if finished:
        make_metadata(place, "attempt_ok", "True", at + 50, "internal_attempt_status")
        make_metadata(place, "attempt-done", "0", at + 60)
        make_artifact(place, "_task_ok", at + 70)
        for name in INNER_ARTIFACTS if full else ():
            make_artifact(place, name, at + 70)


def _about(step: str) -> Iterator[tuple[str, str]]:
    fields = (
        ("metaflow_version", METAFLOW),
        ("python_version", PYTHON),
        ("runtime", "dev"),
        ("user", USER),
    )
    yield from (*fields, ("script-name", f"{step}.py"))


def make_parameters(metaflow_dir: str, flow: str, run: str, at: int) -> None:
    """The step `_parameters` and its task 0, which are in every run."""
    make_step(metaflow_dir, flow, run, "_parameters", at)
    place = Place(metaflow_dir, flow, run, "_parameters", "0", at)
    _object(os.path.dirname(place.meta), place.ids, flow, at)
    make_metadata(place, "attempt-done", "0", at + 3)
    make_metadata(place, "start_step", "start", at + 5)
    make_metadata(place, "end_step", "end", at + 5)
    for name in ("_graph_info", "_task_ok", "name"):
        make_artifact(place, name, at + 4)


def make_runs(
    metaflow_dir: str,
    count: int,
    flow: str = "ManyRuns",
    *,
    last: int | None = None,
    full: bool = False,
) -> list[str]:
    """Completed runs of one flow with the steps start and end, a minute apart; the newest began at `last` (ms)."""
    last = _now() - 10_000 if last is None else last
    runs = []
    for number in range(count):
        at = last - (count - 1 - number) * SPACING
        run = make_run(metaflow_dir, flow, at, tags=(f"batch:{number % 10}",))
        make_parameters(metaflow_dir, flow, run, at + 5)
        for task, step in enumerate(("start", "end"), 1):
            moment = at + task * 1000
            make_step(metaflow_dir, flow, run, step, moment)
            make_task(Place(metaflow_dir, flow, run, step, str(task), moment + 2), full=full)
        runs.append(run)
    return runs


def make_flows(metaflow_dir: str, count: int, *, full: bool = False) -> list[str]:
    """Flows of one run each."""
    names = [f"Flow{number:05d}" for number in range(count)]
    last = _now() - 10_000
    for number, name in enumerate(names):
        make_runs(metaflow_dir, 1, name, last=last - (count - 1 - number) * SPACING, full=full)
    return names


def make_foreach(
    metaflow_dir: str,
    tasks: int,
    flow: str = "WideRun",
    *,
    finished: bool = True,
    full: bool = False,
) -> str:
    """One run with `tasks` tasks in its step `work`; returns its id. If not `finished` the tasks are at work."""
    at = _now() - 60_000 - tasks * 3
    run = make_run(metaflow_dir, flow, at)
    make_parameters(metaflow_dir, flow, run, at + 5)
    make_step(metaflow_dir, flow, run, "start", at + 1000)
    make_task(Place(metaflow_dir, flow, run, "start", "1", at + 1002), full=full)
    make_step(metaflow_dir, flow, run, "work", at + 2000)
    for number in range(tasks):
        place = Place(metaflow_dir, flow, run, "work", str(number + 2), at + 2002 + number * 3)
        make_task(place, split=number, finished=finished, full=full)
    for task, step in enumerate(("join", "end") if finished else (), tasks + 2):
        moment = at + 3000 + task * 3
        make_step(metaflow_dir, flow, run, step, moment)
        make_task(Place(metaflow_dir, flow, run, step, str(task), moment + 2), full=full)
    return run


def make_artifacts(metaflow_dir: str, count: int, flow: str = "ManyArtifacts") -> str:
    """One run whose task in `start` has `count` artifacts; returns the task's pathspec."""
    run = make_runs(metaflow_dir, 1, flow)[0]
    place = Place(metaflow_dir, flow, run, "start", "1", _now())
    for number in range(count):
        make_artifact(place, f"x{number:05d}", place.at)
    return f"{flow}/{run}/start/1"


def _now() -> int:
    return time.time_ns() // 1_000_000


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Makes trees of .metaflow as local mode writes them."
    )
    parser.add_argument("root", help="the directory that contains .metaflow, or will")
    parser.add_argument("what", choices=("flows", "runs", "tasks", "artifacts"))
    parser.add_argument("count", type=int)
    parser.add_argument(
        "--full", action="store_true", help="all records of every task, as of a real flow"
    )
    arguments = parser.parse_args()
    metaflow_dir = os.path.join(os.path.realpath(arguments.root), ".metaflow")
    os.makedirs(metaflow_dir, exist_ok=True)
    began = time.perf_counter()
    if arguments.what == "flows":
        make_flows(metaflow_dir, arguments.count, full=arguments.full)
    elif arguments.what == "runs":
        make_runs(metaflow_dir, arguments.count, full=arguments.full)
    elif arguments.what == "tasks":
        make_foreach(metaflow_dir, arguments.count, full=arguments.full)
    else:
        make_artifacts(metaflow_dir, arguments.count)
    print(
        f"{arguments.count} {arguments.what} in {metaflow_dir}, {time.perf_counter() - began:.1f} s"
    )


if __name__ == "__main__":
    main()
