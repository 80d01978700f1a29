"""Names, JSON and the checks of what clients send: tables, without a server or a file."""

from __future__ import annotations

import json
from typing import Any

import pytest

import mflocal
from mflocal import Problem

pytestmark = pytest.mark.core

E_ACUTE = "e\u0301"  # two code points


# -- names


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Flow", True), ("_x", True), ("Größe", True), ("流れ", True), ("a" * 255, True), ("é" * 127, True),
        ("", False), ("1a", False), ("a b", False), ("a-b", False), (".", False), ("..", False), ("a/b", False),
        ("a.b", False), (".mflocal", False), ("mf.cards", False), ("a\0", False), ("a\n", False), ("*", False),
        ("a" * 256, False), ("é" * 128, False), ("\ud800", False), ("~", False), ("_meta", False),
    ],
)  # fmt: skip
def test_flow_and_step_names_are_identifiers_that_fit_a_file_name(text: str, good: bool) -> None:
    assert mflocal.is_flow_name(text) is good


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("1", True), ("1700000000000001", True), ("argo-abc", True), ("sfn-a:b.c_d", True), ("...", False), (".hidden", False),
        ("x" * 255, True), ("-1", True), ("1.0", True), ("NULL", True), ("nightly@2026", True), ("a b", True),
        ("a~b", True), ("a+b", True), ("\u00fc1", True), ("a*", True), ("[a]", True), ("a\\b", True), ("_Meta", True),
        ("data-1", True), ("a%2Fb", True),
        ("", False), (".", False), ("..", False), ("a/b", False), ("a\0b", False), ("a\n", False), ("\x1b[2J", False),
        ("x" * 256, False), ("\u00fc" * 128, False), ("\x85", False), ("\x7f", False), ("\ud800", False),
        ("_meta", False), ("data", False), ("latest_run", False),
    ],
)  # fmt: skip
def test_run_and_task_ids_are_any_one_part_of_a_path(text: str, good: bool) -> None:
    assert mflocal.is_id(text) is good


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("x", True), ("col a-b", True), ("größe", True), ("*", True), ("[a]?", True), (" ", True), (E_ACUTE, True),
        ("a\n", True), ("x" * 255, True), ("é" * 127, True),
        ("", False), (".", False), ("..", False), ("a/b", False), ("../x", False), ("a\0", False), ("\ud800", False),
        ("x" * 256, False), ("é" * 128, False),
    ],
)  # fmt: skip
def test_file_names(text: str, good: bool) -> None:
    assert mflocal.is_file_name(text) is good


def test_artifact_names_are_measured_with_what_local_mode_adds_around_them() -> None:
    """A name is good exactly when the file name that comes of it fits 255 bytes."""
    row = {"name": "n" * (255 - len("12_artifact_.json")), "attempt_id": 12}
    assert len(mflocal.artifact_file(12, mflocal.artifact_body([row])[0]["name"])) == 255
    with pytest.raises(Problem):
        mflocal.artifact_body([dict(row, name=row["name"] + "n")])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", True), ("12", True), ("1" * 18, True), ("1" * 19, False), ("01", False), ("", False), ("-1", False),
        ("+1", False), ("1.0", False), ("²", False), ("١", False), ("1_0", False), ("argo-1", False),
    ],
)  # fmt: skip
def test_what_counts_as_a_number(text: str, number: bool) -> None:
    assert mflocal.is_number(text) is number
    assert mflocal.public_id(text) == (int(text) if number else text)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("sysmeta_attempt_1700000000000.json", ("attempt", 1700000000000)),
        ("sysmeta_attempt-done_5.json", ("attempt-done", 5)),
        ("sysmeta_a_1_2.json", ("a_1", 2)),
        ("sysmeta_ _7.json", (" ", 7)),
        ("sysmeta_x.json", None),
        ("sysmeta_x_.json", None),
        ("sysmeta_x_1a.json", None),
        ("sysmeta_x_١.json", None),
        ("sysmeta_x_-1.json", None),
        ("sysmeta_x_1", None),
        ("_self.json", None),
        ("0_artifact_x.json", None),
        ("_mflocal.json", None),
        ("tmpabc123", None),
    ],
)
def test_metadata_file_names_are_taken_apart_as_they_were_put_together(
    name: str, parts: Any
) -> None:
    assert mflocal.split_metadata_file(name) == parts
    assert parts is None or mflocal.metadata_file(*parts) == name


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("0_artifact_x.json", (0, "x")),
        ("12_artifact_a_artifact_b.json", (12, "a_artifact_b")),
        ("0_artifact__task_ok.json", (0, "_task_ok")),
        ("0_artifact_col a-b.json", (0, "col a-b")),
        ("0_artifact_x.json.json", (0, "x.json")),
        ("_artifact_x.json", None),
        ("a_artifact_x.json", None),
        ("-1_artifact_x.json", None),
        ("²_artifact_x.json", None),
        ("0_artifact_x", None),
        ("sysmeta_x_1.json", None),
    ],
)
def test_artifact_file_names_are_taken_apart_as_they_were_put_together(
    name: str, parts: Any
) -> None:
    assert mflocal.split_artifact_file(name) == parts
    assert parts is None or mflocal.artifact_file(*parts) == name


def test_every_field_name_can_be_found_again() -> None:
    """What POST metadata takes must not vanish."""
    for field in ("x", " ", "a_1", "..", "", "größe", "a b", "_", "sysmeta_", "a\nb"):
        assert mflocal.split_metadata_file(mflocal.metadata_file(field, 1)) == (field, 1), field


def test_metadata_ids_differ_by_time_and_place_and_survive_javascript() -> None:
    ms = 1_790_000_000_000
    first = mflocal.metadata_id("/F/1/start/1/_meta/sysmeta_a_1.json", ms)
    assert first == mflocal.metadata_id("/F/1/start/1/_meta/sysmeta_a_1.json", ms)
    assert first != mflocal.metadata_id("/F/1/start/1/_meta/sysmeta_b_1.json", ms)
    assert first < mflocal.metadata_id("/F/1/start/1/_meta/sysmeta_a_1.json", ms + 1)
    assert 0 < mflocal.metadata_id("x", 2_600_000_000_000) < 2**53
    assert mflocal.metadata_id("x", 0) >= 0
    assert mflocal.metadata_id("/F/\udcff", ms) > 0


# -- JSON


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"{}", {}), (b" [1, 2.5, true, null] ", [1, 2.5, True, None]), (b'"\\u00e9"', "é"), ('"é"'.encode(), "é"),
        (b'{"a": 1, "a": 2}', {"a": 2}), (b"-0", 0), (b"1" * 300, int("1" * 300)), (b'"\\ud83d\\ude00"', "😀"),
        (b"[" * 50 + b"]" * 50, None),
    ],
)  # fmt: skip
def test_json_that_is_taken(data: bytes, value: Any) -> None:
    got = mflocal.loads(data)
    assert value is None or got == value


@pytest.mark.parametrize(
    "data",
    [
        b"", b" ", b"{", b"{bad", b"[1,]", b"{'a': 1}", b'{"a" 1}', b"nope", b"[] x", b"01", b"+1", b".5", b"0x1",
        b"NaN", b"[Infinity]", b"-Infinity", b'{"a": NaN}', b'"\xff"', b'\xef\xbb\xbf{"a": 1}', b'"\xed\xa0\x80"',
        '{"a": 1}'.encode("utf-16"), b'"\x01"', b'"a\nb"', b'"\\x"', b'"\\u12"', b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"1" * 5000, b"[-" + b"9" * 100_000 + b"]", b"/* */ {}",
    ],
    ids=lambda data: repr(data[:12]),
)  # fmt: skip
def test_json_that_is_refused(data: bytes) -> None:
    with pytest.raises(Problem) as info:
        mflocal.loads(data)
    assert info.value.status == 400
    assert "JSON" in info.value.detail or "UTF-8" in info.value.detail
    assert "\n" not in info.value.detail and len(info.value.detail) < 300


def test_dumps_is_what_json_dump_writes() -> None:
    for value in (
        {"a": [1, None, True, "é😀\u2028\x00"], "b": {"c": 1.5}},
        [],
        "x",
        {"ö": "\ud800"},
    ):
        assert mflocal.dumps(value) == json.dumps(value).encode("ascii")


def test_a_problem_is_a_json_answer_that_the_ui_shows() -> None:
    problem = Problem(404, "there is no flow X")
    assert problem.body() == {
        "id": "not-found", "status": 404, "title": "Not Found", "detail": "there is no flow X", "type": "about:blank",
    }  # fmt: skip
    assert Problem(418, "x").body()["id"] and not problem.close and problem.headers == {}
    assert Problem(400, "x", id="bad", close=True, headers={"A": "b"}).body()["id"] == "bad"


# -- bodies


@pytest.mark.parametrize(
    ("body", "clean"),
    [
        ({}, {}),
        ({"user_name": None, "tags": None, "system_tags": None}, {}),
        (
            {"user_name": "u", "tags": ["a"], "system_tags": []},
            {"user_name": "u", "tags": ["a"], "system_tags": []},
        ),
        ({"user_name": 123}, {"user_name": "123"}),
        ({"user_name": "", "unknown": [{}], "ts_epoch": 5, "flow_id": "../.."}, {"user_name": ""}),
        ({"tags": ["", "é", "x" * 1000]}, {"tags": ["", "é", "x" * 1000]}),
        ({"user_name": "u" * 255}, {"user_name": "u" * 255}),
    ],
)
def test_object_bodies_that_are_taken(body: Any, clean: Any) -> None:
    assert mflocal.object_body(body) == clean


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ([], "list"), (None, "null"), ("x", "string"), (5, "number"), (True, "boolean"),
        ({"user_name": ["u"]}, "user_name"), ({"user_name": {}}, "user_name"), ({"user_name": "a\0b"}, "user_name"),
        ({"user_name": "u" * 256}, "user_name"), ({"tags": "notalist"}, "tags"), ({"tags": [1]}, "tags"),
        ({"tags": [None]}, "tags"), ({"tags": {"a": 1}}, "tags"), ({"system_tags": ["a\0"]}, "system_tags"),
        ({"system_tags": 0}, "system_tags"),
    ],
)  # fmt: skip
def test_object_bodies_that_are_refused(body: Any, named: str) -> None:
    with pytest.raises(Problem) as info:
        mflocal.object_body(body)
    assert info.value.status == 400 and named in info.value.detail


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ({"value": "v"}, "v"), ({"value": ""}, ""), ({"value": 5}, "5"), ({"value": 1.5}, "1.5"),
        ({"value": True}, "true"), ({"value": False}, "false"), ({"value": [1, "a"]}, [1, "a"]), ({"value": []}, []),
        ({"value": "x" * 300_000}, "x" * 300_000), ({"value": "\ud800"}, "\ud800"), ({"value": None}, None),
        ({"value": {"a": 1}}, {"a": 1}), ({"value": [[1], None]}, [[1], None]), ({"value": "a\0b"}, "a\0b"),
    ],
)  # fmt: skip
def test_metadata_values_that_are_taken(row: Any, value: Any) -> None:
    assert mflocal.metadata_body([dict(row, field_name="f")]) == [
        {"field_name": "f", "value": value}
    ]


def test_metadata_rows_without_keys_get_what_the_real_service_gives() -> None:
    assert mflocal.metadata_body([]) == [] and mflocal.metadata_body({}) == []
    record = mflocal.metadata_record(
        {"run_number": "1", "step_name": "s", "task_id": "2"}, "F", {}, 7
    )
    assert (record["field_name"], record["type"], record["value"], record["user_name"]) == (
        " ",
        " ",
        " ",
        " ",
    )
    assert record["tags"] == [] and record["ts_epoch"] == 7


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"field_name": "a"}, "list"), (None, "null"), ("x", "string"), (["x"], "row 0"), ([[]], "row 0"),
        ([{"field_name": "a", "value": "v"}, None], "row 1"),
    ],
)  # fmt: skip
def test_metadata_bodies_that_are_refused(body: Any, named: str) -> None:
    with pytest.raises(Problem) as info:
        mflocal.metadata_body(body)
    assert info.value.status == 400 and named in info.value.detail


@pytest.mark.parametrize(
    ("row", "clean"),
    [
        ({"field_name": None}, {}), ({"field_name": 5}, {"field_name": "5"}), ({"field_name": ["a"]}, {"field_name": "{a}"}),
        ({"type": {"a": 1}, "user_name": None}, {"type": '{"a": 1}'}), ({"type": "t" * 300}, {"type": "t" * 300}),
        ({"tags": "x", "system_tags": [1, "a", None]}, {"system_tags": ["a"]}),
    ],
)  # fmt: skip
def test_nothing_in_a_metadata_row_fails_its_step(row: Any, clean: Any) -> None:
    assert mflocal.metadata_body([row]) == [clean]


def test_a_body_has_so_many_rows_and_not_one_more() -> None:
    """16 MiB of `{}` would be five million files."""
    row: dict[str, Any] = {}
    for check in (mflocal.metadata_body, mflocal.artifact_body):
        with pytest.raises(Problem) as info:
            check([row] * (mflocal.MAX_ROWS + 1))
        assert info.value.status == 413 and str(mflocal.MAX_ROWS) in info.value.detail
    assert len(mflocal.artifact_body([row] * mflocal.MAX_ROWS)) == mflocal.MAX_ROWS


def test_numbers_that_json_cannot_hold_never_reach_a_record() -> None:
    """1e999 is good JSON and becomes infinity in Python; json.dumps would write `Infinity`, which is none."""
    for body in (
        b'[{"field_name": "f", "value": 1e999}]',
        b'[{"field_name": "f", "value": ["a", -1e999]}]',
    ):
        try:
            rows = mflocal.metadata_body(mflocal.loads(body))
        except Problem as problem:
            assert problem.status == 400
            continue
        data = mflocal.dumps(mflocal.metadata_record({}, "F", rows[0], 1))
        assert mflocal.loads(data)


@pytest.mark.parametrize(
    ("row", "clean"),
    [
        ({}, {"attempt_id": 0}),
        ({"name": "x", "attempt_id": "1"}, {"name": "x", "attempt_id": 1}),
        ({"name": "x", "attempt_id": 32767}, {"name": "x", "attempt_id": 32767}),
        ({"name": "col a-b", "sha": None}, {"name": "col a-b", "attempt_id": 0}),
        (
            {"name": "größe", "location": "l" * 5000},
            {"name": "größe", "location": "l" * 5000, "attempt_id": 0},
        ),
        ({"name": "*", "size": 5}, {"name": "*", "attempt_id": 0}),
    ],
)
def test_artifact_rows_that_are_taken(row: Any, clean: Any) -> None:
    assert mflocal.artifact_body([row]) == [clean]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"name": "a/b"}, "name"), ({"name": "a\0b"}, "name"), ({"name": "n" * 251}, "name"), ({"name": ["x"]}, "name"),
        ({"attempt_id": -1}, "attempt"), ({"attempt_id": "abc"}, "attempt"), ({"attempt_id": 99999}, "attempt"),
        ({"attempt_id": None}, "attempt"), ({"attempt_id": True}, "attempt"), ({"attempt_id": 1.0}, "attempt"),
        ({"attempt_id": "١"}, "attempt"), ({"attempt_id": 10**400}, "attempt"), ({"sha": {}}, "sha"),
        ({"content_type": "c" * 256}, "content_type"), ({"tags": 5}, "tags"), ({"location": ["x"]}, "location"),
    ],
)  # fmt: skip
def test_artifact_rows_that_are_refused(row: Any, named: str) -> None:
    with pytest.raises(Problem) as info:
        mflocal.artifact_body([{"name": "good"}, row])
    assert info.value.status == 400 and named in info.value.detail and "row 1" in info.value.detail


# -- rows


def test_rows_have_the_keys_of_the_real_service_in_its_order() -> None:
    run = {"user_name": "u", "ts_epoch": 1, "tags": ["a"], "system_tags": ["user:u"]}
    assert list(mflocal.flow_row({})) == ["flow_id", "user_name", "ts_epoch", "tags", "system_tags"]
    row = mflocal.run_row("F", "12", run, None)
    assert list(row) == [
        "flow_id", "run_number", "user_name", "ts_epoch", "tags", "system_tags", "last_heartbeat_ts",
    ]  # fmt: skip
    assert (
        row["run_number"] == 12 and mflocal.run_row("F", "argo-x", run, 5)["run_number"] == "argo-x"
    )
    assert mflocal.step_row("F", "12", {"step_name": "s"}, run)["run_number"] == "12"
    assert mflocal.step_row("F", "12", {"step_name": "s"}, run)["user_name"] == ""
    task = mflocal.task_row("F", "12", "3", {"step_name": "s", "tags": ["own"]}, run, 5)
    assert (task["task_id"], task["tags"], task["last_heartbeat_ts"]) == (3, ["a"], 5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x", "x"), (None, None), ([], "{}"), ([1, 2], "{1,2}"), (["a", "b c"], '{a,"b c"}'), (True, "true"),
        (['say "hi"'], '{"say \\"hi\\""}'), (["a,b"], '{"a,b"}'), ([""], '{""}'), (["null"], '{"null"}'), (5, "5"),
        ([True], "{true}"), ({"a": 1}, '{"a": 1}'), (["a\nb", "c\td"], '{"a\nb","c\td"}'), (["a\\b"], '{"a\\\\b"}'), ([None], "{NULL}"),
    ],
)  # fmt: skip
def test_metadata_values_as_text(value: Any, text: Any) -> None:
    assert mflocal.value_text(value) == text


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        ("True", True), ("true", True), ("False", False), (True, True), (False, False), (" t ", True), ("1", True),
        ("0", False), ("off", False), ("maybe", None), ("", None), (None, None), ([], None),
    ],
)  # fmt: skip
def test_truth_is_what_a_database_would_make_of_it(value: Any, verdict: Any) -> None:
    assert mflocal.truth(value) is verdict


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        (None, True), ([], False), (["user:x"], False), (["metaflow_version:2.19.39"], True),
        (["metaflow_version:2.2.12+netflix.git"], True), (["metaflow_version:2.2.11"], False),
        (["metaflow_version:2.0.0"], False), (["metaflow_version:1.14.0"], True), (["metaflow_version:1.13.0"], False),
        (["metaflow_version:abc"], True), (["metaflow_version:3.0"], True),
    ],
)  # fmt: skip
def test_which_clients_beat(tags: Any, wanted: bool) -> None:
    assert mflocal.wants_heartbeat(tags) is wanted


def test_the_user_of_a_run_is_vouched_for_by_its_system_tags() -> None:
    assert mflocal.verified_user({"user_name": "u", "system_tags": ["user:u"]}) == "u"
    for record in (
        {"user_name": "u", "system_tags": ["user:v"]},
        {"user_name": "u"},
        {"system_tags": ["user:None"]},
    ):
        assert mflocal.verified_user(record) is None
