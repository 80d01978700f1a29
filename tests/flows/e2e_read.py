"""Describes a run as Metaflow's Client sees it: over HTTP, and in local mode from the files; prints both as JSON.

usage: e2e_read.py FLOW/RUN URL ROOT
"""

import json
import sys

from metaflow import Metaflow, Run, metadata, namespace


def value_of(record):
    """The value of a metadata record; the service answers a list as the text that its database makes of it."""
    return "{%s}" % ",".join(record.value) if isinstance(record.value, list) else record.value


def describe_task(task):
    artifacts = {
        a.id: [a.sha, str(a.created_at), a.finished_at is not None] for a in task.artifacts
    }
    return {
        "successful": task.successful,
        "finished": task.finished,
        "attempt": task.current_attempt,
        "created_at": str(task.created_at),
        "artifacts": artifacts,
        "metadata": sorted([m.name, value_of(m), m.type] for m in task.metadata),
        "tags": sorted(task.tags),
        "parents": sorted(p.pathspec for p in task.parent_tasks)
        if hasattr(task, "parent_tasks")
        else [],
        "stdout": task.stdout,
        "exception": str(task.exception) if task.exception else None,
    }


def describe(pathspec):
    namespace(None)
    run = Run(pathspec)
    end = run.end_task
    return {
        "flows": sorted(f.id for f in Metaflow().flows),
        "runs": [r.id for r in run.parent],
        "latest": run.parent.latest_run.id,
        "latest_successful": getattr(run.parent.latest_successful_run, "id", None),
        "successful": run.successful,
        "finished": run.finished,
        "created_at": str(run.created_at),
        "finished_at": str(run.finished_at),
        "user_tags": sorted(run.user_tags),
        "system_tags": sorted(run.system_tags),
        "end": end.pathspec if end else None,
        "data": {name: getattr(end.data, name) for name in end.data._artifacts} if end else None,
        "steps": {s.id: {t.id: describe_task(t) for t in s} for s in run},
    }


if __name__ == "__main__":
    pathspec, url, root = sys.argv[1:]
    seen = {}
    for how in ("service@" + url, "local@" + root):
        metadata(how)
        seen[how.partition("@")[0]] = describe(pathspec)
    json.dump(seen, sys.stdout, default=str)
