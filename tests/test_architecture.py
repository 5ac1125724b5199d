"""The house rules that a machine can check: who imports whom, file sizes, lint, types."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("proxy", "replay", "analysis", "traces")
INNER = (*ROOMS, "jobs", "cli")
# What each part of the house may import of the others; jobs and cli join rooms.
MAY_IMPORT = {
    "traces": set(),
    "proxy": {"traces"},
    "replay": {"traces"},
    "analysis": {"traces"},
    "jobs": set(ROOMS),
    "cli": {*ROOMS, "jobs"},
    "": {*ROOMS, "cli", "jobs"},  # src/tokentape/*.py
}
# Libraries that belong to one part; the tape reader may hand its files to DuckDB.
BELONGS_TO = {
    "mitmproxy": ("proxy/",),
    "aiohttp": ("replay/",),
    "duckdb": ("analysis/", "traces/reader.py"),
    "typer": ("cli/",),
}
LONGEST_FILE_LINES = 500
TOOLS_TIMEOUT_S = 280  # a first run has no cache


def source_files() -> list[tuple[str, Path]]:
    """(path inside the package, file) of every source file, each once."""
    found = []
    for base in [*(ROOT / room for room in ROOMS), ROOT / "src" / "tokentape"]:
        top = base.name if base.name in ROOMS else ""
        for path in sorted(base.rglob("*.py")):
            inside = path.relative_to(base)
            if top or inside.parts[0] not in ROOMS:
                found.append(((Path(top) / inside).as_posix(), path))
    return found


SOURCES = source_files()


def part_of(inside: str) -> str:
    """The room (or jobs, cli) that a file lies in; "" for the package itself."""
    first = inside.split("/", maxsplit=1)[0]
    return first if first in INNER else ""


def imports(tree: ast.AST, *, lazy: bool = True) -> Iterator[str]:
    """Dotted names that a file imports; without `lazy` only those that run at import time."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif lazy or not is_late(node):
            yield from imports(node, lazy=lazy)


def is_late(node: ast.AST) -> bool:
    """True for what does not run when its file is imported."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def parts_imported(tree: ast.AST, *, lazy: bool = True) -> set[str]:
    """The parts of tokentape that a file imports."""
    names = (name.split(".") for name in imports(tree, lazy=lazy))
    return {n[1] for n in names if n[0] == "tokentape" and len(n) > 1 and n[1] in INNER}


def parsed() -> Iterator[tuple[str, ast.Module]]:
    for inside, path in SOURCES:
        yield inside, ast.parse(path.read_text(encoding="utf-8"))


def test_every_room_is_looked_at() -> None:
    assert {part_of(inside) for inside, _ in SOURCES} == {*INNER, ""}


def test_rooms_import_only_what_lies_below_them() -> None:
    wrong = {
        inside: extra
        for inside, tree in parsed()
        if (extra := parts_imported(tree) - MAY_IMPORT[part_of(inside)] - {part_of(inside)})
    }
    assert wrong == {}


def test_the_command_line_and_the_package_import_rooms_only_when_needed() -> None:
    wrong = {}
    for inside, tree in parsed():
        if part_of(inside) in {"cli", ""}:
            names = {n for n in imports(tree, lazy=False) if n.startswith("tokentape.")}
            rooms = {n for n in names if n.split(".")[1] in {*ROOMS, "jobs"}}
            # traces.errors holds the exceptions that cli catches, and imports nothing
            if rooms := {n for n in rooms if not n.startswith("tokentape.traces.errors")}:
                wrong[inside] = rooms
    assert wrong == {}


def test_a_library_is_imported_only_in_the_room_it_belongs_to() -> None:
    wrong = [
        f"{inside} imports {library}"
        for inside, tree in parsed()
        for library in {name.split(".")[0] for name in imports(tree)} & BELONGS_TO.keys()
        if not inside.startswith(BELONGS_TO[library])
    ]
    assert wrong == []


def test_no_import_goes_around_the_package() -> None:
    wrong = [
        f"{inside} imports {name}"
        for inside, tree in parsed()
        for name in imports(tree)
        if name.startswith(".") or name.split(".")[0] in ROOMS
    ]
    assert wrong == []


def test_every_folder_says_what_it_is_for() -> None:
    silent = [
        inside
        for inside, tree in parsed()
        if inside.endswith("__init__.py")
        and ((doc := ast.get_docstring(tree)) is None or "To be written" in doc)
    ]
    assert silent == []


def test_every_source_file_says_what_it_is() -> None:
    assert [inside for inside, tree in parsed() if not ast.get_docstring(tree)] == []


def test_every_source_folder_is_a_package() -> None:
    folders = {path.parent for _, path in SOURCES}
    assert [f for f in folders if not (f / "__init__.py").exists()] == []


def test_no_source_file_is_too_long_to_read() -> None:
    lengths = {inside: len(path.read_text("utf-8").splitlines()) for inside, path in SOURCES}
    assert {i: n for i, n in lengths.items() if n > LONGEST_FILE_LINES} == {}


def run_tool(*command: str) -> None:
    """Run a checker of this environment; fails with all that it prints."""
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if result.returncode:
        pytest.fail(result.stdout + result.stderr, pytrace=False)


def test_ruff_finds_nothing() -> None:
    run_tool("ruff", "check", "--quiet", "--output-format", "concise")


def test_every_file_is_formatted() -> None:
    run_tool("ruff", "format", "--check", "--quiet", "--output-format", "concise")


@pytest.mark.timeout(TOOLS_TIMEOUT_S)
def test_mypy_strict_finds_nothing() -> None:
    run_tool("mypy", "--no-error-summary", "--num-workers", "2")
