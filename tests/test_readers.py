"""The datastore readers against trees that real flows wrote in local mode, and against hostile ones."""

import collections
import contextlib
import copyreg
import datetime
import decimal
import gzip
import hashlib
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import uuid
from typing import Any

import pytest

import mflocal

FLOWS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "flows")
STEPS = ["_parameters", "start", "middle", "leaf", "gather", "join"]


class Tree:
    """A root in which flows ran, read as files."""

    def __init__(self, root):
        self.root = str(root)
        self.dir = os.path.join(self.root, ".metaflow")

    def run(self, script, *options, ok=True):
        env = {key: value for key, value in os.environ.items() if not key.startswith("METAFLOW")}
        env.update(
            USERNAME="tester", METAFLOW_HOME=self.root, METAFLOW_DATASTORE_SYSROOT_LOCAL=self.root
        )
        env["METAFLOW_DEFAULT_METADATA"] = "local"
        command = [
            sys.executable,
            os.path.join(FLOWS, script),
            "--quiet",
            "run",
            "--max-workers",
            "2",
            *options,
        ]
        done = subprocess.run(
            command, env=env, cwd=self.root, capture_output=True, text=True, timeout=180
        )
        assert (done.returncode == 0) is ok, done.stdout + done.stderr
        return self

    def run_id(self, flow):
        return max(name for name in os.listdir(os.path.join(self.dir, flow)) if name.isdigit())

    def task(self, flow, step, number=0):
        run = self.run_id(flow)
        tasks = [
            name for name in os.listdir(os.path.join(self.dir, flow, run, step)) if name.isdigit()
        ]
        return flow, run, step, sorted(tasks, key=int)[number]

    def records(self, task, kind="artifact"):
        meta = os.path.join(self.dir, *task, "_meta")
        found = []
        for name in sorted(os.listdir(meta)):
            if (
                ("_artifact_" in name)
                if kind == "artifact"
                else name.startswith("sysmeta_" + kind + "_")
            ):
                with open(os.path.join(meta, name)) as file:
                    found.append(json.load(file))
        return found

    def artifact(self, task, name, **changes):
        records = [record for record in self.records(task) if record["name"] == name]
        return {**max(records, key=lambda record: record["attempt_id"]), **changes}


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    made = Tree(tmp_path_factory.mktemp("readers"))
    return made.run("readers_data.py").run("readers_cards.py").run("readers_fail.py", ok=False)


@pytest.fixture(scope="session")
def config_tree(tmp_path_factory):
    pytest.importorskip("metaflow.user_configs")
    return Tree(tmp_path_factory.mktemp("config")).run("readers_config.py")


def snapshot(root):
    """Every file with its content and times."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            info = os.lstat(path)
            with open(path, "rb") as file:
                found[path] = (
                    info.st_mtime_ns,
                    info.st_ino,
                    info.st_mode,
                    hashlib.sha1(file.read()).hexdigest(),
                )
    return found


def content(tree, name, step="start", flow="ReadersData", **changes):
    task = tree.task(flow, step)
    return mflocal.artifact_content(
        tree.dir, tree.artifact(task, name, **changes), data_roots=[tree.root + "/data"]
    )


# Artifacts of real runs.

PLAIN = {
    "number": 12,
    "whole": 2**100,
    "unicode": "é 世界 😀",
    "nested": {
        "a": [1, 2, {"b": None}],
        "t": (1,),
        "f": 1.5,
        "s": {3},
        "z": frozenset(),
        "y": b"\x00q",
    },
    "moment": datetime.datetime(2026, 11, 21, 22, 30, 1, 5),
    "zoned": datetime.datetime(2026, 11, 21, tzinfo=datetime.timezone.utc),
    "day": datetime.date(2026, 11, 21),
    "span": datetime.timedelta(hours=3),
    "money": decimal.Decimal("12.30"),
    "ident": uuid.UUID(int=7),
    "path": pathlib.PurePosixPath("a/b"),
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
    "counter": collections.Counter("aab"),
    "default": collections.defaultdict(list, {"k": [1]}),
    "ring": collections.deque([1, 2], maxlen=5),
    "z": complex(1, -2),
    "error": ValueError("bad", 3),
    "text": "hällo",
    "nothing": None,
    "flag": True,
    "outer": ["a", "b"],
    "big": "z" * 20000,
}


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_content_is_str_of_the_value(tree, name):
    assert content(tree, name) == {"content": str(PLAIN[name])}


def test_other_types_are_shown_by_type_and_size(tree):
    point = content(tree, "point")["content"]
    assert point.startswith("<__main__.Point, ") and point.endswith(" bytes>")
    assert content(tree, "opaque")["content"].startswith("<__main__.Opaque, ")
    assert content(tree, "mixed") == {"content": "[1, <__main__.Opaque>, 'x']"}


def test_included_file(tree):
    with open(os.path.join(FLOWS, "include.txt"), encoding="utf-8") as file:
        assert content(tree, "included") == {"content": file.read()}
    elsewhere = mflocal.artifact_content(
        tree.dir, tree.artifact(tree.task("ReadersData", "start"), "included")
    )
    assert elsewhere["postprocess_error"]["id"] == "datastore-not-local"


def with_state(name: str, state: Any) -> bytes:
    """The pickle of an object of the class `name`, by which `state` would be set."""
    module, _, kind = name.rpartition(".")
    return (
        b"\x80\x02c%s\n%s\n)\x81" % (module.encode(), kind.encode())
        + pickle.dumps(state, 2)[2:-1]
        + b"b."
    )


def included_at(root: pathlib.Path, url: Any, **more: Any) -> dict[str, Any]:
    """The record of an IncludeFile parameter whose content is at `url`; `more` of what describes it."""
    described = {"type": "uploader-v2", "url": url, "is_text": True, **more}
    state = {"_descriptor": described, "_cached_size": None}
    return blob(root, with_state("metaflow.includefile.IncludedFile", state))


def include(folder: pathlib.Path, content: bytes) -> str:
    """Puts an included file into a `data` directory, and says its URL."""
    name = hashlib.sha1(content).hexdigest()
    (folder / "F").mkdir(parents=True, exist_ok=True)
    (folder / "F" / name).write_bytes(gzip.compress(content))
    return "local:///gone/data/F/" + name


def test_included_file_is_only_read_by_its_content(tmp_path):
    """A pickle cannot name a file of whose content it does not have the sha1."""
    (tmp_path / "data" / "F").mkdir(parents=True)
    for text, id in (("mine", None), ("secret", "artifact-unreadable")):
        name = hashlib.sha1(b"mine").hexdigest()
        (tmp_path / "data" / "F" / name).write_bytes(gzip.compress(text.encode()))
        shown = mflocal.artifact_content(
            str(tmp_path), included_at(tmp_path, "local:///gone/data/F/" + name)
        )
        assert (
            shown == {"content": "mine"} if id is None else shown["postprocess_error"]["id"] == id
        )
    for url in ("local:///etc/passwd", "s3://bucket/F/" + name, "local://" + name, "", None, 7):
        shown = mflocal.artifact_content(str(tmp_path), included_at(tmp_path, url))
        assert shown["postprocess_error"]["id"] == "datastore-not-local", url


@pytest.mark.parametrize(
    "encoding",
    [
        "hex",
        "rot13",
        "base64",
        "undefined",
        "idna",
        "punycode",
        "no-such",
        "a/b",
        "",
        7,
        ["utf-8"],
        None,
    ],
)
def test_included_file_in_an_encoding_that_is_none(tmp_path: pathlib.Path, encoding: Any) -> None:
    """What codecs knows besides text encodings raises, or takes quadratic time."""
    url = include(tmp_path / "data", "hällo wörld".encode())
    shown = mflocal.artifact_content(str(tmp_path), included_at(tmp_path, url, encoding=encoding))
    assert shown == {"content": "hällo wörld"}


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "UTF-16", "cp1252", "utf_8_sig"])
def test_included_file_in_its_encoding(tmp_path: pathlib.Path, encoding: str) -> None:
    url = include(tmp_path / "data", "hällo".encode(encoding))
    shown = mflocal.artifact_content(str(tmp_path), included_at(tmp_path, url, encoding=encoding))
    assert shown == {"content": "hällo"}


def test_included_files_behind_a_link_out_of_the_root_are_not_read(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    url = include(tmp_path / "out", b"secret")
    (root / "data").symlink_to(tmp_path / "out")
    shown = mflocal.artifact_content(str(root), included_at(root, url))
    assert shown["postprocess_error"]["id"] == "datastore-not-local"
    named = mflocal.artifact_content(
        str(root), included_at(root, url), data_roots=[str(tmp_path / "out")]
    )
    assert named == {"content": "secret"}, "where the user said that they are"
    (root / "data").unlink()
    url = include(root / "kept", b"mine")
    (root / "data").symlink_to(root / "kept")
    assert mflocal.artifact_content(str(root), included_at(root, url)) == {"content": "mine"}


def test_too_large(tree):
    task = tree.task("ReadersData", "start")
    error = content(tree, "huge")["postprocess_error"]
    size = len(pickle.dumps("z" * (3 << 20), protocol=4))
    assert error["id"] == "artifact-too-large" and error["traceback"] is None
    assert error["detail"].startswith("/".join(task) + "/huge: ") and error["detail"].endswith(
        " bytes"
    )
    assert abs(int(error["detail"].split()[-2]) - size) < 32


def test_too_large_without_the_index(tree, tmp_path):
    """The sizes that gzip claims do not matter: what is unpacked is bounded."""
    fake = blob(tmp_path, pickle.dumps("z" * (3 << 20)))
    assert "3145" in mflocal.artifact_content(str(tmp_path), fake)["postprocess_error"]["detail"]


def test_every_attempt_has_its_own_value(tree):
    task = tree.task("ReadersData", "end")
    shown = {
        record["attempt_id"]: mflocal.artifact_content(tree.dir, record)["content"]
        for record in tree.records(task)
        if record["name"] == "tried"
    }
    assert shown == {0: "0", 1: "1"}


def test_all_artifacts_of_a_run_at_once(tree):
    records = [record for step in STEPS for record in tree.records(tree.task("ReadersData", step))]
    before = snapshot(tree.dir)
    contents = mflocal.artifact_contents(tree.dir, records)
    assert snapshot(tree.dir) == before
    assert len(contents) == len(records) > 50
    for record, shown in zip(records, contents):
        assert shown.keys() in ({"content"}, {"postprocess_error"})
        if "postprocess_error" in shown:
            assert record["name"] in ("huge", "included")


def test_a_page_of_contents_is_bounded(tmp_path, monkeypatch):
    records = [blob(tmp_path, pickle.dumps("%d" % index * 900_000)) for index in range(9)]
    records.append(blob(tmp_path, pickle.dumps("last")))
    monkeypatch.setattr(mflocal, "ARTIFACT_PAGE_BYTES", 2_000_000)
    contents = mflocal.artifact_contents(str(tmp_path), records)
    assert [len(shown.get("content", "")) for shown in contents] == [900_000] * 2 + [0] * 7 + [4]


def test_remote_datastores_say_so(tree):
    for kind in ("s3", "azure", "gs"):
        error = content(tree, "number", ds_type=kind, location=":root:%s://bucket/metaflow" % kind)[
            "postprocess_error"
        ]
        assert (
            error["id"] == "datastore-not-local"
            and "not local" in error["detail"]
            and kind in error["detail"]
        )
    with pytest.raises(mflocal.Problem) as raised:
        task = tree.task("ReadersData", "start")
        mflocal.run_dag(tree.dir, [tree.artifact(task, "_graph_info", ds_type="s3")])
    assert (raised.value.status, raised.value.id) == (501, "datastore-not-local")
    shown = mflocal.run_parameters(tree.dir, [tree.artifact(task, "text", ds_type="s3")])
    assert "not local" in shown["text"]["value"]


def test_another_local_root_opens_nothing(tree, tmp_path):
    other = blob(tmp_path, pickle.dumps("secret"))
    error = mflocal.artifact_content(tree.dir, other)["postprocess_error"]
    assert error["id"] == "datastore-not-local"
    assert mflocal.artifact_content(str(tmp_path), other) == {"content": "secret"}


def test_a_project_that_moved_is_still_read(tree):
    assert content(tree, "number", location=":root:/gone/.metaflow") == {"content": "12"}


def test_missing_and_damaged(tree, tmp_path):
    assert content(tree, "number", sha="0" * 40)["postprocess_error"]["id"] == "artifact-not-found"
    for sha in ("../" + "0" * 37, "/etc/passwd", "", None, 7, "A" * 40):
        assert content(tree, "number", sha=sha)["postprocess_error"]["id"] == "artifact-not-found"
    for raw in (b"", b"\x1f\x8b", gzip.compress(pickle.dumps(1))[:-6], b"no gzip at all"):
        damaged = blob(tmp_path, pickle.dumps(1), packed=raw)
        assert (
            mflocal.artifact_content(str(tmp_path), damaged)["postprocess_error"]["id"]
            == "artifact-unreadable"
        )
    for value in ({"cas_raw": True, "cas_version": 1}, {"cas_raw": False, "cas_version": 9}, ["x"]):
        made = blob(tmp_path, pickle.dumps(2), packed=pickle.dumps(2), meta=value)
        shown = mflocal.artifact_content(str(tmp_path), made)
        assert ("content" in shown) is (isinstance(value, dict) and value["cas_version"] == 1), (
            value
        )


def test_encodings_of_extensions_are_not_unpickled(tmp_path):
    made = blob(tmp_path, b"PAR1 something", content_type="parquet")
    assert mflocal.artifact_content(str(tmp_path), made) == {"content": "<parquet, 14 bytes>"}


@pytest.mark.parametrize("encoding", [["pickle-v4"], {"a": 1}, 7, 1.5, True], ids=str)
def test_an_encoding_that_is_no_text_is_none(tmp_path: pathlib.Path, encoding: Any) -> None:
    task = tmp_path / "F/1/s/1"
    task.mkdir(parents=True)
    (task / "0.data.json").write_text(
        json.dumps({"objects": {}, "info": {"a": {"encoding": encoding}}})
    )
    assert mflocal.artifact_content(str(tmp_path), blob(tmp_path, pickle.dumps("x"))) == {
        "content": "x"
    }
    told = blob(tmp_path, pickle.dumps("y"), name="b", content_type=encoding)
    assert mflocal.artifact_content(str(tmp_path), told) == {"content": "y"}


# Files outside.


def blob(root, data, packed=None, meta=None, **fields):
    """A store with one blob, and the record of an artifact in it."""
    sha = hashlib.sha1(data).hexdigest()
    folder = os.path.join(str(root), "F", "data", sha[:2])
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, sha), "wb") as file:
        file.write(gzip.compress(data, 1) if packed is None else packed)
    with open(os.path.join(folder, sha + "_meta"), "w") as file:
        json.dump({"cas_raw": False, "cas_version": 1} if meta is None else meta, file)
    record = {
        "flow_id": "F",
        "run_number": 1,
        "step_name": "s",
        "task_id": 1,
        "name": "a",
        "attempt_id": 0,
    }
    record.update(sha=sha, ds_type="local", location=":root:" + str(root), content_type="pickle-v4")
    record.update(fields)
    return record


def test_symlinks_to_the_outside_open_nothing(tmp_path):
    outside, inside = tmp_path / "out", tmp_path / "in"
    secret = blob(outside, pickle.dumps("secret"))
    sha = secret["sha"]
    mine = {**secret, "location": ":root:" + str(inside)}
    for link, target in (
        ("F", outside / "F"),
        ("F/data", outside / "F" / "data"),
        ("F/data/" + sha[:2], outside / "F" / "data" / sha[:2]),
        ("F/data/%s/%s" % (sha[:2], sha), outside / "F" / "data" / sha[:2] / sha),
    ):
        path = inside / link
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
        assert (
            mflocal.artifact_content(str(inside), mine)["postprocess_error"]["id"]
            == "artifact-not-found"
        ), link
        path.unlink()
    good = blob(inside, pickle.dumps("mine"))
    (inside / "G").symlink_to(inside / "F")
    assert mflocal.artifact_content(str(inside), {**good, "flow_id": "G"}) == {"content": "mine"}


def test_fifos_and_directories_do_not_block(tmp_path):
    record = blob(tmp_path, pickle.dumps(1))
    path = os.path.join(str(tmp_path), "F", "data", record["sha"][:2], record["sha"])
    for make in (os.mkfifo, os.mkdir):
        os.unlink(path)
        make(path)
        assert (
            mflocal.artifact_content(str(tmp_path), record)["postprocess_error"]["id"]
            == "artifact-not-found"
        )
        if make is os.mkfifo:
            continue
        os.rmdir(path)


@pytest.mark.parametrize("bad", ["..", ".", "", "a/b", "a\\b", "a\0b", "../../etc"])
def test_ids_are_never_paths(tmp_path, bad):
    (tmp_path / "secret.html").write_text("x")
    task = ["F", "1", "s", "1"]
    for index in range(4):
        hostile = task[:index] + [bad] + task[index + 1 :]
        assert mflocal.list_cards(str(tmp_path), hostile) == []
        assert mflocal.card_html(str(tmp_path), hostile, "secret") is None
        assert mflocal.log_rows(str(tmp_path), hostile, 0, "stdout").rows == []
    assert mflocal.card_html(str(tmp_path), task, bad) is None
    assert mflocal.card_data(str(tmp_path), task, bad) is None


# Hostile pickles.

FIRED = []


def fire(*args):
    FIRED.append(args)
    return args


class Reduced:
    def __init__(self, *reduction):
        self.reduction = reduction

    def __reduce__(self):
        return self.reduction


class Stateful:
    def __setstate__(self, state):
        fire("setstate", state)

    def __getstate__(self):
        return {"a": 1}


def hostile_pickles(marker):
    command = "touch %s" % marker
    code = "__import__('os').system(%r)" % command
    yield "os.system", pickle.dumps(Reduced(os.system, (command,)))
    yield "eval", pickle.dumps(Reduced(eval, (code,)))
    yield "exec", pickle.dumps(Reduced(exec, (code,)), 2)
    yield "nested", pickle.dumps({"a": [Reduced(fire, (Reduced(os.system, (command,)),))]})
    yield "getattr", pickle.dumps(Reduced(getattr, (Reduced(__import__, ("os",)), "system")))
    yield "setstate", pickle.dumps(Stateful())
    yield (
        "state slots",
        pickle.dumps(Reduced(Stateful, (), (None, {"__class__": Reduced(fire, ())}))),
    )
    yield (
        "listitems",
        pickle.dumps(Reduced(collections.UserList, (), None, iter([Reduced(fire, (1,))]))),
    )
    yield (
        "dictitems",
        pickle.dumps(Reduced(collections.UserDict, (), None, iter([("k", Reduced(fire, (1,)))]))),
    )
    yield (
        "reconstructor",
        pickle.dumps(Reduced(copyreg._reconstructor, (Stateful, object, None), {"a": 1})),
    )
    yield "newobj", b"\x80\x02cposix\nsystem\nU\x05touch\x85\x81."
    yield "newobj_ex", b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x05touch\x85}\x92."
    yield "inst", b"(S'%s'\nios\nsystem\n." % command.encode()
    yield "obj", b"(cos\nsystem\nS'%s'\no." % command.encode()
    yield "stack global", b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x01" + b"1\x85R."
    yield "dotted name", b"\x80\x04\x8c\x08datetime\x8c\x14datetime.__class__.x\x93)R."
    yield (
        "os through datetime",
        b"\x80\x04\x8c\x08datetime\x8c\x0esys.modules.get\x93\x8c\x02os\x85R.",
    )
    yield "build on a list", b"\x80\x04]}\x8c\x06append\x8c\x04evils\x62."
    yield "build on a class", b"\x80\x04cdatetime\ndatetime\n}\x8c\x03now\x8c\x01xsb."
    yield "persistent id", b"Pos.system\n."
    yield "binary persistent id", b"\x80\x04\x8c\x09os.systemQ."
    yield "name that is no text", b"\x80\x04K\x01K\x02\x93."
    yield (
        "maker with a name as argument",
        b"\x80\x04\x8c\x08datetime\x8c\x08timezone\x93\x8c\x02os\x8c\x06system\x93\x85R.",
    )
    yield (
        "moment with a foreign zone",
        b"\x80\x04cdatetime\ndatetime\n(C\x0a\x07\xea\x01\x01\0\0\0\0\0\0cos\nsystem\n)RtR.",
    )
    yield "counter of an object", b"\x80\x04ccollections\nCounter\ncos\nsystem\n)R\x85R."
    yield "path of objects", b"\x80\x04cpathlib\nPosixPath\ncos\nsystem\n\x85R."


def test_hostile_pickles_do_nothing(tmp_path):
    marker = tmp_path / "fired"
    loaded = set(sys.modules)
    for what, data in hostile_pickles(marker):
        shown = mflocal.artifact_content(str(tmp_path), blob(tmp_path, data))
        assert shown.keys() in ({"content"}, {"postprocess_error"}), what
        assert not FIRED and not marker.exists(), what
        json.dumps(shown)
    assert not [name for name in set(sys.modules) - loaded if not name.startswith("encodings")]
    shown = mflocal.artifact_content(
        str(tmp_path), blob(tmp_path, pickle.dumps(Reduced(os.system, ("x",))))
    )
    assert shown["content"].startswith("<posix.system, ")


def test_the_extension_registry_is_not_asked(tmp_path):
    copyreg.add_extension(__name__, "fire", 240)
    try:
        data = pickle.dumps(fire, 2)
        assert b"\x82" in data
        pickle.loads(data)  # now it is in pickle's cache
        shown = mflocal.artifact_content(str(tmp_path), blob(tmp_path, data))
        assert shown["content"].startswith("<pickle.extension, ")
    finally:
        copyreg.remove_extension(__name__, "fire", 240)


def nest(opening, closing, depth):
    return b"\x80\x04" + opening * depth + b"N" + closing * depth + b"."


def bombs():
    yield "lists", nest(b"](", b"e", 200_000)
    yield "tuples", b"\x80\x04N" + b"\x85" * 400_000 + b"."
    yield "tuples as a key", b"\x80\x04}N" + b"\x85" * 290_000 + b"Ns."
    yield "sets of tuples", b"\x80\x04\x8f(N" + b"\x85" * 100_000 + b"\x90."
    yield "frozensets", b"\x80\x04" + b"(" * 50_000 + b"\x91" * 50_000 + b"."
    yield (
        "deques",
        b"\x80\x04"
        + b"ccollections\ndeque\nq\0"
        + b"h\0)R(" * 60_000
        + b"Ne"
        + b"e" * 59_999
        + b".",
    )
    yield (
        "ordered dicts",
        b"\x80\x04ccollections\nOrderedDict\nq\0"
        + b"h\0)RK\x01" * 60_000
        + b"N"
        + b"s" * 60_000
        + b".",
    )
    doubled = b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(100))
    yield "billion laughs", b"\x80\x04]q\0" + doubled + b"."
    yield "billion laughs as a key", b"\x80\x04)q\0" + doubled + b"0}hdNs."
    yield "itself", b"\x80\x04]q\0h\0a."
    yield "memo index", b"\x80\x04Nr\xff\xff\xff\xff."
    yield "long size", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f."
    yield "bytearray size", b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f."
    yield "negative size", b"\x80\x02T\xff\xff\xff\xffx."
    yield "frame size", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN."
    yield "digits", b"I" + b"9" * 900_000 + b"\n."
    yield "long digits", b"L" + b"9" * 900_000 + b"L\n."
    yield "long bytes", b"\x80\x02\x8b" + struct.pack("<i", 900_000) + b"\x7f" * 900_000 + b"."
    yield "empty sets", b"\x80\x04(" + b"\x8f" * 1_000_000 + b"l."
    yield "memoized", b"\x80\x04N" + b"\x94" * 1_000_000 + b"."
    yield "marks", b"\x80\x04" + b"(" * 1_000_000 + b"."
    colliding = b"".join(
        b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") for n in range(1, 80_000)
    )
    yield "colliding keys", b"\x80\x04\x8f(" + colliding + b"\x90."
    yield "nothing", b""
    yield "only stop", b"."
    yield "cut short", pickle.dumps({"a": 1})[:-3]
    yield "bad opcode", b"\x80\x04\xff."
    yield "protocol 9", b"\x80\x09N."
    yield "pop of a mark", b"\x80\x04(\x31\x31\x31."
    yield "append to nothing", b"\x80\x04(e."
    yield "odd items", b"\x80\x04}(K\x01u."
    yield "list as a key", b"\x80\x04}]Ns."
    yield "calls a number", b"\x80\x04K\x01)R."


@pytest.mark.parametrize(
    "what,data", list(bombs()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_bombs_are_bounded(tmp_path, what, data):
    record = blob(tmp_path, data)
    started = time.monotonic()
    shown = mflocal.artifact_content(str(tmp_path), record)
    assert time.monotonic() - started < 60
    assert shown.keys() in ({"content"}, {"postprocess_error"})
    if "postprocess_error" in shown:
        assert shown["postprocess_error"]["id"] in ("artifact-unreadable", "artifact-too-large")
    assert len(json.dumps(shown)) < 8 << 20
    parameter = mflocal.run_parameters(str(tmp_path), [{**record, "name": "p"}])["p"]["value"]
    json.dumps(parameter, allow_nan=False)


def test_keys_are_not_nested_deep():
    """Hashing a nest of tuples recurses in C, and hashes a shared part again each time."""
    shallow = b"\x80\x04}N" + b"\x85" * 20 + b"Ns."
    assert mflocal.unpickle_plain(shallow) == pickle.loads(shallow)
    for deep in (
        b"\x80\x04}N" + b"\x85" * 40 + b"Ns.",
        b"\x80\x04\x8f(N" + b"2\x86" * 30 + b"\x90.",
    ):
        with pytest.raises(mflocal.UnreadablePickle):
            mflocal.unpickle_plain(deep)


def test_gzip_bomb_is_bounded(tmp_path):
    packed = gzip.compress(b"\0" * (64 << 20), 9)
    shown = mflocal.artifact_content(str(tmp_path), blob(tmp_path, b"x", packed=packed))
    assert shown["postprocess_error"]["id"] == "artifact-too-large"


def test_padding_behind_a_blob_is_not_read(tmp_path: pathlib.Path) -> None:
    """gzip skips zeros one by one, and a sparse file has as many as one likes."""
    packed, most = gzip.compress(pickle.dumps("x")), 1000 + 1000 // 1000 + 1024
    for size, shown in ((most, "x"), (most + 1, "")):
        record = blob(tmp_path, pickle.dumps("x"), packed=packed.ljust(size, b"\0"))
        value = mflocal.read_artifact(str(tmp_path), record, limit=1000)
        assert value.text == shown and (value.error or {}).get("id") == (
            None if shown else "artifact-too-large"
        )


@pytest.mark.parametrize("limit", [1, 1000, 1 << 20])
def test_what_does_not_compress_is_read_up_to_the_limit(tmp_path: pathlib.Path, limit: int) -> None:
    data = os.urandom(limit)
    for level in (0, 1, 9):
        path = tmp_path / "blob"
        path.write_bytes(gzip.compress(data, level))
        with open(path, "rb") as file:
            assert mflocal._gunzip(file, limit) == data


def copying(what: str, calls: int) -> bytes:
    """A pickle that gives one large argument, from its memo, to a constructor again and again."""
    text = b"\x80\x04X" + struct.pack("<I", 600_000) + b"x" * 600_000
    numbers = b"\x80\x04(" + b"".join(b"M" + struct.pack("<H", number) for number in range(20_000))
    pairs = (
        b"\x80\x04("
        + b"".join(b"M" + struct.pack("<H", number) + b"N" for number in range(20_000))
        + b"d"
    )
    name, argument = {
        "set": (b"builtins\nset", numbers + b"l"),
        "frozenset": (b"builtins\nfrozenset", numbers + b"t"),
        "deque": (b"collections\ndeque", numbers + b"l"),
        "bytearray": (b"builtins\nbytearray", text.replace(b"X", b"B", 1)),
        "bytes": (b"_codecs\nencode", text),
        "path": (b"pathlib\nPosixPath", text),
        "decimal": (b"decimal\nDecimal", text),
        "dict": (b"collections\nOrderedDict", pairs),
        "counter": (b"collections\nCounter", pairs),
        "config": (b"metaflow.user_configs.config_parameters\nConfigValue", pairs),
        "config state": (b"metaflow.user_configs.config_parameters\nConfigValue", pairs),
    }[what]
    if what == "config state":
        state = b"\x80\x04}X\x05\0\0\0_data" + argument[2:] + b"sq\0"
        return state + b"c" + name + b"\nq\1" + b"h\1)Rh\0b" * calls + b"N."
    # What was made stays on the stack to the end; the value of the pickle is None.
    return argument + b"q\0c" + name + b"\nq\1" + b"h\1h\0\x85R" * calls + b"N."


@pytest.mark.parametrize(
    "what",
    [
        "set",
        "frozenset",
        "deque",
        "bytearray",
        "bytes",
        "path",
        "decimal",
        "dict",
        "counter",
        "config",
        "config state",
    ],
)
def test_what_constructors_copy_is_bounded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(mflocal, "PICKLE_COPIED", 4 << 20)
    few, many = blob(tmp_path, copying(what, 3)), blob(tmp_path, copying(what, 8))
    assert mflocal.artifact_content(str(tmp_path), few) == {"content": "None"}
    shown = mflocal.artifact_content(str(tmp_path), many)
    assert shown.get("postprocess_error", {}).get("id") == "artifact-too-large", str(shown)[:200]


def test_the_memory_of_copies_is_bounded(tmp_path: pathlib.Path) -> None:
    record = blob(tmp_path, copying("bytearray", 300))
    tracemalloc.start()
    try:
        shown = mflocal.artifact_content(str(tmp_path), record)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert shown.get("postprocess_error", {}).get("id") == "artifact-too-large", str(shown)[:200]
    assert peak < 100 << 20  # 180 MB without the bound


def test_a_foreign_error_is_never_written_out(tmp_path: pathlib.Path) -> None:
    """Metaflow's wrapper of an exception: type and exception are text, or nobody asks what they are."""

    def wrapped(state: dict[str, Any]) -> str:
        record = blob(tmp_path, with_state("metaflow.exception.MetaflowExceptionWrapper", state))
        return str(mflocal.artifact_content(str(tmp_path), record)["content"])

    shared: list[Any] = ["part"]
    for _ in range(10):  # with 40 the text would have a million million parts
        shared = [shared, shared]
    assert wrapped({"type": shared, "exception": shared}) == "[no stacktrace]\n...: ..."
    assert (
        wrapped({"type": "T", "exception": {"a": shared}, "stacktrace": shared})
        == "[no stacktrace]\nT: ..."
    )
    assert wrapped({"type": 7, "exception": "e", "stacktrace": ""}) == "[no stacktrace]\n...: e"
    assert wrapped({"exception": "e"}) == "[no stacktrace]\nNone: e"
    assert wrapped({"type": shared, "stacktrace": "Traceback"}) == "Traceback"


def test_random_bytes_never_raise(tmp_path):
    import random

    rng = random.Random(5)
    seeds = [pickle.dumps(PLAIN, protocol) for protocol in range(6)]
    for _ in range(3000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(mflocal.UnreadablePickle, mflocal._OverLimit):
            mflocal.plain_text(mflocal.unpickle_plain(bytes(data)))


@pytest.mark.parametrize("protocol", range(6))
def test_all_protocols(protocol):
    values = dict(
        PLAIN,
        arr=bytearray(b"x\xff"),
        rng=range(1, 9, 2),
        loop=[1],
        at=datetime.time(1, 2, 3),
        neg=-(2**70),
    )
    values["loop"].append(values["loop"])
    values["set of"] = {(1, "a"), frozenset([2])}
    values["err"] = KeyError("k")
    values["inf"] = [float("inf"), float("-inf")]
    values["text\n'\""] = "\udc80\n"
    for name, value in values.items():
        read = mflocal.plain_text(mflocal.unpickle_plain(pickle.dumps(value, protocol)))
        assert read == str(value), (name, protocol)
        assert mflocal.plain_text(mflocal.unpickle_plain(pickle.dumps([value], protocol))) == str(
            [value]
        ), name


def test_hypothesis_values():
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

    @hypothesis.settings(max_examples=150, deadline=None)
    @hypothesis.given(values, st.integers(0, 5))
    def same(value, protocol):
        data = pickle.dumps(value, protocol)
        assert mflocal.plain_text(mflocal.unpickle_plain(data)) == str(pickle.loads(data))

    same()


# Parameters.


def test_parameters(tree):
    records = tree.records(tree.task("ReadersData", "_parameters"))
    with open(os.path.join(FLOWS, "include.txt"), encoding="utf-8") as file:
        included = file.read()
    assert mflocal.run_parameters(tree.dir, records, data_roots=[tree.root + "/data"]) == {
        "constant": {"value": ["c", 1]},
        "count": {"value": 3},
        "dashed": {"value": "dash"},
        "flag": {"value": True},
        "included": {"value": included},
        "nothing": {"value": None},
        "ratio": {"value": 2.5},
        "shape": {"value": {"k": [1, 2, None]}},
        "text": {"value": "hällo"},
    }


def test_parameters_that_are_large_or_odd(tmp_path):
    shown = mflocal.run_parameters(
        str(tmp_path),
        [
            blob(tmp_path, pickle.dumps("x" * 70_000), name="long"),
            blob(tmp_path, pickle.dumps("x" * 60_000), name="less"),
            blob(
                tmp_path,
                pickle.dumps({1: float("nan"), (2,): {3}, "b": b"\xff", "d": decimal.Decimal(1)}),
                name="odd",
            ),
            blob(tmp_path, pickle.dumps("old"), name="twice", attempt_id=0),
            blob(tmp_path, pickle.dumps("new"), name="twice", attempt_id=1),
            blob(tmp_path, pickle.dumps("x"), name="_hidden"),
            blob(tmp_path, pickle.dumps("x"), name="name"),
            blob(tmp_path, pickle.dumps("x"), name="script_name"),
        ],
    )
    size = len(pickle.dumps("x" * 70_000))
    assert shown["long"]["value"] == "Artifact too large: %d bytes" % size
    assert shown["less"]["value"] == "x" * 60_000
    assert shown["odd"]["value"] == {"1": "nan", "(2,)": [3], "b": "b'\\xff'", "d": "1"}
    assert shown["twice"]["value"] == "new"
    assert sorted(shown) == ["less", "long", "odd", "twice"]


def test_config_parameter(config_tree):
    records = config_tree.records(config_tree.task("ReadersConfig", "_parameters"))
    assert mflocal.run_parameters(config_tree.dir, records) == {
        "cfg": {"value": {"lr": 0.1, "names": ["a", {"b": 1}]}}
    }


def test_config_value_of_other_versions():
    class ConfigValue(dict):
        def __reduce__(self):
            return ConfigValue, ({"lr": 1},)

    ConfigValue.__module__, ConfigValue.__qualname__ = (
        "metaflow.user_configs.config_parameters",
        "ConfigValue",
    )
    data = b"\x80\x04\x8c'metaflow.user_configs.config_parameters\x8c\x0bConfigValue\x93"
    assert (
        mflocal.plain_text(mflocal.unpickle_plain(data + b"}\x8c\x02lrK\x01s\x85R.")) == "{'lr': 1}"
    )
    assert (
        mflocal.plain_text(
            mflocal.unpickle_plain(data + b")\x81}\x8c\x05_data}\x8c\x02lrK\x01ssb.")
        )
        == "{'lr': 1}"
    )


# The graph.


def check_graph(graph):
    assert set(graph) >= {
        "file", "start_step", "end_step", "parameters", "constants", "steps", "graph_structure", "doc",
        "decorators", "extensions",
    }  # fmt: skip

    def names(structure):
        for item in structure:
            if isinstance(item, list):
                yield from names(item)
            else:
                yield item

    assert graph["steps"] and graph["graph_structure"]
    assert set(names(graph["graph_structure"])) <= set(graph["steps"])
    for name, step in graph["steps"].items():
        assert (
            step["name"] == name
            and isinstance(step["next"], list)
            and set(step["next"]) <= set(graph["steps"])
        )
        assert isinstance(step["type"], str) and isinstance(step["doc"], str)
        for deco in step["decorators"]:
            assert isinstance(deco["name"], str) and isinstance(deco["attributes"], dict)
    json.dumps(graph, allow_nan=False)


def test_dag_of_nested_foreach(tree):
    graph = mflocal.run_dag(tree.dir, tree.records(tree.task("ReadersData", "_parameters")))
    check_graph(graph)
    assert graph["graph_structure"] == ["start", [["middle", [["leaf"]], "gather"]], "join", "end"]
    assert graph["file"] == "readers_data.py" and graph["doc"] == "A flow to read back."
    assert (
        graph["steps"]["start"]["type"] == "split-foreach"
        and graph["steps"]["start"]["doc"] == "Makes things."
    )
    assert (
        graph["steps"]["start"]["foreach_artifact"] == "outer"
        and graph["steps"]["start"]["matching_join"] == "join"
    )
    assert [deco["name"] for deco in graph["steps"]["end"]["decorators"]] == ["retry"]
    assert graph["steps"]["end"]["decorators"][0]["statically_defined"] is True
    assert (graph["start_step"], graph["end_step"]) == ("start", "end")
    assert "constant" in [one["name"] for one in graph["constants"]]


def test_dag_of_a_failed_run_has_the_steps_that_never_ran(tree):
    graph = mflocal.run_dag(tree.dir, tree.records(tree.task("ReadersFail", "_parameters")))
    check_graph(graph)
    assert graph["graph_structure"] == ["start", "boom", [["left"], ["right"]], "both", "end"]
    assert graph["steps"]["boom"]["next"] == ["left", "right"]


def test_dag_names_the_cards(tree):
    graph = mflocal.run_dag(tree.dir, tree.records(tree.task("ReadersCards", "start")))
    assert [deco["name"] for deco in graph["steps"]["start"]["decorators"]].count("card") == 2


def test_dag_of_switch_and_recursion(config_tree):
    graph = mflocal.run_dag(
        config_tree.dir, config_tree.records(config_tree.task("ReadersConfig", "_parameters"))
    )
    check_graph(graph)
    assert graph["graph_structure"] == ["start", "loop", [["fin"]], "end"]
    loop = graph["steps"]["loop"]
    assert (loop["type"], loop["next"], loop["condition"]) == (
        "split-switch",
        ["loop", "fin"],
        "go",
    )
    assert loop["switch_cases"] == {"again": "loop", "stop": "fin"}


def test_dag_without_graph_info(tree):
    steps = [
        ("_parameters", 0),
        ("start", 0),
        ("middle", 1),
        ("leaf", 2),
        ("gather", 1),
        ("join", 0),
        ("end", 0),
    ]
    graph = mflocal.run_dag(tree.dir, [], steps)
    check_graph(graph)
    assert graph["graph_structure"] == ["start", [["middle", [["leaf"]], "gather"]], "join", "end"]
    assert (
        graph["steps"]["start"]["type"] == "split-foreach"
        and graph["steps"]["gather"]["type"] == "join"
    )
    for some in (
        [("start", 0)],
        [("a", 3), ("b", 1)],
        [("start", 0), ("x", 2), ("y", 2), ("z", 1)],
    ):
        check_graph(mflocal.run_dag(tree.dir, [], some))
    assert mflocal.run_dag(tree.dir, [], []) is None
    assert mflocal.run_dag(tree.dir, [], [("_parameters", 0)]) is None


@pytest.mark.parametrize(
    "info",
    [
        {},
        [],
        None,
        {"steps": None, "graph_structure": None},
        {"steps": {"start": None}, "graph_structure": ["start"]},
        {
            "steps": {"a": {}, "b": {"next": ["gone", None], "decorators": None, "doc": None}},
            "graph_structure": None,
        },
        {
            "steps": {
                "a": {"decorators": [{"name": None}, None, {"name": "card", "attributes": None}]}
            },
            "graph_structure": ["z"],
        },
        {
            "steps": {"a": {"next": "a", "type": None, "line": None, "node_info": None}},
            "graph_structure": [[["a", "q"], []]],
        },
        {"steps": {1: {}}, "file": None, "parameters": None, "extra": None},
    ],
    ids=str,
)
def test_dag_is_never_broken(tmp_path, info):
    record = blob(tmp_path, pickle.dumps(info), name="_graph_info")
    check_graph(mflocal.run_dag(str(tmp_path), [record], [("start", 0), ("end", 0)]))


# Logs.


def lines_of(tree, task, attempt, stream):
    return [row["line"] for row in mflocal.log_rows(tree.dir, task, attempt, stream).rows]


def stamp(second, micro=0):
    return "2026-11-21T22:34:%02d.%06dZ" % (second, micro)


def mflog(second, message, source="runtime", micro=0):
    return ("[MFLOG|0|%s|%s|%s]%s" % (stamp(second, micro), source, uuid.uuid4(), message)).encode()


TASK = ("F", "1", "s", "1")


def write_log(root, name, data):
    folder = os.path.join(str(root), *TASK)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    with open(path + ".new", "wb") as file:
        file.write(data)
    os.replace(path + ".new", path)


def test_logs_of_a_real_task(tree):
    task = tree.task("ReadersData", "start")
    before = snapshot(tree.dir)
    page = mflocal.log_rows(tree.dir, task, 0, "stdout")
    expected = ["line %d" % number for number in range(12)]
    expected += [
        "unicode é 世界 😀 \u2028 not a line end",
        "long:" + "x" * 70000,
        "",
        "carriage\rreturn",
    ]
    expected += ["no newline at the end"]
    assert [row["line"] for row in page.rows] == expected
    assert [row["row"] for row in page.rows] == list(range(17)) and (page.pages, page.total) == (
        1,
        17,
    )
    now = time.time() * 1000
    assert all(
        isinstance(row["timestamp"], int) and now - 3_600_000 < row["timestamp"] <= now
        for row in page.rows
    )
    assert lines_of(tree, task, 0, "stderr") == ["err ☃"]
    text = b"".join(mflocal.log_text(tree.dir, task, 0, "stdout"))
    assert text.decode() == "\n".join(expected)
    assert mflocal.log_file_name(task, 0, "stdout") == "stdout_%s-0.txt" % "_".join(task)
    assert snapshot(tree.dir) == before


def test_logs_as_metaflows_own_reader(tree):
    """The text of Metaflow's client is ours and a newline."""
    code = (
        "import sys; from metaflow import Task, namespace, metadata; namespace(None)\n"
        "task = Task(sys.argv[1], attempt=int(sys.argv[2]))\n"
        "sys.stdout.buffer.write((task.stdout + '\\0' + task.stderr).encode())\n"
    )
    env = dict(
        os.environ,
        METAFLOW_DATASTORE_SYSROOT_LOCAL=tree.root,
        METAFLOW_DEFAULT_METADATA="local",
        USERNAME="t",
    )
    for task, attempt in (
        (tree.task("ReadersData", "start"), 0),
        (tree.task("ReadersData", "end"), 0),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, "/".join(task), str(attempt)],
            env=env,
            cwd=tree.root,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        for stream, theirs in zip(("stdout", "stderr"), done.stdout.split(b"\0")):
            ours = b"".join(mflocal.log_text(tree.dir, task, attempt, stream))
            assert (ours + b"\n" if ours else b"") == theirs


def test_logs_of_each_attempt(tree):
    task = tree.task("ReadersData", "end")
    assert lines_of(tree, task, 0, "stdout") == ["attempt 0"]
    assert lines_of(tree, task, 1, "stdout") == ["attempt 1"]
    assert "RuntimeError: once" in lines_of(tree, task, 0, "stderr")
    assert mflocal.log_rows(tree.dir, task, 2, "stdout") == ([], 1, 0)
    assert list(mflocal.log_text(tree.dir, task, 2, "stdout")) == []


@pytest.mark.parametrize("limit,total", [(5, 12), (5, 10), (7, 3), (1, 2), (1000, 12), (3, 0)])
def test_log_pages(tmp_path, limit, total):
    """Forwards cut from the front; backwards the last page comes first, and is the short remainder."""
    write_log(
        tmp_path,
        "0.runtime_stdout.log",
        b"".join(mflog(n, "l%d" % n) + b"\n" for n in range(total)),
    )
    pages = max(1, -(-total // limit))
    seen, backwards = [], []
    for number in range(1, pages + 1):
        page = mflocal.log_rows(str(tmp_path), TASK, 0, "stdout", limit=limit, page=number)
        assert (page.pages, page.total) == (pages, total)
        seen += page.rows
        back = mflocal.log_rows(
            str(tmp_path), TASK, 0, "stdout", limit=limit, page=number, reverse=True
        )
        backwards += back.rows
        if number == 1 and total:
            assert len(back.rows) == (total % limit or limit)
    assert [row["row"] for row in seen] == list(range(total))
    assert backwards == seen[::-1]
    for beyond in (pages + 1, 0, -3):
        assert (
            mflocal.log_rows(str(tmp_path), TASK, 0, "stdout", limit=limit, page=beyond).rows == []
        )
    assert mflocal.log_rows(str(tmp_path), TASK, 0, "stdout", limit=0).rows == seen


def test_logs_of_two_sources_are_merged_by_time(tmp_path):
    write_log(
        tmp_path,
        "0.runtime_stdout.log",
        mflog(1, "r1") + b"\n" + mflog(5, "r5") + b"\n" + mflog(9, "r9") + b"\n",
    )
    write_log(
        tmp_path,
        "0.task_stdout.log",
        mflog(2, "t2", "task") + b"\n" + mflog(5, "t5", "task") + b"\n" + mflog(7, "t7"),
    )
    assert lines_of_path(tmp_path) == ["r1", "t2", "r5", "t5", "t7", "r9"]
    assert b"".join(mflocal.log_text(str(tmp_path), TASK, 0, "stdout")) == b"r1\nt2\nr5\nt5\nt7\nr9"
    page = mflocal.log_rows(str(tmp_path), TASK, 0, "stdout", limit=4, page=1, reverse=True)
    assert [(row["row"], row["line"]) for row in page.rows] == [(5, "r9"), (4, "t7")]
    expected = int(
        datetime.datetime(2026, 11, 21, 22, 34, 9, tzinfo=datetime.timezone.utc).timestamp() * 1000
    )
    assert page.rows[0]["timestamp"] == expected


def lines_of_path(root, stream="stdout"):
    return [row["line"] for row in mflocal.log_rows(str(root), TASK, 0, stream).rows]


def test_log_out_of_order_in_one_file(tmp_path):
    write_log(
        tmp_path,
        "0.runtime_stdout.log",
        b"\n".join([mflog(5, "b"), mflog(3, "a"), mflog(5, "c"), b"bare", mflog(4, "x")]),
    )
    assert lines_of_path(tmp_path) == ["a", "x", "b", "c", "bare"]


def test_lines_without_a_header_stay_where_they_are(tmp_path):
    write_log(
        tmp_path,
        "0.runtime_stdout.log",
        mflog(1, "one") + b"\nbare [MFLOG|0|x\n\n" + mflog(2, "two\r") + b"\n[MFLOG|0|notatimeZ|a|b]odd\n"
        + b"\xff\xfe\n[![MFLOG|0|" + stamp(3).encode() + b"|runtime|id]kept\n",
    )  # fmt: skip
    rows = mflocal.log_rows(str(tmp_path), TASK, 0, "stdout").rows
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


def test_log_of_before_mflog(tmp_path):
    write_log(tmp_path, "0.stdout.log", b"plain\nlines")
    assert lines_of_path(tmp_path) == ["plain", "lines"]
    write_log(tmp_path, "0.runtime_stdout.log", mflog(1, "new"))
    assert lines_of_path(tmp_path) == ["new"]


def test_a_growing_log(tmp_path):
    """Replaced by a longer file, or appended to; at any byte; also shortened, scrubbed and gone."""
    whole = b"\n".join(mflog(n, "line %d é" % n) for n in range(6))
    for size in list(range(0, len(whole), 7)) + [len(whole)]:
        write_log(tmp_path, "0.runtime_stdout.log", whole[:size])
        rows = lines_of_path(tmp_path)
        fresh = str(tmp_path) + "/."  # another cache entry for the same files
        assert rows == [row["line"] for row in mflocal.log_rows(fresh, TASK, 0, "stdout").rows]
        complete = whole[:size].count(b"\n")
        assert rows[:complete] == ["line %d é" % n for n in range(complete)]
        assert len(rows) <= complete + 1 and not any("MFLOG" in line for line in rows)
    path = os.path.join(str(tmp_path), *TASK, "0.runtime_stdout.log")
    with open(path, "ab") as file:
        file.write(b" more\n" + mflog(7, "appended") + b"\n")
    assert lines_of_path(tmp_path)[-2:] == ["line 5 é more", "appended"]
    write_log(tmp_path, "0.runtime_stdout.log", b"[REDACTED runtime stdout]")
    assert lines_of_path(tmp_path) == ["[REDACTED runtime stdout]"]
    os.unlink(path)
    assert lines_of_path(tmp_path) == []


def test_a_log_is_read_only_once(tmp_path):
    data = b"".join(mflog(n % 60, "x" * 50) + b"\n" for n in range(60))
    write_log(tmp_path, "0.runtime_stdout.log", data)
    lines_of_path(tmp_path)
    log = mflocal._logs[(str(tmp_path), *TASK, "0", "stdout")].files[0]
    version = log.version
    lines_of_path(tmp_path)
    assert log.version == version
    write_log(tmp_path, "0.runtime_stdout.log", data + mflog(59, "new") + b"\n")
    kept = log.starts
    assert lines_of_path(tmp_path)[-1] == "new"
    assert log.starts is kept


def test_large_log_is_fast_and_bounded(tmp_path):
    line = mflog(1, "x" * 40)
    with io.BytesIO() as out:
        for second in range(60):
            out.write((mflog(second, "x" * 40) + b"\n") * 4000)
        write_log(tmp_path, "0.runtime_stdout.log", out.getvalue())
    assert len(line) > 100
    started = time.monotonic()
    page = mflocal.log_rows(str(tmp_path), TASK, 0, "stdout", limit=1000, page=1, reverse=True)
    first = time.monotonic() - started
    assert page.total == 240_000 and page.rows[0]["row"] == 239_999
    started = time.monotonic()
    mflocal.log_rows(str(tmp_path), TASK, 0, "stdout", limit=1000, page=120)
    assert time.monotonic() - started < first
    pieces = list(mflocal.log_text(str(tmp_path), TASK, 0, "stdout"))
    assert max(map(len, pieces)) < 140_000 and sum(map(len, pieces)) == 240_000 * 41 - 1


def test_very_long_line(tmp_path):
    write_log(
        tmp_path,
        "0.runtime_stdout.log",
        mflog(1, "é" * 2_000_000) + b"\n" + mflog(2, "next") + b"\n",
    )
    rows = lines_of_path(tmp_path)
    assert rows[1] == "next" and rows[0].startswith("éé") and 500_000 < len(rows[0]) < 1_100_000
    assert rows[0].endswith("more bytes: download the log to see them]")
    assert (
        b"".join(mflocal.log_text(str(tmp_path), TASK, 0, "stdout")).decode()
        == "é" * 2_000_000 + "\nnext"
    )


def test_a_page_of_long_lines_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(mflocal, "LOG_PAGE_BYTES", 10_000)
    write_log(
        tmp_path, "0.runtime_stdout.log", b"".join(mflog(n, "y" * 3000) + b"\n" for n in range(20))
    )
    rows = mflocal.log_rows(str(tmp_path), TASK, 0, "stdout").rows
    assert len(rows) == 20 and sum(len(row["line"]) for row in rows) < 20_000


def test_more_lines_than_are_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr(mflocal, "LOG_INDEX_LINES", 10)
    write_log(tmp_path, "0.runtime_stdout.log", b"\n".join(mflog(n, "l%d" % n) for n in range(15)))
    page = mflocal.log_rows(str(tmp_path), TASK, 0, "stdout")
    assert page.total == 11 and page.rows[9]["line"] == "l9" and "download" in page.rows[10]["line"]
    text = b"".join(mflocal.log_text(str(tmp_path), TASK, 0, "stdout"))
    assert text.split(b"\n") == [b"l%d" % n for n in range(15)]


def test_more_bytes_than_are_indexed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file may have any length; its lines are looked for in the first part only."""
    monkeypatch.setattr(mflocal, "_LOG_BLOCK", 1000)
    monkeypatch.setattr(mflocal, "LOG_INDEX_BYTES", 5000)
    line = mflog(1, "x" * 20) + b"\n"
    write_log(tmp_path, "0.runtime_stdout.log", line * 1000)
    page = mflocal.log_rows(str(tmp_path), TASK, 0, "stdout")
    assert (
        page.rows[-1]["line"].startswith("... more lines than")
        and page.rows[-2]["line"] == "x" * 20
    )
    assert 5000 // len(line) < page.total <= 6000 // len(line) + 1
    path = os.path.join(str(tmp_path), *TASK, "0.runtime_stdout.log")
    with open(path, "ab") as file:
        file.write(line)
    assert mflocal.log_rows(str(tmp_path), TASK, 0, "stdout").total == page.total, (
        "what comes later is beyond it"
    )
    text = b"".join(mflocal.log_text(str(tmp_path), TASK, 0, "stdout"))
    assert text == b"\n".join([b"x" * 20] * 1001)


def test_a_first_line_longer_than_what_is_indexed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mflocal, "_LOG_BLOCK", 1000)
    monkeypatch.setattr(mflocal, "LOG_INDEX_BYTES", 5000)
    write_log(tmp_path, "0.runtime_stdout.log", mflog(1, "x" * 200_000) + b"\n" + mflog(2, "end"))
    assert mflocal.log_rows(str(tmp_path), TASK, 0, "stdout").total == 1
    assert b"".join(mflocal.log_text(str(tmp_path), TASK, 0, "stdout")) == b"x" * 200_000 + b"\nend"


def test_a_sparse_log_has_few_lines(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mflocal, "LOG_INDEX_BYTES", 2 << 20)
    write_log(tmp_path, "0.runtime_stdout.log", b"one\ntwo\n")
    os.truncate(os.path.join(str(tmp_path), *TASK, "0.runtime_stdout.log"), 16 << 20)
    page = mflocal.log_rows(str(tmp_path), TASK, 0, "stdout")
    assert [row["line"] for row in page.rows[:2]] == ["one", "two"]
    assert page.total == 3 and page.rows[2]["line"].startswith("... more lines than")


def test_download_while_the_log_grows(tmp_path):
    write_log(
        tmp_path,
        "0.runtime_stdout.log",
        b"".join(mflog(n % 60, "z" * 3000) + b"\n" for n in range(60)),
    )
    text = mflocal.log_text(str(tmp_path), TASK, 0, "stdout")
    first = next(text)
    write_log(tmp_path, "0.runtime_stdout.log", mflog(1, "other") + b"\n")
    assert lines_of_path(tmp_path) == ["other"]
    assert len(first + b"".join(text)) == 60 * 3001 - 1


def test_closing_a_download_closes_its_files(tmp_path):
    write_log(
        tmp_path,
        "0.runtime_stdout.log",
        b"".join(mflog(n % 60, "z" * 3000) + b"\n" for n in range(60)),
    )
    before = len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0
    text = mflocal.log_text(str(tmp_path), TASK, 0, "stdout")
    next(text)
    text.close()
    assert not before or len(os.listdir("/dev/fd")) == before


def test_logs_elsewhere(tree, tmp_path):
    task = tree.task("ReadersData", "start")
    for kind, root in (("s3", "s3://bucket/x"), ("local", str(tmp_path)), ("azure", None)):
        with pytest.raises(mflocal.Problem) as raised:
            mflocal.log_rows(tree.dir, (*task[:3], "999"), 0, "stdout", ds_type=kind, ds_root=root)
        assert raised.value.id == "datastore-not-local" and "not local" in raised.value.detail
        assert raised.value.status not in (403, 404)
    assert (
        mflocal.log_rows(
            tree.dir, (*task[:3], "999"), 0, "stdout", ds_type="local", ds_root=tree.dir
        ).rows
        == []
    )
    secret = tmp_path / "F"
    write_log(secret, "0.runtime_stdout.log", mflog(1, "secret"))
    with pytest.raises(mflocal.Problem):
        mflocal.log_text(tree.dir, TASK, 0, "stdout", ds_type="local", ds_root=str(secret))


def test_log_symlinks_open_nothing(tmp_path):
    outside = tmp_path / "secret"
    outside.write_bytes(mflog(1, "secret"))
    folder = tmp_path.joinpath("in", *TASK)
    folder.mkdir(parents=True)
    (folder / "0.runtime_stdout.log").symlink_to(outside)
    assert lines_of_path(tmp_path / "in") == []


# Cards.


def test_cards_of_a_real_task(tree):
    task = tree.task("ReadersCards", "start")
    before = snapshot(tree.dir)
    cards = mflocal.list_cards(tree.dir, task)
    assert [(card["type"], card["id"]) for card in cards] == [("default", None), ("blank", "mine")]
    for card in cards:
        assert set(card) == {"id", "hash", "type"} and len(card["hash"]) in (32, 40)
        html = mflocal.card_html(tree.dir, task, card["hash"])
        assert html.lstrip().lower().startswith(b"<!doctype html")
        data = mflocal.card_data(tree.dir, task, card["hash"])
        assert (data["id"], data["type"]) == (card["id"], card["type"])
        assert (
            set(data["data"]) == {"reload_token", "created_on", "data"}
            and data["data"]["reload_token"] == "final"
        )
    assert "Hello ☃" in json.dumps(data["data"]["data"], ensure_ascii=False)
    assert mflocal.list_cards(tree.dir, tree.task("ReadersCards", "end")) == []
    assert (
        mflocal.card_html(tree.dir, task, "deadbeef") is None
        and mflocal.card_data(tree.dir, task, "deadbeef") is None
    )
    assert snapshot(tree.dir) == before


def make_card(root, name, data, kind="cards", steps=True):
    flow, run, step, task = TASK
    place = [flow, "runs", run] + (["steps", step] if steps else []) + ["tasks", task, kind]
    folder = os.path.join(str(root), *place)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "wb") as file:
        file.write(data)


def test_cards_in_both_places_and_layouts(tmp_path):
    inside, other = tmp_path / "a" / ".metaflow", tmp_path / "b" / "mf.cards"
    make_card(inside / "mf.cards", "default-aa11.html", b"<html>1")
    make_card(other, "blank-x-bb22.html", b"<html>2")
    make_card(
        other,
        "blank-x-bb22.data.json",
        b'{"reload_token": "t", "data": {}, "created_on": 1}',
        "runtime",
    )
    make_card(other, "default-aa11.html", b"<html>shadowed")
    assert mflocal.list_cards(str(inside), TASK) == [
        {"id": None, "hash": "aa11", "type": "default"}
    ]
    both = mflocal.list_cards(str(inside), TASK, [str(other)])
    assert both == [
        {"id": None, "hash": "aa11", "type": "default"},
        {"id": "x", "hash": "bb22", "type": "blank"},
    ]
    assert mflocal.card_html(str(inside), TASK, "aa11", [str(other)]) == b"<html>1"
    assert mflocal.card_html(str(inside), TASK, "bb22") is None
    assert mflocal.card_html(str(inside), TASK, "bb22", [str(other)]) == b"<html>2"
    assert mflocal.card_data(str(inside), TASK, "bb22", [str(other)])["data"]["reload_token"] == "t"
    old = tmp_path / "old"
    make_card(old / "mf.cards", "default-cc33.html", b"<html>3", steps=False)
    assert mflocal.list_cards(str(old), TASK) == [{"id": None, "hash": "cc33", "type": "default"}]


def test_cards_still_being_written(tmp_path):
    root = tmp_path / "mf.cards"
    for name in (
        "tmpab12cd",
        "default-aa11.html.tmp",
        "a-b-c-d.html",
        "nohash.html",
        ".html",
        "default-.html",
    ):
        make_card(root, name, b"x")
    make_card(root, "default-ee55.html", b"")
    assert mflocal.list_cards(str(tmp_path), TASK) == []
    assert mflocal.card_html(str(tmp_path), TASK, "ee55") is None
    make_card(root, "default-ee55.data.json", b'{"reload_token": "x", "da', "runtime")
    assert mflocal.card_data(str(tmp_path), TASK, "ee55") == {
        "data": None,
        "id": None,
        "type": "default",
    }
    make_card(
        root,
        "default-ee55.data.json",
        b'{"reload_token": "x", "data": {"n": NaN}, "created_on": 1.5}',
        "runtime",
    )
    data = mflocal.card_data(str(tmp_path), TASK, "ee55")
    assert data["data"] == {"reload_token": "x", "data": {"n": None}, "created_on": 1.5}


def test_numbers_of_a_card_that_no_browser_reads_are_null(tmp_path: pathlib.Path) -> None:
    numbers = b'{"data": {"a": 1e999, "b": -1e999, "c": [1e308, 1.5, -0.25, 3], "d": Infinity}}'
    make_card(tmp_path / "mf.cards", "default-aa11.html", b"<html>")
    make_card(tmp_path / "mf.cards", "default-aa11.data.json", numbers, "runtime")
    shown = mflocal.card_data(str(tmp_path), TASK, "aa11")
    assert shown["data"] == {"data": {"a": None, "b": None, "c": [1e308, 1.5, -0.25, 3], "d": None}}
    json.dumps(shown, allow_nan=False)


def test_cards_outside_open_nothing(tmp_path):
    make_card(tmp_path / "out", "default-aa11.html", b"<html>secret")
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "mf.cards").symlink_to(tmp_path / "out")
    assert (
        mflocal.list_cards(str(inside), TASK) == []
        and mflocal.card_html(str(inside), TASK, "aa11") is None
    )
    (inside / "mf.cards").unlink()
    make_card(inside / "mf.cards", "x-bb22.html", b"<html>")
    folder = inside.joinpath("mf.cards", "F", "runs", "1", "steps", "s", "tasks", "1", "cards")
    (folder / "default-cc33.html").symlink_to(tmp_path / "out" / "F")
    secret = tmp_path / "secret"
    secret.write_text("<html>")
    (folder / "default-dd44.html").symlink_to(secret)
    assert [card["hash"] for card in mflocal.list_cards(str(inside), TASK)] == ["bb22"]
    assert mflocal.card_html(str(inside), TASK, "dd44") is None


def test_card_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(mflocal, "CARD_BYTES", 10)
    make_card(tmp_path / "mf.cards", "default-aa11.html", b"x" * 11)
    with pytest.raises(mflocal.Problem) as raised:
        mflocal.card_html(str(tmp_path), TASK, "aa11")
    assert raised.value.id == "card-too-large"


# Search and foreach.


def test_search_artifacts(tree):
    task = tree.task("ReadersData", "start")

    def matches(name, *value):
        return mflocal.search_artifact(tree.dir, tree.artifact(task, name), *value)

    row = {"flow_id": task[0], "run_number": task[1], "step_name": task[2], "task_id": task[3]}
    assert matches("number") == {**row, "searchable": True}
    assert (
        matches("number", "1")
        == matches("number", '"12"')
        == {**row, "searchable": True, "error": None}
    )
    assert matches("number", "") == {**row, "searchable": True, "error": None}
    assert matches("number", '"1"') is None and matches("number", "3") is None
    assert matches("unicode", "世界") and matches("text", "HÄLLO") and matches("flag", '"true"')
    assert matches("nested", "none") and matches("nested", "'A'")
    large = matches("huge", "zz")
    assert large["searchable"] is False and large["error"]["id"] == "artifact-too-large"
    assert all(isinstance(row[key], str) for key in row)
    assert (
        mflocal.search_artifact(tree.dir, tree.artifact(task, "number", run_number=5, task_id=7))[
            "task_id"
        ]
        == "7"
    )


@pytest.mark.parametrize(
    "value",
    [["outer=a", "inner=a1"], "{outer=a,inner=a1}", '["outer=a", "inner=a1"]', "outer=a,inner=a1"],
    ids=str,
)
def test_search_foreach(value):
    record = {"flow_id": "F", "run_number": "1", "step_name": "s", "task_id": 4, "value": value}
    match = mflocal.search_foreach(record, "inner", "a1")
    assert match == {
        "flow_id": "F", "run_number": "1", "step_name": "s", "task_id": "4", "value": "{outer=a,inner=a1}",
        "searchable": True,
    }  # fmt: skip
    assert mflocal.search_foreach(record, "inner") and mflocal.search_foreach(record, "inner", "a")
    assert mflocal.search_foreach(record, "inner", '"a1"') and not mflocal.search_foreach(
        record, "inner", '"a"'
    )
    assert not mflocal.search_foreach(record, "inner", "b") and not mflocal.search_foreach(
        record, "other"
    )
    assert mflocal.foreach_depth(stack=value) == 2


def test_foreach_of_real_tasks(tree):
    for step, depth in (("start", 0), ("middle", 1), ("leaf", 2), ("join", 0)):
        for number in range(2 if depth else 1):
            task = tree.task("ReadersData", step, number)
            stack = mflocal.read_artifact(tree.dir, tree.artifact(task, "_foreach_stack")).value
            label = mflocal.foreach_label(int(task[3]), stack)
            assert len(stack) == depth
            assert label == (None if not depth else "%s[%d]" % (task[3], stack[0].index))
            paths = tree.records(task, "foreach-execution-path")
            if paths:
                assert mflocal.foreach_label(task[3], execution_path=paths[0]["value"]) == label
                assert mflocal.foreach_depth(paths[0]["value"]) == depth
            for record in tree.records(task, "foreach-stack"):
                assert mflocal.search_foreach(record, "outer", '"%s"' % stack[0].value)
    assert (
        "ForeachFrame(step='middle', var='outer', num_splits=2, index="
        in content(tree, "_foreach_stack", "middle")["content"]
    )


def test_exceptions_of_a_failed_task(tree):
    shown = content(tree, "_exception", "boom", "ReadersFail")["content"]
    assert (
        shown.startswith("Traceback (most recent call last)")
        and "RuntimeError: on purpose" in shown
    )
