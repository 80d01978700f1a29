"""What test_store and test_metadata_api share: one pair of flow runs, and scripts that run under Metaflow."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

from conftest import FLOWS, Client, clean_env

# What scripts need of Metaflow, under its names of 2.12.0 and of today.
PRELUDE = """
import json, os, sys
try:
    from metaflow.plugins.metadata_providers.local import LocalMetadataProvider
    from metaflow.plugins.metadata_providers.service import ServiceMetadataProvider
    from metaflow.metadata_provider.metadata import DataArtifact, MetaDatum
except ImportError:
    from metaflow.plugins.metadata.local import LocalMetadataProvider
    from metaflow.plugins.metadata.service import ServiceMetadataProvider
    from metaflow.metadata.metadata import DataArtifact, MetaDatum
from metaflow.metaflow_environment import MetaflowEnvironment
"""


def metaflow_env(root: Path, url: str | None = None) -> dict[str, str]:
    """The environment of a client: local mode on `root`, or the service at `url` with artifacts in `root`."""
    env = {"METAFLOW_DATASTORE_SYSROOT_LOCAL": str(root), "METAFLOW_DEFAULT_METADATA": "local"}
    if url:
        env.update(
            METAFLOW_DEFAULT_METADATA="service",
            METAFLOW_SERVICE_URL=url,
            METAFLOW_ENABLED_SIDECAR="",
        )
    home = root / "home"
    home.mkdir(exist_ok=True)
    return clean_env(
        HOME=str(home), METAFLOW_HOME=str(home), NO_PROXY="127.0.0.1", no_proxy="127.0.0.1", **env
    )


def script(code: str, root: Path, url: str | None = None, *args: str) -> Any:
    """Runs Python code that may use the PRELUDE's names and returns the JSON that it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *args],
        cwd=root, env=metaflow_env(root, url), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _run_flow(root: Path, url: str | None, name: str) -> subprocess.Popen[bytes]:
    with open(root / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, str(FLOWS / "meta_flow.py"), "--no-pylint", "run", "--tag", "t1", "--tag", "größe",
             "--max-workers", "2", "--run-id-file", str(root / f"{name}.id")],
            cwd=root, env=metaflow_env(root, url), stdout=log, stderr=log,
        )  # fmt: skip


def flow_root(base: Path, make_service: Callable[..., Client]) -> dict[str, str]:
    """{"root", "local", "http"}: a root where MetaFlow ran twice at the same time, in local mode and over HTTP.

    Made once for all workers of a test run; nobody serves or changes it afterwards, so copy it.
    """
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with open(shared / "meta_flow.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = shared / "meta_flow.json"
        if not known.exists():
            root = shared / "meta_flow"
            root.mkdir()
            service = make_service(root)
            flows = {
                "local": _run_flow(root, None, "local"),
                "http": _run_flow(root, service.url, "http"),
            }
            told = {"root": str(root)}
            for name, process in flows.items():
                assert process.wait(180) == 0, (root / f"{name}.log").read_text()
                told[name] = (root / f"{name}.id").read_text().strip()
            known.write_text(json.dumps(told))
        return dict(json.loads(known.read_text()))
