"""The contract of the one module: sections in order, each using only what stands above it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Iterator, Union

import pytest

pytestmark = pytest.mark.structural

REPO = Path(__file__).resolve().parent.parent
SOURCE = (REPO / "mflocal.py").read_text()
TREE = ast.parse(SOURCE)
HEADER = re.compile(r"^# ---- (\d+)\. (.+) ----$", re.M)
SECTIONS = [
    (int(m.group(1)), m.group(2), SOURCE.count("\n", 0, m.start()) + 1)
    for m in HEADER.finditer(SOURCE)
]
MOST_LINES = 14_500  # only ever made smaller
TITLES = [
    "Settings", "Records", "Store", "Liveness", "Status", "Query", "Reader", "HTTP", "WebSocket",
    "Router", "Rows", "Metadata API", "Live", "UI API", "Server", "Daemon", "CLI",
]  # fmt: skip


def section_of(line: int) -> int:
    """The number of the section that a line belongs to, 0 above the first."""
    return max((number for number, _, start in SECTIONS if start <= line), default=0)


def defined() -> dict[str, int]:
    """Every name that the module defines at its top level, and the section that does."""
    found: dict[str, int] = {}
    for node in TREE.body:
        names: list[str] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [
                n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)
            ]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        for name in names:
            found.setdefault(name, section_of(node.lineno))
    return found


def test_all_sections_are_there_in_order() -> None:
    assert [number for number, _, _ in SECTIONS] == list(range(1, len(TITLES) + 1))
    for (_, title, _), expected in zip(SECTIONS, TITLES):
        assert title.lower().startswith(expected.lower()), title


Scope = Union[ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda]


def bound_in(scope: Scope) -> set[str]:
    """The names that a function binds itself: parameters, assignments, nested functions, imports."""
    arguments = scope.args
    names = {a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
    names |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None}
    for node in ast.walk(scope):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node is not scope:
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
    return names


def uses(node: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[tuple[str, int]]:
    """(name, line) of every use of a name of the module below a node."""
    if isinstance(node, ast.Name) and node.id not in local:
        yield node.id, node.lineno
    inner = (
        local | bound_in(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        else local
    )
    for child in ast.iter_child_nodes(node):
        yield from uses(child, frozenset(inner))


def test_a_section_uses_only_sections_above_it() -> None:
    where = defined()
    wrong = {
        f"section {section_of(line)} line {line} uses {name} of section {where[name]}"
        for name, line in uses(TREE)
        if name in where and where[name] > section_of(line)
    }
    assert not wrong


def test_private_names_stay_in_their_section() -> None:
    where = defined()
    wrong = {
        f"line {line} uses {name} of section {where[name]}"
        for name, line in uses(TREE)
        if name.startswith("_") and name in where and where[name] != section_of(line)
    }
    assert not wrong


def test_no_name_is_defined_twice() -> None:
    names = [
        n.name
        for n in TREE.body
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    ]
    assert sorted(names) == sorted(set(names))


def test_nothing_is_imported_but_the_standard_library() -> None:
    known = getattr(sys, "stdlib_module_names", None)
    if known is None:
        pytest.skip("this Python does not list its standard library")
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= known, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and (node.module or "").partition(".")[0] in known, node.lineno


def test_commands_do_not_import_what_only_the_daemon_needs() -> None:
    heavy = "{'asyncio', 'ssl', 'http', 'subprocess', 'inspect', 'tempfile', 'urllib'}"
    code = (
        f"import sys; had = set(sys.modules); import mflocal\n"
        f"print(*sorted({heavy} & (set(sys.modules) - had)))"
    )
    # Isolated: what stands in site-packages (*.pth) may import what it likes.
    code = f"import sys; sys.path.insert(0, {str(REPO)!r})\n{code}"
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_functions_are_short() -> None:
    wrong = []
    for node in ast.walk(TREE):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > 60:
                wrong.append(f"{node.name} has {length} lines")
    assert not wrong


def test_the_module_is_not_too_long() -> None:
    assert SOURCE.count("\n") <= MOST_LINES


def test_the_top_level_has_nothing_else() -> None:
    allowed = {
        "pyproject.toml", "README.md", "mflocal.py", "build.py", "tests", "docs", "dist", "LICENSE", "CHANGELOG.md",
    }  # fmt: skip
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    assert {top for top in tops if not top.startswith(".")} <= allowed


CLOCKS = {"monotonic", "perf_counter", "time"}
GENEROUS = 60  # s: a test may give up after that; anything shorter fails on a busy machine


def elapsed(node: ast.AST, names: frozenset[str] = frozenset()) -> bool:
    """Whether an expression is a time that has passed: `time.monotonic() - began`, or a name for that."""
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("abs", "max", "min", "share", "median") and any(
            elapsed(argument, names) for argument in node.args
        )
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Sub)
        and any(
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr in CLOCKS
            and isinstance(call.func.value, ast.Name)
            and call.func.value.id == "time"
            for call in ast.walk(node)
        )
    )


def short_limits(tree: ast.AST) -> Iterator[int]:
    """Lines that ask for a time below a number of seconds."""
    names = frozenset(
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and elapsed(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    )
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        for left, operator, right in zip(sides, node.ops, sides[1:]):
            if isinstance(operator, (ast.Gt, ast.GtE)):
                left, right = right, left
            elif not isinstance(operator, (ast.Lt, ast.LtE)):
                continue
            if elapsed(left, names) and isinstance(right, ast.Constant):
                if isinstance(right.value, (int, float)) and right.value < GENEROUS:
                    yield node.lineno


def test_no_test_depends_on_how_fast_the_machine_is() -> None:
    """What is about speed is compared within the same run, or measured by bench.py."""
    found = [
        f"{path.name}:{line}"
        for path in sorted((REPO / "tests").glob("*.py"))
        if path.name != "bench.py"
        for line in short_limits(ast.parse(path.read_text()))
    ]
    assert found == []
    wrong = ast.parse("took = time.monotonic() - began\nassert 1 < took < 2\nassert 5 >= took")
    assert list(short_limits(wrong)) == [2, 3]


def test_the_tests_that_the_docs_name_are_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)", (REPO / "docs/threats.md").read_text())
    assert len(named) > 100
    gone = {
        f"{file}::{test}"
        for file, test in named
        if not re.search(rf"def {test}\(", (REPO / "tests" / file).read_text())
    }
    assert not gone
