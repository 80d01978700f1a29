"""What all tests share: the module under test, and real services on real roots."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Begun in the background of a shell without job control; what we start would inherit it and hear no Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGQUIT) == signal.SIG_IGN:
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)

REPO = Path(__file__).resolve().parent.parent
MODULE = REPO / "mflocal.py"
FLOWS = Path(__file__).resolve().parent / "flows"
sys.path.insert(0, str(REPO))


class Answer(NamedTuple):
    """One answer: status, body as JSON (or text, where it is none), headers with lower-case names."""

    status: int
    body: Any
    headers: dict[str, str]


class Client:
    """The plainest client there is, for one service."""

    def __init__(self, url: str, root: Path) -> None:
        self.url = url
        self.root = root

    def __call__(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers=headers or {}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return _answer(response.status, response.read(), response.headers)
        except urllib.error.HTTPError as error:
            return _answer(error.code, error.read(), error.headers)

    def get(self, path: str) -> Any:
        """The JSON of a GET that must succeed."""
        answer = self("GET", path)
        assert answer.status == 200, answer
        return answer.body

    def post(self, path: str, body: Any) -> Any:
        """The JSON of a POST that must succeed."""
        answer = self("POST", path, body)
        assert answer.status == 200, answer
        return answer.body


def _answer(status: int, raw: bytes, headers: Any) -> Answer:
    try:
        body = json.loads(raw)
    except ValueError:
        body = raw.decode("utf-8", "replace")
    return Answer(status, body, {name.lower(): value for name, value in headers.items()})


def clean_env(**extra: str) -> dict[str, str]:
    """This environment without anything that would steer Metaflow or mflocal, plus `extra`."""
    steering = ("METAFLOW_", "MFLOCAL", "PYTEST_", "PYTHONDONTWRITEBYTECODE")
    env = {k: v for k, v in os.environ.items() if not k.startswith(steering)}
    return {**env, "USER": "tester", "PYTHONUNBUFFERED": "1", **extra}


# As an installed mflocal runs, with its bytecode cached: `python mflocal.py` would compile 12,000 lines each time.
COMMAND = [
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(REPO)!r}); import mflocal; mflocal.console()",
]


def wait_for(condition: Callable[[], Any], seconds: float = 60.0, pause: float = 0.02) -> Any:
    """The first true value of the condition."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(pause)


def mflocal(
    *args: str, cwd: Path, check: bool = False, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Runs the command line of the checkout to its end; text streams are captured."""
    kwargs.setdefault("env", clean_env())
    kwargs.setdefault("timeout", 120)
    done = subprocess.run(
        [*COMMAND, *args], cwd=cwd, capture_output=True, text=True, check=False, **kwargs
    )
    assert not check or done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done


@pytest.fixture
def make_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Client]]:
    """A maker of services: `serve` in the foreground on a root of their own, stopped after the test."""
    started: list[subprocess.Popen[str]] = []

    def make(root: Path | None = None, *options: str, **env: str) -> Client:
        root = root or tmp_path_factory.mktemp("root")
        process = subprocess.Popen(
            [*COMMAND, "serve", "--root", str(root), *options],
            cwd=root, env=clean_env(**env), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        started.append(process)
        state = root / ".metaflow" / ".mflocal" / "daemon.json"
        until = time.monotonic() + 60
        while time.monotonic() < until and process.poll() is None:
            try:
                told = json.loads(state.read_text())
                if told.get("state") == "ready" and told.get("pid") == process.pid:
                    client = Client(f"http://127.0.0.1:{told['port']}", root)
                    client.pid = process.pid  # type: ignore[attr-defined]
                    client.process = process  # type: ignore[attr-defined]
                    return client
            except (OSError, ValueError):
                pass
            time.sleep(0.02)
        raise AssertionError(
            "the service did not start: " + (process.stderr.read() if process.stderr else "")
        )

    yield make
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stderr:
            process.stderr.close()


@pytest.fixture
def service(make_service: Callable[..., Client]) -> Client:
    """One service on an empty root."""
    return make_service()


@pytest.fixture
def ran(
    tmp_path_factory: pytest.TempPathFactory, make_service: Callable[..., Client], tmp_path: Path
) -> Iterator[dict[str, Any]]:
    """A copy of the root where MetaFlow ran in local mode and over HTTP: {"root", "local", "http"}."""
    from meta_shared import flow_root

    told: dict[str, Any] = flow_root(tmp_path_factory.getbasetemp(), make_service)
    source = Path(told["root"]) / ".metaflow"
    shutil.copytree(source, tmp_path / "copy/.metaflow", ignore=shutil.ignore_patterns(".mflocal"))
    yield {**told, "root": tmp_path / "copy"}


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A project directory of its own; its daemon is stopped after the test."""
    root = tmp_path / "project"
    root.mkdir()
    yield root
    if (root / ".metaflow").is_dir():
        mflocal("stop", "--force", "--root", str(root), cwd=root)
