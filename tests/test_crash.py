"""Kills, full and failing disks, clocks that jump: what was answered 200 is there, and the service goes on."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from conftest import REPO, Client, clean_env, mflocal, wait_for
from processes import Started, daemon_state, running
from wire import BODY, Served

KILLS = int(os.environ.get("MFLOCAL_KILLS", "20"))
SEED = int(os.environ.get("MFLOCAL_KILL_SEED", "1"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


# -- kill -9


class Writer(threading.Thread):
    """A client that writes one thing after another on one connection; keeps what was answered 200."""

    def __init__(self, served: Served, number: int) -> None:
        super().__init__(daemon=True)
        self.connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        self.number = number
        self.said: list[tuple[str, Any, Any]] = []  # (path, body, answer)
        self.trouble = ""

    def run(self) -> None:
        try:
            self.write()
        except (OSError, http.client.HTTPException):
            pass  # killed
        except Exception as error:
            self.trouble = repr(error)

    def post(self, path: str, body: Any, method: str = "POST") -> Any:
        self.connection.request(method, path, json.dumps(body))
        response = self.connection.getresponse()
        data = response.read()
        assert response.status == 200, (path, response.status, data)
        answer = json.loads(data)
        self.said.append((path, body, answer))
        return answer

    def write(self) -> None:
        for lap in range(10_000):
            run = self.post("/flows/F/run", {**BODY, "tags": [f"{self.number}-{lap}"]})[
                "run_number"
            ]
            path = f"/flows/F/runs/{run}"
            self.post(f"{path}/steps/s/step", BODY)
            for _ in range(3):
                task = f"{path}/steps/s/tasks/{self.post(f'{path}/steps/s/task', BODY)['task_id']}"
                rows = [
                    {
                        "field_name": f"f{i}",
                        "value": f"{self.number}-{lap}-" + "v" * (i * 700),
                        "type": "t",
                    }
                    for i in range(8)
                ]
                self.post(f"{task}/metadata", rows)
                self.post(
                    f"{task}/artifact",
                    [{"name": f"a{i}", "sha": f"{lap}-{i}", "attempt_id": 0} for i in range(8)],
                )
                self.post(f"{task}/heartbeat", {})
            self.post(
                f"{path}/tag/mutate", {"tags_to_add": ["late"], "tags_to_remove": []}, "PATCH"
            )


def record(path: Path) -> Any:
    return json.loads(path.read_text())


def missing(metaflow: Path, said: list[tuple[str, Any, Any]]) -> list[str]:
    """What was answered 200 and is not on disk, whole."""
    wrong, files = [], {}
    for path, body, answer in said:
        words = path.split("/")
        run = metaflow / "F" / (str(answer["run_number"]) if words[-1] == "run" else words[4])
        try:
            if words[-1] == "run":
                known = record(run / "_meta/_self.json")["tags"]
                assert set(body["tags"]) <= set(known)
            elif words[-1] == "step":
                assert record(run / "s/_meta/_self.json")["step_name"] == "s"
            elif words[-1] == "task":
                assert record(run / "s" / str(answer["task_id"]) / "_meta/_self.json")[
                    "task_id"
                ] == str(answer["task_id"])
            elif words[-1] == "mutate":
                assert answer["tags"] == record(run / "_meta/_self.json")["tags"]
            elif words[-1] in ("metadata", "artifact"):
                meta = run / "s" / words[8] / "_meta"
                if meta not in files:
                    files[meta] = {name: record(meta / name) for name in os.listdir(meta)}
                found = list(files[meta].values())
                for row in body:
                    keys = (
                        ("field_name", "value", "type")
                        if "value" in row
                        else ("name", "sha", "attempt_id")
                    )
                    assert (
                        sum(all(have.get(key) == row[key] for key in keys) for have in found) == 1
                    ), row
        except (OSError, ValueError, AssertionError, KeyError) as error:
            wrong.append(f"{path}: {error!r:.200}")
    return wrong


def half_files(metaflow: Path) -> list[str]:
    """Files below the flows that are not whole JSON, and names that are nobody's.

    Signs of life are written in place by one call; a kill may leave the new, empty file, which counts as none.
    """
    wrong = []
    for path in (metaflow / "F").rglob("*"):
        if path.is_file() and not (path.name == "_mflocal.json" and path.stat().st_size == 0):
            try:
                assert path.suffix == ".json" and isinstance(record(path), dict)
            except (ValueError, AssertionError):
                wrong.append(str(path))
    return wrong


def test_kill_9_under_load(root: Path) -> None:
    """MFLOCAL_KILLS (20) times at moments from MFLOCAL_KILL_SEED (1); four clients write all the time."""
    chance = random.Random(SEED)
    port, total, leftovers, slowest = 0, 0, 0, 0.0
    temp = root / ".metaflow/.mflocal/tmp"
    for _ in range(KILLS):
        began = time.monotonic()
        served = Served(root)
        slowest = max(slowest, time.monotonic() - began)
        try:
            assert served.port == port or not port, "the same port after a kill"
            port = served.port
            assert os.listdir(temp) == []
            served.client("POST", "/flows/F", {})
            writers = [Writer(served, number) for number in range(4)]
            for writer in writers:
                writer.start()
            time.sleep(chance.uniform(0.02, 0.35))
        finally:
            served.kill()
        for writer in writers:
            writer.join(60)
            assert not writer.is_alive() and not writer.trouble, writer.trouble
        said = [row for writer in writers for row in writer.said]
        total += len(said)
        leftovers += len(os.listdir(temp))
        assert missing(root / ".metaflow", said) == []
        assert half_files(root / ".metaflow") == []
        shutil.rmtree(root / ".metaflow/F")  # keeps the next look short
    print(
        f"{KILLS} kills, {total} requests answered 200, {leftovers} temp files left over, slowest start {slowest:.2f} s"
    )
    assert total > KILLS * 20
    with Served(root) as served:
        assert served.port == port and os.listdir(temp) == [] and "Traceback" not in served.log


def test_readers_after_a_kill_see_what_was_told(root: Path) -> None:
    """The next service answers from the files what the killed one had answered."""
    served = Served(root)
    try:
        served.client("POST", "/flows/F", {})
        writer = Writer(served, 0)
        writer.start()
        time.sleep(0.5)
    finally:
        served.kill()
    writer.join(60)
    with Served(root) as served:
        for path, body, answer in writer.said:
            if path.endswith("/metadata"):
                rows = {row["field_name"]: row["value"] for row in served.client.get(path)}
                assert rows == {row["field_name"]: row["value"] for row in body}
            elif path.endswith("/artifact"):
                assert {row["name"] for row in served.client.get(path + "s")} == {
                    row["name"] for row in body
                }
            elif path.endswith("/task"):
                assert (
                    served.client.get(f"{path}s/{answer['task_id']}")["ts_epoch"]
                    == answer["ts_epoch"]
                )
        assert len(served.client.get("/flows/F/runs")) >= sum(
            path.endswith("/run") for path, _, _ in writer.said
        )


FLOW = """
import os, time
from metaflow import FlowSpec, step
class KilledFlow(FlowSpec):
    @step
    def start(self):
        self.items = list(range(6))
        self.next(self.work, foreach="items")
    @step
    def work(self):
        self.square = self.input ** 2
        for name in ("f%d" % i for i in range(40)):
            setattr(self, name, self.input)
        self.next(self.join)
    @step
    def join(self, inputs):
        self.squares = sorted(i.square for i in inputs)
        self.next(self.end)
    @step
    def end(self):
        assert self.squares == [0, 1, 4, 9, 16, 25]
if __name__ == "__main__":
    KilledFlow()
"""


def test_a_flow_survives_a_daemon_killed_twice(project: Path) -> None:
    """Killed while tasks start and write; the wrapper brings it back on the same port within the client's retries."""
    (project / "killed.py").write_text(FLOW)
    started = Started(
        project, sys.executable, "killed.py", "--no-pylint", "run", "--max-workers", "2"
    )
    try:
        port = int(
            wait_for(
                lambda: (
                    (project / ".metaflow/.mflocal/daemon.json").exists() and daemon_state(project)
                )
            )["port"]
        )
        chance = random.Random(SEED)
        for _ in range(2):
            flow = project / ".metaflow/KilledFlow"
            count = len(list(flow.rglob("sysmeta_*"))) if flow.exists() else 0
            wait_for(lambda: flow.exists() and len(list(flow.rglob("sysmeta_*"))) > count + 8)  # noqa: B023
            time.sleep(chance.uniform(0, 0.3))
            pid = int(daemon_state(project)["pid"])
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: not running(pid))  # noqa: B023
            wait_for(lambda: back(project, pid))  # noqa: B023
        assert started.wait() == 0, started.output
    finally:
        started.end()
    assert started.output.count("started it again") == 2, started.output
    assert int(daemon_state(project)["port"]) == port
    done = [
        path
        for path in (project / ".metaflow/KilledFlow").rglob("sysmeta_attempt_ok_*")
        if record(path)["value"] == "True"
    ]
    assert len(done) == 9  # start, 6 of work, join, end


def back(project: Path, killed: int) -> bool:
    try:
        state = daemon_state(project)
    except (OSError, ValueError):
        return False
    return bool(state["pid"] != killed and state["state"] == "ready")


# -- disks


@pytest.fixture
def mount() -> Iterator[Callable[..., Path]]:
    """A maker of small file systems in memory; a root on each."""
    made: list[Path] = []

    def make(options: str) -> Path:
        disk = Path(tempfile.mkdtemp(prefix="mflocal-disk-"))
        program = shutil.which("mount")
        done = program and subprocess.run(
            [program, "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True
        )
        if not done or done.returncode:
            disk.rmdir()
            pytest.skip("no small file system can be mounted here")
        made.append(disk)
        (disk / "root").mkdir()
        return disk / "root"

    yield make
    for disk in made:
        subprocess.run(["umount", str(disk)], check=True)
        disk.rmdir()
        Path(f"{disk}.log").unlink(missing_ok=True)


def served_on(root: Path, **quick: float) -> Served:
    """A service on a small disk, with other constants; its log lies elsewhere."""
    log = Path(str(root.parent) + ".log")
    found = Served.__new__(Served)
    link = root.parent / "root.log"
    if not link.is_symlink():
        link.symlink_to(log)
    found.__init__(root, quick=quick)  # type: ignore[misc]
    return found


def writes(task: str) -> list[tuple[str, str, Any]]:
    """One of each kind of write."""
    run, step = task.rpartition("/steps")[0], task.rpartition("/tasks")[0]
    long = "x" * 5000
    return [
        ("POST", "/flows/Other", {"tags": [long]}), ("POST", "/flows/F/run", {**BODY, "tags": [long]}),
        ("POST", f"{run}/steps/other/step", BODY), ("POST", f"{step}/task", BODY),
        ("POST", f"{task}/metadata", [{"field_name": "m", "value": long}]), ("POST", f"{task}/artifact", [{"name": "a", "sha": "1"}]),
        ("PATCH", f"{run}/tag/mutate", {"tags_to_add": [long]}),
    ]  # fmt: skip


def check_refused(served: Served, task: str, status: int, word: str) -> None:
    """Each write is refused with a JSON body that names path and reason; reading and beating go on."""
    for method, path, body in writes(task):
        answer = served.client(method, path, body)
        assert answer.status == status, (path, answer)
        assert ".metaflow/" in answer.body["detail"] and word in answer.body["detail"], answer.body
        assert answer.body["id"] == ("no-space" if status == 507 else "disk-error")
    run = task.rpartition("/steps")[0]
    for path in (task, run):
        asked = time.time()
        answer = served.client("POST", f"{path}/heartbeat", {})
        assert answer.status == 200 and isinstance(answer.body, str)
        assert int(asked) <= served.client.get(path)["last_heartbeat_ts"] <= time.time()
    assert [row["flow_id"] for row in served.client.get("/flows")] == ["F"]
    assert len(served.client.get("/flows/F/runs")) == 1
    assert served.client.get(f"{task}/metadata") == []
    # Empty files may lie ready there; of what was refused nothing stays.
    assert {path.stat().st_size for path in (served.metaflow / ".mflocal/tmp").iterdir()} <= {0}
    assert served.process.poll() is None and "Traceback" not in served.log


def check_recovered(served: Served, task: str) -> None:
    for method, path, body in writes(task):
        assert served.client(method, path, body).status == 200, path
    assert (
        len(served.client.get("/flows/F/runs")) == 2
        and len(served.client.get(f"{task}/metadata")) == 1
    )


def fill(directory: Path) -> Path:
    """Leaves no byte free."""
    filler = directory / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass
    return filler


def test_a_full_disk(mount: Callable[..., Path]) -> None:
    root = mount("size=1m")
    with served_on(root) as served:
        task = served.task()
        filler = fill(root)
        check_refused(served, task, 507, "No space left")
        filler.unlink()
        check_recovered(served, task)


def test_no_inode_left(mount: Callable[..., Path]) -> None:
    root = mount("size=4m,nr_inodes=60")
    with served_on(root) as served:
        task = served.task()
        spare = root / "spare"
        spare.mkdir()
        try:
            for number in range(100):
                (spare / str(number)).touch()
        except OSError:
            pass
        assert 5 < number < 99
        check_refused(served, task, 507, "No space left")
        shutil.rmtree(spare)
        check_recovered(served, task)


def test_a_disk_that_becomes_read_only(mount: Callable[..., Path]) -> None:
    root = mount("size=4m")
    with served_on(root) as served:
        task = served.task()
        # The service holds its lock file open for writing, so the file system itself cannot be remounted.
        flow = root / ".metaflow"
        if subprocess.run(
            ["mount", "--bind", str(flow), str(flow)], capture_output=True
        ).returncode:
            pytest.skip("no bind mounts here")
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(flow)], check=True)
            check_refused(served, task, 500, "Read-only file system")
        finally:
            subprocess.run(["umount", str(flow)], check=True)
        check_recovered(served, task)


def test_starting_on_a_full_disk(mount: Callable[..., Path]) -> None:
    """One line that says why, exit code 3; and a start when there is room again."""
    root = mount("size=1m")
    (root / ".metaflow").mkdir()
    filler = fill(root)
    try:
        done = mflocal("start", cwd=root)
        assert (
            done.returncode == 3 and "No space left" in done.stderr and done.stderr.count("\n") == 1
        ), done.stderr
    finally:
        filler.unlink()
    assert mflocal("start", cwd=root).returncode == 0
    assert mflocal("stop", cwd=root).returncode == 0


NOBODY = 65534


def test_a_directory_that_refuses() -> None:
    """EACCES for a service of another user, taken away and given back while it runs."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    python = next((p for p in (sys.executable, "/usr/bin/python3") if runs_as_nobody(p)), None)
    if python is None:
        pytest.skip("no Python that other users can run")
    with tempfile.TemporaryDirectory(prefix="mflocal-") as name:
        os.chmod(name, 0o755)
        shutil.copy(REPO / "mflocal.py", Path(name, "mflocal.py"))
        os.chmod(Path(name, "mflocal.py"), 0o644)
        root = Path(name).resolve() / "root"
        root.mkdir()
        os.chown(root, NOBODY, NOBODY)
        env = clean_env(HOME=name)
        with Served(
            root,
            python=python,
            module=Path(name),
            env=env,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
        ) as served:
            task = served.task()
            (served.metaflow / "F/_meta/_self.json").stat()
            folders = [
                served.metaflow,
                *(path for path in (served.metaflow / "F").rglob("*") if path.is_dir()),
                served.metaflow / "F",
            ]
            modes = {folder: folder.stat().st_mode & 0o777 for folder in folders}
            for folder in folders:
                os.chmod(folder, 0o555)
            check_refused(served, task, 500, "Permission denied")
            for folder, mode in modes.items():
                os.chmod(folder, mode)
            check_recovered(served, task)


def runs_as_nobody(python: str) -> bool:
    code = "import json, asyncio, ssl, hmac"
    try:
        return (
            subprocess.run(
                [python, "-c", code], user=NOBODY, group=NOBODY, cwd="/", capture_output=True
            ).returncode
            == 0
        )
    except OSError:
        return False


def test_the_folder_for_temp_files_is_deleted(root: Path) -> None:
    """Somebody cleans up too much: the service goes on or says what is missing, and does not die."""
    with Served(root) as served:
        task = served.task()
        time.sleep(0.1)  # files for the next writes are made after the answer
        shutil.rmtree(served.metaflow / ".mflocal/tmp")
        answer = served.client("POST", f"{task}/metadata", [{"field_name": "a", "value": "v"}])
        assert answer.status == 200, answer
        assert "Traceback" not in served.log


# -- clocks, signals, ports

CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#include <sys/time.h>
static long shift(void) {
    char text[32] = "";
    int fd = open(getenv("TEST_SHIFT"), O_RDONLY | O_CLOEXEC);
    if (fd >= 0) { if (read(fd, text, sizeof text - 1) < 0) text[0] = 0; close(fd); }
    return atol(text);
}
int clock_gettime(clockid_t id, struct timespec *out) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, out);
    if (id == CLOCK_REALTIME) out->tv_sec += shift();
    return result;
}
"""


def test_the_clock_jumps(root: Path, tmp_path: Path) -> None:
    """A day forward, then two days back, under an open connection: deadlines do not see it, ids go on rising."""
    compiler = shutil.which("cc")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    (tmp_path / "clock.c").write_text(CLOCK)
    library, shift = tmp_path / "clock.so", tmp_path / "shift"
    if subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "clock.c"), "-ldl"]
    ).returncode:
        pytest.skip("the C compiler does not work")
    shift.write_text("0")
    with Served(
        root, "--idle-timeout", "60", env=clean_env(LD_PRELOAD=str(library), TEST_SHIFT=str(shift))
    ) as served:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)

        def post(path: str, body: Any) -> Any:
            connection.request("POST", path, json.dumps(body))
            response = connection.getresponse()
            data = response.read()
            assert response.status == 200, data
            return json.loads(data)

        post("/flows/F", {})

        def begin() -> Any:
            """The id of a run whose first task has begun: so long the connection stands for it."""
            run = post("/flows/F/run", BODY)["run_number"]
            post(f"/flows/F/runs/{run}/steps/start/step", BODY)
            post(f"/flows/F/runs/{run}/steps/start/task", BODY)
            return run

        runs = [begin()]
        first = f"/flows/F/runs/{runs[0]}"
        for seconds in (86_400, -86_400):
            shift.write_text(str(seconds))
            moved = int(time.time()) + seconds
            wait_for(
                lambda moved=moved: (
                    moved <= served.client.get(first)["last_heartbeat_ts"] <= moved + 3600
                )
            )
            runs += [begin() for _ in range(3)]
            rows = served.client.get("/flows/F/runs?status=running")
            assert {row["run_number"] for row in rows} == set(runs)
            assert post(f"/flows/F/runs/{runs[0]}/heartbeat", {})
        assert runs == sorted(set(runs)) and len(runs) == 7
        assert served.process.poll() is None and "Traceback" not in served.log
        connection.close()


def test_stopped_for_five_seconds(root: Path) -> None:
    """A laptop that sleeps: what was asked meanwhile is answered, what was alive is alive, nothing idles out."""
    with Served(root, "--idle-timeout", "2") as served:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)

        def ask(method: str, path: str, body: Any = None) -> Any:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            data = response.read()
            assert response.status == 200, data
            return json.loads(data)

        ask("POST", "/flows/F", {})
        run = ask("POST", "/flows/F/run", BODY)["run_number"]
        ask("POST", f"/flows/F/runs/{run}/steps/start/step", BODY)
        ask("POST", f"/flows/F/runs/{run}/steps/start/task", BODY)
        os.kill(served.pid, signal.SIGSTOP)
        found: list[int] = []
        threads = [
            threading.Thread(
                target=lambda: found.append(served.client("GET", f"/flows/F/runs/{run}").status)
            )
            for _ in range(5)
        ]
        try:
            for thread in threads:
                thread.start()
            time.sleep(5)
        finally:
            os.kill(served.pid, signal.SIGCONT)
        for thread in threads:
            thread.join(60)
        assert found == [200] * 5
        assert [row["run_number"] for row in served.client.get("/flows/F/runs?status=running")] == [
            run
        ]
        now = int(time.time())
        wait_for(lambda: ask("GET", f"/flows/F/runs/{run}")["last_heartbeat_ts"] >= now)
        time.sleep(2.5)  # more than the idle timeout: the connection speaks for the run
        assert served.process.poll() is None
        connection.close()
        wait_for(lambda: served.process.poll() is not None)


def test_the_port_is_taken_between_two_starts(project: Path) -> None:
    """By a server that answers anything: it is not believed, and the next start takes another port."""
    mflocal("start", cwd=project, check=True)
    before = daemon_state(project)
    token = json.loads(Path(before["secrets"]).read_text())["token"]
    os.kill(int(before["pid"]), signal.SIGKILL)
    wait_for(lambda: not running(int(before["pid"])))
    with socket.create_server(("127.0.0.1", int(before["port"]))) as other:
        heard: list[bytes] = []

        def lie() -> None:
            while True:
                try:
                    sock, _ = other.accept()
                    heard.append(sock.recv(65536))
                    sock.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"instance": 1}')
                    sock.close()
                except OSError:
                    return

        threading.Thread(target=lie, daemon=True).start()
        assert mflocal("url", cwd=project).returncode == 1
        mflocal("start", cwd=project, check=True)
        after = daemon_state(project)
        assert after["port"] != before["port"] and after["instance"] != before["instance"]
        assert token.encode() not in b"".join(heard)
        other.shutdown(socket.SHUT_RDWR)


def test_umask_of_the_caller(project: Path) -> None:
    """000 and 077: our own files are private either way, the data has the modes that local mode would give it."""
    for umask in (0o000, 0o077):
        old = os.umask(umask)
        try:
            mflocal("start", cwd=project, check=True)
        finally:
            os.umask(old)
        state = project / ".metaflow" / ".mflocal"
        port = daemon_state(project)["port"]
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=20)
        connection.request("POST", f"/flows/F{umask}", "{}")
        assert connection.getresponse().status == 200
        connection.close()
        assert (project / f".metaflow/F{umask}").stat().st_mode & 0o777 == 0o777 & ~umask
        assert (
            project / f".metaflow/F{umask}/_meta/_self.json"
        ).stat().st_mode & 0o777 == 0o666 & ~umask
        assert state.stat().st_mode & 0o777 == 0o700
        assert all(
            path.stat().st_mode & 0o077 == 0
            for path in state.rglob("*")
            if path.parent.name != "tmp"
        )
        mflocal("stop", "--force", cwd=project, check=True)


REPLACE = {
    "tar": 'tar cf "$0/b.tar" .metaflow && tar xf "$0/b.tar"',
    "zip": '"$PY" -m zipfile -c "$0/b.zip" .metaflow/*/ && "$PY" -m zipfile -e "$0/b.zip" .metaflow',
    "sed": "find .metaflow -name '*.json' -not -path '*/.mflocal/*' -exec sed -i s/x/x/ {} +",
    "cp": 'rm -rf "$0/b" && cp -a .metaflow "$0/b" && cp -a --remove-destination "$0/b/." .metaflow',
}


def whole(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except ValueError:
        return False


@pytest.mark.parametrize("tool", sorted(REPLACE))
def test_replacing_every_file_loses_nothing(service: Client, tmp_path: Path, tool: str) -> None:
    """A restored backup, an unpacked cache, an editor over all files: between writes and during them."""
    service.post("/flows/F", {})
    runs: list[str] = []
    stop = threading.Event()

    def write_one() -> None:
        run = service.post("/flows/F/run", {"tags": ["x"]})["run_number"]
        path = f"/flows/F/runs/{run}/steps/start"
        service.post(f"{path}/step", {})
        task = service.post(f"{path}/task", {})["task_id"]
        row = {"field_name": "f", "value": "v"}
        service.post(f"{path}/tasks/{task}/metadata", [row, row])
        runs.append(f"{path}/tasks/{task}")

    def write() -> None:
        while not stop.is_set():
            try:
                write_one()
            except AssertionError:
                pass  # refused while a tool had taken the run's record away
            time.sleep(0.05)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        env = {**os.environ, "PY": sys.executable}
        for _ in range(3):
            before = len(runs)
            # A tool may find that a file changed while it was read: that is the tool's affair.
            subprocess.run(["sh", "-c", REPLACE[tool], str(tmp_path)], cwd=service.root, env=env,
                           capture_output=True)  # fmt: skip
            wait_for(lambda before=before: len(runs) > before)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    service.post("/flows/F/run", {})
    for path in runs:
        assert len(service.get(f"{path}/metadata")) == 2
    # _mflocal.json, our note of heartbeats, is written in place while a copy may read it.
    records = set((service.root / ".metaflow/F").rglob("*.json"))
    records = {path for path in records if path.name != "_mflocal.json"}
    assert len(records) > 4 * len(runs) and [p for p in records if not whole(p)] == []


def test_empty_records_are_named_once_and_the_rest_is_served(service: Client) -> None:
    service.post("/flows/F", {})
    good, bad = (service.post("/flows/F/run", {})["run_number"] for _ in range(2))
    record = service.root / f".metaflow/F/{bad}/_meta/_self.json"
    record.write_text("")
    os.utime(record, (1_700_000_000, 1_700_000_000))
    for _ in range(3):
        assert [row["run_number"] for row in service.get("/flows/F/runs")] == [good]
        assert [row["run_number"] for row in service.get("/api/flows/F/runs")["data"]] == [good]
    service.process.terminate()
    told = service.process.stderr.read()
    assert told.count(str(record)) == 1, told
