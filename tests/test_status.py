"""Status, start, finish and duration of attempts, runs and steps: one table row per rule and improvement.

Times are ms unless they end in _s. T is the moment a task or run was created; NOW is an hour later.
"""

from __future__ import annotations

import pytest

import mflocal
from mflocal import COMPLETED as C
from mflocal import FAILED as F
from mflocal import PENDING as P
from mflocal import RUNNING as R
from mflocal import UNKNOWN as U
from mflocal import TaskFacts, allowed_attempts, attempt_rows, run_status, step_duration

T = 1_795_293_431_000
HOUR = 3_600_000
DAY = 24 * HOUR
NOW = T + HOUR
LIVE = {"alive": lambda n: True}
DEAD = {"alive": lambda n: False}


def summarize(tasks, end_step="end"):
    """The RunSummary of (step name, facts) pairs."""
    summary = mflocal.RunSummary(end_step)
    for step_name, facts in tasks:
        summary.add(step_name, facts)
    return summary


def sec(ms):
    """A heartbeat: whole seconds."""
    return ms // 1000


def task(*attempts, created=T, beat=None, changed=0):
    """TaskFacts; each attempt is a dict of AttemptFacts fields, numbered from 0, or None to leave one out."""
    facts = TaskFacts()
    facts.created_at = created
    facts.heartbeat = beat
    facts.changed_at = changed
    for number, fields in enumerate(attempts):
        if fields is not None:
            attempt = facts.attempt(number)
            for name, value in fields.items():
                setattr(attempt, name, value)
    return facts


def ran(start, end, ok=True):
    return {"started_at": start, "ok": ok, "ok_at": end, "done_at": end + 2}


def began(start):
    return {"started_at": start}


STALE, FRESH = sec(NOW - 61_000), sec(NOW - 50_000)

# name, facts, keywords, [(status, started_at, finished_at, duration)]
ATTEMPTS = [
    (C, task(ran(T + 10, T + 50)), {}, [(C, T + 10, T + 52, 42)]),
    (F, task(ran(T + 10, T + 50, False)), {}, [(F, T + 10, T + 52, 42)]),
    ("completed, never started (a clone)", task({"ok": True, "ok_at": T + 9}), {}, [(C, None, T + 9, 9)]),
    ("finish is the latest of all", task({"started_at": T, "ok": True, "ok_at": T + 5, "task_ok_at": T + 8}), {},
     [(C, T, T + 8, 8)]),
    ("retry", task(ran(T + 10, T + 50, False), ran(T + 90, T + 99)), {},
     [(F, T + 10, T + 52, 42), (C, T + 90, T + 101, 11)]),
    ("done without attempt_ok", task({"started_at": T, "done_at": T + 7}), {}, [(U, T, T + 7, 7)]),
    ("attempt_ok that is no boolean", task({"started_at": T, "ok_at": T + 7}), {}, [(U, T, T + 7, 7)]),
    ("... resolved: ok", task({"started_at": T, "done_at": T + 7}), {"task_ok": lambda n: True},
     [(C, T, T + 7, 7)]),
    ("... resolved: not ok", task({"started_at": T, "task_ok_at": T + 7}), {"task_ok": lambda n: False},
     [(F, T, T + 7, 7)]),
    ("_task_ok never overrules attempt_ok", task(ran(T, T + 8)), {"task_ok": lambda n: False},
     [(C, T, T + 10, 10)]),
    ("_parameters", task({"done_at": T + 342}, beat=sec(T)), {"parameters": True},
     [(C, None, T + 342, 342)]),
    ("_parameters not done yet", task(beat=sec(NOW)), {"parameters": True}, [(R, None, None, HOUR)]),
    ("next attempt begun", task(began(T + 5), began(NOW - 9)), {},
     [(F, T + 5, NOW - 9, HOUR - 14), (R, NOW - 9, None, 9)]),
    ("an attempt in between is missing", task(began(T + 5), None, began(NOW - 9)), {},
     [(F, T + 5, NOW - 9, HOUR - 14), (R, NOW - 9, None, 9)]),
    ("only attempt 1 is known", task(None, ran(T, T + 8)), {}, [(C, T, T + 10, 10)]),
    ("next attempt only finished", task(began(T + 5), {"ok": True, "ok_at": T + 99}), {},
     [(F, T + 5, T + 99, 94), (C, None, T + 99, 99)]),
    # alive by connection
    ("alive, no heartbeat", task(began(T)), LIVE, [(R, T, None, HOUR)]),
    ("alive, heartbeat of an hour ago", task(began(T), beat=sec(T)), LIVE,
     [(R, T, None, HOUR)]),
    ("alive, older than a day", task(began(T - 2 * DAY), created=T - 2 * DAY), LIVE,
     [(R, T - 2 * DAY, None, HOUR + 2 * DAY)]),
    ("alive again after a loss", task({"started_at": T, "lost_at": T + 5}), LIVE,
     [(R, T, None, HOUR)]),
    ("alive although its run has ended", task(began(T)), {"alive": lambda n: True, "run_ended": True},
     [(R, T, None, HOUR)]),
    ("run ended before the task began, wrapper alive", task(), {**LIVE, "run_ended": True, "run_finished_at": NOW},
     [(F, None, NOW, HOUR)]),
    ("alive does not undo a finish", task(ran(T, T + 8)), LIVE, [(C, T, T + 10, 10)]),
    ("lost", task({"started_at": T, "lost_at": T + 5_000}, beat=sec(T + 5_000)), DEAD,
     [(F, T, T + 5_000, 5_000)]),
    ("lost this very moment", task({"started_at": T, "lost_at": NOW}, beat=sec(NOW)), DEAD,
     [(F, T, NOW, HOUR)]),
    ("lost, known from disk only", task({"started_at": T, "lost_at": T + 5_000}, beat=FRESH), {},
     [(R, T, None, HOUR)]),
    ("lost, heartbeat older than the loss", task({"started_at": T, "lost_at": NOW - 500}, beat=FRESH), {},
     [(F, T, NOW - 500, HOUR - 500)]),
    ("lost, then finished after all", task({"started_at": T, "lost_at": T + 5, "ok": True, "ok_at": T + 9}),
     DEAD, [(C, T, T + 9, 9)]),
    ("lost, moment unknown", task(began(T), beat=sec(T + 8_000)), DEAD,
     [(F, T, T + 8_000, 8_000)]),
    ("lost attempt 0, attempt 1 runs", task({"started_at": T, "lost_at": T + 5}, began(T + 900)),
     {"alive": lambda n: n == 1}, [(F, T, T + 900, 900), (R, T + 900, None, HOUR - 900)]),
    # the run has ended
    ("run ended", task(began(T)), {"run_ended": True, "run_finished_at": T + 99}, [(F, T, T + 99, 99)]),
    ("run ended, moment unknown", task(began(T), changed=T + 77), {"run_ended": True}, [(F, T, T + 77, 77)]),
    ("run ended, moment unknown, no file but the start", task(began(T + 50)), {"run_ended": True},
     [(F, T + 50, T + 50, 0)]),
    ("run ended, fresh heartbeat", task(began(T), beat=FRESH), {"run_ended": True, "run_finished_at": NOW},
     [(F, T, NOW, HOUR)]),
    ("run ended, task never started", task(), {"run_ended": True, "run_finished_at": T + 99},
     [(F, None, T + 99, 99)]),
    # heartbeats
    ("heartbeat fresh", task(began(T), beat=FRESH), {}, [(R, T, None, HOUR)]),
    ("heartbeat exactly at the cutoff", task(began(T), beat=sec(NOW - 60_000)), {}, [(R, T, None, HOUR)]),
    ("heartbeat stale", task(began(T), beat=STALE), {}, [(F, T, STALE * 1000, STALE * 1000 - T)]),
    ("heartbeat stale although the run goes on", task(began(T), beat=STALE), {"run_ended": False},
     [(F, T, STALE * 1000, STALE * 1000 - T)]),
    ("heartbeat stale, longer cutoff", task(began(T), beat=STALE), {"cutoff": 120}, [(R, T, None, HOUR)]),
    ("heartbeat in the future", task(began(T), beat=sec(NOW + DAY)), {}, [(R, T, None, HOUR)]),
    ("heartbeat stale, attempt just begun", task(ran(T, T + 8, False), began(NOW - 900), beat=STALE), {},
     [(F, T, T + 10, 10), (R, NOW - 900, None, 900)]),
    ("heartbeat before the start never makes a negative duration", task(began(T + 900), beat=sec(T)), {},
     [(F, T + 900, T + 900, 0)]),
    ("created, heartbeat of its creation", task(created=NOW - 900, beat=sec(NOW - 900)), {},
     [(R, None, None, 900)]),
    ("waits in a job queue, run alive", task(beat=sec(T)), {"run_ended": False}, [(R, None, None, HOUR)]),
    ("waits in a job queue, run unknown", task(beat=sec(T)), {}, [(F, None, T, 0)]),
    # plain local mode: no heartbeat, no connection
    ("local, not started", task(created=NOW - 5), {}, [(P, None, None, None)]),
    ("local, running", task(began(T)), {}, [(R, T, None, HOUR)]),
    ("local, asleep for three days, run goes on", task(began(NOW - 3 * DAY), created=NOW - 3 * DAY),
     {"run_ended": False}, [(R, NOW - 3 * DAY, None, 3 * DAY)]),
    ("local, silent for a day, run unknown", task(began(NOW - DAY - 1), created=NOW - DAY - 2), {},
     [(F, NOW - DAY - 1, NOW - DAY - 1, 0)]),
    ("local, silent for just a day", task(began(NOW - DAY), created=NOW - DAY), {},
     [(R, NOW - DAY, None, DAY)]),
    ("local, silent for a day but for one file", task(began(NOW - 3 * DAY), changed=NOW - HOUR), {},
     [(R, NOW - 3 * DAY, None, 3 * DAY)]),
    ("local, shorter cutoff", task(began(T), changed=T + 50), {"local_cutoff": 300}, [(F, T, T + 50, 50)]),
    ("local, never started, silent for a day", task(created=NOW - DAY - 1), {},
     [(F, None, NOW - DAY - 1, 0)]),
    # odd clocks and gaps
    ("finish before start", task(ran(T + 900, T + 50)), {}, [(C, T + 900, T + 900, 0)]),
    ("started in the future", task(began(NOW + 5_000)), {}, [(R, NOW + 5_000, None, 0)]),
    ("nothing known at all", task(created=None), {}, [(P, None, None, None)]),
    ("creation unknown", task({"ok": True, "ok_at": T}, created=None), {}, [(C, None, T, None)]),
]  # fmt: skip


@pytest.mark.parametrize("name, facts, keywords, rows", ATTEMPTS, ids=[row[0] for row in ATTEMPTS])
def test_attempts(name, facts, keywords, rows):
    found = attempt_rows(facts, NOW, **keywords)
    assert [(r.status, r.started_at, r.finished_at, r.duration) for r in found] == rows


def test_recorded_attempts():
    """Tasks of real runs with the answers the real service gave."""
    killed = task(began(1795293441489), created=1795293438542, beat=1795293470)
    assert attempt_rows(killed, NOW)[0][1:5] == (F, 1795293441489, 1795293470000, 28511)
    retried = task(
        {
            "started_at": 1795293553931,
            "ok": False,
            "ok_at": 1795293554100,
            "done_at": 1795293554121,
        },
        {"started_at": 1795293556593, "ok": True, "ok_at": 1795293556700, "done_at": 1795293556744},
        created=1795293552098,
        beat=1795293552,
    )
    assert [r[:5] for r in attempt_rows(retried, NOW)] == [
        (0, F, 1795293553931, 1795293554121, 190),
        (1, C, 1795293556593, 1795293556744, 151),
    ]
    parameters = task(
        {"done_at": 1795293432334, "task_ok_at": 1795293432300}, created=1795293431992
    )
    assert attempt_rows(parameters, NOW)[0][1:5] == (U, None, 1795293432334, 342)
    assert attempt_rows(parameters, NOW, task_ok=lambda n: True)[0].status == "completed"


def test_ok_is_reported_and_task_ok_is_asked_only_when_needed():
    asked = []

    def task_ok(number):
        asked.append(number)
        return False

    rows = attempt_rows(
        task(ran(T, T + 1), {"done_at": T + 9}, began(NOW - 5)), NOW, task_ok=task_ok
    )
    assert [r.ok for r in rows] == [True, False, None]
    assert [r.attempt_id for r in rows] == [0, 1, 2]
    assert asked == [1]


def test_attempt_numbers_sort_as_numbers():
    facts = task(*[ran(T + i, T + i, False) for i in range(12)])
    assert [r.attempt_id for r in attempt_rows(facts, NOW)] == list(range(12))


PARAMETERS = ("_parameters", task({"done_at": T + 300}))
START = ("start", task(ran(T + 2_000, T + 3_000), created=T + 1_000))
CAUGHT = (
    "boom",
    task(ran(T + 4_000, T + 5_000, False), ran(T + 6_000, T + 7_000), created=T + 3_500),
)
FAILED = ("boom", task(ran(T + 4_000, T + 5_000, False), created=T + 3_500))
SLEEPING = ("slow", task(began(T + 4_000), created=T + 3_500))
WAITING = ("slow", task(created=T + 3_500))
END_OK = ("end", task(ran(T + 8_000, T + 9_000), created=T + 7_500))
END_BAD = ("end", task(ran(T + 8_000, T + 9_000, False), created=T + 7_500))
END_RETRIED = ("end", task(ran(T + 8_000, T + 9_000, False), began(T + 10_000), created=T + 7_500))
END_DONE = ("end", task({"started_at": T + 8_000, "done_at": T + 9_000}, created=T + 7_500))
SOON, LATER = T + 12_000, T + 5_002 + 301_000
RUNNING_SOON = (R, None, 12_000)
GONE_AT = T + 11_500
GONE = {"alive": False, "lost_at": GONE_AT}


def allow(step, attempts):
    return {"allowed": {step: attempts}.get}


def failed(at):
    return (F, at, at - T)


# name, tasks, now, keywords, (status, finished_at, duration)
RUNS = [
    # 1: the end step decides
    (C, [PARAMETERS, START, END_OK], NOW, {}, (C, T + 9_000, 9_000)),
    ("completed whatever else", [START, SLEEPING, END_OK], NOW, {"alive": False, "lost_at": NOW - 5},
     (C, T + 9_000, 9_000)),
    ("end failed", [START, END_BAD], NOW, {}, failed(T + 9_000)),
    ("end failed, runtime not gone yet", [START, END_BAD], SOON, {"alive": True, "heartbeat": sec(SOON)},
     failed(T + 9_000)),
    ("end tried again", [START, END_RETRIED], SOON, {"alive": True}, RUNNING_SOON),
    ("end tried again, fresh heartbeat", [START, END_RETRIED], SOON, {"heartbeat": sec(SOON)}, RUNNING_SOON),
    ("end tried again, local", [START, END_RETRIED], SOON, {}, RUNNING_SOON),
    ("end tried again, then killed", [START, END_RETRIED], SOON, GONE, failed(GONE_AT)),
    ("end tried again, heartbeats stopped", [START, END_RETRIED], NOW, {"heartbeat": sec(T + 20_000)},
     failed(T + 20_000)),
    ("end done, no attempt_ok (old client)", [START, END_DONE], NOW, {}, (C, T + 9_000, 9_000)),
    ("end done, _task_ok false", [START, END_DONE], NOW, {"end_task_ok": False}, failed(T + 9_000)),
    # 2, 3: connections
    ("alive, nothing yet", [], SOON, {"alive": True}, RUNNING_SOON),
    ("alive, asleep for an hour", [START, SLEEPING], NOW, {"alive": True, "heartbeat": sec(T)},
     (R, None, HOUR)),
    ("alive, a task failed and may be retried", [START, FAILED], SOON, {"alive": True}, RUNNING_SOON),
    ("killed", [START, SLEEPING], SOON, {**GONE, "heartbeat": sec(GONE_AT)}, failed(GONE_AT)),
    ("failed task, runtime has gone: at once", [START, FAILED], T + 5_200,
     {"alive": False, "lost_at": T + 5_100, "heartbeat": sec(T + 5_100)}, failed(T + 5_100)),
    ("gone before its last task finished", [START, CAUGHT], SOON, {"alive": False, "lost_at": T + 6_500},
     failed(T + 7_002)),
    ("gone, known from disk only", [START, SLEEPING], SOON, {"lost_at": GONE_AT}, failed(GONE_AT)),
    ("gone, moment unknown", [START, FAILED], SOON, {"alive": False}, failed(T + 5_002)),
    ("gone, moment unknown, nothing finished", [SLEEPING], SOON, {"alive": False}, failed(T + 4_000)),
    ("gone, moment unknown, beaten", [SLEEPING], SOON, {"alive": False, "heartbeat": sec(T + 9_000)},
     failed(T + 9_000)),
    ("gone, moment unknown, no tasks", [], SOON, {"alive": False}, failed(T)),
    ("gone in the moment a task began", [SLEEPING], SOON, {"lost_at": T + 4_000}, failed(T + 4_000)),
    ("gone, resumed", [START, SLEEPING], SOON, {"alive": True, "lost_at": T + 3_000}, RUNNING_SOON),
    ("gone, resumed by somebody unseen", [START, SLEEPING], SOON, {"alive": False, "lost_at": T + 3_000},
     RUNNING_SOON),
    ("gone, beaten since", [START, SLEEPING], SOON, {"lost_at": T + 5_000, "heartbeat": sec(T + 11_000)},
     RUNNING_SOON),
    # nothing survives a boot of its machine
    ("silent since before the boot", [START, SLEEPING], NOW, {"booted_at": NOW - 5}, failed(T + 4_000)),
    ("a change since the boot", [START, ("slow", task(began(T + 4_000), changed=NOW))], NOW, {"booted_at": NOW - 5},
     (R, None, HOUR)),
    ("before the boot, but alive", [SLEEPING], NOW, {"booted_at": NOW - 5, "alive": True}, (R, None, HOUR)),
    ("before the boot, with heartbeats", [SLEEPING], NOW, {"booted_at": NOW, "heartbeat": FRESH}, (R, None, HOUR)),
    # a scheduler drives it
    ("scheduled, between its tasks", [START], NOW, {"scheduled": True, "heartbeat": sec(T + 3_000)}, (R, None, HOUR)),
    ("scheduled, between its tasks, after a boot", [START], NOW, {"scheduled": True, "booted_at": NOW}, (R, None, HOUR)),
    ("scheduled, silent for longer than a day", [START], T + DAY + HOUR, {"scheduled": True}, failed(T + 3_002)),
    ("scheduled, a task died", [SLEEPING], NOW, {"scheduled": True, "heartbeat": STALE}, failed(STALE * 1000)),
    ("scheduled, failed, may be tried again", [START, FAILED], T + 60_000, {"scheduled": True}, (R, None, 60_000)),
    ("scheduled, failed for good", [START, FAILED], T + 60_000, {"scheduled": True, **allow("boom", 1)}, failed(T + 5_002)),
    # 4, 5: heartbeats
    ("fresh heartbeat", [START, SLEEPING], NOW, {"heartbeat": FRESH}, (R, None, HOUR)),
    ("a task's heartbeat counts", [("slow", task(began(T), beat=FRESH))], NOW, {"heartbeat": sec(T)},
     (R, None, HOUR)),
    ("the newest heartbeat counts", [("a", task(beat=FRESH)), ("b", task(beat=STALE))], NOW, {}, (R, None, HOUR)),
    ("heartbeat older than the run", [], T + 60_000, {"heartbeat": sec(T - 1_000)}, (R, None, 60_000)),
    ("heartbeat at the cutoff", [START, SLEEPING], NOW, {"heartbeat": sec(NOW - 60_000)}, (R, None, HOUR)),
    ("heartbeats stopped", [START, SLEEPING], NOW, {"heartbeat": STALE}, failed(STALE * 1000)),
    ("heartbeats stopped, no tasks", [], NOW, {"heartbeat": sec(T)}, failed(T)),
    ("longer cutoff", [START, SLEEPING], NOW, {"heartbeat": STALE, "cutoff": 360}, (R, None, HOUR)),
    ("heartbeat old, task just begun", [("slow", task(began(NOW - 900)))], NOW, {"heartbeat": sec(T)},
     (R, None, HOUR)),
    ("heartbeat old, file just changed by another", [("slow", task(began(T), changed=NOW - 5))], NOW,
     {"heartbeat": sec(T)}, failed(T)),
    ("failed task, still beating", [START, FAILED], T + 30_000, {"heartbeat": sec(T + 25_000)},
     (R, None, 30_000)),
    ("failed task, two beats missed", [START, FAILED], T + 36_000, {"heartbeat": sec(T + 5_000)},
     failed(T + 5_002)),
    ("failed task, caught", [START, CAUGHT], T + 36_000, {"heartbeat": sec(T + 5_000)}, (R, None, 36_000)),
    ("failed task, no attempt left", [START, FAILED], T + 5_100, {"heartbeat": sec(T), **allow("boom", 1)},
     failed(T + 5_002)),
    ("failed task, one attempt left", [START, FAILED], T + 5_100, {"heartbeat": sec(T), **allow("boom", 2)},
     (R, None, 5_100)),
    ("failed task, sibling unfinished", [START, FAILED, SLEEPING], T + 36_000, {"heartbeat": sec(T)},
     failed(T + 5_002)),
    # 6: plain local mode
    ("local, just begun", [], SOON, {}, RUNNING_SOON),
    ("local, asleep for an hour", [START, SLEEPING], NOW, {}, (R, None, HOUR)),
    ("local, asleep for 23 hours", [START, SLEEPING], T + 23 * HOUR, {}, (R, None, 23 * HOUR)),
    ("local, silent for more than a day", [START, SLEEPING], T + 25 * HOUR, {}, failed(T + 4_000)),
    ("local, a file changed meanwhile", [("slow", task(began(T), changed=T + 20 * HOUR))], T + 25 * HOUR, {},
     (R, None, 25 * HOUR)),
    ("local, documented setting", [START, SLEEPING], NOW, {"local_cutoff": 600}, failed(T + 4_000)),
    ("local, waits for its first start", [START, WAITING], NOW, {}, (R, None, HOUR)),
    ("local, between two tasks", [PARAMETERS, START], T + 60_000, {}, (R, None, 60_000)),
    ("local, nothing unfinished for 5 minutes", [PARAMETERS, START], T + 400_000, {}, failed(T + 3_002)),
    ("local, a long task finished just now", [("start", task(ran(T, NOW - 99_000)))], NOW, {}, (R, None, HOUR)),
    ("local, nothing ever came", [], NOW, {}, failed(T)),
    ("local, failed a moment ago, may be retried", [START, FAILED], SOON, {}, RUNNING_SOON),
    ("local, failed and silent", [START, FAILED], LATER, {}, failed(T + 5_002)),
    ("local, failed and silent, sibling was killed", [START, FAILED, SLEEPING], LATER, {}, failed(T + 5_002)),
    ("local, failed, sibling still writes", [FAILED, ("slow", task(began(T), changed=LATER - 9_000))], LATER,
     {}, (R, None, LATER - T)),
    ("local, failed, no attempt left", [START, FAILED], SOON, allow("boom", 1), failed(T + 5_002)),
    ("local, failed, attempts left", [START, FAILED], SOON, allow("boom", 3), RUNNING_SOON),
    ("local, caught", [START, CAUGHT], SOON, allow("boom", 2), RUNNING_SOON),
    ("local, short setting is never exceeded", [PARAMETERS, START], T + 60_000, {"local_cutoff": 10},
     failed(T + 3_002)),
]  # fmt: skip


@pytest.mark.parametrize("name, tasks, now, keywords, expected", RUNS, ids=[row[0] for row in RUNS])
def test_runs(name, tasks, now, keywords, expected):
    assert run_status(T, summarize(tasks), now, **keywords) == expected
    assert run_status(T, summarize(tasks[::-1]), now, **keywords) == expected, "in any order"


def test_recorded_runs():
    """Real runs with the answers the real service gave."""
    end = task(
        {"started_at": 1795293559283, "ok": True, "ok_at": 1795293559385, "done_at": 1795293559505}
    )
    assert run_status(1795293548369, summarize([("end", end)]), NOW, heartbeat=1795293558) == (
        "completed", 1795293559385, 11016,
    )  # fmt: skip
    killed = task(began(1795293441489), created=1795293438542, beat=1795293470)
    assert run_status(1795293431746, summarize([("slow", killed)]), NOW, heartbeat=1795293471) == (
        "failed", 1795293471000, 39254,
    )  # fmt: skip


def test_end_step_with_another_name():
    finish = ("finish", END_OK[1])
    assert run_status(T, summarize([START, finish], "finish"), NOW).status == "completed"
    assert run_status(T, summarize([START, finish]), NOW).status == "failed"


def test_newest_attempt_ok_of_the_end_step_counts():
    both = task(ran(T + 8_000, T + 9_000, False), ran(T + 10_000, T + 11_000))
    assert run_status(T, summarize([("end", both)]), NOW) == (C, T + 11_000, 11_000)
    two_tasks = [("end", task(ran(T, T + 8_000))), ("end", task(ran(T, T + 9_000, False)))]
    assert run_status(T, summarize(two_tasks), NOW) == failed(T + 9_000)


def test_order_of_attempts_on_disk_does_not_matter():
    """Attempts are found in the order of file names, 10 before 2."""
    for name in ("end", "boom"):
        for fields in (
            (ran(T, T + 9, False), began(T + 20)),
            (began(T), {"done_at": T + 9}),
            (ran(T, T + 9), None),
        ):
            straight, turned = task(*fields), task(*fields)
            turned.attempts = dict(reversed(list(straight.attempts.items())))
            one, other = summarize([(name, straight)]), summarize([(name, turned)])
            for slot in one.__slots__:
                assert getattr(one, slot) == getattr(other, slot), slot


def test_end_step_begun_in_the_moment_of_its_failure_has_failed():
    facts = task(ran(T, T + 9_000, False), began(T + 9_000))
    assert run_status(T, summarize([("end", facts)]), SOON).status == F


@pytest.mark.parametrize(
    "tasks, settled",
    [([], False), ([END_OK], True), ([END_BAD], True), ([END_RETRIED], False), ([FAILED], False)],
)
def test_settled_runs_need_no_other_tasks(tasks, settled):
    assert summarize(tasks).settled is settled


def test_runs_never_end_before_they_began():
    assert run_status(T, summarize([("end", task(ran(T - 900, T - 500)))]), NOW) == (C, T, 0)
    assert run_status(T, summarize([]), T - 5_000, alive=True) == (R, None, 0)
    assert run_status(None, summarize([]), NOW, alive=True) == (R, None, None)
    assert run_status(T + 226, summarize([]), T + DAY, heartbeat=sec(T)) == (F, T + 226, 0)


DECORATORS = [
    ([], 1),
    ([{"name": "card", "attributes": {}}, {"name": "timeout"}], 1),
    ([{"name": "retry", "attributes": {"times": 2, "minutes_between_retries": "2"}}], 3),
    ([{"name": "retry", "attributes": {"times": "3"}}], 4),
    ([{"name": "retry", "attributes": {}}], 4),
    ([{"name": "retry", "attributes": {"times": 0}}], 1),
    ([{"name": "catch", "attributes": {"var": "x"}}], 4),
    ([{"name": "catch"}, {"name": "retry", "attributes": {"times": 1}}], 5),
    ([{"name": "retry", "attributes": {"times": 99}}], 6),
    ([{"name": "retry", "attributes": {"times": "often"}}], None),
    ([{"name": "company_retry"}], None),
]


@pytest.mark.parametrize("decorators, attempts", DECORATORS)
def test_allowed_attempts(decorators, attempts):
    assert allowed_attempts(decorators) == attempts


STEPS = [
    ("finished", [task(ran(T, T + 700)), task(ran(T, T + 900))], {}, 902),
    (R, [task(ran(T, T + 700)), task(began(T))], {"running": True}, HOUR),
    ("heartbeat later than the finish", [task(ran(T, T + 700), beat=sec(T + 3_000))], {}, 3_000),
    ("heartbeat only", [task(began(T), beat=sec(T + 9_000))], {}, 9_000),
    ("newest heartbeat", [task(beat=sec(T + 9_000)), task(beat=sec(T + 3_000))], {}, 9_000),
    (
        "one without hides no other",
        [task(began(T)), task(began(T), beat=sec(T + 9_000))],
        {},
        9_000,
    ),
    ("lost", [task({"started_at": T, "lost_at": T + 77})], {}, 77),
    ("_task_ok only", [task({"task_ok_at": T + 70})], {}, 70),
    ("nothing yet", [task()], {}, HOUR),
    ("no tasks", [], {}, HOUR),
    ("nothing, and old", [task()], {"old": 60}, None),
    ("finish before the step was created", [task(ran(T - 90, T - 50))], {}, 0),
]


@pytest.mark.parametrize("name, tasks, keywords, expected", STEPS, ids=[row[0] for row in STEPS])
def test_steps(name, tasks, keywords, expected):
    assert step_duration(T, tasks, NOW, **keywords) == expected


def test_step_of_unknown_age_has_no_duration():
    assert step_duration(None, [], NOW) is None


def test_nothing_is_ever_negative():
    """All combinations of a few odd times: no negative duration, no finish before the start."""
    times = (None, T - 5_000, T, NOW + 5_000)
    for start in times:
        for end in times:
            for beat in (None, sec(T - 9_000), sec(NOW + 9_000)):
                for lost in (None, T - 1):
                    fields = {"started_at": start, "done_at": end, "lost_at": lost}
                    facts = task(fields, created=T, beat=beat)
                    for alive in (None, True, False):
                        row = attempt_rows(facts, NOW, lambda n, alive=alive: alive)[0]
                        assert row.duration is None or row.duration >= 0
                        if None not in (row.started_at, row.finished_at):
                            assert row.finished_at >= row.started_at
                        run = run_status(
                            T, summarize([("end", facts)]), NOW, alive=alive, lost_at=lost
                        )
                        assert run.duration >= 0
                        assert (run.finished_at is None) == (run.status == mflocal.RUNNING)
