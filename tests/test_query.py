"""Filters, tags, order, groups, pages and cursors, against facts taken from answers of the real services."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re

import pytest

from mflocal import (
    MAX_PATTERN_TEXT,
    SERVICE_RUN_COLUMNS,
    SERVICE_TASK_COLUMNS,
    UI_COLUMNS,
    Problem,
    arrange,
    base_url,
    cursor_page,
    envelope,
    envelope_one,
    group_rows,
    learn_patterns,
    like_matcher,
    matches,
    parse_filters,
    parse_list_query,
    parse_order,
    parse_page,
    sort_rows,
    wants_cursor,
)

SYSTEM = ["metaflow_version:2.19.39", "runtime:dev", "user:tester"]


def filter_rows(rows, filters):
    """The rows that pass all filters."""
    return [row for row in rows if matches(row, filters)]


def service_run(
    number, ts, user_name="tester", beat=1795293708, status="running", tags=(), system_tags=SYSTEM
):
    row = {
        "flow_id": "F1",
        "run_number": number,
        "user_name": user_name,
        "ts_epoch": ts,
        "status": status,
    }
    row.update(
        last_heartbeat_ts=beat,
        tags=list(tags),
        system_tags=list(system_tags),
        run_id=None,
        user=None,
    )
    if "user:%s" % user_name in system_tags:
        row["user"] = user_name
    if isinstance(number, str):
        row["run_id"] = number
    return row


# The runs of a recorded sweep, newest first. There the string ids hide numbers; here an id is what it is.
SERVICE_RUNS = [
    service_run(15, 1795293708929),
    service_run("F1", 1795293708820),
    service_run("argo-abc", 1795293708675),
    service_run(8, 1795293708600, user_name=None, system_tags=["metaflow_version:2.19.39"]),
    service_run(7, 1795293708572, beat=None, status="failed", system_tags=[]),
    service_run(6, 1795293708549, system_tags=["metaflow_version:abc"]),
    service_run(5, 1795293708500, system_tags=["metaflow_version:2.0.5"]),
    service_run(4, 1795293708478, system_tags=["metaflow_version:1.14.0"]),
    service_run(
        3, 1795293708428, beat=None, status="failed", system_tags=["metaflow_version:1.13.0"]
    ),
    service_run(2, 1795293708400, beat=None, status="failed", system_tags=["user:tester"]),
    service_run(1, 1795293708372, tags=["ta", "tb"]),
]
ALL = [row["run_number"] for row in SERVICE_RUNS]
NAMED = [n for n in ALL if n != 8]

# query, numbers of the runs that pass
SERVICE_FILTERS = [
    ([], ALL),
    ([("nosuch", "1")], ALL),
    ([("finished_at", "1")], ALL),
    ([("_foo", "1")], ALL),
    ([("status", "running,failed")], ALL),
    ([("status:ne", "failed")], [15, "F1", "argo-abc", 8, 6, 5, 4, 1]),
    ([("status", "null")], []),
    ([("user", "tester")], [15, "F1", "argo-abc", 2, 1]),
    ([("user", "other")], []),
    ([("user", "null")], [8, 7, 6, 5, 4, 3]),
    ([("user", "null,tester")], ALL),
    ([("user_name", "tester")], NAMED),
    ([("user_name", "tester,other")], NAMED),
    ([("user_name:ne", "tester")], []),
    ([("user_name:ne", "other")], NAMED),
    ([("user_name:co", "EST")], NAMED),
    ([("user_name:sw", "te")], NAMED),
    ([("user_name:ew", "er")], NAMED),
    ([("user_name:sw", "es")], []),
    ([("user_name:li", "t%r")], NAMED),
    ([("user_name:li", "TESTE_")], NAMED),
    ([("user_name:li", "test")], []),
    ([("user_name:is", "null")], [8]),
    ([("user_name:lt", "u")], NAMED),
    ([("user_name:gt", "u")], []),
    ([("run_number", "1,2")], [2, 1]),
    ([("run_number", "1"), ("run_number", "2")], []),
    ([("run_number:gt", "3")], [15, 8, 7, 6, 5, 4]),
    ([("run_number:ge", "3")], [15, 8, 7, 6, 5, 4, 3]),
    ([("run_number:ne", "1")], ALL[:-1]),
    ([("run_number:lt", "5"), ("run_number:gt", "2")], [4, 3]),
    ([("run_id", "argo-abc")], ["argo-abc"]),
    ([("run_id:ne", "null")], [15, 8, 7, 6, 5, 4, 3, 2, 1]),
    ([("run_id", "null")], [15, 8, 7, 6, 5, 4, 3, 2, 1]),
    ([("ts_epoch:gt", "0")], ALL),
    ([("ts_epoch:lt", "9999999999999")], ALL),
    ([("ts_epoch", "null")], []),
    ([("ts_epoch:ge", "1795293708572"), ("ts_epoch:le", "1795293708600")], [8, 7]),
    ([("last_heartbeat_ts:gt", "0")], [15, "F1", "argo-abc", 8, 6, 5, 4, 1]),
    ([("last_heartbeat_ts", "null")], [7, 3, 2]),
    ([("flow_id", "F2")], []),
    ([("flow_id:ne", "F1")], []),
    ([("user_name", "';--")], []),
    # the real service answers 500 to these
    ([("tags", "ta")], [1]),
    ([("tags:ne", "ta")], ALL[:-1]),
    ([("tags", '["ta", "tb"]')], [1]),
    ([("tags", '["tb","ta"]')], [1]),
    ([("tags", '["ta"]')], []),
    ([("system_tags:co", "USER")], [15, "F1", "argo-abc", 2, 1]),
    ([("system_tags:ew", "1.14.0")], [4]),
    ([("tags", "null")], []),
    # tags
    ([("_tags", "ta")], [1]),
    ([("_tags", "ta,user:tester")], [1]),
    ([("_tags:all", "ta,user:tester")], [1]),
    ([("_tags:all", "ta,nope")], []),
    ([("_tags:any", "ta,zzz")], [1]),
    ([("_tags:likeany", "user:te,zzz")], [15, "F1", "argo-abc", 2, 1]),
    ([("_tags:likeall", "runtime,user:te")], [15, "F1", "argo-abc", 1]),
    ([("_tags:likeall", "ta,tb")], [1]),
    ([("_tags:likeall", "TA")], []),
    ([("_tags:likeall", "r_ntime:%user:t")], [15, "F1", "argo-abc", 1]),
    ([("_tags:bogus", "ta")], [1]),
    ([("_tags", "")], []),
    ([("_tags", "nope")], []),
    ([("status", "failed"), ("_tags", "user:tester")], [2]),
]


def names(table):
    return ["&".join("%s=%.40r" % pair for pair in row[0]) for row in table]


@pytest.mark.parametrize("args, expected", SERVICE_FILTERS, ids=names(SERVICE_FILTERS))
def test_metadata_api_filters(args, expected):
    filters = parse_filters(args, SERVICE_RUN_COLUMNS, strict=True)
    assert [row["run_number"] for row in filter_rows(SERVICE_RUNS, filters)] == expected
    assert [row["run_number"] for row in SERVICE_RUNS if matches(row, filters)] == expected
    known = [a for a in args if a[0].split(":")[0] in {*SERVICE_RUN_COLUMNS, "_tags"}]
    assert bool(filters) == bool(known), "a known filter switches paging on"


SERVICE_PROBLEMS = [
    ([("run_number:foo", "1")], "unsupported operator 'foo' for field 'run_number'"),
    ([("status:zz", "failed")], "unsupported operator 'zz' for field 'status'"),
    ([("user:re", "t.*")], "unsupported operator 're' for field 'user'"),
    ([("user:", "t")], "unsupported operator '' for field 'user'"),
    ([("status", "bogus")], "unsupported status filter: bogus"),
    ([("status:co", "run")], "unsupported status filter: run"),
    ([("status:li", "fail%")], "unsupported status filter: fail%"),
    ([("status", "failed,")], "unsupported status filter: "),
    ([("ts_epoch:gt", "abc")], "invalid ts_epoch: expected integer epoch milliseconds, got 'abc'"),
    (
        [("last_heartbeat_ts", "x")],
        "invalid last_heartbeat_ts: expected integer epoch milliseconds, got 'x'",
    ),
]
FORMER_500 = [
    ([("run_number", "abc")], "invalid run_number"),
    ([("run_number", "1.5")], "invalid run_number"),
    ([("run_number", "")], "invalid run_number"),
    ([("run_number", "\u0661")], "invalid run_number"),
    ([("run_number", "1_0")], "invalid run_number"),
    ([("run_number:co", "1")], "unsupported operator 'co' for field 'run_number'"),
    ([("ts_epoch:co", "1")], "unsupported operator 'co' for field 'ts_epoch'"),
    ([("ts_epoch:gt", "99999999999999999999")], "invalid ts_epoch"),
    ([("ts_epoch", "9223372036854775808")], "invalid ts_epoch"),
    ([("user_name", "a\0b")], "the value of 'user_name' has a NUL"),
    ([("_tags", "a\0b")], "the value of '_tags' has a NUL"),
    ([("user_name:is", "true")], "user_name:is takes only null"),
    ([("tags", "[1,")], "not a JSON list"),
]


@pytest.mark.parametrize(
    "args, detail", SERVICE_PROBLEMS + FORMER_500, ids=names(SERVICE_PROBLEMS + FORMER_500)
)
def test_metadata_api_refusals(args, detail):
    with pytest.raises(Problem) as caught:
        parse_filters(args, SERVICE_RUN_COLUMNS, strict=True)
    assert (caught.value.status, caught.value.id) == (400, "invalid-filter")
    if (args, detail) in FORMER_500:
        assert caught.value.detail.startswith(detail)
    else:
        assert caught.value.detail == detail, "word for word as recorded"


def test_task_filters_of_the_metadata_api():
    rows = [
        {"task_id": 6, "user_name": None},
        {"task_id": "my-task", "task_name": "my-task", "user_name": "t"},
    ]

    def ids(*args):
        filters = parse_filters(args, SERVICE_TASK_COLUMNS, strict=True, tags=False)
        return [row["task_id"] for row in filter_rows(rows, filters)]

    assert ids(("_tags", "ta")) == [6, "my-task"], "tasks have no _tags there"
    assert ids(("tags", "ta")) == [6, "my-task"]
    assert ids(("task_id", "6")) == [6]
    assert ids(("task_name", "my-task")) == ["my-task"]
    assert ids(("user_name", "null")) == [6]
    assert ids(("step_name", "x")) == [6, "my-task"]


def ui_run(number, flow, status, ts, tags=(), user="tester", finished=True):
    return {
        "flow_id": flow, "run_number": number, "run": str(number), "run_id": None, "status": status,
        "user": user, "user_name": user, "ts_epoch": ts, "finished_at": ts + number * 100 if finished else None,
        "duration": number * 100 if finished else None, "last_heartbeat_ts": ts // 1000, "tags": list(tags),
        "system_tags": ["runtime:dev", "user:%s" % user],
    }  # fmt: skip


FLOWS = [
    "Kill",
    "Linear",
    "Foreach20",
    "Branch",
    "Params",
    "Retry",
    "Fail",
    "Fail",
    "Card",
    "Tag",
    "Nested",
]
FLOWS += ["Log", "Catch", "Config", "Switch", "Switch", "Recursion"]
UI_RUNS = [
    ui_run(n, FLOWS[n - 1] + "Flow", "failed" if n in (1, 7) else "completed", 1795293431746 + n * 1000,
           ["added1", "sp ace"] if n == 10 else [])
    for n in range(17, 0, -1)
]  # fmt: skip

UI_FILTERS = [
    ([("status", "failed")], [7, 1]),
    ([("status:ne", "completed")], [7, 1]),
    ([("status:co", "AIL")], [7, 1]),
    ([("status", "bogus")], []),
    ([("run", "2")], [2]),
    ([("run:sw", "1")], [17, 16, 15, 14, 13, 12, 11, 10, 1]),
    ([("run_number:gt", "14")], [17, 16, 15]),
    ([("run_number", "abc,2")], 400),
    ([("run_number:gt", "x")], 400),
    ([("ts_epoch", "abc")], 400),
    ([("ts_epoch:gt", "99999999999999999999")], 400),
    ([("duration:gt", "abc")], 400),
    ([("user_name", "a\0b")], 400),
    ([("user_name:is", "true")], 400),
    ([("user_name:is", "null")], []),
    ([("user_name:zz", "tester"), ("run", "3")], [3]),
    ([("bogus", "1"), ("run", "3")], [3]),
    ([("invalidate", "1"), ("benchmark", "1"), ("run", "3")], [3]),
    ([("run_number:co", "5")], [15, 5]),
    ([("finished_at:gt", "0"), ("duration:le", "200")], [2, 1]),
    ([("flow_id:re", "F.*Flow")], [8, 7, 3]),
    ([("flow_id:re", "low")], []),
    ([("flow_id:re", ".*20|Ta"), ("run_number:lt", "9")], [3]),
    ([("flow_id:re", "(")], 400),
    ([("flow_id:re", r"(F).*\1")], [8, 7, 3]),
    ([("flow_id:re", "x" * 600)], 400),
    ([("flow_id:co", "%" * 1001)], 400),
    ([("run_number:re", "1[0-2]$")], [12, 11, 10]),
    ([("tags:re", "sp.*e")], [10]),
    ([("system_tags:co", "user"), ("run", "4")], [4]),
    ([("flow_id", "LinearFlow,TagFlow")], [10, 2]),
    ([("flow_id:ne", "LinearFlow"), ("run_number:le", "3")], [3, 1]),
    ([("_tags", "sp ace")], [10]),
    ([("_tags", "added1,user:tester")], [10]),
    ([("_tags:any", "added1,nosuch")], [10]),
    ([("_tags", "cli_tag")], []),
    ([("user:le", "tester"), ("run", "9")], [9]),
    ([("user:le", "a")], []),
    ([("taskId", "1,2"), ("postprocess", "true"), ("run", "3")], [3]),
]


def passing_ui(args):
    """The runs that pass, as the service finds them: patterns are matched beforehand."""

    async def match(pattern, texts):
        try:
            return [re.match(pattern, text) is not None for text in texts]
        except re.error:
            raise Problem(400, "invalid pattern") from None

    filters = parse_filters(args, UI_COLUMNS["runs"])
    asyncio.run(learn_patterns(filters, UI_RUNS, match))
    return filter_rows(UI_RUNS, filters)


@pytest.mark.parametrize("args, expected", UI_FILTERS, ids=names(UI_FILTERS))
def test_ui_filters(args, expected):
    if expected == 400:
        with pytest.raises(Problem) as caught:
            passing_ui(args)
        assert caught.value.status == 400
    else:
        rows = passing_ui(args)
        assert [row["run_number"] for row in rows] == expected


METADATA = [
    {"id": 689, "field_name": "attempt-done", "value": "1", "attempt_id": 1, "run_number": "6"},
    {"id": 684, "field_name": "attempt", "value": "1", "attempt_id": 1, "run_number": "6"},
    {"id": 673, "field_name": "attempt", "value": "0", "attempt_id": 0, "run_number": "6"},
    {
        "id": 650,
        "field_name": "foreach-stack",
        "value": ["x=1", "y=2"],
        "attempt_id": 0,
        "run_number": "6",
    },
    {
        "id": 645,
        "field_name": "start_step",
        "value": "start",
        "attempt_id": None,
        "run_number": "6",
    },
]


@pytest.mark.parametrize(
    "args, expected",
    [
        ([("attempt_id:is", "null")], [645]),
        ([("attempt_id", "1")], [689, 684]),
        ([("attempt_id", "0,null")], [673, 650, 645]),
        ([("field_name", "attempt")], [684, 673]),
        ([("field_name:sw", "attempt")], [689, 684, 673]),
        ([("value", "1")], [689, 684]),
        ([("value:co", "Y=2")], [650]),
        ([("run_number", "6")], [689, 684, 673, 650, 645]),
        ([("run_number:gt", "5")], [689, 684, 673, 650, 645]),
        ([("run_number:gt", "6")], []),
        ([("ts_epoch:gt", "0")], []),
        ([("ts_epoch", "null"), ("id", "645")], [645]),
        ([("_tags", "a")], []),
    ],
)
def test_ui_metadata_filters(args, expected):
    assert [
        r["id"] for r in filter_rows(METADATA, parse_filters(args, UI_COLUMNS["metadata"]))
    ] == expected


def test_underscore_in_a_text_filter_is_a_wildcard_as_recorded():
    rows = [{"name": "name"}, {"name": "_task_ok"}]
    assert len(filter_rows(rows, parse_filters([("name:sw", "_")], {"name": "str"}))) == 2
    assert len(filter_rows(rows, parse_filters([("name:sw", "\\_")], {"name": "str"}))) == 1


def test_rows_without_tags_pass_no_tag_filter():
    assert not matches(
        {"tags": None, "system_tags": None}, parse_filters([("_tags", "runtime:dev")], {})
    )
    assert not matches({}, parse_filters([("_tags:likeany", "x")], {}))


def test_limits_of_filters_are_exact():
    for count, fits in ((1000, True), (1001, False)):
        for args in ([("user:co", "x" * count)], [("user:li", "x" * count)], [("user", ",".join("x" * count))],
                     [("_tags", ",".join("x" * count))]):  # fmt: skip
            if fits:
                assert filter_rows([{"user": "y"}], parse_filters(args, UI_COLUMNS["runs"])) == []
            else:
                with pytest.raises(Problem):
                    parse_filters(args, UI_COLUMNS["runs"])
    assert parse_filters([("user:re", "x" * 512)], UI_COLUMNS["runs"])
    for number in ("9223372036854775807", "-9223372036854775808", " +5 "):
        parse_filters([("ts_epoch", number)], UI_COLUMNS["runs"])
    for number in ("9223372036854775808", "-9223372036854775809", "5 5"):
        with pytest.raises(Problem):
            parse_filters([("ts_epoch", number)], UI_COLUMNS["runs"])


def test_ids_are_found_as_text_and_as_numbers():
    def ids(value):
        return [r["run_id"] for r in filter_rows([{"run_id": i} for i in (7, "7", 0, "07")],
                                                 parse_filters([("run_id", value)], UI_COLUMNS["steps"]))]  # fmt: skip

    assert ids("7") == [7, "7"]
    assert ids("0") == [0]
    assert ids("07") == ["07"]


# -- LIKE and regular expressions


def like_reference(pattern, text):
    parts, quoted = [], False
    for char in pattern:
        if quoted or char not in "%_\\":
            parts.append(re.escape(char))
            quoted = False
        elif char == "\\":
            quoted = True
        else:
            parts.append(".*" if char == "%" else ".")
    if quoted:
        parts.append(re.escape("\\"))
    return re.fullmatch("".join(parts), text, re.DOTALL) is not None


def test_like_agrees_with_its_definition():
    dice = random.Random(1)
    found = set()
    for _ in range(20_000):
        pattern = "".join(dice.choices("ab%_\\\n", (5, 5, 5, 3, 1, 1), k=dice.randrange(8)))
        text = "".join(dice.choices("ab%_\\\n", (8, 8, 1, 1, 1, 1), k=dice.randrange(10)))
        expected = like_reference(pattern, text)
        found.add(expected)
        assert like_matcher(pattern, ignore_case=False)(text) == expected, (pattern, text)
    assert found == {True, False}


def test_like_case():
    assert like_matcher("%M\u00dcN%")("in m\u00fcnchen")
    assert not like_matcher("%M\u00dcN%", ignore_case=False)("in m\u00fcnchen")


def test_like_with_a_joker_looks_at_the_beginning_of_a_text_only():
    """Such a piece is tried at every place, and its length is the client's too; plain text is found anywhere."""
    edge = "." * (MAX_PATTERN_TEXT - 6)
    for text, found in ((edge + "needle", True), (edge + ".needle", False)):
        assert like_matcher("%n_edle%")(text) is found
        assert like_matcher("%needle%")(text) and like_matcher("%needle")(text)


@pytest.mark.parametrize("patterns", [["a.*"] * 8, ["a.*,b.*"] * 4, [",".join(["a.*"] * 8)]])
def test_a_request_may_have_a_few_patterns(patterns):
    args = [("flow_id:re", pattern) for pattern in patterns]
    assert parse_filters(args, UI_COLUMNS["runs"])
    for more in (("user:re", "x"), ("flow_id:re", patterns[0] + ",x")):
        with pytest.raises(Problem) as caught:
            parse_filters([*args, more], UI_COLUMNS["runs"])
        assert (caught.value.status, caught.value.id) == (400, "invalid-filter")
    assert parse_filters(
        [*args, ("user:co", "x,y"), ("bogus:re", "x"), ("_tags", "a,b")], UI_COLUMNS["runs"]
    )


# -- order, groups, pages


def numbers(query, rows=UI_RUNS, kind="runs", first=()):
    args = [tuple(pair.split("=", 1)) for pair in query.split("&") if pair]
    parsed = parse_list_query(args, UI_COLUMNS[kind], first=first)
    found, more = arrange(filter_rows(rows, parsed.filters), parsed)
    key = "run_number" if kind == "runs" else "task_id"
    return [row[key] for row in found], more


DOWN, UP = list(range(17, 7, -1)), list(range(1, 11))
LISTS = [
    ("", DOWN, True),
    ("_limit=2", [17, 16], True),
    ("_limit=2&_page=2", [15, 14], True),
    ("_limit=2&_page=9", [1], False),
    ("_limit=2&_page=99", [], False),
    ("_limit=17", list(range(17, 0, -1)), False),
    ("_limit=0", list(range(17, 0, -1)), False),
    ("_limit=0&_page=2", [], False),
    ("_limit=-1", DOWN, True),
    ("_limit=abc", DOWN, True),
    ("_limit=", DOWN, True),
    ("_limit=5000", list(range(17, 0, -1)), False),
    ("_page=0", DOWN, True),
    ("_page=-3", DOWN, True),
    ("_page=abc", DOWN, True),
    ("_limit=1&_limit=2", [17], True),
    ("_order=ts_epoch", DOWN, True),
    ("_order=-ts_epoch", DOWN, True),
    ("_order=+ts_epoch", UP, True),
    ("_order= ts_epoch", UP, True),
    ("_order=bogus", DOWN, True),
    ("_order=bogus,+ts_epoch", UP, True),
    ("_order=", DOWN, True),
    ("_order=+run_number", UP, True),
    ("_order=-run_number,+ts_epoch", DOWN, True),
    ("_order=+status,+run_number", [2, 3, 4, 5, 6, 8, 9, 10, 11, 12], True),
    ("_order=+status&_limit=3", [17, 16, 15], True),
    ("_order=status&_limit=3", [7, 1, 17], True),
    ("_order=finished_at,-run_number", DOWN, True),
    ("_order=duration&_limit=2", [17, 16], True),
    ("_order=+flow_id&_limit=4", [4, 9, 13, 14], True),
    ("_order=+flow_id,ts_epoch&flow_id=SwitchFlow", [16, 15], False),
    ("_order=+flow_id,+ts_epoch&flow_id=SwitchFlow", [15, 16], False),
    ("flow_id:ne=LinearFlow&_order=-run_number&_limit=3", [17, 16, 15], True),
    ("status=completed&flow_id=LinearFlow&_tags=user:tester&_order=-ts_epoch&_limit=15", [2], False),
    # groups
    ("_group=run_number", UP, True),
    ("_group=run_number&_group_limit=1", UP, True),
    ("_group=user_name&_group_limit=2", [17, 16], False),
    ("_group=user_name&_limit=1&_group_limit=2&_order=-ts_epoch", [17, 16], False),
    ("_group=user_name&_limit=1&_group_limit=2&_order=+ts_epoch", [1, 2], False),
    ("_group=bogus", DOWN, True),
    ("_group=status", DOWN, True),
    ("_group=", DOWN, True),
    ("_group=flow_id&_limit=2&_page=2", [13, 14], True),
    ("_group=flow_id,user_name&_limit=2&_group_limit=1", [4, 9], True),
    ("_group=flow_id&_limit=0&_group_limit=1", [4, 9, 13, 14, 8, 3, 1, 2, 12, 11, 5, 17, 6, 16, 10], False),
    ("_group=flow_id&_limit=15", [4, 9, 13, 14, 8, 7, 3, 1, 2, 12, 11, 5, 17, 6, 16, 15, 10], False),
    ("_group=flow_id&_limit=15&_page=2", [], False),
    ("_group=flow_id&_order=-flow_id&_limit=2", [10, 16, 15], True),
    ("_group=user_name&_group_limit=0", list(range(17, 0, -1)), False),
    ("_group=user_name&_group_limit=x", DOWN, False),
]  # fmt: skip


@pytest.mark.parametrize("query, expected, more", LISTS, ids=[row[0] for row in LISTS])
def test_lists(query, expected, more):
    assert numbers(query) == (expected, more)


def test_pages_put_together_are_the_whole():
    for extra in ("", "&_order=+status", "&_group=flow_id", "&_order=+duration,-ts_epoch"):
        whole, _ = numbers("_limit=0" + extra)
        pages, page = [], 1
        while True:
            found, more = numbers("_limit=4&_page=%d%s" % (page, extra))
            pages += found
            page += 1
            if not more:
                break
        assert pages == whole
        assert sorted(whole) == list(range(1, 18))


def test_what_has_not_finished_is_newest():
    rows = [ui_run(3, "F", "running", 3, finished=False), *UI_RUNS[-2:]]
    assert numbers("_order=-finished_at", rows) == ([3, 2, 1], False)
    assert numbers("_order=+finished_at", rows) == ([1, 2, 3], False)


def test_ids_of_both_kinds_can_be_ordered():
    rows = [{"task_id": value} for value in ("b", 10, None, 9, "a")]
    assert [r["task_id"] for r in sort_rows(rows, [("task_id", False)])] == [9, 10, "a", "b", None]
    assert [r["task_id"] for r in sort_rows(rows, [("task_id", True)])] == [None, "b", "a", 10, 9]


def test_equals_keep_the_default_order():
    rows = [{"id": i, "ts_epoch": 5, "x": i % 2} for i in range(100, 0, -1)]
    assert [r["id"] for r in sort_rows(rows, [("x", True)], 3)] == [99, 97, 95]
    assert [r["id"] for r in sort_rows(rows, [("x", False)], 3)] == [100, 98, 96]
    assert [r["id"] for r in sort_rows(rows, [("ts_epoch", True)], 3)] == [100, 99, 98]
    assert [r["id"] for r in sort_rows(rows, [("ts_epoch", False)], 3)] == [1, 2, 3], (
        "ascending: oldest first"
    )
    assert [r["id"] for r in sort_rows(rows, [("x", False)], None)][:3] == [100, 98, 96]


def test_a_fixed_first_order_comes_before_the_requested_one():
    rows = [{"task_id": 43, "attempt_id": n, "ts_epoch": 1} for n in (0, 1, 2)]
    order = parse_order(
        [("_order", "+ts_epoch")], UI_COLUMNS["tasks"], first=[("attempt_id", True)]
    )
    assert [r["attempt_id"] for r in sort_rows(rows, order)] == [2, 1, 0]


def test_groups_of_null_come_last_and_are_not_lost():
    rows = [dict(ui_run(1, "F", "completed", 1), user=None), *UI_RUNS[-3:]]
    assert numbers("_group=user", rows) == ([3, 2, 1, 1], False)
    assert numbers("_group=user&_limit=1", rows) == ([3, 2, 1], True)
    assert numbers("_group=user&_order=-user", rows) == ([3, 2, 1, 1], False)


def test_the_columns_a_query_looks_at_are_known():
    args = [("status", "failed"), ("_order", "-duration"), ("_group", "flow_id"), ("bogus", "1")]
    assert parse_list_query(args, UI_COLUMNS["runs"]).columns == {"status", "duration", "flow_id"}
    assert parse_list_query([("_limit", "3")], UI_COLUMNS["runs"]).columns == frozenset()


def test_page_limits_of_logs_and_cards():
    assert parse_page([], default_limit=1000, max_limit=10_000) == (1, 1000)
    assert parse_page(
        [("_limit", "20000"), ("_page", "3")], default_limit=1000, max_limit=10_000
    ) == (
        3,
        10_000,
    )
    assert parse_page([("_limit", "\u0665"), ("_page", "1" * 30)]) == (1, 10)


# -- answers


def test_envelope_of_the_first_page():
    answer = envelope([1], "https://ui.example.com", "/api/flows", [("_limit", "1")], has_more=True)
    assert answer == {
        "data": [1],
        "status": 200,
        "links": {
            "self": "https://ui.example.com/api/flows?_limit=1",
            "first": "https://ui.example.com/api/flows?_limit=1&_page=1",
            "prev": "https://ui.example.com/api/flows?_limit=1&_page=1",
            "next": "https://ui.example.com/api/flows?_limit=1&_page=2",
            "last": None,
        },
        "pages": {"self": 1, "first": 1, "prev": 1, "next": 2, "last": None},
        "query": {"_limit": "1"},
    }


def test_envelope_of_the_last_page_has_no_next():
    args = [("_page", "99"), ("_limit", "2")]
    answer = envelope([], "http://h", "/flows", args, page=99, last_page=99)
    assert answer["links"]["next"] is None and answer["pages"]["next"] is None
    assert answer["links"]["prev"] == "http://h/flows?_page=98&_limit=2"
    assert answer["links"]["last"] == "http://h/flows?_page=99&_limit=2"
    assert answer["pages"] == {"self": 99, "first": 1, "prev": 98, "next": None, "last": 99}


def test_links_keep_every_parameter_as_it_was_meant():
    args = [
        ("_tags", "sp ace"),
        ("_order", "+ts_epoch"),
        ("ts_epoch:ge", "1"),
        ("ts_epoch:ge", "2"),
        ("x", "a&b=\u00e9%"),
    ]
    answer = envelope(
        [], "http://h", "/runs", args + [("_page", "1"), ("_page", "7")], has_more=True
    )
    assert answer["links"]["next"] == (
        "http://h/runs?_tags=sp%20ace&_order=%2Bts_epoch&ts_epoch:ge=1&ts_epoch:ge=2&x=a%26b%3D%C3%A9%25&_page=2"
    )
    assert answer["query"] == {
        "_tags": "sp ace", "_order": "+ts_epoch", "ts_epoch:ge": "1", "x": "a&b=\u00e9%", "_page": "1",
    }  # fmt: skip
    assert envelope([], "http://h", "/flows", [])["links"]["self"] == "http://h/flows"


def test_envelope_of_one_object():
    answer = envelope_one({}, "http://h", "/flows/F", [("a", "1")], status=404)
    assert answer == {
        "data": {},
        "status": 404,
        "links": {"self": "http://h/flows/F?a=1"},
        "query": {"a": "1"},
    }


@pytest.mark.parametrize(
    "headers, expected",
    [
        ({"host": "127.0.0.1:8083"}, "http://127.0.0.1:8083"),
        ({"host": "[::1]:8083"}, "http://[::1]:8083"),
        ({"host": "h", "x-forwarded-proto": "https, http", "x-forwarded-host": "ui.example.com, other"},
         "https://ui.example.com"),
        ({"host": "h", "x-forwarded-host": "ui.example.com:3000"}, "http://ui.example.com:3000"),
        ({"host": "h", "x-forwarded-proto": "javascript", "x-forwarded-host": "a/b\"><"}, "http://h"),
        ({"host": "h", "x-forwarded-host": "user@evil"}, "http://h"),
        ({}, "http://localhost"),
    ],
)  # fmt: skip
def test_base_url(headers, expected):
    assert base_url(headers) == expected


# -- cursors


def cursor(**values):
    return base64.b64encode(json.dumps(values).encode()).decode()


KEY = ("ts_epoch", "run_number")


def test_cursor_pages_of_recorded_runs():
    pages, args = [], [("_limit", "3")]
    while True:
        page, headers = cursor_page(SERVICE_RUNS, args, KEY)
        pages.append([row["run_number"] for row in page])
        assert headers["X-Limit"] == "3"
        if "X-Next-Cursor" not in headers:
            break
        args = [("_limit", "3"), ("_cursor", headers["X-Next-Cursor"])]
    assert pages == [[15, "F1", "argo-abc"], [8, 7, 6], [5, 4, 3], [2, 1]]


def test_cursor_is_written_as_recorded():
    rows = [{"ts_epoch": 1795293708572, "run_number": 7}, {"ts_epoch": 1, "run_number": 1}]
    _, headers = cursor_page(rows, [("_limit", "1")], KEY)
    assert (
        headers["X-Next-Cursor"] == "eyJ0c19lcG9jaCI6IDE3OTUyOTM3MDg1NzIsICJydW5fbnVtYmVyIjogN30="
    )
    rows = [
        {"ts_epoch": 1795293739135, "task_id": 1, "name": "nf"},
        {"ts_epoch": 1, "task_id": 1, "name": "a"},
    ]
    _, headers = cursor_page(rows, [("_limit", "1")], ("ts_epoch", "task_id", "name"))
    assert headers["X-Next-Cursor"] == (
        "eyJ0c19lcG9jaCI6IDE3OTUyOTM3MzkxMzUsICJ0YXNrX2lkIjogMSwgIm5hbWUiOiAibmYifQ=="
    )


def test_a_cursor_with_a_plus_may_come_unescaped():
    rows = [{"ts_epoch": 2, "flow_id": "Flow"}, {"ts_epoch": 1, "flow_id": "Flow"}]
    text = base64.b64encode(b'{"ts_epoch": 2, "flow_id": "~~~\xc3\xbe"}').decode()
    assert "+" in text
    page, _ = cursor_page(rows, [("_cursor", text.replace("+", " "))], ("ts_epoch", "flow_id"))
    assert page == rows, "Flow sorts before ~ and so comes after it on the way down"


def test_equal_times_and_both_kinds_of_ids():
    rows = [{"ts_epoch": 5, "run_number": n} for n in (2, "b", 10, "a", 9)]
    seen, args = [], [("_limit", "2")]
    while args:
        page, headers = cursor_page(rows, args, KEY)
        seen += [row["run_number"] for row in page]
        args = (
            [("_limit", "2"), ("_cursor", headers["X-Next-Cursor"])]
            if "X-Next-Cursor" in headers
            else []
        )
    assert seen == ["b", "a", 10, 9, 2]


def test_rows_without_a_time_come_last_and_can_be_paged():
    rows = [
        {"ts_epoch": at, "run_number": n} for n, at in enumerate((None, 5, None, 7, None, None, 6))
    ]
    seen, args = [], [("_limit", "2")]
    while args:
        page, headers = cursor_page(rows, args, KEY)
        seen += [row["run_number"] for row in page]
        args = (
            [("_limit", "2"), ("_cursor", headers["X-Next-Cursor"])]
            if "X-Next-Cursor" in headers
            else []
        )
    assert seen == [3, 6, 1, 5, 4, 2, 0]


@pytest.mark.parametrize(
    "args, limit, count",
    [
        ([("_limit", "")], "50", 50),
        ([("_cursor", "")], "50", 50),
        ([("_limit", "0")], "0", 0),
        ([("_limit", "501")], "500", 500),
        ([("_limit", "1000000")], "500", 500),
        ([("_limit", "1"), ("_limit", "2")], "1", 1),
        ([("_cursor", cursor(ts_epoch=40, run_number=40))], "50", 40),
        ([("_cursor", cursor(ts_epoch=0, run_number=0))], "50", 0),
    ],
)
def test_cursor_limits(args, limit, count):
    rows = [{"ts_epoch": n, "run_number": n} for n in range(600)]
    page, headers = cursor_page(rows, args, KEY)
    assert headers["X-Limit"] == limit
    assert len(page) == count
    assert page == sorted(page, key=lambda r: -r["ts_epoch"])


def test_paging_is_off_unless_asked_for():
    rows = [{"ts_epoch": n, "run_number": n} for n in range(600)]
    assert cursor_page(rows, [("user", "x")], KEY) == (rows, {})
    assert len(cursor_page(rows, [("user", "x")], KEY, always=True)[0]) == 50
    assert (
        wants_cursor([("_limit", "")])
        and wants_cursor([("_cursor", "x")])
        and not wants_cursor([("_page", "1")])
    )


@pytest.mark.parametrize(
    "name, value, problem",
    [
        ("_limit", "abc", "invalid-limit"),
        ("_limit", "1.5", "invalid-limit"),
        ("_limit", "-1", "invalid-limit"),
        ("_limit", "-5", "invalid-limit"),
        ("_cursor", "bad", "invalid-cursor"),
        ("_cursor", "MTI=", "invalid-cursor"),
        ("_cursor", "eyJ0c19lcG9jaCI6IngiLCJmbG93X2lkIjoiRjEifQ==", "invalid-cursor"),
        ("_cursor", cursor(ts_epoch=1), "invalid-cursor"),
        ("_cursor", cursor(ts_epoch="1", run_number=1), "invalid-cursor"),
        ("_cursor", cursor(ts_epoch=True, run_number=1), "invalid-cursor"),
        ("_cursor", cursor(ts_epoch=1, run_number=None), "invalid-cursor"),
        ("_cursor", cursor(ts_epoch=1, run_number=[1]), "invalid-cursor"),
        ("_cursor", base64.b64encode(b"[1, 2]").decode(), "invalid-cursor"),
        ("_cursor", base64.b64encode(b"\xff\xfe").decode(), "invalid-cursor"),
        ("_cursor", base64.b64encode(b"[" * 5000).decode(), "invalid-cursor"),
        ("_cursor", "\u00e9\u00e9\u00e9\u00e9", "invalid-cursor"),
    ],
)
def test_bad_cursors_and_limits(name, value, problem):
    with pytest.raises(Problem) as caught:
        cursor_page([], [(name, value)], KEY)
    assert (caught.value.status, caught.value.id) == (400, problem)
    if problem == "invalid-cursor":
        assert caught.value.detail == "Invalid cursor"


# -- groups


def test_group_rows_is_what_arrange_does():
    query = parse_list_query([("_group", "flow_id"), ("_limit", "3")], UI_COLUMNS["runs"])
    assert group_rows(UI_RUNS, query) == arrange(UI_RUNS, query)
