"""Artifacts, parameters, graphs, logs, cards and searches, asked of a service on trees that real flows wrote in
local mode, and on hostile ones written as files.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import copyreg
import dataclasses
import datetime
import decimal
import enum
import fractions
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import uuid
import zoneinfo
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Iterator
from urllib.parse import quote

import make_tree
import pytest
from conftest import REPO, wait_for
from wire import Served, children_of

FLOWS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "flows")
Record = dict[str, Any]


class Tree(Served):
    """A service on a root in which flows ran in local mode, and into which artifacts can be put as files."""

    times = itertools.count(1_700_000_000_000, 1000)

    def run(self, script: str, *options: str, ok: bool = True, **more: str) -> None:
        """Runs a flow to its end."""
        env = {key: value for key, value in os.environ.items() if not key.startswith("METAFLOW")}
        root = str(self.root)
        env.update(USERNAME="tester", METAFLOW_HOME=root, METAFLOW_DATASTORE_SYSROOT_LOCAL=root)
        env.update(METAFLOW_DEFAULT_METADATA="local", **more)
        words = [sys.executable, os.path.join(FLOWS, script), "--quiet", *options]
        done = subprocess.run(words, env=env, cwd=root, capture_output=True, text=True, timeout=180)
        assert (done.returncode == 0) is ok, done.stdout + done.stderr

    def get(self, path: str) -> Any:
        """The data of an answer."""
        return self.client.get("/api" + path)["data"]

    def newest(self, flow: str) -> str:
        """The path of a flow's newest run."""
        runs = self.get(f"/flows/{flow}/runs?_limit=1")
        return f"/flows/{flow}/runs/{runs[0]['run_number']}"

    def task_of(self, flow: str, step: str, number: int = 0) -> str:
        """The path of a task of a flow's newest run, by its place in the step."""
        place = f"{self.newest(flow)}/steps/{step}/tasks"
        return f"{place}/{sorted(int(t['task_id']) for t in self.get(place))[number]}"

    def contents(self, path: str) -> dict[str, str]:
        """What is shown of each artifact by name; of one that cannot be read {"id", "detail", "traceback"}."""
        rows = self.get(f"{path}/artifacts?postprocess=true&_limit=1000")
        shown = {}
        for row in rows:
            assert ("content" in row) is not ("postprocess_error" in row), row
            assert isinstance(row.get("content", ""), str)
            shown[row["name"]] = row["content"] if "content" in row else row["postprocess_error"]
        return shown

    def place(self, step: str = "start", flow: str = "F", run: str = "") -> make_tree.Place:
        """A new task, in a new run unless one is named."""
        at = next(self.times)
        root = str(self.metaflow)
        run = run or make_tree.make_run(root, flow, at)
        made = make_tree.Place(root, flow, run, step, "1", at)
        make_tree.make_step(root, flow, run, step, at)
        make_tree.make_task(made)
        return made

    def path(self, place: make_tree.Place) -> str:
        """Its path."""
        return f"/flows/{place.flow}/runs/{place.run}/steps/{place.step}/tasks/{place.task}"

    def put(self, place: make_tree.Place, name: str, data: bytes, packed: bytes | None = None,
            about: Any = None, **fields: Any) -> str:  # fmt: skip
        """Puts an artifact into a task, with the pickle `data`; returns its key."""
        sha = hashlib.sha1(data).hexdigest()
        folder = pathlib.Path(place.root, place.flow, "data", sha[:2])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / sha).write_bytes(gzip.compress(data, 1) if packed is None else packed)
        about = {"cas_raw": False, "cas_version": 1} if about is None else about
        (folder / (sha + "_meta")).write_text(json.dumps(about))
        make_tree.make_artifact(place, name, place.at)
        path = pathlib.Path(place.meta, f"0_artifact_{name}.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "sha": sha, **fields}))
        return sha

    def shown(self, values: dict[str, bytes], **fields: Any) -> dict[str, Any]:
        """What is shown of pickles, by their names."""
        place = self.place()
        for name, data in values.items():
            self.put(place, name, data, **fields)
        found = self.contents(self.path(place))
        return {name: found[name] for name in values}

    def snapshot(self) -> Record:
        """Every file of the root with its content and times."""
        found = {}
        for folder, _, names in os.walk(self.metaflow):
            for name in names:
                path = os.path.join(folder, name)
                if "/.mflocal/" not in path and os.path.isfile(path):
                    info = os.lstat(path)
                    found[path] = (info.st_mtime_ns, info.st_ino, pathlib.Path(path).read_bytes())
        return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    with Tree(tmp_path_factory.mktemp("readers")) as made:
        made.run("readers_data.py", "run", "--max-workers", "2")
        made.run("readers_cards.py", "run")
        made.run("readers_fail.py", "run", ok=False)
        yield made


# Artifacts of real runs.

PLAIN: Record = {
    "number": 12, "whole": 2**100, "unicode": "é 世界 😀",
    "nested": {"a": [1, 2, {"b": None}], "t": (1,), "f": 1.5, "s": {3}, "z": frozenset(), "y": b"\x00q"},
    "moment": datetime.datetime(2026, 11, 21, 22, 30, 1, 5),
    "zoned": datetime.datetime(2026, 11, 21, tzinfo=datetime.timezone.utc),
    "day": datetime.date(2026, 11, 21), "span": datetime.timedelta(hours=3),
    "money": decimal.Decimal("12.30"), "ident": uuid.UUID(int=7), "path": pathlib.PurePosixPath("a/b"),
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]), "counter": collections.Counter("aab"),
    "default": collections.defaultdict(list, {"k": [1]}), "ring": collections.deque([1, 2], maxlen=5),
    "z": complex(1, -2), "error": ValueError("bad", 3), "text": "hällo", "nothing": None, "flag": True,
    "outer": ["a", "b"], "big": "z" * 20000,
}  # fmt: skip


def test_contents_of_a_real_task(tree: Tree) -> None:
    before = tree.snapshot()
    path = tree.task_of("ReadersData", "start")
    shown = tree.contents(path)
    for name, value in PLAIN.items():
        assert shown[name] == str(value), name
    assert shown["point"] == "Point(1, 2)"
    assert shown["opaque"].startswith("Opaque(inside=[0, 1, 2, ")
    assert shown["mixed"].startswith("[1, Opaque(inside=[0, ") and shown["mixed"].endswith(", 'x']")
    assert shown["included"] == pathlib.Path(FLOWS, "include.txt").read_text(encoding="utf-8")
    huge = shown["huge"]
    assert isinstance(huge, dict) and huge["id"] == "artifact-too-large"
    size = len(pickle.dumps("z" * (3 << 20), protocol=4))
    words = huge["detail"].split()
    assert words[0].endswith("/huge:") and words[0].startswith("ReadersData/")
    assert (words[2], huge["traceback"]) == ("bytes", None) and abs(int(words[1]) - size) < 32
    assert [name for name, one in shown.items() if isinstance(one, dict)] == ["huge"]
    tree.contents(tree.newest("ReadersData"))
    assert tree.snapshot() == before


def test_every_attempt_has_its_own_value(tree: Tree) -> None:
    path = tree.task_of("ReadersData", "end")
    rows = tree.get(f"{path}/artifacts?postprocess=true&_limit=1000&name=tried")
    assert {row["attempt_id"]: row["content"] for row in rows} == {0: "0", 1: "1"}


def test_exceptions_of_a_failed_task(tree: Tree) -> None:
    shown = tree.contents(tree.task_of("ReadersFail", "boom"))["_exception"]
    assert shown.startswith("Traceback (most recent call last)")
    assert "RuntimeError: on purpose" in shown


# Values, over all protocols.


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Model:
    rate: float
    name: str = "m"


Pair = collections.namedtuple("Pair", "a b")


def test_text_is_str_over_all_protocols(tree: Tree) -> None:
    berlin = datetime.datetime(2026, 7, 1, 12, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
    values = dict(
        PLAIN, arr=bytearray(b"x\xff"), rng=range(1, 9, 2), loop=[1], at=datetime.time(1, 2, 3),
        neg=-(2**70), err=KeyError("k"), inf=[float("inf"), float("-inf")], lone="\udc80\n'\"",
        set_of={(1, "a")}, frozen=frozenset([2]), third=fractions.Fraction(1, 3), berlin=berlin,
        builtin=len, kind=int, dots=..., missing=NotImplemented, oserror=FileNotFoundError(2, "gone"),
        winter=[berlin.replace(month=1)], nan=float("nan"), slices=slice(1, None),
    )  # fmt: skip
    values["loop"].append(values["loop"])
    pickles, expected = {}, {}
    for name, value in values.items():
        for protocol in range(6):
            for kind, one in (("", value), ("_in", [value])):
                try:
                    pickles[f"{name}{kind}_{protocol}"] = pickle.dumps(one, protocol)
                except (TypeError, pickle.PicklingError):
                    continue  # a protocol that is too old for it
                expected[f"{name}{kind}_{protocol}"] = str(one)
    shown = tree.shown(pickles)
    wrong = {name: (shown[name], text) for name, text in expected.items() if shown[name] != text}
    known = {"berlin_in", "winter", "winter_in"}  # repr() of the zone's key
    assert {name.rpartition("_")[0] for name in wrong} <= known, wrong
    assert shown["berlin_4"] == "2026-07-01 12:00:00+02:00"


def test_objects_of_unknown_classes_are_told_by_what_they_hold(tree: Tree) -> None:
    values: Record = {
        "color": (Color.RED, "Color(1)"), "level": (Level.HIGH, "Level(3)"),
        "model": (Model(0.5), "Model(rate=0.5, name='m')"), "pair": (Pair(1, "b"), "Pair(1, 'b')"),
        "models": ([Model(1.0, "x")], "[Model(rate=1.0, name='x')]"),
        "users": (collections.UserDict(a=1), "UserDict(data={'a': 1})"), "function": (test_every_attempt_has_its_own_value, "<"),
        "a_class": (Model, "<"),
    }  # fmt: skip
    shown = tree.shown({name: pickle.dumps(value) for name, (value, _) in values.items()})
    for name, (_, text) in values.items():
        assert shown[name].startswith(text) if text == "<" else shown[name] == text, name


def test_values_of_numpy_and_pandas(tree: Tree) -> None:
    """Their pickles were made by the real ones, of old and of new versions."""
    rows = json.loads(pathlib.Path(__file__).with_name("values.json").read_text())
    shown = tree.shown({f"v{n}": base64.b64decode(row["pickle"]) for n, row in enumerate(rows)})
    for number, row in enumerate(rows):
        assert shown[f"v{number}"] == row["text"], (row["name"], row["made_by"], row["protocol"])
    assert len({row["made_by"] for row in rows}) == 2


def test_a_metric_is_found_by_search(tree: Tree) -> None:
    place = tree.place()
    rows = json.loads(pathlib.Path(__file__).with_name("values.json").read_text())
    metric = next(row for row in rows if row["name"] == "float64")
    tree.put(place, "accuracy", base64.b64decode(metric["pickle"]))
    tree.put(place, "secret", pickle.dumps("z" * (3 << 20)))
    run = tree.path(place).rpartition("/steps")[0]
    for value, found in (("0.93", True), ('"0.93"', True), ("0.9", True), ('"0.9"', False)):
        matches = search(tree, f"/api{run}/search?key=accuracy&value={quote(value)}")
        assert [match["searchable"] for match in matches] == [True] * found, value
    (match,) = search(tree, f"/api{run}/search?key=secret&value=z")
    assert (match["searchable"], match["error"]["id"]) == (False, "artifact-too-large")
    assert len(search(tree, f"/api{run}/search?key=secret")) == 1


def search(tree: Tree, path: str) -> Any:
    """The matches of a search."""
    client = pytest.importorskip("websockets.sync.client")
    with client.connect(tree.client.url.replace("http", "ws") + path) as socket:
        while True:
            event = json.loads(socket.recv(60))["event"]
            assert event["type"] in ("progress", "result"), event
            if event["type"] == "result":
                return event["matches"]


# Where artifacts are.


def with_state(name: str, state: Any) -> bytes:
    """The pickle of an object of the class `name`, by which `state` would be set."""
    module, _, kind = name.rpartition(".")
    head = b"\x80\x02c%s\n%s\n)\x81" % (module.encode(), kind.encode())
    return head + pickle.dumps(state, 2)[2:-1] + b"b."


def including(url: Any, **more: Any) -> bytes:
    """The pickle of an IncludeFile parameter whose content is at `url`; `more` of what describes it."""
    described = {"type": "uploader-v2", "url": url, "is_text": True, **more}
    state = {"_descriptor": described, "_cached_size": None}
    return with_state("metaflow.includefile.IncludedFile", state)


def include(folder: pathlib.Path, content: bytes, name: str = "") -> str:
    """Puts an included file into a `data` directory, and says its URL."""
    name = name or hashlib.sha1(content).hexdigest()
    (folder / "F").mkdir(parents=True, exist_ok=True)
    (folder / "F" / name).write_bytes(gzip.compress(content))
    return "local:///gone/data/F/" + name


def test_included_files_are_only_read_by_their_content(tree: Tree) -> None:
    inside, beside = tree.metaflow / "data", tree.root / "data"
    url = include(inside, "hällo wörld".encode())
    wrong = include(beside, b"secret", hashlib.sha1(b"mine").hexdigest())
    shown = tree.shown({
        "good": including(url), "beside": including(include(beside, b"mine too")),
        "binary": including(include(inside, b"\xff\0"), is_text=False), "wrong": including(wrong),
        **{f"none{n}": including(url, encoding=name) for n, name in enumerate(
            ["hex", "rot13", "base64", "undefined", "idna", "punycode", "no-such", "a/b", "", 7, ["utf-8"], None])},
        **{f"some{n}": including(include(inside, "hällo".encode(name)), encoding=name) for n, name in enumerate(
            ["utf-8", "latin-1", "UTF-16", "cp1252", "utf_8_sig"])},
        **{f"away{n}": including(one) for n, one in enumerate(
            ["local:///etc/passwd", "s3://bucket/F/" + "0" * 40, "local://" + "0" * 40, "", None, 7])},
    })  # fmt: skip
    assert (shown["good"], shown["beside"], shown["binary"]) == (
        "hällo wörld",
        "mine too",
        "b'\\xff\\x00'",
    )
    assert shown["wrong"]["id"] == "artifact-unreadable"
    assert {one for name, one in shown.items() if name.startswith("none")} == {"hällo wörld"}
    assert {one for name, one in shown.items() if name.startswith("some")} == {"hällo"}
    assert {one["id"] for name, one in shown.items() if name.startswith("away")} == {
        "datastore-not-local"
    }


def test_data_that_is_elsewhere_missing_or_damaged(tree: Tree, tmp_path: pathlib.Path) -> None:
    place = tree.place()
    for kind in ("s3", "azure", "gs"):
        where = f":root:{kind}://bucket/metaflow"
        tree.put(place, kind, pickle.dumps(1), ds_type=kind, location=where)
    tree.put(place, "other", pickle.dumps(2), location=f":root:{tmp_path}", sha="1" * 40)
    tree.put(place, "moved", pickle.dumps(3), location=":root:/gone/.metaflow")
    for number, sha in enumerate(
        ("0" * 40, "../" + "0" * 37, "/etc/passwd", "", None, 7, "A" * 40)
    ):
        tree.put(place, f"missing{number}", pickle.dumps(4), sha=sha)
    whole = gzip.compress(pickle.dumps(5))
    for number, packed in enumerate((b"", b"\x1f\x8b", whole[:-6], b"no gzip at all")):
        tree.put(place, f"damaged{number}", pickle.dumps(f"d{number}"), packed=packed)
    tree.put(place, "raw", pickle.dumps(6), packed=pickle.dumps(6), about={"cas_raw": True})
    tree.put(place, "newer", pickle.dumps(7), about={"cas_raw": False, "cas_version": 9})
    tree.put(place, "parquet", b"PAR1 something", content_type="parquet")
    tree.put(place, "padded", pickle.dumps(8), packed=gzip.compress(b"x").ljust(2 << 20, b"\0"))
    for number, coding in enumerate((["pickle-v4"], {"a": 1}, 7, True)):
        tree.put(place, f"coding{number}", pickle.dumps(f"c{number}"), content_type=coding)
    shown = tree.contents(tree.path(place))
    for name, one in shown.items():
        kind = name.rstrip("0123456789")
        if kind in ("missing", "damaged", "newer", "padded", "s3", "azure", "gs", "other"):
            assert one["id"] == {
                "missing": "artifact-not-found", "damaged": "artifact-unreadable", "newer": "artifact-unreadable",
                "padded": "artifact-too-large",
            }.get(kind, "datastore-not-local"), name  # fmt: skip
    assert "not local" in shown["s3"]["detail"] and "s3" in shown["s3"]["detail"]
    assert (shown["moved"], shown["raw"], shown["parquet"]) == ("3", "6", "<parquet, 14 bytes>")
    assert [shown[f"coding{n}"] for n in range(4)] == ["c0", "c1", "c2", "c3"]


def test_a_page_of_contents_is_bounded(tree: Tree) -> None:
    values = {f"n{n:02d}": pickle.dumps(str(n % 10) * 900_000) for n in range(12)}
    shown = tree.shown({**values, "small": pickle.dumps("last")})
    assert shown["small"] == "last"
    large = [one for name, one in shown.items() if name != "small"]
    whole = [one for one in large if isinstance(one, str)]
    assert 8 <= len(whole) <= 9 and all(len(one) == 900_000 for one in whole)


def test_links_and_fifos_open_nothing(tree: Tree, tmp_path: pathlib.Path) -> None:
    secret = pickle.dumps("secret")
    sha = hashlib.sha1(secret).hexdigest()
    out = tmp_path / "out"
    (out / sha[:2]).mkdir(parents=True)
    (out / sha[:2] / sha).write_bytes(gzip.compress(secret))
    places = {}
    for flow in ("LinkData", "LinkFolder", "LinkFile", "Fifo", "Folder"):
        place = tree.place(flow=flow)
        places[flow] = place
        tree.put(place, "x", secret)
        data = tree.metaflow / flow / "data"
        shutil.rmtree(data)
        if flow == "LinkData":
            data.symlink_to(out)
            continue
        data.mkdir()
        if flow == "LinkFolder":
            (data / sha[:2]).symlink_to(out / sha[:2])
            continue
        (data / sha[:2]).mkdir()
        target = data / sha[:2] / sha
        if flow == "LinkFile":
            target.symlink_to(out / sha[:2] / sha)
        else:
            os.mkfifo(target) if flow == "Fifo" else target.mkdir()
    for flow, place in places.items():
        assert tree.contents(tree.path(place))["x"]["id"] == "artifact-not-found", flow
    mine = tree.place(flow="Mine")
    tree.put(mine, "x", pickle.dumps("mine"))
    data = tree.metaflow / "Mine" / "data"
    data.rename(tree.metaflow / "kept")
    data.symlink_to(tree.metaflow / "kept")
    assert tree.contents(tree.path(mine))["x"] == "mine", "a link that stays inside"


# Hostile pickles.


class Reduced:
    def __init__(self, *reduction: Any) -> None:
        self.reduction = reduction

    def __reduce__(self) -> Any:
        return self.reduction


class Stateful:
    def __setstate__(self, state: Any) -> None:
        raise AssertionError("nothing of the flow's code may run")

    def __getstate__(self) -> Any:
        return {"a": 1}


def hostile_pickles(marker: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    command = f"touch {marker}"
    code = f"__import__('os').system({command!r})"
    mark = b"touch " + str(marker).encode()
    state = (None, {"__class__": Reduced(os.system, (command,))})
    yield "system", pickle.dumps(Reduced(os.system, (command,)))
    yield "eval", pickle.dumps(Reduced(eval, (code,)))
    yield "exec", pickle.dumps(Reduced(exec, (code,)), 2)
    yield "nested", pickle.dumps({"a": [Reduced(print, (Reduced(os.system, (command,)),))]})
    yield "getattr", pickle.dumps(Reduced(getattr, (Reduced(__import__, ("os",)), "system")))
    yield "setstate", pickle.dumps(Stateful())
    yield "slots", pickle.dumps(Reduced(Stateful, (), state))
    items = [Reduced(os.system, (command,))]
    yield "listitems", pickle.dumps(Reduced(collections.UserList, (), None, iter(items)))
    pairs = [("k", items[0])]
    yield "dictitems", pickle.dumps(Reduced(collections.UserDict, (), None, iter(pairs)))
    made = Reduced(copyreg._reconstructor, (Stateful, object, None), {"a": 1})  # type: ignore[attr-defined]
    yield "reconstructor", pickle.dumps(made)
    yield "newobj", b"\x80\x02cposix\nsystem\nU" + bytes([len(mark)]) + mark + b"\x85\x81."
    yield "newobj_ex", b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x05touch\x85}\x92."
    yield "inst", b"(S'%s'\nios\nsystem\n." % command.encode()
    yield "obj", b"(cos\nsystem\nS'%s'\no." % command.encode()
    yield "stack_global", b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R."
    yield "dotted", b"\x80\x04\x8c\x08datetime\x8c\x14datetime.__class__.x\x93)R."
    yield "modules", b"\x80\x04\x8c\x08datetime\x8c\x0fsys.modules.get\x93\x8c\x02os\x85R."
    yield "build_list", b"\x80\x04]}\x8c\x06append\x8c\x04evilsb."
    yield "build_class", b"\x80\x04cdatetime\ndatetime\n}\x8c\x03now\x8c\x01xsb."
    # A class of Python's own that is changed for the next pickle.
    yield (
        "counter_repr",
        (
            b"\x80\x04\x8c\x0bcollections\x8c\x07Counter\x93N}\x8c\x08__repr__\x8c\x08builtins\x8c\x04exit\x93s\x86b."
        ),
    )
    yield "frame_repr", b"\x80\x04c__main__\nForeachFrame\nN}\x8c\x08__repr__cos\nsystem\ns\x86b."
    yield (
        "maker_defaults",
        b"\x80\x04c_codecs\nencode\nN}\x8c\x0c__defaults__cos\nsystem\n\x85s\x86b.",
    )
    yield "persistent", b"Pos.system\n."
    yield "persistent_binary", b"\x80\x04\x8c\x09os.systemQ."
    yield "no_name", b"\x80\x04K\x01K\x02\x93."
    yield (
        "zone_name",
        b"\x80\x04\x8c\x08datetime\x8c\x08timezone\x93\x8c\x02os\x8c\x06system\x93\x85R.",
    )
    yield (
        "zone_path",
        b"\x80\x04\x8c\x08zoneinfo\x8c\x11ZoneInfo._unpickle\x93\x8c\x0e../../../passwdK\x01\x86R.",
    )
    yield (
        "moment",
        b"\x80\x04cdatetime\ndatetime\n(C\x0a\x07\xea\x01\x01\0\0\0\0\0\0cos\nsystem\n)RtR.",
    )
    yield "counter", b"\x80\x04ccollections\nCounter\ncos\nsystem\n)R\x85R."
    yield "path", b"\x80\x04cpathlib\nPosixPath\ncos\nsystem\n\x85R."
    yield "partial", pickle.dumps(Reduced(__import__, ("functools",)))
    yield (
        "attribute",
        b"\x80\x04cbuiltins\ngetattr\n\x8c\x08builtins\x8c\x03len\x93\x8c\x08__self__\x86R.",
    )
    yield (
        "array_shape",
        b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\xffK\xffK\xff\x87NNNtb.",
    )
    yield "dtype_state", b"\x80\x04cnumpy\ndtype\n\x8c\x02M8\x85RK\x01b."
    yield "frame_state", with_state("pandas.DataFrame", {"_mgr": 1})


def nest(opening: bytes, closing: bytes, depth: int) -> bytes:
    return b"\x80\x04" + opening * depth + b"N" + closing * depth + b"."


def bombs() -> Iterator[tuple[str, bytes]]:
    yield "lists", nest(b"](", b"e", 200_000)
    yield "tuples", b"\x80\x04N" + b"\x85" * 400_000 + b"."
    yield "tuples_as_a_key", b"\x80\x04}N" + b"\x85" * 290_000 + b"Ns."
    yield "sets_of_tuples", b"\x80\x04\x8f(N" + b"\x85" * 100_000 + b"\x90."
    yield "frozensets", b"\x80\x04" + b"(" * 50_000 + b"\x91" * 50_000 + b"."
    deque = b"\x80\x04ccollections\ndeque\nq\0"
    yield "deques", deque + b"h\0)R(" * 60_000 + b"Ne" + b"e" * 59_999 + b"."
    ordered = b"\x80\x04ccollections\nOrderedDict\nq\0"
    yield "ordered_dicts", ordered + b"h\0)RK\x01" * 60_000 + b"N" + b"s" * 60_000 + b"."
    doubled = b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(100))
    yield "billion_laughs", b"\x80\x04]q\0" + doubled + b"."
    yield "billion_laughs_as_a_key", b"\x80\x04)q\0" + doubled + b"0}hdNs."
    yield "itself", b"\x80\x04]q\0h\0a."
    yield "foreign_itself", b"\x80\x02cm\nC\n)\x81q\0}U\x01ah\0sb."
    yield "memo_index", b"\x80\x04Nr\xff\xff\xff\xff."
    yield "long_size", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f."
    yield "bytearray_size", b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f."
    yield "negative_size", b"\x80\x02T\xff\xff\xff\xffx."
    yield "frame_size", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN."
    yield "digits", b"I" + b"9" * 900_000 + b"\n."
    yield "long_bytes", b"\x80\x02\x8b" + struct.pack("<i", 900_000) + b"\x7f" * 900_000 + b"."
    yield (
        "huge_range",
        b"\x80\x04cbuiltins\nset\ncbuiltins\nrange\nK\0I4000000000\nK\x01\x87R\x85R.",
    )
    yield "huge_bytes", b"\x80\x04cbuiltins\nbytearray\nI8000000000\n\x85R."
    yield "fraction", b"\x80\x04cfractions\nFraction\n\x8c\x0c1e9999999999\x85R."
    yield "empty_sets", b"\x80\x04(" + b"\x8f" * 1_000_000 + b"l."
    yield "memoized", b"\x80\x04N" + b"\x94" * 1_000_000 + b"."
    yield "marks", b"\x80\x04" + b"(" * 1_000_000 + b"."
    yield "names", b"\x80\x04" + b"".join(b"cm\nx%d\n0" % n for n in range(60_000)) + b"N."
    text = (
        b"\x80\x04B" + struct.pack("<I", 600_000) + b"x" * 600_000 + b"q\0cbuiltins\nbytearray\nq\1"
    )
    yield "copies", text + b"h\1h\0\x85R" * 5000 + b"N."
    yield "nothing", b""
    yield "only_stop", b"."
    yield "cut_short", pickle.dumps({"a": 1})[:-3]
    yield "bad_opcode", b"\x80\x04\xff."
    yield "protocol_9", b"\x80\x09N."
    yield "pop_of_a_mark", b"\x80\x04(111."
    yield "append_to_nothing", b"\x80\x04(e."
    yield "odd_items", b"\x80\x04}(K\x01u."
    yield "list_as_a_key", b"\x80\x04}]Ns."
    yield "calls_a_number", b"\x80\x04K\x01)R."
    yield "extension", b"\x80\x02\x82\xf0."
    yield "buffer", b"\x80\x05\x97."


def colliding(first: int = 1, count: int = 80_000) -> bytes:
    """A set of numbers with one hash: takes minutes to build."""
    numbers = (
        b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") for n in range(first, first + count)
    )
    return b"\x80\x04\x8f(" + b"".join(numbers) + b"\x90."


def mutated() -> Iterator[tuple[str, bytes]]:
    import random

    rng = random.Random(5)
    seeds = [pickle.dumps(PLAIN, protocol) for protocol in range(6)]
    for number in range(150):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        yield f"mutated{number}", bytes(data)


def test_hostile_pickles_do_nothing(tree: Tree, tmp_path: pathlib.Path) -> None:
    """All in one request, with plain values between them."""
    marker = tmp_path / "fired"
    hostile = {**dict(hostile_pickles(marker)), **dict(mutated())}
    mixed, plain = {}, pickle.dumps({"c": collections.Counter("a")})
    for number, (name, data) in enumerate(hostile.items()):
        mixed[name] = data
        mixed[f"plain{number // 12}"] = plain
    shown = tree.shown(mixed)
    for name, one in shown.items():
        if name.startswith("plain"):
            assert one == "{'c': Counter({'a': 1})}", name
        elif isinstance(one, dict):
            assert one["id"] in ("artifact-unreadable", "artifact-too-large"), (name, one)
    assert shown["system"].startswith("system('touch ")
    parameters = tree.place("_parameters")
    for name, data in hostile_pickles(marker):
        tree.put(parameters, name, data)
    run = tree.path(parameters).rpartition("/steps")[0]
    json.dumps(tree.get(f"{run}/parameters"), allow_nan=False)
    assert not marker.exists() and tree.process.poll() is None


def test_bombs_end_and_spare_their_neighbours(tree: Tree) -> None:
    before = tree.memory()
    shown = tree.shown(dict(bombs()))
    for name, one in shown.items():
        if isinstance(one, dict):
            assert one["id"] in ("artifact-unreadable", "artifact-too-large"), (name, one)
    assert tree.memory() < before + 100, "what is hostile is unpacked elsewhere"
    chosen = {
        name: data for name, data in bombs() if name in ("tuples_as_a_key", "huge_bytes", "itself")
    }
    mixed = {"plain0": pickle.dumps(0)}
    for number, (name, data) in enumerate(chosen.items(), 1):
        mixed.update({name: data, f"plain{number}": pickle.dumps(number)})
    shown = tree.shown({**mixed, "slow": colliding()})
    assert [shown[f"plain{number}"] for number in range(4)] == ["0", "1", "2", "3"]
    assert shown["itself"] == "[[...]]" and shown["slow"]["id"] == "artifact-unreadable"


def test_bombs_of_gzip_are_bounded(tree: Tree) -> None:
    place = tree.place()
    tree.put(place, "zeros", b"x", packed=gzip.compress(bytes(200 << 20)))
    members = gzip.compress(bytes(1 << 20)) * 60
    tree.put(place, "members", b"y", packed=members)
    tree.put(place, "plain", pickle.dumps("after"))
    shown = tree.contents(tree.path(place))
    assert {shown["zeros"]["id"], shown["members"]["id"]} == {"artifact-too-large"}
    assert shown["plain"] == "after"


def test_what_is_hostile_holds_up_nobody(tree: Tree) -> None:
    """200 values that take minutes each, asked for by two clients: pings and another client's log go on."""
    place, other = tree.place(), tree.place()
    for number in range(200):
        tree.put(place, f"slow{number}", colliding(1 + number))
    write_log(other, "0.runtime_stdout.log", mflog(1, "mine") + b"\n")
    path, log = f"/api{tree.path(place)}", f"/api{tree.path(other)}/logs/out"

    def waits(target: str, times: int) -> list[float]:
        found = []
        for _ in range(times):
            began = time.monotonic()
            tree.client.get(target) if target != "/ping" else tree.client("GET", target)
            found.append(time.monotonic() - began)
        return sorted(found)

    alone = waits("/ping", 50), waits(log, 5)
    with ThreadPoolExecutor(2) as pool:
        slow = f"{path}/artifacts?postprocess=true&_limit=1000"
        asked = [pool.submit(tree.client.get, slow) for _ in range(2)]
        wait_for(lambda: len(tree.workers) >= 2)
        beside = waits("/ping", 50), waits(log, 5)
        assert not any(future.done() for future in asked), "the log came first"
        rows = [row for future in asked for row in future.result()["data"]]
    errors = [row["postprocess_error"] for row in rows if row["name"].startswith("slow")]
    assert len(errors) == 400 and {error["id"] for error in errors} == {"artifact-unreadable"}
    for before, during in zip(alone, beside):
        assert during[len(during) // 2] < 20 * before[len(before) // 2] + 0.2, (alone, beside)
    assert tree.contents(tree.path(tree.place()))
    wait_for(lambda: not tree.workers)


def test_a_client_that_leaves_cancels_what_it_asked_for(tree: Tree) -> None:
    place = tree.place()
    for number in range(20):
        tree.put(place, f"slow{number}", colliding(1000 + number))
    step = tree.path(place).rpartition("/tasks")[0]
    make_tree.make_metadata(place, "f", "a" * 40 + "!", place.at)
    for target in (
        f"/api{tree.path(place)}/artifacts?postprocess=true",
        f"{step}/filtered_tasks?pattern={quote('(a+)+$')}",
    ):
        with tree.connect() as sock:
            sock.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            wait_for(lambda: tree.workers)
        wait_for(lambda: not tree.workers, 5)


def test_nothing_outlives_the_daemon(tmp_path: pathlib.Path) -> None:
    """kill -9 in the middle of a hostile value and of a hostile pattern: the workers end at once."""
    root = tmp_path / "root"
    root.mkdir()
    with Tree(root) as tree:
        place = tree.place()
        for number in range(50):
            tree.put(place, f"slow{number}", colliding(number))
        with tree.connect() as sock:
            target = f"/api{tree.path(place)}/artifacts?postprocess=true"
            sock.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            found = wait_for(lambda: tree.workers)
            child = tree.children[0]
            sockets = sum(
                "socket" in os.readlink(f"/proc/{child}/fd/{n}")
                for n in os.listdir(f"/proc/{child}/fd")
            )
            held = {os.readlink(f"/proc/{child}/fd/{n}") for n in os.listdir(f"/proc/{child}/fd")}
            assert sockets <= 4 and not any("lock" in one or ".metaflow" in one for one in held), (
                held
            )
            tree.kill()
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in (child, *found)), 3)
    with Tree(root) as tree:
        place = tree.place()
        tree.put(place, "x", pickle.dumps("again"))
        assert tree.contents(tree.path(place))["x"] == "again"
        child = tree.children[0]
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: not os.path.exists(f"/proc/{child}") or tree.children)
        assert tree.contents(tree.path(place))["x"] == "again", "a killed reader is started again"
        assert children_of(tree.pid) != [child]


def test_reading_needs_no_file_of_the_module(tmp_path: pathlib.Path) -> None:
    """The cache of the .pyz may be cleaned up while the daemon runs out of it."""
    module, root = tmp_path / "module", tmp_path / "root"
    module.mkdir()
    root.mkdir()
    shutil.copy(REPO / "mflocal.py", module)
    with Tree(root, module=module, quick={"READER_IDLE": 0.2}) as tree:
        shutil.rmtree(module)
        place = tree.place()
        tree.put(place, "x", pickle.dumps([datetime.date(2026, 1, 2), decimal.Decimal(1)]))
        write_log(place, "0.runtime_stdout.log", mflog(1, "mine") + b"\n")
        for _ in range(2):
            assert tree.contents(tree.path(place))["x"] == str(
                [datetime.date(2026, 1, 2), decimal.Decimal(1)]
            )
            assert lines(tree, place) == ["mine"]
            wait_for(lambda: not tree.children)  # the reader ends when idle, and is started again


# Parameters.


def test_parameters_of_a_real_run(tree: Tree) -> None:
    included = pathlib.Path(FLOWS, "include.txt").read_text(encoding="utf-8")
    assert tree.get(f"{tree.newest('ReadersData')}/parameters") == {
        "constant": {"value": ["c", 1]}, "count": {"value": 3}, "dashed": {"value": "dash"},
        "flag": {"value": True}, "included": {"value": included}, "nothing": {"value": None},
        "ratio": {"value": 2.5}, "shape": {"value": {"k": [1, 2, None]}}, "text": {"value": "hällo"},
    }  # fmt: skip


def test_parameters_that_are_large_or_odd(tree: Tree) -> None:
    place = tree.place("_parameters")
    odd = {1: float("nan"), (2,): {3}, "b": b"\xff", "d": decimal.Decimal(1), "c": Color.RED}
    rows = json.loads(pathlib.Path(__file__).with_name("values.json").read_text())
    array = next(row for row in rows if row["name"] == "array of float32")
    config = b"\x80\x04\x8c'metaflow.user_configs.config_parameters\x8c\x0bConfigValue\x93"
    for name, data in {
        "long": pickle.dumps("x" * 70_000), "less": pickle.dumps("x" * 60_000), "odd": pickle.dumps(odd),
        "_hidden": b"N.", "name": b"N.", "script_name": b"N.", "array": base64.b64decode(array["pickle"]),
        "config": config + b"}\x8c\x02lrK\x01s\x85R.", "older": config + b")\x81}\x8c\x05_data}\x8c\x02lrK\x01ssb.",
    }.items():  # fmt: skip
        tree.put(place, name, data)
    tree.put(place, "away", pickle.dumps(1), ds_type="s3")
    tree.put(place, "twice", pickle.dumps("old"))
    newer = tree.put(place, "newer", pickle.dumps("new"))
    meta = pathlib.Path(place.meta)
    record = json.loads((meta / "0_artifact_newer.json").read_text())
    record = {**record, "name": "twice", "attempt_id": 1, "sha": newer}
    (meta / "1_artifact_twice.json").write_text(json.dumps(record))
    (meta / "0_artifact_newer.json").unlink()
    shown = tree.get(f"{tree.path(place).rpartition('/steps')[0]}/parameters")
    size = len(pickle.dumps("x" * 70_000))
    assert shown["long"]["value"] == f"Artifact too large: {size} bytes"
    assert shown["less"]["value"] == "x" * 60_000
    assert shown["odd"]["value"] == {
        "1": "nan",
        "(2,)": [3],
        "b": "b'\\xff'",
        "d": "1",
        "c": "Color(1)",
    }
    assert shown["twice"]["value"] == "new" and "not local" in shown["away"]["value"]
    assert shown["array"]["value"] == [1.5, 0.1]
    assert shown["config"]["value"] == shown["older"]["value"] == {"lr": 1}
    assert sorted(shown) == ["array", "away", "config", "less", "long", "odd", "older", "twice"]


def test_config_parameter_and_switch(tree: Tree) -> None:
    pytest.importorskip("metaflow.user_configs")
    tree.run("readers_config.py", "run")
    run = tree.newest("ReadersConfig")
    assert tree.get(f"{run}/parameters") == {
        "cfg": {"value": {"lr": 0.1, "names": ["a", {"b": 1}]}}
    }
    graph = tree.get(f"{run}/dag")
    check_graph(graph)
    assert graph["graph_structure"] == ["start", "loop", [["fin"]], "end"]
    loop = graph["steps"]["loop"]
    assert (loop["type"], loop["next"], loop["condition"]) == (
        "split-switch",
        ["loop", "fin"],
        "go",
    )
    assert loop["switch_cases"] == {"again": "loop", "stop": "fin"}


# The graph.


def check_graph(graph: Record) -> None:
    assert set(graph) >= {
        "file", "start_step", "end_step", "parameters", "constants", "steps", "graph_structure", "doc",
        "decorators", "extensions",
    }  # fmt: skip

    def names(structure: Any) -> Iterator[str]:
        for item in structure:
            if isinstance(item, list):
                yield from names(item)
            else:
                yield item

    steps = graph["steps"]
    assert steps and graph["graph_structure"]
    assert set(names(graph["graph_structure"])) <= set(steps)
    for name, step in steps.items():
        assert step["name"] == name and set(step["next"]) <= set(steps)
        assert isinstance(step["type"], str) and isinstance(step["doc"], str)
        for deco in step["decorators"]:
            assert isinstance(deco["name"], str) and isinstance(deco["attributes"], dict)


def test_graphs_of_real_runs(tree: Tree) -> None:
    graph = tree.get(f"{tree.newest('ReadersData')}/dag")
    check_graph(graph)
    assert graph["graph_structure"] == ["start", [["middle", [["leaf"]], "gather"]], "join", "end"]
    assert (graph["file"], graph["doc"]) == ("readers_data.py", "A flow to read back.")
    start, end = graph["steps"]["start"], graph["steps"]["end"]
    assert (start["type"], start["doc"]) == ("split-foreach", "Makes things.")
    assert (start["foreach_artifact"], start["matching_join"]) == ("outer", "join")
    assert [deco["name"] for deco in end["decorators"]] == ["retry"]
    assert end["decorators"][0]["statically_defined"] is True
    assert (graph["start_step"], graph["end_step"]) == ("start", "end")
    assert "constant" in [one["name"] for one in graph["constants"]]
    failed = tree.get(f"{tree.newest('ReadersFail')}/dag")
    check_graph(failed)
    assert failed["graph_structure"] == ["start", "boom", [["left"], ["right"]], "both", "end"]
    assert failed["steps"]["boom"]["next"] == ["left", "right"]
    cards = tree.get(f"{tree.newest('ReadersCards')}/dag")["steps"]["start"]["decorators"]
    assert [deco["name"] for deco in cards].count("card") == 2


BROKEN_GRAPHS: list[Any] = [
    {}, [], None, {"steps": None, "graph_structure": None},
    {"steps": {"start": None}, "graph_structure": ["start"]},
    {"steps": {"a": {}, "b": {"next": ["gone", None], "decorators": None, "doc": None}}, "graph_structure": None},
    {"steps": {"a": {"decorators": [{"name": None}, None, {"name": "card", "attributes": None}]}}, "graph_structure": ["z"]},
    {"steps": {"a": {"next": "a", "type": None, "line": None, "node_info": None}}, "graph_structure": [[["a", "q"], []]]},
    {"steps": {1: {}}, "file": None, "parameters": None, "extra": None},
]  # fmt: skip


def test_a_graph_is_never_broken(tree: Tree) -> None:
    for info in BROKEN_GRAPHS:
        parameters = tree.place("_parameters")
        tree.place("start", run=parameters.run)
        tree.put(parameters, "_graph_info", pickle.dumps(info))
        check_graph(tree.get(f"/flows/F/runs/{parameters.run}/dag"))
    parameters = tree.place("_parameters")
    tree.put(parameters, "_graph_info", pickle.dumps({}), ds_type="s3")
    answer = tree.client("GET", f"/api/flows/F/runs/{parameters.run}/dag")
    assert (answer.status, answer.body["id"]) == (501, "datastore-not-local")


def test_graph_of_a_run_without_one(tree: Tree) -> None:
    """Drawn from the steps that have begun and how deep in foreach they are."""
    first = tree.place("_parameters")
    assert tree.client("GET", f"/api/flows/F/runs/{first.run}/dag").status == 404
    for step, stack in (("start", []), ("middle", ["x=1"]), ("leaf", ["x=1", "y=2"]), ("gather", ["x=1"]),
                        ("join", []), ("end", [])):  # fmt: skip
        place = tree.place(step, run=first.run)
        if stack:
            make_tree.make_metadata(place, "foreach-stack", stack, place.at)
    graph = tree.get(f"/flows/F/runs/{first.run}/dag")
    check_graph(graph)
    assert graph["graph_structure"] == ["start", [["middle", [["leaf"]], "gather"]], "join", "end"]
    assert (graph["steps"]["start"]["type"], graph["steps"]["gather"]["type"]) == (
        "split-foreach",
        "join",
    )


# Logs.


def stamp(second: int, micro: int = 0) -> str:
    return "2026-11-21T22:34:%02d.%06dZ" % (second, micro)


def mflog(second: int, message: str, source: str = "runtime", micro: int = 0) -> bytes:
    return f"[MFLOG|0|{stamp(second, micro)}|{source}|{uuid.uuid4()}]{message}".encode()


def write_log(place: make_tree.Place, name: str, data: bytes) -> pathlib.Path:
    path = pathlib.Path(place.meta).parent / name
    new = path.with_name(name + ".new")
    new.write_bytes(data)
    os.replace(new, path)
    return path


def rows_of(tree: Tree, path: str, query: str = "", stream: str = "out") -> Any:
    return tree.get(f"{path}/logs/{stream}?{query}")


def lines(tree: Tree, place: make_tree.Place, query: str = "") -> list[str]:
    return [row["line"] for row in rows_of(tree, tree.path(place), query)]


def download(tree: Tree, path: str, query: str = "", stream: str = "out") -> bytes:
    answer = tree.raw(
        f"GET /api{path}/logs/{stream}/download?{query} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()
    )
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    return body


def test_logs_of_a_real_task(tree: Tree) -> None:
    path = tree.task_of("ReadersData", "start")
    before = tree.snapshot()
    expected = [f"line {number}" for number in range(12)]
    expected += [
        "unicode é 世界 😀 \u2028 not a line end",
        "long:" + "x" * 70000,
        "",
        "carriage\rreturn",
    ]
    expected += ["no newline at the end"]
    rows = rows_of(tree, path)
    assert [row["line"] for row in rows] == expected
    assert [row["row"] for row in rows] == list(range(17))
    now = time.time() * 1000
    assert all(
        isinstance(row["timestamp"], int) and now - 3_600_000 < row["timestamp"] <= now
        for row in rows
    )
    assert [row["line"] for row in rows_of(tree, path, stream="err")] == ["err ☃"]
    assert download(tree, path).decode() == "\n".join(expected)
    answer = tree.client("GET", f"/api{path}/logs/out/download")
    flow, run, step, task = path.split("/")[2::2]
    assert (
        answer.headers["content-disposition"]
        == f"Attachment;filename=stdout_{flow}_{run}_{step}_{task}-0.txt"
    )
    assert tree.snapshot() == before


def test_logs_as_metaflows_own_reader(tree: Tree) -> None:
    """The text of Metaflow's client is ours and a newline."""
    code = (
        "import sys; from metaflow import Task, namespace, metadata; namespace(None)\n"
        "task = Task(sys.argv[1], attempt=int(sys.argv[2]))\n"
        "sys.stdout.buffer.write((task.stdout + '\\0' + task.stderr).encode())\n"
    )
    env = dict(
        os.environ,
        METAFLOW_DATASTORE_SYSROOT_LOCAL=str(tree.root),
        METAFLOW_DEFAULT_METADATA="local",
        USERNAME="t",
    )
    for step in ("start", "end"):
        path = tree.task_of("ReadersData", step)
        words = [sys.executable, "-c", code, "/".join(path.split("/")[2::2]), "0"]
        done = subprocess.run(words, env=env, cwd=tree.root, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        for stream, theirs in zip(("out", "err"), done.stdout.split(b"\0")):
            ours = download(tree, path, "attempt_id=0", stream)
            assert (ours + b"\n" if ours else b"") == theirs


def test_logs_of_each_attempt(tree: Tree) -> None:
    path = tree.task_of("ReadersData", "end")
    assert [row["line"] for row in rows_of(tree, path, "attempt_id=0")] == ["attempt 0"]
    assert [row["line"] for row in rows_of(tree, path, "attempt_id=1")] == ["attempt 1"]
    assert "RuntimeError: once" in [
        row["line"] for row in rows_of(tree, path, "attempt_id=0", "err")
    ]
    assert tree.client("GET", f"/api{path}/logs/out?attempt_id=2").status == 404


@pytest.mark.parametrize("limit,total", [(5, 12), (5, 10), (1, 2), (1000, 12), (3, 0)])
def test_log_pages(tree: Tree, limit: int, total: int) -> None:
    """Forwards cut from the front; backwards the last page comes first, and is the short remainder."""
    place = tree.place()
    write_log(
        place, "0.runtime_stdout.log", b"".join(mflog(n, f"l{n}") + b"\n" for n in range(total))
    )
    pages, path = max(1, -(-total // limit)), tree.path(place)
    seen, backwards = [], []
    for number in range(1, pages + 1):
        answer = tree.client.get(f"/api{path}/logs/out?_limit={limit}&_page={number}&_order=%2Brow")
        assert answer["pages"]["last"] == pages
        seen += answer["data"]
        back = rows_of(tree, path, f"_limit={limit}&_page={number}&_order=-row")
        backwards += back
        assert number > 1 or len(back) == (total % limit or min(limit, total))
    assert [row["row"] for row in seen] == list(range(total))
    assert backwards == seen[::-1]
    assert rows_of(tree, path, f"_limit={limit}&_page={pages + 1}") == []
    assert rows_of(tree, path, "_limit=0") == seen


def test_order_and_headers_of_logs(tree: Tree) -> None:
    two = tree.place()
    write_log(two, "0.runtime_stdout.log", b"".join(mflog(n, f"r{n}") + b"\n" for n in (1, 5, 9)))
    write_log(two, "0.task_stdout.log", b"\n".join(mflog(n, f"t{n}", "task") for n in (2, 5, 7)))
    assert lines(tree, two) == ["r1", "t2", "r5", "t5", "t7", "r9"]
    assert download(tree, tree.path(two)) == b"r1\nt2\nr5\nt5\nt7\nr9"
    back = rows_of(tree, tree.path(two), "_limit=4&_page=1&_order=-row")
    assert [(row["row"], row["line"]) for row in back] == [(5, "r9"), (4, "t7")]
    at = datetime.datetime(2026, 11, 21, 22, 34, 9, tzinfo=datetime.timezone.utc)
    assert back[0]["timestamp"] == at.timestamp() * 1000
    mixed = tree.place()
    moments = [mflog(5, "b"), mflog(3, "a"), mflog(5, "c"), b"bare", mflog(4, "x")]
    whole = mflog(3, "whole second", micro=0).replace(b".000000Z", b"Z")
    write_log(mixed, "0.runtime_stdout.log", b"\n".join([*moments, whole]))
    assert lines(tree, mixed) == ["a", "whole second", "x", "b", "c", "bare"]
    bare = tree.place()
    write_log(
        bare, "0.runtime_stdout.log",
        mflog(1, "one") + b"\nbare [MFLOG|0|x\n\n" + mflog(2, "two\r") + b"\n[MFLOG|0|notatimeZ|a|b]odd\n"
        + b"\xff\xfe\n[![MFLOG|0|" + stamp(3).encode() + b"|runtime|id]kept\n",
    )  # fmt: skip
    rows = rows_of(tree, tree.path(bare))
    assert [row["line"] for row in rows] == [
        "one", "bare [MFLOG|0|x", "", "two\r", "[MFLOG|0|notatimeZ|a|b]odd", "\ufffd\ufffd", "kept",
    ]  # fmt: skip
    assert [row["timestamp"] is None for row in rows] == [
        False,
        True,
        True,
        False,
        True,
        True,
        False,
    ]
    old = tree.place()
    write_log(old, "0.stdout.log", b"plain\nlines")
    assert lines(tree, old) == ["plain", "lines"]
    write_log(old, "0.runtime_stdout.log", mflog(1, "new"))
    assert lines(tree, old) == ["new"]


def test_a_growing_log(tree: Tree) -> None:
    """Replaced by a longer file, or appended to; at any byte; also shortened, scrubbed and gone."""
    place = tree.place()
    whole = b"\n".join(mflog(n, f"line {n} é") for n in range(4))
    for size in [*range(0, len(whole), 31), len(whole)]:
        write_log(place, "0.runtime_stdout.log", whole[:size])
        found, complete = lines(tree, place), whole[:size].count(b"\n")
        assert found[:complete] == [f"line {n} é" for n in range(complete)]
        assert len(found) <= complete + 1 and not any("MFLOG" in line for line in found)
    path = pathlib.Path(place.meta).parent / "0.runtime_stdout.log"
    with open(path, "ab") as file:
        file.write(b" more\n" + mflog(7, "appended") + b"\n")
    assert lines(tree, place)[-2:] == ["line 3 é more", "appended"]
    write_log(place, "0.runtime_stdout.log", b"[REDACTED runtime stdout]")
    assert lines(tree, place) == ["[REDACTED runtime stdout]"]
    path.unlink()
    assert lines(tree, place) == []


def test_long_logs_and_long_lines(tree: Tree) -> None:
    place = tree.place()
    write_log(
        place,
        "0.runtime_stdout.log",
        b"".join((mflog(n, "x" * 40) + b"\n") * 4000 for n in range(60)),
    )
    answer = tree.client.get(f"/api{tree.path(place)}/logs/out?_limit=1000&_order=-row")
    assert answer["pages"]["last"] == 240 and answer["data"][0]["row"] == 239_999
    assert len(download(tree, tree.path(place))) == 240_000 * 41 - 1
    long = tree.place()
    write_log(
        long, "0.runtime_stdout.log", mflog(1, "é" * 2_000_000) + b"\n" + mflog(2, "next") + b"\n"
    )
    first, second = lines(tree, long)
    assert second == "next" and first.startswith("éé") and 500_000 < len(first) < 1_100_000
    assert first.endswith("more bytes: download the log to see them]")
    assert download(tree, tree.path(long)).decode() == "é" * 2_000_000 + "\nnext"
    wide = tree.place()
    write_log(
        wide,
        "0.runtime_stdout.log",
        b"".join(mflog(n % 60, "y" * 900_000) + b"\n" for n in range(40)),
    )
    found = lines(tree, wide)
    assert len(found) == 40 and sum(map(len, found)) < 20 << 20


def test_a_header_that_never_ends_costs_no_time(tree: Tree) -> None:
    place = tree.place()
    line = b"[MFLOG|0|" + b"Z|" * 240 + b"\n"
    write_log(place, "0.runtime_stdout.log", line * 20_000)
    assert len(rows_of(tree, tree.path(place), "_limit=1000")) == 1000
    assert tree.client.get(f"/api{tree.path(place)}/logs/out?_limit=1000")["pages"]["last"] == 20


def test_more_than_is_indexed(tmp_path: pathlib.Path) -> None:
    """Rows say so; the download has it all. A sparse file may have any length."""
    root = tmp_path / "root"
    root.mkdir()
    with Tree(root, quick={"LOG_INDEX_LINES": 10, "LOG_INDEX_BYTES": 1 << 20}) as tree:
        many = tree.place()
        write_log(many, "0.runtime_stdout.log", b"\n".join(mflog(n, f"l{n}") for n in range(15)))
        found = lines(tree, many)
        assert len(found) == 11 and found[9] == "l9" and "download" in found[10]
        assert download(tree, tree.path(many)).split(b"\n") == [b"l%d" % n for n in range(15)]
        long = tree.place()
        write_log(long, "0.runtime_stdout.log", mflog(1, "x" * (2 << 20)) + b"\n" + mflog(2, "end"))
        assert len(lines(tree, long)) == 1
        assert download(tree, tree.path(long)) == b"x" * (2 << 20) + b"\nend"
        sparse = tree.place()
        path = write_log(sparse, "0.runtime_stdout.log", b"one\ntwo\n")
        os.truncate(path, 16 << 20)
        found = lines(tree, sparse)
        assert found[:2] == ["one", "two"] and found[2].startswith("... more lines than")


def test_a_log_is_waited_for_when_its_task_has_just_ended(tree: Tree) -> None:
    """Metaflow writes the log when the task's process ends, and the UI asks only twice."""
    now = time.time_ns() // 1_000_000
    root = str(tree.metaflow)
    run = make_tree.make_run(root, "F", now - 1000)
    make_tree.make_step(root, "F", run, "start", now - 1000)
    place = make_tree.Place(root, "F", run, "start", "1", now - 100)
    make_tree.make_task(place)
    writer = threading.Timer(
        0.7, lambda: write_log(place, "0.runtime_stdout.log", mflog(1, "late") + b"\n")
    )
    writer.start()
    try:
        assert lines(tree, place) == ["late"]
    finally:
        writer.join()


def test_downloads_end_with_their_clients(tree: Tree) -> None:
    place = tree.place()
    write_log(place, "0.runtime_stdout.log", (mflog(1, "z" * 100_000) + b"\n") * 300)
    target = f"/api{tree.path(place)}/logs/out/download"
    socks = []
    for _ in range(12):
        sock = tree.connect(receive=4096)
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        socks.append(sock)
    wait_for(lambda: tree.workers)
    assert lines(tree, place, "_limit=1")[0].startswith("zzz"), "slow downloads hold up no page"
    for sock in socks:
        sock.close()
    wait_for(lambda: not tree.workers)


def test_logs_elsewhere_and_links(tree: Tree, tmp_path: pathlib.Path) -> None:
    for kind, root in (("s3", "s3://bucket/x"), ("local", str(tmp_path)), ("azure", "")):
        place = tree.place()
        make_tree.make_metadata(place, "ds-type", kind, place.at + 100)
        make_tree.make_metadata(place, "ds-root", root, place.at + 100)
        for path in ("logs/out", "logs/out/download"):
            answer = tree.client("GET", f"/api{tree.path(place)}/{path}")
            assert (answer.status, answer.body["id"]) == (501, "datastore-not-local")
            assert "not local" in answer.body["detail"]
    linked, secret = tree.place(), tmp_path / "secret"
    secret.write_bytes(mflog(1, "secret"))
    (pathlib.Path(linked.meta).parent / "0.runtime_stdout.log").symlink_to(secret)
    os.mkfifo(pathlib.Path(linked.meta).parent / "0.task_stdout.log")
    assert lines(tree, linked) == [] and download(tree, tree.path(linked)) == b""


# Cards.


def test_cards_of_a_real_task(tree: Tree) -> None:
    path, before = tree.task_of("ReadersCards", "start"), tree.snapshot()
    cards = tree.get(f"{path}/cards")
    assert [(card["type"], card["id"]) for card in cards] == [("default", None), ("blank", "mine")]
    for card in cards:
        assert set(card) == {"id", "hash", "type"} and len(card["hash"]) in (32, 40)
        answer = tree.client("GET", f"/api{path}/cards/{card['hash']}")
        assert answer.headers["content-type"].startswith("text/html")
        assert answer.body.lstrip().lower().startswith("<!doctype html")
        data = tree.client.get(f"/api{path}/cards/{card['hash']}/data")
        assert (data["id"], data["type"]) == (card["id"], card["type"])
        assert set(data["data"]) == {"reload_token", "created_on", "data"}
        assert data["data"]["reload_token"] == "final"
    assert "Hello ☃" in json.dumps(data["data"]["data"], ensure_ascii=False)
    assert tree.get(f"{tree.task_of('ReadersCards', 'end')}/cards") == []
    for missing in ("deadbeef", "deadbeef/data", "..%2fx", "a%00b"):
        assert tree.client("GET", f"/api{path}/cards/{missing}").status in (400, 404)
    assert tree.snapshot() == before


def test_cards_of_resumed_tasks_are_those_of_their_origin(tree: Tree) -> None:
    """Metaflow clones no cards; a run may be resumed from a resumed one."""
    origin = tree.newest("ReadersCards")
    cards = tree.get(f"{tree.task_of('ReadersCards', 'start')}/cards")
    assert len(cards) == 2
    for _ in range(2):
        number = tree.newest("ReadersCards").rpartition("/")[2]
        tree.run("readers_cards.py", "resume", "end", "--origin-run-id", number)
        path = tree.task_of("ReadersCards", "start")
        assert not path.startswith(origin)
        assert tree.get(f"{path}/cards") == cards
        html = tree.client("GET", f"/api{path}/cards/{cards[0]['hash']}")
        assert html.status == 200 and html.body.lstrip().lower().startswith("<!doctype html")
        assert tree.client.get(f"/api{path}/cards/{cards[0]['hash']}/data")["data"]


def make_card(
    root: pathlib.Path,
    place: make_tree.Place,
    name: str,
    data: bytes,
    kind: str = "cards",
    steps: bool = True,
) -> pathlib.Path:
    parts = [
        place.flow,
        "runs",
        place.run,
        *(["steps", place.step] if steps else []),
        "tasks",
        place.task,
        kind,
    ]
    folder = root.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


def test_cards_in_both_layouts_and_half_written(tree: Tree) -> None:
    root, place = tree.metaflow / "mf.cards", tree.place()
    path = tree.path(place)
    for name in (
        "tmpab12cd",
        "default-aa11.html.tmp",
        "a-b-c-d.html",
        "nohash.html",
        ".html",
        "default-.html",
    ):
        make_card(root, place, name, b"x")
    make_card(root, place, "default-ee55.html", b"")
    assert tree.get(f"{path}/cards") == []
    assert tree.client("GET", f"/api{path}/cards/ee55").status == 404
    make_card(root, place, "default-cc33.html", b"<html>3", steps=False)
    make_card(root, place, "blank-x-bb22.html", b"<html>2")
    make_card(tree.metaflow, place, "blank-dd44.html", b"<html>4")
    found = {(card["type"], card["id"], card["hash"]) for card in tree.get(f"{path}/cards")}
    assert found >= {("blank", "x", "bb22"), ("blank", None, "dd44")}
    assert tree.client("GET", f"/api{path}/cards/cc33").body == "<html>3"
    data = f"/api{path}/cards/ee55/data"
    make_card(root, place, "default-ee55.data.json", b'{"reload_token": "x", "da', "runtime")
    assert tree.client.get(data) == {"data": None, "id": None, "type": "default"}
    numbers = b'{"data": {"a": 1e999, "b": -1e999, "c": [1e308, 1.5, 3], "d": Infinity, "n": NaN}}'
    make_card(root, place, "default-ee55.data.json", numbers, "runtime")
    shown = tree.client.get(data)["data"]
    assert shown == {"data": {"a": None, "b": None, "c": [1e308, 1.5, 3], "d": None, "n": None}}
    make_card(root, place, "default-ee55.data.json", b"[" * 100_000, "runtime")
    assert tree.client.get(data)["data"] is None


def test_cards_outside_open_nothing(tree: Tree, tmp_path: pathlib.Path) -> None:
    place = tree.place()
    card = make_card(tree.metaflow / "mf.cards", place, "x-bb22.html", b"<html>")
    secret = tmp_path / "secret"
    secret.write_text("<html>")
    (card.parent / "default-dd44.html").symlink_to(secret)
    os.mkfifo(card.parent / "default-ff66.html")
    path = tree.path(place)
    assert [card["hash"] for card in tree.get(f"{path}/cards")] == ["bb22"]
    assert tree.client("GET", f"/api{path}/cards/dd44").status == 404
    assert tree.client("GET", f"/api{path}/cards/ff66").status == 404
    other = tree.place()
    hidden = make_card(tmp_path, other, "default-aa11.html", b"<html>secret")
    folder = tree.metaflow / "mf.cards" / "F" / "runs" / other.run
    folder.symlink_to(hidden.parents[5])
    assert tree.get(f"{tree.path(other)}/cards") == []
    assert tree.client("GET", f"/api{tree.path(other)}/cards/aa11").status == 404


def test_large_cards_of_clients_that_do_not_read_cost_no_memory(tree: Tree) -> None:
    place = tree.place()
    make_card(tree.metaflow / "mf.cards", place, "default-aa11.html", b"<html>" + bytes(60 << 20))
    target = f"/api{tree.path(place)}/cards/aa11"
    before, socks = tree.memory(), []
    for _ in range(20):
        sock = tree.connect(receive=4096)
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        socks.append(sock)
    assert len(tree.client("GET", target).body) == 6 + (60 << 20)
    assert tree.memory() < before + 100
    for sock in socks:
        sock.close()


# Foreach.


def test_labels_and_variables_of_a_real_foreach(tree: Tree) -> None:
    for step, depth in (("start", 0), ("middle", 1), ("leaf", 2), ("join", 0)):
        path = f"{tree.newest('ReadersData')}/steps/{step}/tasks"
        labels = [row.get("foreach_label") for row in tree.get(f"{path}?postprocess=true")]
        ids = [row["task_id"] for row in tree.get(f"{path}?postprocess=true")]
        if not depth:
            assert labels == [None]
        else:
            # Which of them ran first is left to chance.
            half = len(ids) // 2
            assert [label[:-3] for label in labels] == [str(task) for task in ids]
            assert sorted(label[-3:] for label in labels) == ["[0]"] * half + ["[1]"] * half
    shown = tree.contents(tree.task_of("ReadersData", "middle"))
    assert (
        "ForeachFrame(step='middle', var='outer', num_splits=2, index=" in shown["_foreach_stack"]
    )
    run = tree.newest("ReadersData")
    for value, count in (('"a"', 3), ("a1", 1), ("b", 3), ('"nope"', 0)):
        key = "inner" if value == "a1" else "outer"
        found = search(
            tree, f"/api{run}/search?key={key}&value={quote(value)}&scope=FOREACH_VARIABLE"
        )
        assert len(found) >= count and bool(found) is bool(count), (value, found)


def test_random_values_match_str(tree: Tree) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    flat = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text()
        | st.binary()
        | st.datetimes()
        | st.uuids()
    )
    values = st.recursive(
        flat,
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    )
    made: dict[str, bytes] = {}

    @hypothesis.settings(max_examples=200, deadline=None, database=None)
    @hypothesis.given(values, st.integers(0, 5))
    def make(value: Any, protocol: int) -> None:
        made[f"v{len(made)}"] = pickle.dumps(value, protocol)

    make()
    shown = tree.shown(made)
    with contextlib.suppress(KeyError):
        for name, data in made.items():
            assert shown[name] == str(pickle.loads(data)), data
