"""The UI's API over HTTP and WebSocket, on what a real flow wrote in local mode; shapes as recorded."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
from test_ui_rows import ARTIFACT_KEYS, METADATA_KEYS, RUN_KEYS, STEP_KEYS, TASK_KEYS, run_flow

PAGES = ["self", "first", "prev", "next", "last"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with one completed and one failed run of the same flow."""
    root = tmp_path_factory.mktemp("ui")
    run_flow(root)
    run_flow(root, "--fail", "True", "--n", "2", "--tag", "sp ace", ok=False)
    return root


@pytest.fixture
def ui(make_service: Callable[..., Any], root: Path) -> Any:
    return make_service(root)


@pytest.fixture
def run(root: Path) -> str:
    """The path of the completed run."""
    ids = sorted(
        path.name for path in (root / ".metaflow" / "UiTinyFlow").iterdir() if path.name.isdigit()
    )
    return f"/api/flows/UiTinyFlow/runs/{ids[0]}"


def listed(ui: Any, path: str) -> list[Any]:
    """The rows of a list, whose envelope must be whole."""
    body = ui.get(path)
    assert list(body) == ["data", "status", "links", "pages", "query"]
    assert body["status"] == 200 and list(body["links"]) == PAGES and list(body["pages"]) == PAGES
    assert (body["links"]["next"] is None) == (body["pages"]["next"] is None)
    rows: list[Any] = body["data"]
    return rows


def test_runs(ui: Any) -> None:
    rows = listed(ui, "/api/runs?_order=-ts_epoch&_limit=30")
    assert [row["status"] for row in rows] == ["failed", "completed"]
    assert all(list(row) == RUN_KEYS for row in rows)
    new, old = rows
    for query, expected in {
        "": [new, old],
        "_limit=1": [new],
        "_limit=1&_page=2": [old],
        "_limit=1&_page=3": [],
        "_limit=0": [new, old],
        "_limit=abc&_page=junk": [new, old],
        "_order=%2Bts_epoch": [old, new],
        "_order=%2Bduration": sorted(rows, key=lambda row: row["duration"]),
        "status=completed": [old],
        "status=failed,completed": [new, old],
        "status=running": [],
        "status:ne=completed": [new],
        "_tags=sp%20ace": [new],
        "_tags=sp+ace,user:tester": [new],
        "_tags:any=nosuch,user:tester": [new, old],
        "_tags:likeany=p%20ac": [new],
        "_tags=nosuch": [],
        f"ts_epoch:ge={new['ts_epoch']}": [new],
        f"ts_epoch%3Ale={old['ts_epoch']}": [old],
        f"run={old['run']}": [old],
        f"run_number:gt={old['run_number']}": [new],
        "user=tester&flow_id=UiTinyFlow": [new, old],
        "user=null": [],
        "flow_id:co=tiny": [new, old],
        "flow_id=Other": [],
        "finished_at:gt=0&status=completed": [old],
        "_group=flow_id&_group_limit=1": [new],
        "_group=flow_id&_group_limit=7&_limit=30&_order=-ts_epoch": [new, old],
        "_group=user": [new, old],
        "bogus=1&status:zz=failed": [new, old],
    }.items():
        got = listed(ui, "/api/runs?" + query)
        assert [row["run"] for row in got] == [row["run"] for row in expected], query
    assert [row["run"] for row in listed(ui, "/api/flows/UiTinyFlow/runs")] == [
        new["run"],
        old["run"],
    ]
    assert listed(ui, "/api/flows/Nothing/runs") == []
    assert ui("GET", "/api/runs?duration:gt=abc").status == 400


def test_links(ui: Any) -> None:
    body = ui.get("/api/runs?_limit=1&_tags=user%3Atester")
    assert body["links"]["next"] == f"{ui.url}/api/runs?_limit=1&_tags=user:tester&_page=2"
    assert body["pages"] == {"self": 1, "first": 1, "prev": 1, "next": 2, "last": None}
    assert body["query"] == {"_limit": "1", "_tags": "user:tester"}
    last = ui.get(body["links"]["next"][len(ui.url) :])
    assert last["links"]["next"] is None and last["pages"]["prev"] == 1
    headers = {"X-Forwarded-Proto": "https, http", "X-Forwarded-Host": "ui.example.com"}
    forwarded = ui("GET", "/api/flows?_limit=1", headers=headers)
    assert forwarded.body["links"]["self"] == "https://ui.example.com/api/flows?_limit=1"


def test_single_objects(ui: Any, run: str) -> None:
    for path, keys in (
        (run, RUN_KEYS),
        (run + "/steps/unit", STEP_KEYS),
        (run + "/steps/start/tasks/1", TASK_KEYS),
    ):
        body = ui.get(path)
        assert list(body) == ["data", "status", "links", "query"] and list(body["data"]) == keys
    for path in (
        "/api/flows/No",
        run + "1",
        run + "/steps/no",
        run + "/steps/start/tasks/99",
        run + "1/dag",
    ):
        answer = ui("GET", path)
        assert (answer.status, answer.body["data"], answer.body["status"]) == (404, {}, 404), path
    assert ui("GET", run + "1/parameters").status == 404
    assert ui("GET", run + "1/parameters").body["id"] == "run-not-found"
    assert ui("GET", "/api/nothing").status == 404 and ui("POST", "/api/runs").status == 405


def test_steps_and_tasks(ui: Any, run: str) -> None:
    steps = listed(ui, run + "/steps?_order=%2Bts_epoch&_limit=1000")
    assert [row["step_name"] for row in steps] == ["_parameters", "start", "unit", "join", "end"]
    tasks = listed(ui, run + "/tasks?_order=%2Bts_epoch&_limit=1000&postprocess=false")
    assert all(list(row) == TASK_KEYS for row in tasks)
    assert [row["task_id"] for row in tasks] == [0, 1, 2, 2, 3, 4, 5, 6]
    assert {row["status"] for row in tasks} == {"completed", "failed"}
    assert [row["step_name"] for row in listed(ui, run + "/tasks?_limit=1")] == ["end"]
    refined = listed(ui, run + "/tasks?taskId=3,4&postprocess=true&_limit=500")
    assert [row["foreach_label"] for row in refined] == ["4[2]", "3[1]"]
    walked: list[Any] = []
    path = run + "/tasks?_order=%2Bts_epoch&_limit=3"
    while path:
        body = ui.get(path)
        walked += body["data"]
        path = (body["links"]["next"] or "")[len(ui.url) :]
    assert walked == tasks
    attempts = listed(ui, run + "/steps/unit/tasks/2/attempts?postprocess=true")
    assert [(row["attempt_id"], row["status"]) for row in attempts] == [
        (1, "completed"),
        (0, "failed"),
    ]
    assert ui.get(run + "/steps/unit/tasks/2?attempt_id=0")["data"]["attempt_id"] == 1
    groups = listed(ui, run + "/tasks?_group=step_name&_group_limit=2")
    assert [row["step_name"] for row in groups] == [
        "_parameters",
        "end",
        "join",
        "start",
        "unit",
        "unit",
    ]


def test_metadata_and_artifacts(ui: Any, run: str) -> None:
    task = run + "/steps/unit/tasks/2"
    of_attempt = listed(ui, task + "/metadata?_limit=100&attempt_id=1")
    assert all(list(row) == METADATA_KEYS and row["attempt_id"] == 1 for row in of_attempt)
    without = listed(ui, task + "/metadata?_limit=100&attempt_id:is=null")
    assert not {row["id"] for row in without} & {row["id"] for row in of_attempt}
    everything = listed(ui, run + "/metadata?_limit=1000")
    assert [row["ts_epoch"] for row in everything] == sorted(
        (r["ts_epoch"] for r in everything), reverse=True
    )
    assert {
        row["step_name"] for row in listed(ui, run + "/metadata?step_name=start&_limit=100")
    } == {"start"}
    artifacts = listed(ui, task + "/artifacts?attempt_id=1&postprocess=true&_limit=50")
    assert all(
        list(row) == [*ARTIFACT_KEYS, "content"] and isinstance(row["content"], str)
        for row in artifacts
    )
    assert {row["name"]: row["content"] for row in artifacts}["x"] == "0"
    assert [row["attempt_id"] for row in listed(ui, task + "/artifacts?name=x")] == [1, 0]
    assert listed(ui, run + "/artifacts?ds_type=local&_limit=1") == []
    assert len(listed(ui, run + "/artifacts?ds_type=local&_limit=2")) == 2
    assert ui.get(run + "/parameters")["data"] == {"fail": {"value": False}, "n": {"value": 3}}
    graph = ui.get(run + "/dag")["data"]
    assert list(graph["steps"]) == ["start", "unit", "join", "end"] and graph["graph_structure"]


@pytest.mark.parametrize("data", [b"no gzip", b""])
def test_an_unreadable_graph_is_drawn_from_the_steps(
    make_service: Callable[..., Any], root: Path, run: str, tmp_path: Path, data: bytes
) -> None:
    shutil.copytree(
        root / ".metaflow", tmp_path / ".metaflow", ignore=shutil.ignore_patterns(".mflocal")
    )
    flow = tmp_path / ".metaflow/UiTinyFlow"
    records = [
        json.loads(path.read_text())
        for path in flow.glob("*/*/*/_meta/*_artifact__graph_info.json")
    ]
    assert records
    for sha in {record["sha"] for record in records}:
        (flow / "data" / sha[:2] / sha).write_bytes(data)
    graph = make_service(tmp_path).get(run + "/dag")["data"]
    assert list(graph["steps"]) == ["start", "unit", "join", "end"]
    assert (graph["graph_structure"][0], graph["graph_structure"][-1]) == ("start", "end")


def test_logs(ui: Any, run: str) -> None:
    out = run + "/steps/start/tasks/1/logs/out"
    body = ui.get(out + "?attempt_id=0&_limit=1000&_page=1&_order=-row")
    assert [(row["row"], row["line"]) for row in body["data"]] == [(0, "hello from start")]
    assert (body["pages"]["last"], body["links"]["next"]) == (1, None)
    err = run + "/steps/unit/tasks/2/logs/err?attempt_id=0"
    rows = ui.get(err + "&_order=+row")["data"]
    assert [row["row"] for row in rows] == list(range(len(rows)))
    assert [row["row"] for row in ui.get(err + "&_limit=2&_page=2&_order=-row")["data"]][0] > 0
    assert ui.get(err + "&_page=99")["data"] == []
    for path in (
        out + "?attempt_id=7",
        out + "?attempt_id=abc",
        run + "/steps/start/tasks/99/logs/out",
    ):
        answer = ui("GET", path)
        assert (answer.status, answer.body) == (404, {"data": []})
    answer = ui("GET", out + "/download?attempt_id=0")
    assert (answer.status, answer.body) == (200, "hello from start")
    run_id = run.rpartition("/")[2]
    assert (
        answer.headers["content-disposition"]
        == f"Attachment;filename=stdout_UiTinyFlow_{run_id}_start_1-0.txt"
    )
    assert answer.headers["content-type"] == "application/octet-stream"


def test_cards(ui: Any, run: str, root: Path) -> None:
    cards = run + "/steps/start/tasks/1/cards"
    assert listed(ui, cards) == [] and ui.get(cards)["pages"]["last"] == 1
    parts = ("UiTinyFlow", "runs", run.rpartition("/")[2], "steps", "start", "tasks", "1")
    folder = root.joinpath(".metaflow", "mf.cards", *parts, "cards")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "default-abc123.html").write_text("<html>card</html>")
    assert listed(ui, cards + "?invalidate=true") == [
        {"id": None, "hash": "abc123", "type": "default"}
    ]
    answer = ui("GET", cards + "/abc123?embed=true")
    assert answer.body == "<html>card</html>" and answer.headers["content-type"].startswith(
        "text/html"
    )
    assert "x-frame-options" not in answer.headers
    assert (
        ui("GET", cards + "/nosuch").status == 404
        and ui("GET", cards + "/abc123/data").status == 404
    )
    assert ui("GET", run + "/steps/start/tasks/99/cards").body == {"data": []}


def test_completion(ui: Any, run: str) -> None:
    assert listed(ui, "/api/flows/autocomplete?_limit=5&flow_id:co=tiny") == ["UiTinyFlow"]
    assert listed(ui, "/api/flows/autocomplete?flow_id:co=zz") == []
    assert listed(ui, "/api/tags/autocomplete?_limit=5&tag:re=user:.*est.*") == ["user:tester"]
    assert listed(ui, "/api/tags/autocomplete?tag:co=SP") == ["sp ace"]
    assert "sp ace" in ui.get("/api/tags")
    run_id = run.rpartition("/")[2]
    assert listed(ui, f"/api/flows/UiTinyFlow/runs/autocomplete?run:co={run_id}&_limit=5") == [
        run_id
    ]
    assert listed(ui, run + "/steps/autocomplete?step_name:co=ni") == ["unit"]
    assert listed(ui, run + "/artifacts/autocomplete?name:sw=tot") == ["total"]
    assert len(listed(ui, run + "/artifacts/autocomplete?_limit=0")) > 10
    assert listed(ui, run + "1/steps/autocomplete") == []


def test_the_rest(ui: Any) -> None:
    features = ui.get("/api/features")
    assert features and all(
        name.startswith("FEATURE_") and value is True for name, value in features.items()
    )
    assert [link["label"] for link in ui.get("/api/links")] == ["Documentation", "Help"]
    for path in ("/api/plugin", "/api/notifications?start:le=5&end:ge=5"):
        assert ui.get(path) == []
    assert ui("GET", "/api/ping").body == "pong" and ui("GET", "/api/config").body == {}
    assert ui("GET", "/api/version").headers["content-type"].startswith("text/plain")
    assert ui("GET", "/api/plugin/x").body == "Plugin not found"
    preflight = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "GET"}
    assert ui("OPTIONS", "/api/links", headers=preflight).status == 204


def test_configuration_files(make_service: Callable[..., Any], root: Path, tmp_path: Path) -> None:
    notices = [
        {"message": "soon", "created": 1618404534000},
        {
            "message": "md",
            "id": "fixed",
            "start": 10,
            "end": 20,
            "created": 5,
            "contentType": "markdown",
        },
        {"message": "no time"},
        "junk",
    ]
    (tmp_path / "n.json").write_text(json.dumps(notices))
    (tmp_path / "l.json").write_text(
        json.dumps([{"href": "https://example.com", "label": "Q"}, {"href": 1}])
    )
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "manifest.json").write_text(
        '{"name": "p", "version": "1", "entrypoint": "index.html"}'
    )
    (plugin / "index.html").write_text("<html>plugin</html>")
    (tmp_path / "p.json").write_text(json.dumps([{"path": "plugin"}, {"path": "missing"}]))
    names = {"NOTIFICATIONS": "n.json", "LINKS": "l.json", "PLUGINS": "p.json"}
    env = {f"METAFLOW_LOCAL_SERVICE_{name}": str(tmp_path / file) for name, file in names.items()}
    ui = make_service(root, **env)
    soon, md = ui.get("/api/notifications")
    assert list(soon) == "id type contentType message url urlText created start end".split()
    assert (soon["type"], soon["contentType"], soon["start"], len(soon["id"])) == (
        "info",
        "text",
        None,
        40,
    )
    assert ui.get("/api/notifications?start:le=15&end:ge=15") == [soon, md]
    assert ui.get("/api/notifications?start:le=15&end:ge=25") == [soon]
    assert ui.get("/api/notifications?created:lt=6") == [md]
    assert ui.get("/api/links") == [{"href": "https://example.com", "label": "Q"}]
    [told] = ui.get("/api/plugin")
    assert (told["name"], told["config"]["version"], told["files"]) == (
        "p",
        "1",
        ["index.html", "manifest.json"],
    )
    answer = ui("GET", "/api/plugin/p/index.html?v=1")
    assert answer.body == "<html>plugin</html>" and answer.headers["content-type"] == "text/html"
    assert ui("GET", "/api/plugin/p/..%2Fn.json").status == 404
    (tmp_path / "p.json").write_text("{}")
    assert ui.get("/api/plugin") == []


def search(ui: Any, path: str) -> tuple[list[Any], int]:
    """(events, close code) of a search."""
    client = pytest.importorskip("websockets.sync.client")
    events = []
    with (
        client.connect(ui.url.replace("http", "ws") + path) as socket,
        contextlib.suppress(Exception),
    ):
        while True:
            events.append(json.loads(socket.recv(20))["event"])
    return events, socket.close_code


def test_search(ui: Any, run: str) -> None:
    where = run.replace("/api/", "/api/search/")

    def matches(query: str, path: str = where) -> list[tuple[str, str]]:
        events, code = search(ui, f"{path}?{query}")
        assert code == 1000 and events[-1]["type"] == "result"
        fractions = [event["fraction"] for event in events[:-1]]
        assert fractions == sorted(fractions) and all(0 < fraction <= 1 for fraction in fractions)
        assert all(
            m["searchable"] is True and isinstance(m["run_number"], str)
            for m in events[-1]["matches"]
        )
        return sorted((m["step_name"], m["task_id"]) for m in events[-1]["matches"])

    assert matches("key=x&value=1&scope=ARTIFACT,FOREACH_VARIABLE") == [("unit", "3")]
    everywhere = [("start", "1"), ("unit", "2"), ("unit", "3"), ("unit", "4")]
    assert matches("key=items&scope=ARTIFACT") == everywhere
    assert matches("key=items&value=%221%22") == []
    assert matches("key=items&value=1", run + "/search") == everywhere
    assert matches("key=items&value=2&scope=FOREACH_VARIABLE") == [("unit", "4")]
    assert matches("key=total&value=%223%22") == [("end", "6"), ("join", "5")]
    assert matches("key=nosuch&value=1") == []
    events, code = search(ui, where)
    assert (events[-1]["type"], code) == ("error", 1011)
    events, code = search(ui, where + "?key=x&scope=NOPE")
    assert (events[-1]["type"], code) == ("error", 1000)


def test_live_over_the_wire(ui: Any, run: str) -> None:
    client = pytest.importorskip("websockets.sync.client")
    with client.connect(ui.url.replace("http", "ws") + "/api/ws") as socket:
        socket.send("__ping__")
        assert socket.recv(2) == "__pong__"
        path = run[len("/api") :]
        socket.send(json.dumps({"type": "SUBSCRIBE", "resource": path, "uuid": "a"}))
        socket.send("__ping__")
        assert socket.recv(2) == "__pong__"
        answer = ui("PATCH", path + "/tag/mutate", {"tags_to_add": ["live"]})
        assert answer.status == 200
        frame = json.loads(socket.recv(5))
        assert list(frame) == ["type", "uuid", "resource", "data"]
        assert (frame["type"], frame["uuid"], frame["resource"]) == ("UPDATE", "a", path)
        assert list(frame["data"]) == RUN_KEYS and frame["data"]["tags"] == ["live"]
        ui("PATCH", path + "/tag/mutate", {"tags_to_remove": ["live"]})
        assert json.loads(socket.recv(5))["data"]["tags"] == []
